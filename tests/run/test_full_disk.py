"""A disk that is really full: a small file system in memory, filled to the last byte. Needs root, and says so."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from megatron_ktr.files.intact_checkpoint import checkpoint_damage
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.replay import write_rollouts
from megatron_ktr.run.directory import list_checkpoints
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.lease import acquire
from megatron_ktr.run.metrics import MetricsWriter, read_records
from megatron_ktr.run.optional_writes import OptionalWrites
from tests.run.test_checkpoint_policy import hf_dir as hf_dir  # a fixture
from tests.run.test_checkpoint_policy import opened, steps


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    """A file system of 8 MB and 64 files: room for two checkpoints."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=64", "tmpfs", str(where)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@contextlib.contextmanager
def full(where: Path) -> Iterator[None]:
    """Nothing more fits, not one byte."""
    filler = where / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def no_inode_left(where: Path) -> Iterator[None]:
    """No further file can be made, though there is room."""
    (where / "many").mkdir()
    with contextlib.suppress(OSError):
        for number in range(100):
            (where / "many" / str(number)).touch()
    try:
        yield
    finally:
        for path in (where / "many").iterdir():
            path.unlink()
        (where / "many").rmdir()


@contextlib.contextmanager
def read_only(where: Path) -> Iterator[None]:
    """As a file system becomes after errors of its disk."""
    subprocess.run(["mount", "-o", "remount,ro", str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(where)], check=True)


@pytest.mark.parametrize("trouble, word", [(full, "disk full"), (no_inode_left, "disk full"), (read_only, "Read-only")])
def test_a_checkpoint_that_does_not_fit_costs_a_line_and_the_last_one_stays(one_rank, hf_dir, small, trouble, word):
    config = config_from_values(dict(model=str(hf_dir), run_dir="unused"))
    policy = Policy(hf_dir, options=PolicyOptions.of(config), ranks=one_rank, platform=current(), num_steps=4)
    run_dir = small / "run"
    stopping = opened(policy, run_dir, keep_checkpoints=1)
    stopping.save_and_wait(1)
    stopping.close()
    with trouble(small), pytest.raises(UserError, match=rf"cannot save step 2 to .*: {word}.*; the last .*00000001$"):
        stopping.after_step(2)
        stopping.close()
    going_on = opened(policy, run_dir, keep_checkpoints=1, save_failure="continue")
    with trouble(small):
        going_on.after_step(2)
        going_on.close()
        assert going_on.counts() == {"save_failures": 1.0} and steps(run_dir) == [1]
    going_on.after_step(3)
    going_on.close()
    # The second part of the run has not loaded 1, so it does not know that it is intact, and 3 alone is verified.
    ((step, path),) = list_checkpoints(run_dir)
    assert step == 3 and checkpoint_damage(path) == []


def test_an_export_that_does_not_fit_leaves_nothing(one_rank, hf_dir, small):
    config = config_from_values(dict(model=str(hf_dir), run_dir="unused"))
    policy = Policy(hf_dir, options=PolicyOptions.of(config), ranks=one_rank, platform=current(), num_steps=4)
    with full(small), pytest.raises(UserError, match="disk full"):
        policy.save_hf(small / "exports/step_00000001")
    assert not list(small.glob("exports/*"))
    policy.save_hf(small / "exports/step_00000001")


def test_records_wait_for_room_and_what_is_optional_is_said_once(small, caplog):
    optional = OptionalWrites(Incidents(small))
    writer = MetricsWriter(small, optional=optional)
    many = {f"key_token_ratio/{number}": 0.5 for number in range(400)}  # more than fits into what the file has already
    writer.write(1, {"loss": 1.0})
    with full(small):
        writer.write(2, {"loss": 2.0, **many})
        writer.write(3, {"loss": 3.0, **many})
        writer.add(3, {"eval/a/accuracy": 0.5})
        assert [record["step"] for record in read_records(small)] == [1], "and no torn line"
        with pytest.raises(UserError, match="cannot be used: lease.json: No space left"):
            acquire(small / "other")
    with no_inode_left(small), pytest.raises(UserError, match="rollouts cannot be written to .*: No space left"):
        write_rollouts(small / "rollouts/step_00000001.jsonl", [])
    writer.write(4, {"loss": 4.0})
    writer.close()
    records = read_records(small)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[2]["loss"] == 3.0 and records[2]["eval/a/accuracy"] == 0.5
    assert records[-1]["write_failures/metrics.jsonl"] == 3.0
    assert caplog.text.count("metrics.jsonl cannot be written, the run goes on without") == 1


def test_an_incident_that_does_not_fit_spoils_no_later_one(small):
    incidents = Incidents(small)
    incidents.add("first", "x" * 3900)  # its line ends a little before the page does
    with full(small):
        incidents.add("lost", "y" * 3900)
    incidents.add("last", "z")
    kinds = [json.loads(line)["kind"] for line in (small / "events.jsonl").read_text().splitlines()]
    assert kinds == ["first", "last"] and incidents.num_lost == 1


def test_values_that_come_late_wait_for_room_too(small):
    """The record is in the file already, which is to be replaced as a whole."""
    writer = MetricsWriter(small)
    writer.write(1, {"loss": 1.0, "seconds/evaluate": 1.0})
    with full(small):
        writer.add(1, {"eval/a/accuracy": 0.5, "seconds/evaluate": 2.0})
        assert read_records(small) == [{"step": 1, "loss": 1.0, "seconds/evaluate": 1.0}]
    writer.write(2, {"loss": 2.0})
    assert read_records(small)[0] == {"step": 1, "loss": 1.0, "seconds/evaluate": 3.0, "eval/a/accuracy": 0.5}
    assert [record["step"] for record in read_records(small)] == [1, 2]


def test_events_of_tensorboard_are_given_up_in_words(small, capfd, monkeypatch):
    ended: list[object] = []
    say = ended.append
    monkeypatch.setattr(threading, "excepthook", say)
    optional = OptionalWrites(Incidents(small))
    writer = MetricsWriter(small, optional=optional)
    with full(small):
        for step in range(1, 400):
            writer._show(step, {"loss": float(step)})
        writer.close()
    assert optional.counts()["write_failures/tensorboard"] == 1.0
    assert "Traceback" not in capfd.readouterr().err
    assert not ended, "its thread ends with a traceback, which Python would print"
    assert threading.excepthook is say
