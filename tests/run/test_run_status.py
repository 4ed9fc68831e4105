"""tools/run_status.py: what it says of a run in every state, and of whatever a run may leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ktr.errors import UserError
from megatron_ktr.run.status.judge import Verdict, judge
from megatron_ktr.run.status.read import read_run_facts
from tests.support.failing_files import failing
from tests.support.patience import wait_until
from tools import run_status

NOW = round(time.time()) + 1e7
"""After everything that happens here: files are written while it is still months away."""
BEGAN = NOW - 600


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


def heartbeat(run_dir: Path, rank: int = 0, **changes: Any) -> None:
    """A rank of this host and process, in the middle of step 31 of 100; steps take 10 seconds."""
    content = {
        "time": NOW - 4,
        "incarnation": repr(BEGAN),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "rank": rank,
        "world_size": 1,
        "heartbeat_seconds": 10.0,
        "num_steps": 100,
        "first_step": 1,
        "last_done": 30,
        "state": "running",
        "step": 31,
        "phase": "rollout",
        "phase_since": NOW - 5,
        "step_since": NOW - 6,
        "mean_step_seconds": 10.0,
        "rss_bytes": 2_000_000_000,
        "open_files": 40,
        "threads": 12,
        "missed": 0,
    }
    path = run_dir / "status" / f"rank_{rank:05d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**content, **changes}))


def record(step: int, **values: Any) -> dict[str, Any]:
    base = {"reward_mean": 0.5, "loss": 0.1, "grad_norm": 1.0, "has_stepped": 1.0, "skipped_updates": 0.0}
    return {"step": step, **base, "seconds/rollout": 6.0, "seconds/update": 3.0, **values}


def write_run(run_dir: Path, *, num_steps: int = 30, every: Mapping[str, Any] | None = None, **options: Any) -> Path:
    run_dir.mkdir(exist_ok=True)
    lines = [record(step, **(every or {})) for step in range(1, num_steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = "".join(f"  {name}: {value}\n" for name, value in {"save_interval": 10, **options}.items())
    (run_dir / "config.yaml").write_text(f"trainer:\n  train_steps: 100\n{written}")
    return run_dir


def incident(run_dir: Path, kind: str, text: str, *, at: float = NOW - 60, step: int = 30, **facts: str) -> None:
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": moment, "step": step, "kind": kind, "text": text, **facts}) + "\n")


def verdict_of(run_dir: Path, **options: Any) -> Verdict:
    return judge(read_run_facts(run_dir, **options))


def wrong(verdict: Verdict) -> str:
    return "\n".join(finding.text for finding in verdict.findings if finding.is_wrong)


def test_a_run_that_goes_well_is_alive_and_says_when_it_ends(tmp_path: Path, capsys: Any) -> None:
    run_dir = write_run(tmp_path / "run")
    heartbeat(run_dir)
    verdict = verdict_of(run_dir)
    assert (verdict.state, verdict.step, verdict.num_steps) == ("running", 30, 100)
    # 70 steps of 10 s, the first of which began 6 s ago.
    assert verdict.seconds_left == 70 * 10 - 6 and not verdict.looks_wrong
    assert run_status.main([str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "30 of 100 done, 10 s a step; now step 31, phase rollout for 5.0 s" in shown
    assert "in about 11 min 34 s" in shown and "nothing looks wrong" in shown and "alive" in shown
    assert run_status.main([str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["state"] == "running" and found["ranks"][0]["process"] == "alive" and found["last"]["step"] == 30


STATES = {
    "killed": (dict(process_started=1.0), "dead", "ended without a word"),
    "its process number is another's now": (dict(pid=1), "dead", "step 31, in phase rollout"),
    "failed": (dict(state="failed"), "failed", "ended with an error on rank 0"),
    "left": (dict(state="left"), "left", ""),
    "done, its export is missing": (dict(state="trained", last_done=100, process_started=1.0), "dead", "ended without"),
    "done, it writes its export": (dict(state="trained", last_done=100), "exporting", ""),
    "another host": (dict(host="elsewhere"), "running", ""),
    "another host, silent": (dict(host="elsewhere", time=NOW - 100), "dead", "ended without a word"),
    "another host, done and silent for an hour": (
        dict(host="elsewhere", state="trained", last_done=100, time=NOW - 3600),
        "dead",
        "ended without",
    ),
    "stopped": (dict(time=NOW - 100), "running", "no heartbeat for 1 min 40 s"),
    "hangs": (
        dict(step_since=NOW - 1000, phase_since=NOW - 900, phase="update"),
        "running",
        "in phase update for 15 min",
    ),
    "heartbeats are lost": (dict(missed=3), "running", "3 heartbeats could not be written"),
    "a rank is missing": (dict(world_size=3), "running", "no heartbeat file of rank 1, rank 2"),
}


@pytest.mark.parametrize("name", STATES)
def test_state_and_what_is_wrong(name: str, tmp_path: Path) -> None:
    changes, state, text = STATES[name]
    text = text.replace("HOST", socket.gethostname())
    run_dir = write_run(tmp_path / "run")
    with stopped_process() if changes.get("pid") == "stopped" else contextlib.nullcontext() as process:
        if process is not None:
            changes = {"pid": process.pid, "process_started": process.create_time()}
        heartbeat(run_dir, **changes)
        verdict = verdict_of(run_dir)
        assert verdict.state == state and text in wrong(verdict) and bool(wrong(verdict)) == bool(text)
        is_held_up = bool(text) and "heartbeats could not be written" not in text
        assert (verdict.seconds_left is not None) == (state == "running" and not is_held_up), (
            "nobody knows when it ends"
        )
        assert run_status.main([str(run_dir)]) == (1 if text else 0)


@contextlib.contextmanager
def stopped_process() -> Iterator[psutil.Process]:
    child = subprocess.Popen(["sleep", "3600"])
    try:
        process = psutil.Process(child.pid)
        process.suspend()
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
        yield process
    finally:
        child.kill()
        child.wait()


def test_a_rank_that_is_gone_is_named_while_others_run(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    for rank in range(4):
        heartbeat(run_dir, rank, world_size=4, **(dict(process_started=1.0) if rank == 2 else {}))
    verdict = verdict_of(run_dir)
    assert verdict.state == "running" and "rank 2" in wrong(verdict) and "rank 1" not in wrong(verdict)


def test_heartbeats_of_an_earlier_start_count_for_nothing(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    heartbeat(run_dir)
    heartbeat(run_dir, 1, incarnation=repr(BEGAN - 5000), state="failed", time=NOW - 5000)
    found = read_run_facts(run_dir)
    assert [one.rank for one in found.ranks] == [0] and found.num_older_ranks == 1
    assert not judge(found).looks_wrong


METRICS = {
    "loss": (dict(loss=None), "loss of step 30 is not a finite number"),
    "updates": (dict(skipped_updates=1.0), "updates skipped in 20 of the last 20 steps, last in 30"),
    "nothing": (dict(has_stepped=0.0), "none of the last 20 steps had anything to learn"),
    "data": (dict(data_wait_fraction=0.4), "40% of the recent steps' time is waiting for data"),
    "slowest": (
        {"ranks/slowest": 5.0, "ranks/slowest_behind_seconds": 2.5},
        "rank 5 was the slowest in 20 of the last 20 steps, 2.5 s behind the others",
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_what_the_metrics_say(name: str, tmp_path: Path) -> None:
    values, text = METRICS[name]
    run_dir = write_run(tmp_path / "run", every=values)
    heartbeat(run_dir)
    verdict = verdict_of(run_dir)
    assert text in "\n".join(finding.text for finding in verdict.findings)
    assert verdict.looks_wrong == (name in ("loss", "updates", "nothing")), "waiting is slow, not wrong"


def test_steps_whose_updates_are_skipped_had_something_to_learn(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", every=dict(has_stepped=0.0, skipped_updates=1.0))
    heartbeat(run_dir)
    assert "anything to learn" not in wrong(verdict_of(run_dir))


def test_a_loss_scale_that_is_looked_for_is_not_wrong(tmp_path: Path) -> None:
    scaled = {"has_stepped": 0.0, "skipped_updates": 1.0, "skipped_updates/loss_scale": 1.0, "grad_norm": None}
    run_dir = write_run(tmp_path / "run", every=scaled)
    heartbeat(run_dir)
    verdict = verdict_of(run_dir)
    assert not verdict.looks_wrong and "for the loss scale of fp16 alone" in "".join(f.text for f in verdict.findings)
    write_run(run_dir, every=scaled, num_steps=60)
    assert "updates skipped in 20 of the last 20 steps, for the loss scale" in wrong(verdict_of(run_dir))
    write_run(run_dir, every={**scaled, "skipped_updates": 2.0, "skipped_updates/log_prob": 1.0})
    assert "updates skipped in 20 of the last 20 steps, last in 30" in wrong(verdict_of(run_dir))


def test_incidents_count_from_the_last_start_on(tmp_path: Path, capsys: Any) -> None:
    run_dir = write_run(tmp_path / "run")
    heartbeat(run_dir)
    incident(run_dir, "alarm", "of a part that is over", at=BEGAN - 100)
    assert not verdict_of(run_dir).looks_wrong
    incident(run_dir, "alarm", "gradient norm 50 is 30 times\x1b[2J the median")
    incident(run_dir, "wandb", "away")
    assert run_status.main([str(run_dir)]) == 1
    shown = capsys.readouterr().out
    assert "alarm 2, wandb 1 (2 since the last start)" in shown and "WRONG  alarm (once, in step 30)" in shown
    assert "\x1b" not in shown and "\\x1b[2J" in shown and "note   wandb" in shown


def test_an_alarm_of_long_ago_is_only_noted_and_each_alarm_is_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=300)
    heartbeat(run_dir, last_done=300, num_steps=900)
    incident(run_dir, "alarm", "it was high", step=150, name="kl")
    verdict = verdict_of(run_dir)
    assert [one.text for one in verdict.findings] == ["alarm kl (once, in step 150): it was high"]
    assert not verdict.looks_wrong
    incident(run_dir, "alarm", "it is high", step=299, name="grad_norm")
    assert wrong(verdict_of(run_dir)) == "alarm grad_norm (once, in step 299): it is high"


def write_checkpoint(run_dir: Path, content: bytes) -> Path:
    from megatron_ktr.files.checksums import write_manifest

    path = run_dir / "checkpoints" / "step_00000030"
    path.mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "config.yaml"):
        (path / name).write_text("{}")
    (path / "training.json").write_text(json.dumps({"version": 2}))
    (path / "__0_0.distcp").write_bytes(content)
    write_manifest(path)
    return path


def test_the_newest_checkpoint_is_complete_verified_or_damaged(tmp_path: Path, monkeypatch: Any) -> None:
    run_dir = write_run(tmp_path / "run")
    heartbeat(run_dir)
    path = write_checkpoint(run_dir, b"a" * 1000)
    assert read_run_facts(run_dir).checkpoint.verdict == "complete"
    assert read_run_facts(run_dir, verifies=True).checkpoint.verdict == "verified"
    for unreadable in (path / "__0_0.distcp", path.parent):
        with failing(unreadable, errno.EIO):
            assert f"{unreadable} cannot be read: Input/output error" in wrong(verdict_of(run_dir, verifies=True))
    (path / "__0_0.distcp").write_bytes(b"a" * 999 + b"b")
    assert read_run_facts(run_dir).checkpoint.verdict == "complete", "only reading finds it"
    assert "__0_0.distcp" in wrong(verdict_of(run_dir, verifies=True))
    (path / "__0_0.distcp").write_bytes(b"a")
    assert "__0_0.distcp: 1 bytes, expected 1000" in wrong(verdict_of(run_dir))
    facts = read_run_facts(run_dir)
    full = dataclasses.replace(
        facts, free_bytes=2_000_000, checkpoint=dataclasses.replace(facts.checkpoint, num_bytes=10**7)
    )
    assert "2 MB are free on the disk of the run, and a checkpoint takes 10 MB" in wrong(judge(full))


def test_a_run_of_a_version_without_heartbeats(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=40)
    os.utime(run_dir / "metrics.jsonl", (NOW - 30, NOW - 30))
    verdict = verdict_of(run_dir)
    assert (verdict.state, verdict.step, verdict.num_steps, verdict.seconds_per_step) == ("silent", 40, 100, 9.0)
    assert "the last step was recorded 30 s ago" in verdict.findings[0].text
    write_run(run_dir, num_steps=100)
    (run_dir / "export").mkdir()
    (run_dir / "export" / "checksums.json").write_text("{}")
    assert verdict_of(run_dir).state == "finished" and run_status.main([str(run_dir)]) == 0


def test_a_start_has_half_an_hour_until_its_first_heartbeat(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=0)
    for age, state in ((600, "starting"), (2000, "silent")):
        os.utime(run_dir / "config.yaml", (NOW - age, NOW - age))
        assert verdict_of(run_dir).state == state and run_status.main([str(run_dir)]) == (state != "starting")
    # Killed, and started again: the heartbeats that are there are of the part before.
    write_run(run_dir)
    heartbeat(run_dir, process_started=1.0, incarnation=repr(NOW - 5000))
    os.utime(run_dir / "config.yaml", (NOW - 5001, NOW - 5001))
    assert verdict_of(run_dir).state == "dead"
    again = run_dir / "config_from_step_00000031.yaml"
    again.write_text("trainer: {}")
    os.utime(again, (NOW - 60, NOW - 60))
    assert verdict_of(run_dir).state == "starting"
    heartbeat(run_dir, incarnation=repr(NOW - 40), time=NOW)
    assert verdict_of(run_dir).state == "running"


def test_what_is_no_run_directory_is_one_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path(__file__)):
        with pytest.raises(UserError, match="expected the --run-dir"):
            run_status.main([str(path)])


NONSENSE = (None, True, "x", "\x1b[2J", -1, 1e308, 10**30, [], {"a": []}, "9" * 5000)


@pytest.mark.parametrize("seed", range(4))
def test_torn_and_senseless_files_never_end_it(seed: int, tmp_path: Path, capsys: Any) -> None:
    """Each file cut off or overwritten at random, values replaced by others: it says what is left."""
    chance = random.Random(seed)
    for number in range(15):
        run_dir = write_run(tmp_path / f"{number}")
        heartbeat(run_dir)
        incident(run_dir, "alarm", "text")
        write_checkpoint(run_dir, b"abc")
        for path in [path for path in run_dir.rglob("*") if path.is_file()]:
            choice, content = chance.random(), path.read_bytes()
            if choice < 0.3:
                path.write_bytes(content[: chance.randrange(len(content))])
            elif choice < 0.5:
                place = chance.randrange(len(content))
                path.write_bytes(content[:place] + chance.randbytes(9) + content[place + 9 :])
            elif choice < 0.7 and path.suffix in (".json", ".jsonl"):
                values = json.loads(content if path.suffix == ".json" else content.splitlines()[-1])
                names = chance.sample(list(values), min(3, len(values)))
                path.write_text(json.dumps(values | {name: chance.choice(NONSENSE) for name in names}) + "\n")
        for flags in ([], ["--json"], ["--verify"]):
            assert run_status.main([str(run_dir), *flags]) in (0, 1)
        assert "\x1b" not in capsys.readouterr().out


ODD_NUMBERS = (10**400, -(10**400), 1e308, -1e308, math.nan, math.inf, -math.inf, 2**63, 1e15, True)


def test_no_number_of_a_heartbeat_or_a_record_ends_it(tmp_path: Path, capsys: Any) -> None:
    """JSON holds whole numbers that no float can hold, and Python's reader takes NaN; each value in turn."""
    every = {"ranks/slowest": 0, "ranks/slowest_behind_seconds": 1.0, "data_wait_fraction": 0.1, "num_skipped": 1}
    run_dir = write_run(tmp_path / "run", num_steps=3, every=every)
    heartbeat(run_dir)
    whole = json.loads((run_dir / "status" / "rank_00000.json").read_text())
    for name in whole:
        for value in ODD_NUMBERS:
            heartbeat(run_dir, **{name: value} if name != "rank" else {})
            assert run_status.main([str(run_dir)]) in (0, 1), (name, value)
    heartbeat(run_dir)
    for name in {**record(1), **every}:
        for value in ODD_NUMBERS:
            lines = [record(step, **every) for step in (1, 2)] + [record(3, **every) | {name: value}]
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            assert run_status.main([str(run_dir)]) in (0, 1), (name, value)
    assert "is not a finite number" in capsys.readouterr().out


