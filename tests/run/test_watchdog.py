"""The watchdog: what it says of a rank that hangs and of those that did not come, and that honest ranks go unharmed."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.errors import EXIT_HANG
from megatron_ktr.processes.frames import _place, place_of_error, place_of_main_thread
from megatron_ktr.run import rank_monitor
from megatron_ktr.run.metrics import PhaseTimer
from megatron_ktr.run.watchdog import Entry, Watchdog, missing_ranks, stopped_seconds
from tests.support.patience import wait_until

LONG_AGO_SECONDS = 1e6


def entry(beat: int, *, moves: int = 7, is_collective: bool = True, place: str = "in all_reduce") -> Entry:
    return Entry(beat, moves, 3, "phase update", is_collective, place)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {0: entry(2)}, "rank 1 has never shown a sign of life"),
        (
            {0: entry(1), 1: entry(1)},
            {0: entry(2), 1: entry(1)},
            "rank 1 shows no sign of life (last seen in phase update of step 3, in all_reduce)",
        ),
        (
            {0: entry(1), 1: entry(1)},
            {0: entry(2), 1: entry(2, is_collective=False, place="at a.py:1 (f), which is no collective")},
            "rank 1 did not come: it is in phase update of step 3, at a.py:1 (f), which is no collective",
        ),
        (
            {0: entry(1), 1: entry(1)},
            {0: entry(2), 1: entry(2, moves=6)},
            "rank 1 is behind: it is in phase update of step 3, in all_reduce",
        ),
        (
            {0: entry(1), 1: entry(1)},
            {0: entry(2), 1: entry(2, place="in broadcast")},
            "rank 0 waits in phase update of step 3, in all_reduce; "
            "rank 1 waits in phase update of step 3, in broadcast",
        ),
        ({0: entry(1), 1: entry(1)}, {0: entry(2), 1: entry(2)}, "all ranks wait in the same place"),
        (
            {0: entry(1), 1: entry(1)},
            {0: entry(2, is_collective=False, place="at a.py:1 (f), which is no collective"), 1: entry(2)},
            "the other ranks wait for it",
        ),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(
    before: dict[int, Entry], after: dict[int, Entry], expected: str
) -> None:
    assert missing_ranks(before, after, world_size=2, speaker=0) == expected


@pytest.mark.parametrize(("passed", "expected"), [(1.25, 0.0), (12.0, 0.0), (3601.25, 3600.0)])
def test_the_time_in_which_the_process_was_stopped_does_not_count(passed: float, expected: float) -> None:
    assert stopped_seconds(passed, wanted=1.25) == expected


def test_a_verdict_about_many_ranks_names_some() -> None:
    found = missing_ranks({}, {0: entry(2)}, world_size=100, speaker=0)
    assert "rank 8 has" in found and "rank 9 has" not in found and found.endswith("; and 91 more")


def test_a_rank_that_hangs_says_where_and_ends_with_its_stack_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No phase of this test reaches the limit by itself, however busy the machine is: the test makes a phase older."""
    monkeypatch.setattr("megatron_ktr.run.watchdog._MOST_SECONDS_BETWEEN_LOOKS", 0.05)
    codes: list[int] = []
    timer, store = PhaseTimer(), torch.distributed.HashStore()
    watchdog, second = (
        Watchdog(
            tmp_path,
            rank=rank,
            world_size=3,
            limit_minutes=60,
            timer=timer,
            connect=lambda: store,
            end=codes.append,
        )
        for rank in range(2)
    )
    watchdog.before_step(3)
    with timer.phase("update"):
        watchdog._since -= LONG_AGO_SECONDS
        wait_until(lambda: bool(codes))
        # Another rank that hangs then leaves the word to the first.
        second._since -= LONG_AGO_SECONDS
        wait_until(lambda: len(codes) == 2)
    watchdog.close()
    second.close()
    assert codes == [EXIT_HANG, EXIT_HANG]
    (incident,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert incident["kind"] == "hang" and incident["rank"] == 0 and incident["step"] == 3
    assert "hangs for 60 minutes (hang_timeout_minutes) in phase update of step 3, at " in incident["text"]
    assert "rank 2 has never shown a sign of life" in incident["text"]
    for rank in range(2):
        assert "test_a_rank_that_hangs" in (tmp_path / f"hangs/rank_{rank}.txt").read_text()


def test_many_short_phases_are_no_hang(tmp_path: Path) -> None:
    """The time of one phase counts, not the time since the start; and a closed watchdog watches nothing."""
    codes: list[int] = []
    timer = PhaseTimer()
    watchdog = Watchdog(tmp_path, rank=0, world_size=1, limit_minutes=60, timer=timer, end=codes.append)
    before = watchdog._since
    for _ in range(3):
        with timer.phase("update"):
            assert watchdog._phase == "update"
    assert watchdog._since > before and watchdog._phase is None
    watchdog.close()
    wait_until(lambda: not any(thread.is_alive() for thread in watchdog._threads))
    assert not timer.listeners and not codes
    assert not list(tmp_path.iterdir()), "nothing is written while nothing happens"


def test_places_name_the_collective_and_who_called_it() -> None:
    # Without a process group it fails inside torch.distributed.
    with pytest.raises(ValueError) as failed, PhaseTimer().phase("update"):
        torch.distributed.all_reduce(torch.zeros(1))
    (note,) = failed.value.__notes__
    assert note.startswith("in phase update, in ") and place_of_error(failed.value).is_collective
    with pytest.raises(ValueError) as other:
        json.loads("{")
    assert not place_of_error(other.value).is_collective
    # Which helper of collectives waits says little; where it was called says what for.
    frames = [("/x/torch/distributed/c10d.py", 1, "all_reduce")]
    frames += [("/x/megatron_ktr/distributed/collectives.py", 2, "all_reduce_sum")]
    assert str(_place(frames)) == "in all_reduce called by distributed/collectives.py:2 (all_reduce_sum)"
    assert str(_place([*frames, ("/x/megatron_ktr/step/a.py", 3, "f")])) == "in all_reduce called by step/a.py:3 (f)"
    core = "/x/megatron/core/pipeline_parallel/"
    frames = [(f"{core}p2p.py", 1, "_communicate"), (f"{core}p2p.py", 2, "recv_forward"), (f"{core}s.py", 3, "forward")]
    assert (
        str(_place([*frames, ("/x/megatron_ktr/a.py", 4, "f")])) == "in recv_forward called by megatron_ktr/a.py:4 (f)"
    )
    asked: list[str] = []
    thread = threading.Thread(target=lambda: asked.append(str(place_of_main_thread())))
    thread.start()
    thread.join()
    assert asked[0].startswith("at ") and "is no collective" in asked[0]


class Client:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)


def test_a_rank_of_ft_launcher_sends_heartbeats_and_others_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    assert rank_monitor.build_rank_monitor() == []
    client = Client()
    monitor = rank_monitor.RankMonitor(client)
    monitor.before_step(1)
    monitor.close()
    assert client.calls == ["init_workload_monitoring", "send_heartbeat", "shutdown_workload_monitoring"]
