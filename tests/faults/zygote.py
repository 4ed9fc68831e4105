"""A process that has imported everything and is forked for each command that a fault is to hit.

Importing torch and megatron-core costs many seconds, and a harness that starts hundreds of commands cannot pay it each
time. The zygote pays once. It runs no thread and no collective itself, so a fork of it is as good as a new process: a
session of its own, its output in files, its own environment, the real entry point, the real exit code.

The zygote is the subreaper of what its commands leave behind, so ``strays`` sees every process that outlives one.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from tests.faults.injector import Plan
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

PRELOAD = (
    "megatron_ktr.train",
    "megatron_ktr.evaluation.commands.evaluate",
    "megatron_ktr.evaluation.commands.options",
    "models.qwen2_5_vl.dist_checkpoint",
    "torch.utils.tensorboard",
    "tools.convert_checkpoint",
    "tools.evaluate",
    "tools.checkpoint",
)
SHARED_MEMORY = "shm"
"""The part of a job's folder that the process finds at /dev/shm."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Job:
    """One process to fork: ``entry`` is ``module:function``, which is called without arguments as a command line is."""

    entry: str
    arguments: tuple[str, ...]
    folder: Path
    """Where the process writes: faults are counted below it, its output goes to ``<label>.out`` and ``<label>.err``."""
    label: str
    plan: Plan = Plan()
    environment: Mapping[str, str] = field(default_factory=dict)
    network: str | None = None
    """The network namespace that the process lives in, by the name that ``ip netns`` knows."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """The exit code; of a process that died of a signal, minus its number."""
    out: str
    error: str


class Process:
    """A command under way."""

    def __init__(self, zygote: Zygote, job: Job, pid: int) -> None:
        self.pid = pid
        self.job = job
        self._zygote = zygote
        self._descriptor = os.pidfd_open(pid)

    def send(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._descriptor, number)

    @property
    def has_ended(self) -> bool:
        return bool(select.select([self._descriptor], [], [], 0.0)[0])

    @property
    def has_fired(self) -> bool:
        """Whether the moment of its plan came."""
        return _fired(self.job).exists()

    @property
    def cpu_seconds(self) -> float:
        fields = self._stat()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def is_stopped(self) -> bool:
        return self._stat()[0] == "T"

    def _stat(self) -> list[str]:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()

    def looks(self, pause_seconds: float) -> Iterator[None]:
        """For a loop that looks at the process again and again until it has ended. One that does not end within
        ``PATIENCE_SECONDS`` hangs, which is a finding of the harness and must not hang the harness itself."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.has_ended:
            if time.monotonic() >= deadline:
                self._give_up()
            yield
            time.sleep(pause_seconds)

    def _give_up(self) -> NoReturn:
        stacks = _stacks(self.pid)
        self.send(signal.SIGKILL)
        raise AssertionError(f"I5: {self.job.label} in {self.job.folder} does not end: {stacks}")

    def wait(self) -> Ended:
        """Waits for the end, at most ``PATIENCE_SECONDS``, and reaps the process."""
        if not select.select([self._descriptor], [], [], PATIENCE_SECONDS)[0]:
            self._give_up()
        os.close(self._descriptor)
        code = self._zygote.ask("reap", self.pid)
        texts = [(self.job.folder / f"{self.job.label}.{end}").read_text(errors="replace") for end in ("out", "err")]
        return Ended(code, *texts)


def _fired(job: Job) -> Path:
    return job.folder / f"{job.label}.fired"


def _stacks(pid: int) -> str:
    tasks = Path(f"/proc/{pid}/task")
    return ", ".join((task / "wchan").read_text() or "running" for task in tasks.iterdir())


class Zygote:
    """The harness's side. ``close`` ends it and everything that it has started."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = str(REPOSITORY)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=REPOSITORY,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        """Seeds may run side by side."""
        self._connection.recv()

    def ask(self, what: str, argument: Any = None) -> Any:
        with self._lock:
            self._connection.send((what, argument))
            return self._connection.recv()

    def start(self, job: Job) -> Process:
        job.folder.mkdir(parents=True, exist_ok=True)
        return Process(self, job, self.ask("fork", job))

    def warm(self, modules: Sequence[str]) -> None:
        """Imports what a first command had to import while it ran."""
        self.ask("import", list(modules))

    def strays(self) -> list[str]:
        """Command lines of processes that a finished command has left and that do not end by themselves."""
        end = time.monotonic() + PATIENCE_SECONDS
        while (found := self.ask("strays")) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def close(self) -> None:
        self._connection.close()
        self._process.wait()


# The zygote's side


def serve(connection: Connection) -> None:
    """Does what the harness asks for until it hangs up, and kills what is then still there."""
    running: set[int] = set()
    connection.send("ready")
    while True:
        try:
            what, argument = connection.recv()
        except EOFError:
            break
        if what == "fork":
            pid = os.fork()
            if pid == 0:
                connection.close()
                _become(argument)
            running.add(pid)
            connection.send(pid)
        elif what == "reap":
            running.discard(argument)
            connection.send(os.waitstatus_to_exitcode(os.waitpid(argument, 0)[1]))
        elif what == "import":
            connection.send(_import(argument))
        else:
            connection.send(_strays(running))
    for pid in _children():
        os.kill(pid, signal.SIGKILL)


def _import(names: Sequence[str], *, is_strict: bool = False) -> int:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # a part of a package that its users never import by name
            if is_strict:
                raise
            sys.modules.pop(name, None)
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, threading.enumerate()
    return len(sys.modules)


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _strays(running: set[int]) -> list[str]:
    found = []
    for pid in set(_children()) - running:
        try:
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip())
        except (ChildProcessError, FileNotFoundError):
            continue
    return found


def _become(job: Job) -> None:
    """In the fork: the command, to its end."""
    import torch

    from tests.faults.injector import install, write_counts
    from tests.faults.isolation import enter_network, with_shared_memory_in

    code = 99
    try:
        # torch makes its pool of threads anew in a fork. Two threads that are the first to need it at the same time
        # would meet in that ("Invalid thread pool!"), so it is made here, while there is one.
        torch.set_num_threads(1)
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in enumerate((os.devnull, f"{job.label}.out", f"{job.label}.err")):
            flags = os.O_RDWR | (os.O_CREAT | os.O_TRUNC if number else 0)
            os.dup2(os.open(job.folder / name if number else name, flags, 0o644), number)
        if job.network:
            enter_network(job.network)
        with_shared_memory_in(job.folder / SHARED_MEMORY)
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(variable, None)
        os.environ.update(job.environment)
        module, function = job.entry.split(":")
        sys.argv = [module, *job.arguments]
        injector = install(job.plan, root=job.folder, fired=_fired(job))
        before = set(sys.modules)
        try:
            from megatron_ktr.errors import run_cli

            run_cli(getattr(importlib.import_module(module), function))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        if job.plan.action == "count":
            write_counts(injector, job.folder / f"{job.label}.counts")
            (job.folder / f"{job.label}.modules").write_text("\n".join(sorted(set(sys.modules) - before)))
        # What the interpreter does at its end, without taking every object apart.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    import torch

    torch.set_num_threads(1)
    _import(PRELOAD, is_strict=True)
    # A ctrl-C at the terminal is for the harness, which hangs up when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))
    os._exit(0)


if __name__ == "__main__":
    main()
