"""Mixtures: exact shares; an order that follows from seed and place alone, and resumes with any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_ktr.config import config_from_values, load_config
from megatron_ktr.config.checks import check
from megatron_ktr.config.data_sources import DataSource, draws_of_weights, parse_data_path
from megatron_ktr.config.load import resolved_text
from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.mixture import WINDOW, MixtureOrder, RecordSource
from megatron_ktr.data.order import EpochOrder
from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.questions import draws_of
from megatron_ktr.types import Prompt

# --- the option -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jsonl", "a.jsonl"),
        ("d:\\a.jsonl", "d:\\a.jsonl"),
        ("a:b/q.json:x1", "a:b/q.json:x1"),
        (["a.jsonl"], "a.jsonl"),
        ("c:0/a:1,b:2", (DataSource("c:0/a", weight=1.0), DataSource("b", weight=2.0))),
        ("a.jsonl:0.7, b.jsonl:.3", (DataSource("a.jsonl", weight=0.7), DataSource("b.jsonl", weight=0.3))),
        ("a.jsonl,b.jsonl", (DataSource("a.jsonl"), DataSource("b.jsonl"))),
        (["a,b.jsonl"], (DataSource("a,b.jsonl"),)),
        ({"path": "q:1"}, (DataSource("q:1"),)),
        (
            ["a.jsonl", {"path": "b:2", "epochs": "1e-1", "name": "bees", "reward_functions": "format, accuracy"}],
            (
                DataSource("a.jsonl"),
                DataSource("b:2", epochs=0.1, name="bees", reward_functions=("format", "accuracy")),
            ),
        ),
    ],
)
def test_a_mixture_is_written_as_text_or_in_a_run_file_and_saved_as_it_was(
    tmp_path: Path, value: Any, expected: Any
) -> None:
    """The last colon alone begins a weight, where a number follows."""
    assert parse_data_path(value) == expected
    file, base = tmp_path / "run.yaml", {"model": "m", "engine": "hf", "length_bonus": 0}
    file.write_text(yaml.safe_dump({**base, "data_path": value}))
    config = load_config(["--config", str(file)])
    assert config.data.data_path == expected
    file.write_text(resolved_text(config))
    assert load_config(["--config", str(file)]) == config


def test_the_flag_may_be_repeated() -> None:
    flags = ["--model", "m", "--engine", "hf", "--data-path", "a.jsonl:2", "--data-path", "b.jsonl:1"]
    assert [source.weight for source in load_config(flags).data.sources] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("a.jsonl:0.5", "a.jsonl is alone"),
        ("a.jsonl:1,b.jsonl", "b.jsonl has no weight"),
        ("a.jsonl:0,b.jsonl:1", "weight of a file to be a number > 0"),
        ("a.jsonl:1,,b.jsonl:1", "one of them is empty"),
        ("x/a.jsonl:1,y/a.jsonl:1", "two files are called 'a'"),
        ("a:0.1234567,b:0.8765433", "come out even only after 10000000 prompts"),
        ([{"path": "a", "weight": 1}, {"path": "b", "epochs": 1}], "weight and epochs cannot be mixed"),
        ([{"path": "a", "wieght": 1}], "unknown key 'wieght'"),
        ([{"weight": 1}], "expected the key path"),
        ([{"path": "a", "weight": True}], "weight of a file to be a number"),
        ([{"path": "a", "name": "two\nlines"}], "name of a file to be a short line"),
        ([{"path": "a", "reward_functions": [1]}], "reward_functions of a file to be text"),
        ([["a"]], "expected a path, or a mapping"),
        ([], "expected the path of a file"),
        ("a\0b", "path of a file to be text"),
    ],
)
def test_a_mixture_that_cannot_be_honoured_is_refused(value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_data_path(value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_epochs": 1.0}, "files with weights have no common epoch"),
        ({"objective": "sft"}, "a names reward_functions, which --objective sft does not read"),
        ({}, "add accuracy to the reward_functions of a"),
    ],
)
def test_options_that_a_mixture_contradicts_are_refused(changes: dict[str, Any], told: str) -> None:
    sources = (DataSource("a.jsonl", weight=1.0, reward_functions=("format",)), DataSource("b.jsonl", weight=2.0))
    with pytest.raises(UserError, match=told):
        check(config_from_values({"model": "m", "engine": "hf", "data_path": sources, **changes}))


# --- the order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [(7, 3), (1, 1), (1, 999), (500, 300, 201), (5, 5, 1000)])
def test_every_period_has_the_exact_shares_and_every_beginning_nearly(draws: tuple[int, ...]) -> None:
    period = sum(draws)
    order = MixtureOrder(draws, [11] * len(draws), seed=3, shuffle=True)
    length = period * max(2, 3000 // period)
    sources = np.array([order.draw_of(element)[0] for element in range(length)])
    for start in range(0, length, period):
        assert tuple(np.bincount(sources[start : start + period], minlength=len(draws))) == draws
    shares = np.array(draws) / period
    counts = np.stack([np.cumsum(sources == source) for source in range(len(draws))], axis=1)
    behind = np.abs(counts - np.arange(1, length + 1)[:, None] * shares)
    # Within a window the places are permuted: at its ends the shares are those of the even spread, off by one for each
    # other source; inside it a source can be ahead by at most all that the window has of it.
    assert behind.max() <= WINDOW * max(shares.min(), (shares * (1 - shares)).max()) + len(draws)
    ends = [place - 1 for place in range(1, length + 1) if place % period % WINDOW == 0]
    assert behind[ends].max() <= len(draws)


def test_each_source_is_drawn_in_its_own_order_without_gap_or_repetition() -> None:
    order = MixtureOrder((7, 3), (5, 8), seed=1, shuffle=True)
    places = [order.place_of(element) for element in range(200)]
    for source, number in enumerate((5, 8)):
        drawn = [place.record for place in places if place.source == source]
        epochs = [drawn[start : start + number] for start in range(0, len(drawn) - number, number)]
        assert len(epochs) > 5 and all(sorted(epoch) == list(range(number)) for epoch in epochs)
    elsewhere = MixtureOrder((7, 3), (5, 8), seed=1, shuffle=True)
    assert [elsewhere.place_of(element) for element in reversed(range(200))] == places[::-1]
    other = MixtureOrder((7, 3), (5, 8), seed=2, shuffle=True)
    assert [other.place_of(element) for element in range(200)] != places
    both = MixtureOrder((1, 1), (50, 50), seed=1, shuffle=True)
    first, second = ([p.record for p in map(both.place_of, range(100)) if p.source == source] for source in (0, 1))
    assert first != second, "sources of equal size have orders of their own"


def test_a_replica_sees_all_sources_in_their_shares() -> None:
    order = MixtureOrder((1, 1), (9, 9), seed=0, shuffle=True)
    seen = [order.draw_of(element)[0] for element in range(0, 2000, 2)]
    assert 400 < sum(seen) < 600, "every other place, 500 of 1000 expected with a standard deviation of 16"


def test_a_single_source_has_the_order_it_always_had() -> None:
    alone, plain = MixtureOrder((4,), (13,), seed=5, shuffle=True), EpochOrder(13, seed=5, shuffle=True)
    assert [alone.place_of(element) for element in range(50)] == [(0, plain.place_of(element)) for element in range(50)]


def test_weights_are_taken_as_they_are_written() -> None:
    assert draws_of_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert draws_of_weights([70, 30]) == (7, 3)
    assert draws_of_weights([1.0, 0.333]) == (1000, 333)


# --- the stream -----------------------------------------------------------------------------------------------


class Loader:
    """Makes a prompt of a number and its file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.wording_digest = f"wording of {name}"

    def load(self, record: dict[str, Any]) -> Prompt:
        return Prompt(f"{self.name}{record['number']}", ())


