"""Group filtering: what is rejected, when a step is decided, and that neither time nor layout has a say in it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.data.retirement import RetirementRule
from megatron_ktr.data.source import DatasetSource
from megatron_ktr.distributed.agreement import gather_objects
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.filtering import Decision, FilterRule, Needs, Verdict, decide, spread_evenly, values_of
from megatron_ktr.rollout.refill import FilteredSource, answered_with_spares
from megatron_ktr.rollout.second_prompt import Question
from megatron_ktr.rollout.source import Sampler
from megatron_ktr.types import Prompt, Rollout, RolloutGroup
from tests.support.patience import PATIENCE_SECONDS
from tests.support.together import replicas

# --- rules by hand --------------------------------------------------------------------------------------------


def group(*rewards: float, **parts: list[float]) -> RolloutGroup:
    """A group whose responses have these whole rewards, or these parts."""
    return weighted({}, **(parts or {"reward": list(rewards)}))


def weighted(weights: dict[str, float], **parts: list[float]) -> RolloutGroup:
    rows = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    rollouts = tuple(Rollout((1, 2), rewards=row, reward_weights=weights) for row in rows)
    return RolloutGroup(Prompt("p", (1,), draw_number=5), rollouts)


PARTS = {"accuracy": [1.0, 1.0, 1.0, 1.0], "format": [1.0, 1.0, 0.0, 1.0]}


@pytest.mark.parametrize(
    ("rule", "made", "reason"),
    [
        (FilterRule(), group(1, 1, 1, 1), ""),
        (FilterRule("equal"), group(1, 1, 1, 1), "equal"),
        (FilterRule("equal"), group(0, 0, 0, 0.25), ""),
        (FilterRule("equal"), group(**PARTS), ""),
        (FilterRule("equal", metric="accuracy"), group(**PARTS), "equal"),
        # Spreads 0.25 and 0.5 against a least spread of 0.5, which is enough itself.
        (FilterRule("equal", min_spread=0.5), group(0, 0.25, 0.25, 0.125), "spread"),
        (FilterRule("equal", min_spread=0.5), group(0, 0.5, 0.25, 0.125), ""),
        # Means 0.25 and 0.75 of four: strictly between the bounds.
        (FilterRule("range", low=0.25, high=0.9), group(0, 0, 0, 1), "range"),
        (FilterRule("range", low=0.24, high=0.75), group(0, 1, 1, 1), "range"),
        (FilterRule("range", low=0.24, high=0.76), group(0, 1, 1, 1), ""),
        # Equal fractional rewards are inside the range and teach nothing.
        (FilterRule("range", low=0.1, high=0.9), group(0.5, 0.5, 0.5, 0.5), "equal"),
        # A part that does not apply to the question rejects nothing.
        (FilterRule("range", metric="accuracy", low=0.1, high=0.9, min_spread=0.7), group(0.2, 0.8), ""),
        # Weights 2 and -1: 2 x 1 - 1 and 2 x 0.5 - 0 are both 1.
        (FilterRule("equal"), weighted({"accuracy": 2.0, "format": -1.0}, accuracy=[1, 0.5], format=[1, 0]), "equal"),
    ],
)
def test_reasons_by_hand(rule: FilterRule, made: RolloutGroup, reason: str) -> None:
    assert rule.reason(made) == reason


def verdicts(text: str) -> list[Verdict]:
    """One verdict a letter: g is good, e and r are rejected; a dot is a draw that could not be used."""
    reasons = {"g": "", "e": "equal", "r": "range"}
    return [
        Verdict(place, 100 + place, reasons[letter], num_tokens=10, num_responses=2, reward_sum=1.0, accuracy=0.5)
        for place, letter in enumerate(text)
        if letter != "."
    ]


@pytest.mark.parametrize(
    ("window", "num_rounds", "needs", "num_more", "kept", "num_consumed", "is_short"),
    [
        ("gggg", 0, Needs(4), 0, [0, 1, 2, 3], 4, False),
        ("gegrggg", 1, Needs(4), 0, [0, 2, 4, 5], 6, False),  # place 6 is drawn again by the next step
        ("g.ggg", 0, Needs(4), 0, [0, 2, 3, 4], 5, False),
        ("gegr", 0, Needs(4), 4, [], 0, False),  # 2 missing at a share of one half
        ("ggge", 0, Needs(4), 2, [], 0, False),  # 1 missing at three quarters: 1.33
        ("eeee", 0, Needs(4), 4, [], 0, False),
        ("geeeeeee", 1, Needs(4), 4, [], 0, False),  # 3 / (1/8) = 24, at most 4
        ("geeegeee", 3, Needs(4), 0, [0, 4], 8, True),
        ("geeeeeee", 3, Needs(4, least=2), 0, [0, 1], 8, True),  # two replicas: one equal group fills up
        ("eeeegeee", 3, Needs(4, least=2, multiple=4), 0, [0, 1, 2, 4], 8, True),
        ("eeee", 3, Needs(4, least=2), 0, [0, 1], 4, True),
    ],
)
def test_decisions_by_hand(window, num_rounds, needs, num_more, kept, num_consumed, is_short) -> None:
    rule = FilterRule("equal", max_rounds=3)
    decision = decide(verdicts(window), num_window=len(window), num_rounds=num_rounds, needs=needs, rule=rule)
    assert decision.num_more == num_more
    assert [verdict.place for verdict in decision.kept] == kept
    assert (decision.num_consumed, decision.is_short) == (num_consumed, is_short)


def test_metrics_by_hand() -> None:
    """Window g e g r g g, 3 wanted: consumed are the first five; a spare beyond the window was answered in vain."""
    found = verdicts("gegrgg")
    decision = decide(found, num_window=6, num_rounds=1, needs=Needs(3), rule=FilterRule("range"))
    spare = verdicts("......g")
    assert values_of(decision, found, num_rounds=1, num_first=3, spares=spare) == {
        "filter/rejected": 2,
        "filter/rejected_equal": 1,
        "filter/rejected_range": 1,
        "filter/rejected_spread": 0,
        "filter/kept": 3,
        "filter/refilled": 1,
        "filter/filled_up": 0,
        "filter/surplus": 2,
        "filter/rounds": 1,
        "filter/is_short": 0,
        "filter/tokens_rejected": 20,
        "filter/tokens_surplus": 20,
        "filter/reward_mean": 0.5,
    }
    assert isinstance(decision, Decision)


def test_groups_are_spread_over_all_replicas_and_few_move() -> None:
    for numbers in itertools.product(range(4), repeat=3):
        parts = spread_evenly(numbers)
        assert sorted(itertools.chain(*parts)) == list(range(sum(numbers)))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        starts = [sum(numbers[:replica]) for replica in range(3)]
        stayed = sum(
            start <= index < start + number
            for part, start, number in zip(parts, starts, numbers, strict=True)
            for index in part
        )
        assert stayed == sum(min(size, number) for size, number in zip(sizes, numbers, strict=True))


# --- spares ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_spares_depend_on_verdicts_and_not_on_who_answers_first(seed: int) -> None:
    """Rejected are places 1, 3, 4 and 5. The first four have two of them, spare 4 and 5 are rejected too, so that
    spares 4, 5, 6 and 7 are asked and 8 is not."""
    rejected = {1, 3, 4, 5}
    shuffled = random.Random(seed)
    waiting: list[tuple[int, threading.Event]] = []
    lock = threading.Condition()
    asked: set[int] = set()

    def made(place: int) -> RolloutGroup:
        return RolloutGroup(Prompt(f"{place}", (1,), draw_number=place), ())

    def answer(question: Question) -> RolloutGroup:
        gate = threading.Event()
        with lock:
            asked.add(question.group.prompt.draw_number)
            waiting.append((question.group.prompt.draw_number, gate))
            lock.notify_all()
        assert gate.wait(PATIENCE_SECONDS)
        return question.group

    def run() -> Mapping[int, RolloutGroup]:
        return answered_with_spares(
            {place: Question(made(place)) for place in range(4)},
            spares=[(place, made(place)) for place in range(4, 9)],
            answer=answer,
            ask=Question,
            is_rejected=lambda one: one.prompt.draw_number in rejected,
        )

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run)
        while not result.done():
            with lock:
                # The end of the last answer wakes nobody, so it is looked for from time to time.
                lock.wait_for(lambda: bool(waiting), 0.02)
                gates = [waiting.pop(shuffled.randrange(len(waiting)))[1]] if waiting else []
            for gate in gates:
                gate.set()
        found = result.result()
    assert sorted(found) == sorted(asked) == list(range(8))


# --- a source -------------------------------------------------------------------------------------------------

G = 4
KINDS = ("easy", "hard", "mixed")


def accuracy(response: str, record: Mapping[str, Any]) -> float:
    """Of every three records one is always right, one always wrong, and one right in every second response."""
    kind = record.get("kind") or KINDS[int(record["problem_id"][1:]) % 3]
    return {"easy": 1.0, "hard": 0.0, "mixed": float(int(response.rsplit("#", 1)[1]) % 2)}[kind]


class MadeRewarder:
    """Gives the accuracies above, without the processes that rewards of one's own run in."""

    num_threads = 1

    def reward(self, groups, *, names):
        return [
            dataclasses.replace(
                one,
                rollouts=tuple(
                    dataclasses.replace(rollout, rewards={"accuracy": accuracy(rollout.text, one.prompt.record)})
                    for rollout in one.rollouts
                ),
            )
            for one in groups
        ]

    def take_counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing to close."""


class MadeEngine(RolloutEngine):
    """Says who asked, in which step and of which weights. Takes its time in an order of its own."""

    def __init__(self, *, world: Any = None, takes_more: bool = False, seed: int = 0) -> None:
        self.version = 0
        self.world = world
        self.is_collective = world is not None
        self.takes_more = takes_more
        self.num_calls = 0
        self.steps_asked: set[int] = set()
        self._order = random.Random(seed)

    def load_weights(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for _ in named_tensors:
            pass
        self.version += 1

    def stream(self, prompts, *, step=0, sampling=None, counts=None):
        self.num_calls += 1
        if self.world is not None:  # ranks that call it more often than others would wait here for ever
            assert len(set(gather_objects(self.num_calls, group=self.world))) == 1
        places = list(range(len(prompts)))
        self._order.shuffle(places)
        for place in places:
            self.steps_asked.add(step)
            text = f"{prompts[place].identity} of weights {self.version} in step {step} #"
            rollouts = tuple(Rollout((step, self.version, 3), text=f"{text}{sample}") for sample in range(G))
            yield place, RolloutGroup(prompts[place], rollouts)


Step = tuple[list[tuple[int, list[str]]], dict[str, float]]
"""The groups kept on this replica as (draw number, texts), and the metrics of the step."""


def made_source(ranks: Any, *, engine: RolloutEngine | None, **options: Any) -> FilteredSource:
    data_options = {"rule": None, "numbers": (30,), "left_out": (4,), "unusable": (7,), **options.pop("data", {})}
    local = None
    if ranks.is_source:
        local = DatasetSource(replicas(ranks.data_size, **data_options)[ranks.data_rank])
    has_sampler = engine is not None and (ranks.is_source or engine.is_collective)
    rewarder: Any = MadeRewarder()
    sampler = Sampler(engine, rewarder=rewarder) if has_sampler and engine is not None else None
    rule = options.pop("rule", FilterRule("equal", max_rounds=4))
    return FilteredSource(local, ranks=ranks, sampler=sampler, rule=rule, **options)


def run_steps(source: FilteredSource, *, wanted: int, steps: range, save_after: int = 0) -> tuple[list[Step], Any]:
    """The steps as the trainer asks for them, and the state after ``save_after``."""
    found, state = [], None
    for step in steps:
        if source.pending_step != step:
            source.load_weights(iter(()))
            source.begin(wanted // source._ranks.data_size, step=step)
        groups = source.finish()
        assert all(one.prompt.token_ids == (1, 2) for one in groups), "as they were drawn, not as the engine saw them"
        kept = [(one.prompt.draw_number, [rollout.text for rollout in one.rollouts]) for one in groups]
        found.append((kept, dict(source.step_values)))
        if source.lag and step < steps[-1]:
            source.load_weights(iter(()))
            source.begin(wanted // source._ranks.data_size, step=step + 1)
        if step == save_after:
            state = json.loads(json.dumps(gather_objects(source.state_dict(), group=source._ranks.data)))
    return found, state


def filtered(context, *, layouts: dict[str, dict[str, Any]], tensor: int = 1) -> dict[str, Any]:
    """The steps of a source for each of ``layouts``; where it says ``save_after``, those of a resumed one too."""
    ranks = context.init(ParallelSizes(tensor=tensor))
    results = {}
    for name, given in layouts.items():
        options = dict(given)
        save_after, kind = options.pop("save_after", 0), options.pop("engine", "plain")
        seed = options.pop("seed", 0)

        def engine(kind: str = kind, seed: int = seed) -> MadeEngine:
            world = ranks.world if kind == "collective" else None
            return MadeEngine(world=world, takes_more=kind == "server", seed=seed)

        used = engine()
        source = made_source(ranks, engine=used, **options)
        steps, state = run_steps(source, wanted=4, steps=range(1, 6), save_after=save_after)
        final = source.state_dict()
        source.close()
        results[name] = {"steps": steps, "state": final, "saved": state, "calls": used.num_calls}
        if save_after:
            again = engine()
            again.version = save_after  # as many updates as the run had
            resumed = made_source(ranks, engine=again, **options)
            resumed.load_state_dict(reshard_states(state, rank=ranks.data_rank, size=ranks.data_size))
            first = run_steps(resumed, wanted=4, steps=range(save_after + 1, 6))
            results[name] |= {"resumed": first[0], "resumed state": resumed.state_dict()}
            results[name]["asked after resume"] = sorted(again.steps_asked)
            resumed.close()
    return results


def joined(found: list[dict[str, Any]], name: str, what: str = "steps") -> list[Step]:
    """The steps over all replicas: kept groups in the order of draws, and the metrics, which must be the same."""
    of_replicas = [one[name][what] for one in found]
    steps = []
    for parts in zip(*of_replicas, strict=True):
        assert all(values == parts[0][1] for _, values in parts)
        steps.append((sorted(itertools.chain(*(kept for kept, _ in parts))), parts[0][1]))
    return steps


RETIRE = {"data": {"rule": RetirementRule(0.9, num_epochs=1, decay=0.5), "numbers": (20, 7)}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another order": {"seed": 7},
    "server": {"engine": "server"},
    "server in another order": {"engine": "server", "seed": 9},
    "collective": {"engine": "collective"},
    "lag": {"lag": 1, "save_after": 2},
    "lag on servers": {"lag": 1, "engine": "server", "save_after": 3},
    "saved": {"save_after": 3},
    "retiring": {**RETIRE, "save_after": 3},
    "retiring alone": {**RETIRE, "rule": FilterRule()},
    "retiring with lag": {**RETIRE, "lag": 1, "save_after": 2},
}


@pytest.fixture(scope="module")
def runs(ranks) -> dict[int, list[dict[str, Any]]]:
    return {size: ranks(filtered, world_size=size, layouts=LAYOUTS) for size in (1, 2)}


def is_mixed(text: str) -> bool:
    return int(text.split(" a")[1].split(" ")[0]) % 3 == 2


@pytest.mark.parametrize("size", [1, 2])
def test_the_first_good_groups_are_kept_whoever_answers_first(runs, size: int) -> None:
    expected = joined(runs[size], "plain")
    assert all(len(kept) == 4 for kept, _ in expected)
    numbers = [number for kept, _ in expected for number, _ in kept]
    assert numbers == sorted(set(numbers)), "in the order of draws, each once"
    assert all(is_mixed(texts[0]) for kept, _ in expected for _, texts in kept)
    for name in ("another order", "server", "server in another order", "collective"):
        found = joined(runs[size], name)
        assert [kept for kept, _ in found] == [kept for kept, _ in expected], name
        for (_, values), (_, wanted) in zip(found, expected, strict=True):
            early = ("filter/surplus", "filter/tokens_surplus")
            assert {k: v for k, v in values.items() if k not in early} == {
                k: v for k, v in wanted.items() if k not in early
            }
    assert joined(runs[size], "server") == joined(runs[size], "server in another order")
    # Two replicas with unequal needs hold as many groups each, and no more was asked than the bound allows.
    for one in runs[size]:
        assert all(len(kept) == 4 // size for kept, _ in one["plain"]["steps"])
        assert one["collective"]["calls"] <= 5 * 5


def test_one_and_two_replicas_keep_count_and_retire_the_same(runs) -> None:
    for name in ("plain", "collective", "lag", "retiring", "retiring alone", "retiring with lag"):
        assert joined(runs[1], name) == joined(runs[2], name), name
        for what in ("cursor", "retirement", "passed_over", "source_epochs"):
            assert runs[1][0][name]["state"].get(what) == runs[2][0][name]["state"].get(what), (name, what)
    assert joined(runs[1], "retiring")[-1][1]["retirement/passed_over"] > 0


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["saved", "lag", "lag on servers", "retiring", "retiring with lag"])
def test_a_filtered_step_resumes_exactly(runs, size: int, name: str) -> None:
    """With a lag the next step has begun at the save: all its groups, the rejected ones too, are found again and not
    sampled anew, as their weights are gone. The texts say which weights answered the others."""
    whole, resumed = joined(runs[size], name), joined(runs[size], name, "resumed")
    assert resumed == whole[-len(resumed) :] and len(resumed) >= 2
    first = LAYOUTS[name]["save_after"] + 1
    for one in runs[size]:
        assert one[name]["resumed state"] == one[name]["state"]
        assert one[name]["asked after resume"] == list(range(first + LAYOUTS[name].get("lag", 0), 6))


def test_a_saved_step_goes_on_in_another_number_of_replicas(ranks, runs) -> None:
    states = [one["retiring with lag"]["saved"] for one in runs[2]][0]
    ((found, final),) = ranks(continue_alone, world_size=1, states=states)
    assert found == joined(runs[2], "retiring with lag")[2:]
    assert final["retirement"] == runs[2][0]["retiring with lag"]["state"]["retirement"]


def continue_alone(context, *, states: list[dict[str, Any]]) -> tuple[list[Step], Any]:
    ranks = context.init(ParallelSizes())
    engine = MadeEngine()
    engine.version = 2
    source = made_source(ranks, engine=engine, lag=1, **RETIRE)
    source.load_state_dict(reshard_states(states, rank=0, size=1))
    found, _ = run_steps(source, wanted=4, steps=range(3, 6))
    state = source.state_dict()
    source.close()
    return [(sorted(kept), values) for kept, values in found], state


# --- ends -----------------------------------------------------------------------------------------------------


def poor(context, *, kind: str) -> list[Step]:
    """Every group is equal, or a single one is good: 4 wanted of 6 records in all."""
    ranks = context.init(ParallelSizes(tensor=2 if context.world_size == 4 else 1))
    numbers = {"all equal": (1,), "one good": (3,)}[kind]
    engine = MadeEngine(world=ranks.world)

    def prepare(prompts: list[Prompt]) -> list[Prompt]:
        assert len(set(gather_objects(len(prompts), group=ranks.model))) == 1, "made by all ranks of a replica together"
        return [dataclasses.replace(prompt, token_ids=(1, 2, 3)) for prompt in prompts]

    source = made_source(
        ranks,
        engine=engine,
        prepare=prepare,
        rule=FilterRule("equal", max_rounds=2),
        data={"numbers": numbers, "left_out": (), "unusable": ()} | ({"shuffle": False} if kind == "one good" else {}),
    )
    steps, _ = run_steps(source, wanted=4, steps=range(1, 3))
    source.close()
    return steps


def test_if_all_groups_are_equal_the_step_goes_on_with_one_for_each_replica(ranks) -> None:
    """Four ranks, two replicas of two: all of them keep the calls in step."""
    found = ranks(poor, world_size=4, kind="all equal")
    for of_replica in (found[:2], found[2:]):
        assert of_replica[0] == of_replica[1], "both ranks of a replica"
        for kept, values in of_replica[0]:
            assert len(kept) == 1
            assert (values["filter/rounds"], values["filter/rejected"], values["filter/filled_up"]) == (2, 12, 2)
            assert values["filter/is_short"] == 1 and values["filter/tokens_rejected"] == 10 * G * 3
    assert [kept[0][0] for kept, _ in found[0]] == [0, 12] and [kept[0][0] for kept, _ in found[2]] == [1, 13]


def test_a_data_set_smaller_than_a_step_goes_round_and_ends(ranks) -> None:
    """Records easy, hard, mixed in this order: the good draws are 2, 5, 8 and 11."""
    (found,) = ranks(poor, world_size=1, kind="one good")
    assert [[number for number, _ in kept] for kept, _ in found] == [[2, 5, 8, 11], [14, 17, 20, 23]]
