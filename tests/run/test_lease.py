"""One run at a time in a run directory: refused in words while the other lives, taken over once it is dead."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.errors import UserError
from megatron_ktr.run.directory import check_run_directory
from megatron_ktr.run.lease import FILE, LeaseHook, LostLease, acquire
from tests.support.paths import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from megatron_ktr.run.lease import acquire
lease = acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(1000)
"""


def never(seconds: float) -> None:
    raise AssertionError("nothing to watch: the process was on this machine")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_living_run_is_named_and_a_killed_one_is_taken_over(tmp_path):
    run_dir = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        named = rf"--run-dir {re.escape(str(run_dir))}: another run \(process {holder.pid} on .*\) is at work there"
        with pytest.raises(UserError, match=named):
            acquire(run_dir, sleep=never)
        holder.send_signal(signal.SIGSTOP)  # one that is stopped may go on
        with pytest.raises(UserError, match=named):
            acquire(run_dir, sleep=never)
        holder.kill()
        # It is dead, though nobody has asked for its exit code yet.
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        lease = acquire(run_dir, sleep=never)
    finally:
        holder.kill()
        holder.wait()
    assert lease.is_held()
    lease.release()
    assert list(run_dir.iterdir()) == [], "and nothing is left of either"


def test_a_process_number_that_came_again_is_not_the_run(tmp_path):
    lease = acquire(tmp_path)
    change(tmp_path / FILE, pid=os.getppid(), started="0")
    second = acquire(tmp_path, sleep=never)
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert second.is_held() and not lease.is_held()
    lease.release()
    second.release()
    assert list(tmp_path.iterdir()) == []


def watching(path: Path, *, beats: bool) -> tuple[list[float], Callable[[float], None]]:
    """A clock that moves when it is asked, and what it does meanwhile."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if beats:
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    return slept, sleep


def test_a_run_of_another_machine_is_watched(tmp_path):
    first = acquire(tmp_path, beat_seconds=1e6)
    change(tmp_path / FILE, machine="elsewhere", host="node7")
    slept, sleep = watching(tmp_path / FILE, beats=True)
    with pytest.raises(UserError, match=r"process \d+ on node7\) is at work there"):
        acquire(tmp_path, stale_seconds=30, sleep=sleep)
    assert len(slept) == 1
    # Ranks that were started again wait for it: it may be their own earlier part.
    slept, sleep = watching(tmp_path / FILE, beats=True)
    with pytest.raises(UserError, match="is at work there"):
        acquire(tmp_path, stale_seconds=30, patience_seconds=3, sleep=sleep)
    assert len(slept) == 7, "four looks, and three pauses between them"
    slept, sleep = watching(tmp_path / FILE, beats=False)
    second = acquire(tmp_path, stale_seconds=2.5, sleep=sleep)
    assert sum(slept) == 2.5 and second.is_held() and not first.is_held()
    # It wakes up again: it ends before it records a step, and leaves the other's lease where it is.
    hook = LeaseHook(first)
    for look in (lambda: hook.before_step(3), lambda: hook.after_step(None)):
        with pytest.raises(LostLease, match="another run .* has taken it over; this run writes nothing more and ends"):
            look()
    first.release()
    assert second.is_held()
    second.release()


def test_what_is_no_lease_is_watched_too(tmp_path):
    """A run that died between making the file and filling it, or a file that somebody else made."""
    for content in (b"", b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"pid": true, "machine": null}'):
        (tmp_path / FILE).write_bytes(content)
        slept, sleep = watching(tmp_path / FILE, beats=False)
        lease = acquire(tmp_path, stale_seconds=1, sleep=sleep)
        assert slept == [1.0]
        lease.release()


def test_a_lease_that_is_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "lease.json").symlink_to("nowhere")
    with pytest.raises(UserError, match="leads nowhere"):
        acquire(tmp_path)


def test_the_faster_of_two_that_take_over_keeps_it(tmp_path, monkeypatch):
    path = tmp_path / FILE
    path.write_text("{}")
    faster = json.dumps({"machine": "elsewhere", "host": "node7", "pid": 7, "token": "faster"})
    original, renamed = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if not renamed:  # between the look at the stale lease and its removal
            path.unlink()
            path.write_text(faster)
        renamed.append(target)
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    slept, sleep = watching(path, beats=False)

    def alive_once_it_is_there(seconds: float) -> None:
        sleep(seconds)
        if renamed:
            os.utime(path, ns=(0, len(slept)))

    with pytest.raises(UserError, match=r"another run \(process 7 on node7\) is at work there"):
        acquire(tmp_path, stale_seconds=1, sleep=alive_once_it_is_there)
    assert path.read_text() == faster and len(renamed) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE]


def test_a_directory_with_a_lease_alone_is_empty_and_a_removed_lease_ends_the_run(tmp_path):
    lease = acquire(tmp_path / "run")
    check_run_directory(config_from_values(dict(model="m", run_dir=str(tmp_path / "run"))))
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(LostLease, match=r"lease.json was removed there"):
        lease.require_held()
    lease.release()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--run-dir \S+ cannot be used: lease.json: "):
        acquire(tmp_path / "file")