def stream(*, rank: int = 0, size: int = 1, draws: tuple[int, int] = (7, 3), **changes: Any) -> PromptDataset:
    sources = [
        RecordSource([{"number": number} for number in range(length)], Loader(name), **given)  # type: ignore[arg-type]
        for name, length, given in (
            ("a", 5, {"name": "a", "draws": draws[0], "left_out": {2}}),
            ("b", 8, {"name": "b", "draws": draws[1], **changes}),
        )
    ]
    return PromptDataset.of_sources(sources, seed=4, rank=rank, size=size)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_draws_the_same_prompts(size: int) -> None:
    alone = stream().next(48)
    together = [prompt for rank in range(size) for prompt in stream(rank=rank, size=size).next(60)]
    last = max(prompt.draw_number for prompt in alone)
    same = sorted((prompt for prompt in together if prompt.draw_number <= last), key=lambda prompt: prompt.draw_number)
    assert [prompt.identity for prompt in same] == [prompt.identity for prompt in alone]
    assert {prompt.source for prompt in alone} == {"a", "b"} and "a2" not in {p.problem_id for p in alone}
    assert all(prompt.problem_id.startswith(prompt.source) for prompt in alone)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_mixture_resumes_in_another_number_of_ranks(size: int) -> None:
    ranks = [stream(rank=rank, size=2) for rank in range(2)]
    for dataset in ranks:
        dataset.next(20)
    states = [dataset.state_dict() for dataset in ranks]
    first = max(dataset.position for dataset in ranks) * 2
    expected = [prompt.identity for prompt in stream().next(100) if prompt.draw_number >= first]
    resumed = [stream(rank=rank, size=size) for rank in range(size)]
    for rank, dataset in enumerate(resumed):
        dataset.load_state_dict(reshard_states(states, rank=rank, size=size))
    drawn = sorted((p for dataset in resumed for p in dataset.next(12)), key=lambda prompt: prompt.draw_number)
    assert [prompt.identity for prompt in drawn[:12]] == expected[:12]
    counts = Counter[str]()
    for dataset in resumed:
        counts.update({name: number for name, number in dataset.counts.items() if name.startswith("source/")})
    assert counts.total() == 40 + 12 * size


