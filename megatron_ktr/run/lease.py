"""One run at a time in a run directory: rank 0 holds ``lease.json`` there, and writes nothing once it has lost it.

    {"host": "node7", "machine": "...", "pid": 4711, "started": "8123", "token": "..."}

The file is made with O_EXCL, so of two runs that begin at once one gets it, on NFS too. While the run lasts, a thread
touches the file every few seconds. Another run that finds it there

- takes it over at once if the process that holds it is dead (it looks, where it is on the same machine),
- is refused at once if that process is alive,
- watches the file where the process is on another machine: it is refused if the file is touched meanwhile, and takes it
  over otherwise.

Ranks that torchrun has started again wait for a while instead of being refused: what holds the lease may be their own
earlier part, on a node that was cut off, until its timeout ends it.

A run that was taken for dead and wakes up again (a machine that was cut off, a process that was stopped) finds another
token in the file. It looks before and after each step and before everything it does to checkpoints, and then ends. What
it had begun to write at that moment may still arrive: checkpoints appear by a rename after such a look, so that leaves
a window of one rename, not of one checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.run.hook import StepHook, Stop
from megatron_ktr.run.step_report import StepReport

FILE = "lease.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
"""For how long a lease of another machine must stay untouched before it is taken over."""
RESTART_PATIENCE_SECONDS = 600.0
"""For how long ranks that were started again wait for a run that is alive."""
_MOST_BYTES = 4096
_log = logging.getLogger(__name__)


class LostLease(UserError):
    """Another run has taken the run directory over. No option makes a run go on after that."""


class Lease:
    """A lease that this process holds. ``acquire`` makes one."""

    def __init__(self, path: Path, *, token: str, descriptor: int, beat_seconds: float) -> None:
        self._path = path
        self._token = token
        self._descriptor = descriptor
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(beat_seconds,), name="lease", daemon=True)
        self._thread.start()

    def is_held(self) -> bool:
        """Whether the file still names this run; also True if it cannot be read now, because that says nothing."""
        for attempt in range(5):
            try:
                holder = _read(self._path)
            except FileNotFoundError:
                # Another run that looks at the lease may hold it in its hands for a moment.
                time.sleep(0.1 * attempt)
                continue
            except OSError:
                return True
            return holder.get("token") == self._token
        return False

    def require_held(self) -> None:
        """Raises ``LostLease`` if another run has taken the directory over, or the file was removed."""
        if self.is_held():
            return
        try:
            by = f"{_words(_read(self._path))} has taken it over"
        except OSError:
            by = f"{FILE} was removed there"
        raise LostLease(f"--run-dir {self._path.parent}: {by}; this run writes nothing more and ends")

    def release(self) -> None:
        """Lets the next run begin. Does nothing to a lease that another run holds."""
        self._ended.set()
        self._thread.join()
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            if _read(self._path).get("token") == self._token:
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _beat(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            # By the open file: that of another run is never touched.
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def acquire(
    run_dir: Path,
    *,
    beat_seconds: float = BEAT_SECONDS,
    stale_seconds: float = STALE_SECONDS,
    patience_seconds: float = 0.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Takes the lease of ``run_dir``, which is made if it does not exist. For ``patience_seconds`` it waits for a run
    that is alive.

    Raises:
        UserError: another run is at work there, or the file cannot be written.
    """
    path = run_dir / FILE
    token = uuid.uuid4().hex
    waited = 0.0
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                try:
                    _remove_if_stale(path, token=token, stale_seconds=stale_seconds, sleep=sleep)
                except UserError:
                    if waited >= patience_seconds:
                        raise
                    sleep(1.0)
                    waited += 1.0
                continue
            break
        try:
            os.write(descriptor, (json.dumps(_self() | {"token": token}) + "\n").encode())
            os.fsync(descriptor)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"--run-dir {run_dir} cannot be used: {FILE}: {error.strerror or error}") from error
    return Lease(path, token=token, descriptor=descriptor, beat_seconds=beat_seconds)


def patience_of_launch() -> float:
    """The seconds to wait for a run that is alive: some where torchrun has started these ranks again, else none."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "").strip()
    return RESTART_PATIENCE_SECONDS if count.isdecimal() and int(count) > 0 else 0.0


def _remove_if_stale(path: Path, *, token: str, stale_seconds: float, sleep: Callable[[float], None]) -> None:
    """Returns when the lease that is there may be tried again: it is gone, or nobody held it any more."""
    try:
        holder, touched = _read(path), _touched(path)
    except FileNotFoundError:
        return
    if holder.get("machine") == _machine():
        pid = holder.get("pid")
        is_alive = isinstance(pid, int) and pid != os.getpid() and _start_of(pid) == holder.get("started")
        if is_alive:
            raise _refusal(path, holder)
    else:
        _log.warning("%s is of %s: watching for %g s whether it is alive", path, _words(holder), stale_seconds)
        waited = 0.0
        while waited < stale_seconds:
            pause = min(1.0, stale_seconds - waited)
            sleep(pause)
            waited += pause
            try:
                if _touched(path) != touched:
                    raise _refusal(path, holder)
            except FileNotFoundError:
                return
    _log.warning("%s was left by %s, which is dead: this run takes the directory over", path, _process(holder))
    aside = path.with_name(f".{path.name}.{token}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != holder:
        # Another run was faster, and this is its lease: it gets it back.
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _refusal(path: Path, holder: dict[str, Any]) -> UserError:
    return UserError(
        f"--run-dir {path.parent}: {_words(holder)} is at work there; end it, choose another directory, or, if that "
        f"is no run, delete {path}"
    )


def _words(holder: dict[str, Any]) -> str:
    return f"another run ({_process(holder)})"


def _process(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"


def _read(path: Path) -> dict[str, Any]:
    """The content; empty if it is no lease, as where a run died while writing it."""
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES)
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _touched(path: Path) -> int:
    # A file server may remember attributes for a minute; opening a file asks it anew.
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _start_of(pid)}


def _machine() -> str:
    """What two processes share if they see each other's process ids: the boot of the machine and the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(pid: int) -> str | None:
    """When a living process started, in the system's own words; None if it is dead, or has only not been reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
        return _alive_without_proc(pid)
    except OSError:
        return None
    # The name, in parentheses, may hold anything.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _alive_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


class LeaseHook(StepHook):
    """Ends a run that another one has taken over, before it records a step. Only rank 0 holds a lease; if it ends, the
    launcher ends the others."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    def before_step(self, step: int) -> None:
        self._lease.require_held()

    def after_step(self, report: StepReport) -> Stop | None:
        self._lease.require_held()
        return None
