"""One function an area: draws a fault from a seed, lets it happen to a real command, and checks every invariant.

A scenario gets the world, a random generator seeded by area and seed, and an empty folder. It returns the kind of the
fault, for the table, and whether it happened, and raises ``AssertionError`` if an invariant is broken.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ktr.errors import EXIT_USER
from megatron_ktr.run.directory import FINISHED_FILE
from tests.faults.damage import damage_checkpoint, damage_file
from tests.faults.injector import Plan, draw
from tests.faults.invariants import (
    check_checkpoints,
    check_clean,
    check_end,
    check_resumed,
    digests,
)
from tests.faults.network import network
from tests.faults.server_cuts import server_network
from tests.faults.serving import serving
from tests.faults.world import (
    CONVERT,
    EVALUATE,
    NO_FAULT,
    NUM_STEPS,
    TRAIN,
    Fault,
    World,
    check_finished,
    finish,
    flags_of,
)
from tests.faults.zygote import Process

Scenario = Callable[[World, random.Random, Path], Fault]
RESUMED: dict[str, Any] = dict(auto_resume=True)
BREAKS = ("kill", "torn", "full", "io")
FILES = ("open", "sync", "rename", "mkdir", "remove", "write")
LAST_STEP = (f"checkpoints/step_{NUM_STEPS:08d}", "export")
"""What a run writes after its last step."""


def resume(
    world: World, rng: random.Random, folder: Path, *, variant: str = "one rank", plan: Plan | None = None
) -> bool:
    """Starts the run again, until it is done, and compares it with the uninterrupted one. With ``plan`` the first
    attempt meets a fault, too. Returns whether it did."""
    has_fired = False
    run_dir = folder / "run"
    arguments = world.training(run_dir, variant, **RESUMED)
    for attempt, fault in enumerate((plan, None) if plan else (None,)):
        step = check_checkpoints(run_dir) if run_dir.exists() else 0
        process = world.start(TRAIN, arguments, folder, f"resumed{attempt}", plan=fault or NO_FAULT)
        ended = finish(process, rng=rng if fault else None)
        has_fired |= process.has_fired
        check_end(ended, **({} if fault else {"allowed": (0,)}))
        if ended.code == 0:
            check_resumed(run_dir, step=step, out=ended.out)
    check_finished(world, folder, variant=variant)
    return has_fired


def training(world: World, rng: random.Random, folder: Path) -> Fault:
    """A signal at a random moment of the process's own time, or at a phase or collective."""
    oracle = world.oracle()
    arguments = world.training(folder / "run")
    if rng.random() < 0.5:
        plan = draw(rng, oracle.counts, ("phase", "collective"), ("kill", "term", "stop", "interrupt"))
        process = world.start(TRAIN, arguments, folder, "faulted", plan=plan)
        ended = finish(process, rng=rng)
        fault = Fault(f"{plan.action} at a {plan.point}", process.has_fired)
    else:
        moment = rng.uniform(0.0, oracle.cpu_seconds)
        name = rng.choice(("SIGKILL", "SIGTERM", "SIGUSR1", "SIGSTOP"))
        process = world.start(TRAIN, arguments, folder, "faulted")
        _wait_for_moment(process, moment)
        is_in_time = not process.has_ended
        if is_in_time:
            process.send(signal.Signals[name])
        ended = finish(process, rng=rng)
        fault = Fault(f"{name} at any moment", is_in_time)
        if name == "SIGUSR1" and ended.code == -signal.SIGUSR1:  # before the run catches it
            ended = type(ended)(-signal.SIGTERM, ended.out, ended.error)
    check_end(ended)
    resume(world, rng, folder)
    return fault


def _wait_for_moment(process: Process, cpu_seconds: float) -> None:
    for _ in process.looks(0.002):
        if process.cpu_seconds >= cpu_seconds:
            return


def checkpoint(world: World, rng: random.Random, folder: Path) -> Fault:
    """The process dies, or the disk fails, at an operation on files."""
    plan = draw(rng, world.oracle().counts, FILES, BREAKS)
    process = world.start(TRAIN, world.training(folder / "run"), folder, "faulted", plan=plan)
    check_end(finish(process))
    resume(world, rng, folder)
    return Fault(f"{plan.action} at {plan.point}", process.has_fired)


