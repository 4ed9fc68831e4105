"""Users' own rewards: every way to write one, and every way in which one can go wrong, at the cost of one response."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator

import psutil
import pytest

from megatron_ktr.config.reward_section import RewardSection
from megatron_ktr.errors import UserError
from megatron_ktr.rewards import Rewarder, RewardOptions, load_reward, pool
from megatron_ktr.rewards.plug_in import PlugIn
from megatron_ktr.types import Prompt, Rollout, RolloutGroup
from tests.support.patience import PATIENCE_SECONDS, wait_until

HOME = "tests.support.plug_ins"
QUICK = 2.0
"""Seconds that a function which never answers is given; the others answer at once, and have far more."""


def group_of(*texts: str, **record: object) -> RolloutGroup:
    fields = {"problem": "Q", "solution": "b", "problem_type": "multiple choice", **record}
    rollouts = tuple(Rollout(tuple(range(len(text))), text=text) for text in texts)
    return RolloutGroup(Prompt("7", (1, 2), record=fields), rollouts)


@contextlib.contextmanager
def rewarding(**options: object) -> Iterator[Rewarder]:
    values = {"reward_on_error": "zero", "reward_timeout": PATIENCE_SECONDS, **options}
    rewarder = Rewarder(RewardOptions(RewardSection(**values)))
    try:
        yield rewarder
    finally:
        rewarder.close()


def values_of(rewarder: Rewarder, name: str, *texts: str, **record: object) -> list[float | None]:
    (found,) = rewarder.reward([group_of(*texts, **record)], names=[f"{HOME}:{name}", "format"])
    return [rollout.rewards.get(name) for rollout in found.rollouts]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_way_to_write_a_reward_gives_the_same_in_a_process_and_without(workers: int) -> None:
    with rewarding(reward_workers=workers) as rewarder:
        assert values_of(rewarder, "length", "a", "bcd", "ef", factor=2.0) == [2.0, 6.0, 4.0]
        # 3 tokens, 2 responses, 2 tokens of the prompt, no media; None for the first of the group.
        assert values_of(rewarder, "worth", "a", "bcd") == [None, 3 + 20 + 200]
        assert values_of(rewarder, "ranked", "bcd", "a", "ef") == [2.0, 0.0, 1.0]
        assert values_of(rewarder, "of_trl", "b", "none", "cd") == [1 + 0.01 + 1, None, 0.02 + 1]
        assert values_of(rewarder, "awaited", "a", "b") == [1.0, 1.0]
        assert values_of(rewarder, "counting", "a") == [1.0]
        assert not [name for name in rewarder.take_counts() if "errors" in name or "timeouts" in name]
    assert load_reward(f"{HOME}:length")("abc", {}) == 3.0


def test_what_raises_exits_or_gives_no_number_costs_its_response_alone() -> None:
    texts = ["fine", "raises", "exits", "nan", "text", "huge", "dies", "leaves", "cannot say why", "prints", "forks"]
    with rewarding() as rewarder:
        assert values_of(rewarder, "wild", *texts, "fine") == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
        counts = rewarder.take_counts()
        assert counts["reward_errors/wild"] == 8 and counts["reward_seconds/wild"] > 0
        assert "reward_seconds/format" in counts and "reward_timeouts/wild" not in counts
        # A function of the whole group is one call.
        assert values_of(rewarder, "wild_batch", "fine", "fine") == [1.0, 1.0]
        assert values_of(rewarder, "wild_batch", "fine", "dies") == [0.0, 0.0]
        assert values_of(rewarder, "wild_batch", "short", "fine") == [0.0, 0.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_list_of_numbers_or_is_cancelled_has_failed_and_records_stay_as_they_are(workers: int) -> None:
    with rewarding(reward_workers=workers, reward_on_error="stop") as rewarder:
        for text, words in {
            "mapping": r"gave \{0: 0.5, 1: 0.5\} .*expected a list with 2 numbers",
            "set": r"gave \{0.0, 1.0\}",
            "text": "gave '10'",
            "raises late": r"failed .*ZeroDivisionError: .*plug_ins.py, line",
        }.items():
            with pytest.raises(UserError, match=words):
                values_of(rewarder, "no_list", text, text)
        with pytest.raises(UserError, match="'awaited' failed .*CancelledError"):
            values_of(rewarder, "awaited", "a", "cancels")
        assert values_of(rewarder, "changes_record", "b", "b") == [1.0, 1.0]


def test_what_hangs_is_ended_from_outside_with_all_that_it_has_started(tmp_path) -> None:
    pid_file = tmp_path / "pid"
    with rewarding(reward_timeout=QUICK) as rewarder:
        found = values_of(rewarder, "wild", "ignores signals", "fine", "hides", "fine", pid_file=str(pid_file))
        assert found == [0.0, 1.0, 0.0, 1.0]
        # Awaited together: one waits in vain, and one that blocks all of them is told from the others.
        assert values_of(rewarder, "awaited", "a", "waits", "b") == [1.0, 0.0, 1.0]
        assert values_of(rewarder, "awaited", "a", "sleeps", "b") == [1.0, 0.0, 1.0]
        counts = rewarder.take_counts()
    assert counts["reward_timeouts/wild"] == 2 and counts["reward_timeouts/awaited"] == 2
    hidden = int(pid_file.read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        wait_until(lambda: psutil.Process(hidden).status() == psutil.STATUS_ZOMBIE)


def test_what_swells_is_ended() -> None:
    with rewarding(reward_worker_memory_gb=0.4) as rewarder:
        assert values_of(rewarder, "wild", "fine", "swells", "fine") == [1.0, 0.0, 1.0]
        assert rewarder.take_counts()["reward_errors/wild"] == 1


def test_the_policies_stop_in_words_or_make_the_group_even() -> None:
    with rewarding(reward_on_error="stop", reward_timeout=QUICK) as rewarder:
        for text, words in {
            "raises": r"reward 'wild' failed for a response to problem 7: KeyError: 'no such field' \(.*line \d+\)",
            "dies": r"reward 'wild' failed for a response to problem 7: the worker died \(signal 11\)",
            "interrupts": "the worker ended with code .*: .*nterrupt",
            "sleeps": r"reward 'wild' gave no answer within 2 s \(--reward-timeout\), for a response to problem 7",
            "nan": "reward 'wild' gave nan for a response to problem 7, expected a finite number",
        }.items():
            with pytest.raises(UserError, match=words + ".*--reward-on-error zero or skip_group"):
                values_of(rewarder, "wild", "fine", text)
        with pytest.raises(UserError, match="'worth' does not apply: a response has no reward"):
            rewarder.reward([group_of("a")], names=[f"{HOME}:worth"])
    with rewarding(reward_on_error="skip_group", reward_workers=0) as rewarder:
        groups = [group_of("b", "raises", "fine"), group_of("b", "fine")]
        first, second = rewarder.reward(groups, names=[f"{HOME}:wild", f"{HOME}:length"])
        assert [rollout.rewards for rollout in first.rollouts] == [{"wild": 0.0, "length": 0.0}] * 3
        assert [rollout.reward for rollout in second.rollouts] == [2.0, 5.0]
        counts = rewarder.take_counts()
        assert counts["reward_skipped_groups"] == 1 and counts["reward_errors/wild"] == 1
        shuffled = dataclasses.replace(groups[0], prompt=dataclasses.replace(groups[0].prompt, variant="shuffled"))
        (left,) = rewarder.reward([shuffled], names=[f"{HOME}:wild"])
        assert left.rollouts == (), "accuracies of 0 that nobody measured would earn the others a bonus"


def test_weights_scale_the_sum_and_leave_the_parts_as_they_are() -> None:
    with rewarding(reward_workers=0, reward_weights=("length=0.5", "format=-2", "wild=1")) as rewarder:
        group = group_of("<think>x</think><answer>b</answer>")
        (found,) = rewarder.reward([group], names=[f"{HOME}:length", "format", f"{HOME}:wild"])
    (rollout,) = found.rollouts
    assert rollout.rewards == {"length": 34.0, "format": 1.0, "wild": 1.0}
    assert rollout.reward == 0.5 * 34 - 2 + 1 and rollout.reward_weights == {"length": 0.5, "format": -2.0}


def test_functions_of_no_known_form_are_refused_at_once() -> None:
    for name, words in {
        "three": r"takes \(first, second, third\), expected \(response, record\)",
        "needs_state": "needs TRL's trainer_state",
        "Stateful": "is no function but a class",
        "HOME": "cannot be loaded: AttributeError",
    }.items():
        with pytest.raises(UserError, match=words):
            PlugIn.load(f"{HOME}:{name}")
    with pytest.raises(UserError, match="cannot be loaded: ModuleNotFoundError"):
        PlugIn.load("no_such_module:f")


def test_an_import_that_hangs_or_ends_its_process_is_refused_in_words(monkeypatch) -> None:
    with rewarding() as rewarder:
        with pytest.raises(UserError, match=r"'tests.support.plug_in_that_exits:f' cannot be loaded: .*code 7"):
            rewarder.load(["accuracy", "tests.support.plug_in_that_exits:f"])
        with pytest.raises(UserError, match="'no_such_module:f' cannot be loaded: ModuleNotFoundError"):
            rewarder.load(["no_such_module:f"])
        monkeypatch.setattr(pool, "_LOAD_SECONDS", QUICK)
        with pytest.raises(UserError, match="that_hangs:never' cannot be loaded: its module is not imported"):
            rewarder.load(["tests.support.plug_in_that_hangs:never"])
        monkeypatch.undo()
        assert values_of(rewarder, "length", "a") == [1.0], "the next one is not disturbed"
    assert not {name for name in sys.modules if "plug_in_that" in name}


def test_a_closed_rewarder_leaves_no_process() -> None:
    here = psutil.Process(os.getpid())
    before = here.children(recursive=True)  # other tests of this process may keep rewarders
    with rewarding(reward_workers=2) as rewarder:
        values_of(rewarder, "length", "a", "b")
        mine = [process for process in here.children(recursive=True) if process not in before]
        workers = [process for process in mine if "megatron_ktr.rewards.worker" in process.cmdline()]
        # A worker starts when a response waits for one: a quick first one may serve both.
        assert len(workers) in (1, 2)
    assert not [process for process in workers if process.is_running()]