def test_pipes_and_endless_brackets_count_as_not_there(tmp_path: Path) -> None:
    """PyYAML takes hours for a megabyte of open brackets; a pipe that nobody writes to is never read."""
    run_dir = write_run(tmp_path / "run")
    (run_dir / "config.yaml").write_text("[" * 900_000)
    (run_dir / "status").mkdir()
    os.mkfifo(run_dir / "status" / "rank_00000.json")
    os.mkfifo(run_dir / "events.jsonl")
    assert verdict_of(run_dir).step == 30


def test_watching_ends_when_the_run_does(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    run_dir = write_run(tmp_path / "run")
    heartbeat(run_dir)
    monkeypatch.setattr(time, "sleep", lambda seconds: heartbeat(run_dir, state="left"))
    assert run_status.main([str(run_dir), "--watch", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("state ") == 2 and "\x1b" not in shown, "no terminal: nothing is cleared"


def test_a_thousand_ranks_are_one_short_table(tmp_path: Path, capsys: Any) -> None:
    run_dir = write_run(tmp_path / "run")
    for rank in range(1000):
        heartbeat(run_dir, rank, world_size=1000, host=f"node{rank // 8}", time=NOW - (90 if rank == 777 else 1))
    assert run_status.main([str(run_dir)]) == 1
    shown = capsys.readouterr().out
    assert "rank 777 (node97): no heartbeat for 1 min 30 s" in shown and "and 992 further ranks" in shown
    assert len(shown.splitlines()) < 40