def resuming(world: World, rng: random.Random, folder: Path) -> Fault:
    """Killed, and killed again while it resumes."""
    first = draw(rng, world.oracle().counts, ("phase",), ("kill",))
    process = world.start(TRAIN, world.training(folder / "run"), folder, "faulted", plan=first)
    check_end(finish(process))
    # A resumed run has less to do, the least of all one whose last step alone is missing.
    counts = world.counts_of_resumed(without=LAST_STEP)
    second = draw(rng, counts, (*FILES, "phase", "collective"), ("kill", "torn", "full", "stop"))
    has_fired = resume(world, rng, folder, plan=second)
    return Fault(f"kill, then {second.action} while resuming", process.has_fired and has_fired)


def two_ranks(world: World, rng: random.Random, folder: Path) -> Fault:
    """One of two ranks dies or stands still; the other one ends or waits, and both go on together."""
    oracle = world.oracle("two ranks")
    rank = rng.randrange(2)
    counts = dict(oracle.counts_of_ranks[rank])
    plan = draw(rng, counts, ("phase", "collective", "sync", "open"), ("kill", "stop", "term"))
    arguments = world.training(folder / "run", "two ranks")
    processes = world.start_ranks(TRAIN, arguments, folder, "faulted", world_size=2, plans={rank: plan})
    for process in (processes[rank], processes[1 - rank]):
        check_end(finish(process, rng=rng))
    if (folder / "run").exists():
        check_checkpoints(folder / "run")
    again = world.training(folder / "run", "two ranks", **RESUMED)
    for process in world.start_ranks(TRAIN, again, folder, "resumed", world_size=2):
        check_end(process.wait(), allowed=(0,))
    check_finished(world, folder, variant="two ranks")
    return Fault(f"{plan.action} on one of two ranks", processes[rank].has_fired)