def test_another_mixture_cannot_resume_and_other_names_and_places_can() -> None:
    state = stream().state_dict()
    stream().load_state_dict(state)
    stream(name="bees").load_state_dict(state)
    for other in (stream(draws=(3, 7)), stream(rewards=("format",))):
        with pytest.raises(UserError, match="--data-path does not mix the files of the saved run in the same way"):
            other.load_state_dict(state)
    alone = PromptDataset([{"number": 1}], loader=Loader("a"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not mix"):
        alone.load_state_dict(state)


def test_other_rewards_of_a_single_file_cannot_resume() -> None:
    def alone(rewards: tuple[str, ...] | None) -> PromptDataset:
        return PromptDataset.of_sources([RecordSource([{"number": 1}], Loader("a"), rewards=rewards)])  # type: ignore[arg-type]

    state = json.loads(json.dumps(alone(("format",)).state_dict()))
    alone(("format",)).load_state_dict(state)
    for other in (None, ("accuracy",)):
        with pytest.raises(UserError, match="other reward_functions than in the saved run"):
            alone(other).load_state_dict(state)
    del state["rewards"]  # as older checkpoints have it
    alone(None).load_state_dict(state)


def test_replicas_that_read_different_files_are_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A node with an old copy of a file ends the run; a node that lacks media is named."""
    from megatron_ktr.rollout import build

    def compare(*datasets: PromptDataset) -> None:
        def gather(mine: Any, *, group: Any) -> list[Any]:
            return [mine, None, *(build._about(SimpleNamespace(dataset=other)) for other in datasets[1:])]

        monkeypatch.setattr(build, "gather_objects", gather)
        local: Any = SimpleNamespace(dataset=datasets[0])
        build.require_same_questions(local, ranks=SimpleNamespace(rank=0, world=None))  # type: ignore[arg-type]

    compare(stream(), stream(), stream())
    assert not caplog.records
    compare(stream(), stream(), stream(left_out={1, 3}))
    assert "replica 2 leaves out other records than replica 0 and uses 8, not 9" in caplog.text
    other = stream()
    other.sources[1].records.append({"number": 8})  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="replica 1 found other records than that of replica 0"):
        compare(stream(), other)
    other = stream()
    other.sources[1].loader.wording_digest = "another"  # type: ignore[misc]
    with pytest.raises(UserError, match="replica 1 found other wordings"):
        compare(stream(), other)


def test_a_round_that_no_memory_holds_is_refused() -> None:
    sources = [DataSource("a", epochs=1e6), DataSource("b")]
    with pytest.raises(UserError, match="one round of the mixture has 1000000007 prompts"):
        draws_of(sources, [1000, 7])
    assert draws_of(sources, [3, 7]) == [3_000_000, 7]


def test_an_epoch_of_a_mixture_is_its_period_without_what_is_left_out() -> None:
    dataset = stream(draws=(10, 8))
    assert dataset.num_kept == 2 * 4 + 8, "source a twice without one of its five, source b once"
    epoch = Counter(prompt.problem_id for prompt in dataset.next(16))
    assert epoch == {f"a{number}": 2 for number in (0, 1, 3, 4)} | {f"b{number}": 1 for number in range(8)}


def test_rewards_go_by_the_source_of_a_prompt() -> None:
    from megatron_ktr.rollout.second_prompt import Question
    from megatron_ktr.rollout.source import Sampler
    from megatron_ktr.types import Rollout, RolloutGroup

    def responses(prompts: list[Prompt], *, step: int, counts: Any) -> Any:
        yield from ((index, RolloutGroup(prompt, (Rollout((1,), text="?"),))) for index, prompt in enumerate(prompts))

    record = {"solution": "A", "problem_type": "multiple choice"}
    questions = [Question(RolloutGroup(Prompt(name, (), record=record, source=name), ())) for name in ("a", "b")]
    engine: Any = SimpleNamespace(stream=responses)
    answered = Sampler(engine, rewards_of_source={"b": ("format",)}).answer(questions, step=1)
    assert [set(group.rollouts[0].rewards) for group in answered] == [{"accuracy", "format"}, {"format"}]