def disk(world: World, rng: random.Random, folder: Path) -> Fault:
    """The file system of the run directory is too small, and then is not any more."""
    place = folder / "disk"
    place.mkdir()
    used = sum(path.stat().st_size for path in world.oracle().run_dir.rglob("*") if path.is_file())
    size = rng.randint(used // 20, 3 * used // 4)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if mounted.returncode:  # only root may; a disk that says it is full is the next best
        plan = draw(rng, world.oracle().counts, ("open", "sync", "mkdir", "write"), ("full",))
        process = world.start(TRAIN, world.training(folder / "run"), folder, "faulted", plan=plan)
        check_end(finish(process))
        resume(world, rng, folder)
        return Fault("disk full, as if", process.has_fired)
    try:
        (place / "run").mkdir()
        (folder / "run").symlink_to(place / "run")
        ended = finish(world.start(TRAIN, world.training(folder / "run"), folder, "faulted"))
        check_end(ended, allowed=(0, EXIT_USER))
        subprocess.run(["mount", "-o", f"remount,size={4 * used}", place], check=True)
        resume(world, rng, folder)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
    # Checkpoints and exports say it in words of their own.
    return Fault("small file system", "disk full" in ended.error or os.strerror(errno.ENOSPC) in ended.error)


def corruption(world: World, rng: random.Random, folder: Path) -> Fault:
    """The run's files are damaged between two starts."""
    run_dir = world.copy_run(folder, without=("export",))
    newest = sorted((run_dir / "checkpoints").glob("step_*"))
    num_damaged = rng.choice((1, 1, 1, 2, len(newest)))
    kinds = [damage_checkpoint(path, rng) for path in newest[-num_damaged:]]
    before = {path.name: digests(path) for path in newest}
    ended = world.run(TRAIN, world.training(run_dir, **RESUMED), folder, "resumed")
    if num_damaged == len(newest):
        check_end(ended, allowed=(EXIT_USER,))
        assert "is intact" in ended.error, f"I2: refused for another reason: {ended.error}"
        assert {path.name: digests(path) for path in newest} == before, "I5: files changed though nothing was intact"
        return Fault(f"{kinds[0]}, every checkpoint")
    check_end(ended, allowed=(0,))
    assert ended.error.count("set aside") == num_damaged, f"I2: not said: {ended.error}"
    check_finished(world, folder)
    return Fault(kinds[0])


def records(world: World, rng: random.Random, folder: Path) -> Fault:
    """metrics.jsonl, a file of rollouts or config.yaml is damaged: a line of error, or a run to the end."""
    run_dir = world.copy_run(folder, without=LAST_STEP)
    names = ["metrics.jsonl", "config.yaml", "rollouts/step_00000002.jsonl", "rollouts/step_00000004.jsonl"]
    path = run_dir / rng.choice(names)
    kind = damage_file(path, rng, kinds=("flip a bit", "flip 40 bytes", "cut", "empty", "append"))
    check_end(world.run(TRAIN, world.training(run_dir, **RESUMED), folder, "resumed"), allowed=(0, EXIT_USER))
    assert check_checkpoints(run_dir) >= NUM_STEPS - 1, "I5: a checkpoint is lost"
    return Fault(f"{kind}, {path.name if path.parent == run_dir else 'rollouts'}")


def export(world: World, rng: random.Random, folder: Path) -> Fault:
    """A run that is done but for its export dies there."""
    without = rng.choice((("export",), (FINISHED_FILE,)))
    run_dir = world.copy_run(folder, without=without)
    counts = world.counts_of_resumed(without=without)
    plan = draw(rng, counts, ("open", "rename", "sync", "mkdir", "write"), BREAKS)
    process = world.start(TRAIN, world.training(run_dir, **RESUMED), folder, "faulted", plan=plan)
    check_end(finish(process))
    if (run_dir / "export").exists():
        assert digests(run_dir / "export") == world.oracle().facts.weights, "I2: an export that is not whole"
    check_end(world.run(TRAIN, world.training(run_dir, **RESUMED), folder, "resumed"), allowed=(0,))
    check_finished(world, folder)
    return Fault(f"{plan.action} at {plan.point}", process.has_fired)


def conversion(world: World, rng: random.Random, folder: Path) -> Fault:
    """A conversion dies, meets a full disk, or is given a damaged checkpoint or export."""
    out, run_dir = folder / "out", world.oracle().run_dir
    is_to_hf = rng.random() < 0.5
    source = run_dir / "checkpoints" / f"step_{NUM_STEPS:08d}" if is_to_hf else run_dir / "export"
    command = ("to-hf", "--megatron") if is_to_hf else ("to-megatron", "--hf")
    expected = digests(_converted(world, command, source))
    if rng.random() < 0.4:
        shutil.copytree(source, folder / "source")
        kind = damage_checkpoint(folder / "source", rng)
        ended = world.run(CONVERT, (*command, str(folder / "source"), "--out", str(out)), folder, "faulted")
        if not (folder / "source" / "checksums.json").exists():
            check_end(ended, allowed=(0, EXIT_USER))
            return Fault(f"{kind}, source")
        check_end(ended, allowed=(EXIT_USER,))
        assert "source" in ended.error, f"I2: refused for another reason: {ended.error}"
        assert not out.exists(), "I2: made from a damaged source"
        return Fault(f"{kind}, source")
    counts = world.counts_of(world.folder, command[0])
    plan = draw(rng, counts, ("open", "rename", "sync", "mkdir", "write"), (*BREAKS, "stop", "interrupt"))
    process = world.start(CONVERT, (*command, str(source), "--out", str(out)), folder, "faulted", plan=plan)
    check_end(finish(process, rng=rng))
    if out.exists():
        assert digests(out) == expected, "I2: the target has its name and is not whole"
        shutil.rmtree(out)
    check_end(world.run(CONVERT, (*command, str(source), "--out", str(out)), folder, "again"), allowed=(0,))
    assert digests(out) == expected, "I3: the second conversion differs"
    check_clean(out)
    return Fault(f"{plan.action} at {plan.point}", process.has_fired)


def _converted(world: World, command: tuple[str, ...], source: Path) -> Path:
    out = world.folder / command[0]
    with world.making:
        if not out.exists():
            arguments = (*command, str(source), "--out", str(out))
            check_end(world.run(CONVERT, arguments, world.folder, command[0], plan=Plan()), allowed=(0,))
    return out


def evaluation(world: World, rng: random.Random, folder: Path) -> Fault:
    """An evaluation dies and is given the same command again."""

    def arguments(out: Path) -> tuple[str, ...]:
        model = world.inputs / "model"
        asked = dict(benchmark=world.inputs / "questions.json", frames=4, control="intact,hidden", data_workers=0)
        words = dict(prompt_template=model / "prompt_template.txt", temperature=0, max_tokens=6)
        return flags_of(dict(model=model, engine="hf", out=out) | asked | words)

    whole = world.folder / "evaluated"
    with world.making:
        if not whole.exists():
            plan = Plan()
            check_end(world.run(EVALUATE, arguments(whole), world.folder, "evaluated", plan=plan), allowed=(0,))
            world.warm_from(world.folder, "evaluated")
    counts = world.counts_of(world.folder, "evaluated")
    plan = draw(rng, counts, ("open", "sync", "rename", "remove"), (*BREAKS, "stop", "term", "interrupt"))
    out = folder / "out"
    process = world.start(EVALUATE, arguments(out), folder, "faulted", plan=plan)
    check_end(finish(process, rng=rng))
    check_end(world.run(EVALUATE, arguments(out), folder, "again"), allowed=(0,))
    found, expected = (read_answers(one) for one in (out, whole))
    assert found == expected, "I1: answers are lost, doubled or others than those of the uninterrupted evaluation"
    return Fault(f"{plan.action} at {plan.point}", process.has_fired)


def read_answers(out: Path) -> list[tuple[str, ...]]:
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    keys = ("benchmark", "item_id", "condition")
    return sorted((*(str(line[key]) for key in keys), str(line["answer"]["text"])) for line in lines)


def workers(world: World, rng: random.Random, folder: Path) -> Fault:
    """A process that decodes videos dies, or stands still for a while; or the run dies and leaves it alone."""
    oracle = world.oracle("data workers")
    process = world.start(TRAIN, world.training(folder / "run", "data workers"), folder, "faulted")
    moment = rng.uniform(0.0, oracle.cpu_seconds)
    action = rng.choice(("SIGKILL", "SIGSTOP", "SIGSEGV", "run killed"))
    children: list[int] = []
    for _ in process.looks(0.002):
        children = _children_of(process.pid)
        if children and process.cpu_seconds >= moment:
            break
    has_fired = False
    if not process.has_ended:
        if action == "run killed":
            process.send(signal.SIGKILL)
            has_fired = True
        else:
            has_fired = any([_signal(child, signal.Signals[action]) for child in children])
    if action == "SIGSTOP":
        threading.Event().wait(rng.uniform(0.0, 0.3))
        for child in children:
            _signal(child, signal.SIGCONT)
    ended = finish(process)
    check_end(ended)
    if action == "run killed":
        resume(world, rng, folder, variant="data workers")
    else:
        assert ended.code == 0, f"I1: the run ended with its worker: {ended.error}"
        check_finished(world, folder, variant="data workers")
    return Fault(f"{action} of a worker" if action != "run killed" else "SIGKILL of the run with workers", has_fired)


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:
        return []
    return found


def _signal(pid: int, number: signal.Signals) -> bool:
    """Whether the process was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


AREAS: dict[str, tuple[Scenario, int]] = {
    "training": (training, 40),
    "checkpoint writing": (checkpoint, 40),
    "resume": (resuming, 24),
    "two ranks": (two_ranks, 8),
    "network": (network, 6),
    "full disk": (disk, 8),
    "damaged checkpoints": (corruption, 24),
    "damaged records": (records, 12),
    "export": (export, 16),
    "conversion": (conversion, 24),
    "evaluation": (evaluation, 16),
    "data workers": (workers, 8),
    "rollout serving": (serving, 24),
    "server network": (server_network, 8),
}
"""By name: the scenario, and how many seeds CI runs."""
