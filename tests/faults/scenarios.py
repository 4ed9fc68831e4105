"""One function an area: draws a fault from a seed, lets it happen to a real command, and checks every invariant.

A scenario gets the world, a random generator seeded by area and seed, and an empty folder. It returns the kind of the
fault, for the table, and raises ``AssertionError`` if an invariant is broken.
"""

from __future__ import annotations

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
from tests.faults.injector import Plan
from tests.faults.invariants import (
    check_checkpoints,
    check_clean,
    check_close,
    check_end,
    check_resumed,
    check_same,
    digests,
    facts_of,
)
from tests.faults.serving import serving
from tests.faults.world import CONVERT, EVALUATE, NO_FAULT, NUM_STEPS, TRAIN, World, finish, flags_of
from tests.faults.zygote import Process

Scenario = Callable[[World, random.Random, Path], str]
RESUMED: dict[str, Any] = dict(auto_resume=True)
FILES = ("open", "sync", "rename", "mkdir", "remove", "write")


def draw(rng: random.Random, counts: dict[str, int], points: tuple[str, ...], actions: tuple[str, ...]) -> Plan:
    """A plan at one of ``points`` that the command reaches."""
    point = rng.choice([name for name in points if counts.get(name)])
    action = rng.choice([name for name in actions if name != "torn" or point in ("open", "write")])
    return Plan(point, rng.randint(1, counts[point]), action)


def resume(
    world: World, rng: random.Random, folder: Path, *, variant: str = "one rank", plan: Plan | None = None
) -> None:
    """Starts the run again, until it is done, and compares it with the uninterrupted one. With ``plan`` the first
    attempt meets a fault, too."""
    run_dir = folder / "run"
    arguments = world.training(run_dir, variant, **RESUMED)
    for attempt, fault in enumerate((plan, None) if plan else (None,)):
        step = check_checkpoints(run_dir) if run_dir.exists() else 0
        process = world.start(TRAIN, arguments, folder, f"resumed{attempt}", plan=fault or NO_FAULT)
        ended = finish(process, rng=rng if fault else None)
        check_end(ended, **({} if fault else {"allowed": (0,)}))
        if ended.code == 0:
            check_resumed(run_dir, step=step, out=ended.out)
    _check_finished(world, folder, variant=variant)


def _check_finished(world: World, folder: Path, *, variant: str = "one rank") -> None:
    run_dir = folder / "run"
    check_checkpoints(run_dir)
    check = check_close if variant == "data workers" else check_same
    check(facts_of(run_dir, num_steps=NUM_STEPS), world.oracle(variant).facts)
    check_clean(run_dir)
    strays = world.zygote.strays()
    assert not strays, f"I4: still running: {strays}"


def training(world: World, rng: random.Random, folder: Path) -> str:
    """A signal at a random moment of the process's own time, or at a phase or collective."""
    oracle = world.oracle()
    arguments = world.training(folder / "run")
    if rng.random() < 0.5:
        plan = draw(rng, dict(oracle.counts), ("phase", "collective"), ("kill", "term", "stop", "interrupt"))
        ended = finish(world.start(TRAIN, arguments, folder, "faulted", plan=plan), rng=rng)
        kind = f"{plan.action} at a {plan.point}"
    else:
        moment = rng.uniform(0.0, oracle.cpu_seconds)
        name = rng.choice(("SIGKILL", "SIGTERM", "SIGUSR1", "SIGSTOP"))
        process = world.start(TRAIN, arguments, folder, "faulted")
        _wait_for_moment(process, moment)
        if not process.has_ended:
            process.send(signal.Signals[name])
        ended = finish(process, rng=rng)
        kind = f"{name} at any moment"
        if name == "SIGUSR1" and ended.code == -signal.SIGUSR1:  # before the run catches it
            ended = type(ended)(-signal.SIGTERM, ended.out, ended.error)
    check_end(ended)
    resume(world, rng, folder)
    return kind


def _wait_for_moment(process: Process, cpu_seconds: float) -> None:
    while not process.has_ended and process.cpu_seconds < cpu_seconds:
        threading.Event().wait(0.002)


def checkpoint(world: World, rng: random.Random, folder: Path) -> str:
    """The process dies, or the disk fails, at an operation on files."""
    plan = draw(rng, dict(world.oracle().counts), FILES, ("kill", "torn", "full", "io"))
    ended = finish(world.start(TRAIN, world.training(folder / "run"), folder, "faulted", plan=plan))
    check_end(ended)
    resume(world, rng, folder)
    return f"{plan.action} at {plan.point}"


def resuming(world: World, rng: random.Random, folder: Path) -> str:
    """Killed, and killed again while it resumes."""
    counts = dict(world.oracle().counts)
    first = draw(rng, counts, ("phase",), ("kill",))
    check_end(finish(world.start(TRAIN, world.training(folder / "run"), folder, "faulted", plan=first)))
    # A resumed run has less to do; a plan beyond its end would be no fault.
    few = {name: max(1, number // 4) for name, number in counts.items()}
    second = draw(rng, few, (*FILES, "phase", "collective"), ("kill", "torn", "full", "stop"))
    resume(world, rng, folder, plan=second)
    return f"kill, then {second.action} while resuming"


def two_ranks(world: World, rng: random.Random, folder: Path) -> str:
    """One of two ranks dies or stands still; the other one ends or waits, and both go on together."""
    oracle = world.oracle("two ranks")
    rank = rng.randrange(2)
    plan = draw(rng, dict(oracle.counts), ("phase", "collective", "sync", "open"), ("kill", "stop", "term"))
    arguments = world.training(folder / "run", "two ranks")
    processes = world.start_ranks(TRAIN, arguments, folder, "faulted", world_size=2, plans={rank: plan})
    for process in (processes[rank], processes[1 - rank]):
        check_end(finish(process, rng=rng))
    check_checkpoints(folder / "run") if (folder / "run").exists() else 0
    again = world.training(folder / "run", "two ranks", **RESUMED)
    for process in world.start_ranks(TRAIN, again, folder, "resumed", world_size=2):
        check_end(process.wait(), allowed=(0,))
    _check_finished(world, folder, variant="two ranks")
    return f"{plan.action} on one of two ranks"


def disk(world: World, rng: random.Random, folder: Path) -> str:
    """The file system of the run directory is too small, and then is not any more."""
    place = folder / "disk"
    place.mkdir()
    used = sum(path.stat().st_size for path in world.oracle().run_dir.rglob("*") if path.is_file())
    size = rng.randint(used // 20, used)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if mounted.returncode:  # only root may; a disk that says it is full is the next best
        plan = draw(rng, dict(world.oracle().counts), ("open", "sync", "mkdir", "write"), ("full",))
        check_end(finish(world.start(TRAIN, world.training(folder / "run"), folder, "faulted", plan=plan)))
        resume(world, rng, folder)
        return "disk full, as if"
    try:
        (place / "run").mkdir()
        (folder / "run").symlink_to(place / "run")
        check_end(finish(world.start(TRAIN, world.training(folder / "run"), folder, "faulted")), allowed=(0, EXIT_USER))
        subprocess.run(["mount", "-o", f"remount,size={4 * used}", place], check=True)
        resume(world, rng, folder)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
    return "small file system"


def corruption(world: World, rng: random.Random, folder: Path) -> str:
    """The run's files are damaged between two starts."""
    source = world.oracle().run_dir
    shutil.copytree(source, folder / "run")
    run_dir = folder / "run"
    newest = sorted((run_dir / "checkpoints").glob("step_*"))
    shutil.rmtree(run_dir / "export")
    num_damaged = rng.choice((1, 1, 1, 2, len(newest)))
    kinds = [damage_checkpoint(path, rng) for path in newest[-num_damaged:]]
    before = {path.name: digests(path) for path in newest}
    ended = world.run(TRAIN, world.training(run_dir, **RESUMED), folder, "resumed")
    if num_damaged == len(newest):
        check_end(ended, allowed=(EXIT_USER,))
        assert "is intact" in ended.error, f"I2: refused for another reason: {ended.error}"
        assert {path.name: digests(path) for path in newest} == before, "I5: files changed though nothing was intact"
        return f"{kinds[0]}, every checkpoint"
    check_end(ended, allowed=(0,))
    assert ended.error.count("set aside") == num_damaged, f"I2: not said: {ended.error}"
    _check_finished(world, folder)
    return kinds[0]


def records(world: World, rng: random.Random, folder: Path) -> str:
    """metrics.jsonl, a file of rollouts, config.yaml or best.json is damaged: a line of error, or a run to the end."""
    shutil.copytree(world.oracle().run_dir, folder / "run")
    run_dir = folder / "run"
    shutil.rmtree(run_dir / "checkpoints" / f"step_{NUM_STEPS:08d}")
    shutil.rmtree(run_dir / "export")
    names = ["metrics.jsonl", "config.yaml", "rollouts/step_00000002.jsonl", "rollouts/step_00000004.jsonl"]
    path = run_dir / rng.choice(names)
    kind = damage_file(path, rng, kinds=("flip a bit", "flip 40 bytes", "cut", "empty", "append"))
    check_end(world.run(TRAIN, world.training(run_dir, **RESUMED), folder, "resumed"), allowed=(0, EXIT_USER))
    assert check_checkpoints(run_dir) >= NUM_STEPS - 1, "I5: a checkpoint is lost"
    return f"{kind}, {path.name if path.parent == run_dir else 'rollouts'}"


def export(world: World, rng: random.Random, folder: Path) -> str:
    """A run that is done but for its export dies there."""
    shutil.copytree(world.oracle().run_dir, folder / "run")
    if rng.random() < 0.5:
        shutil.rmtree(folder / "run" / "export")
    else:
        (folder / "run" / FINISHED_FILE).unlink()
    plan = Plan(rng.choice(("open", "rename", "sync", "mkdir", "write")), 0, rng.choice(("kill", "torn", "full", "io")))
    if plan.action == "torn" and plan.point not in ("open", "write"):
        plan = Plan("open", 0, "torn")
    most = {"open": 12, "rename": 5, "sync": 12, "mkdir": 3, "write": 100}[plan.point]
    plan = Plan(plan.point, rng.randint(1, most), plan.action)
    check_end(finish(world.start(TRAIN, world.training(folder / "run", **RESUMED), folder, "faulted", plan=plan)))
    if (folder / "run" / "export").exists():
        assert digests(folder / "run" / "export") == world.oracle().facts.weights, "I2: an export that is not whole"
    check_end(world.run(TRAIN, world.training(folder / "run", **RESUMED), folder, "resumed"), allowed=(0,))
    _check_finished(world, folder)
    return f"{plan.action} at {plan.point}"


def conversion(world: World, rng: random.Random, folder: Path) -> str:
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
            return f"{kind}, source"
        check_end(ended, allowed=(EXIT_USER,))
        assert "source" in ended.error, f"I2: refused for another reason: {ended.error}"
        assert not out.exists(), "I2: made from a damaged source"
        return f"{kind}, source"
    most = {"open": 8, "rename": 1, "sync": 8, "mkdir": 2, "write": 200}
    plan = draw(rng, most, tuple(most), ("kill", "torn", "full", "io", "stop", "interrupt"))
    ended = finish(
        world.start(CONVERT, (*command, str(source), "--out", str(out)), folder, "faulted", plan=plan), rng=rng
    )
    check_end(ended)
    if out.exists():
        assert digests(out) == expected, "I2: the target has its name and is not whole"
        shutil.rmtree(out)
    check_end(world.run(CONVERT, (*command, str(source), "--out", str(out)), folder, "again"), allowed=(0,))
    assert digests(out) == expected, "I3: the second conversion differs"
    check_clean(out)
    return f"{plan.action} at {plan.point}"


def _converted(world: World, command: tuple[str, ...], source: Path) -> Path:
    out = world.folder / command[0]
    with world.making:
        if not out.exists():
            check_end(
                world.run(CONVERT, (*command, str(source), "--out", str(out)), world.folder, command[0]), allowed=(0,)
            )
    return out


def evaluation(world: World, rng: random.Random, folder: Path) -> str:
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
    plan = draw(rng, world.counts_of(world.folder, "evaluated"), ("open", "sync", "rename", "remove"), ACTIONS_OF_TOOLS)
    out = folder / "out"
    ended = finish(world.start(EVALUATE, arguments(out), folder, "faulted", plan=plan), rng=rng)
    check_end(ended)
    check_end(world.run(EVALUATE, arguments(out), folder, "again"), allowed=(0,))
    found, expected = (read_answers(one) for one in (out, whole))
    assert found == expected, "I1: answers are lost, doubled or others than those of the uninterrupted evaluation"
    return f"{plan.action} at {plan.point}"


ACTIONS_OF_TOOLS = ("kill", "torn", "full", "io", "stop", "term", "interrupt")


def read_answers(out: Path) -> list[tuple[str, ...]]:
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    keys = ("benchmark", "item_id", "condition")
    return sorted((*(str(line[key]) for key in keys), str(line["answer"]["text"])) for line in lines)


def workers(world: World, rng: random.Random, folder: Path) -> str:
    """A process that decodes videos dies, or stands still for a while; or the run dies and leaves it alone."""
    oracle = world.oracle("data workers")
    process = world.start(TRAIN, world.training(folder / "run", "data workers"), folder, "faulted")
    moment = rng.uniform(0.0, oracle.cpu_seconds)
    action = rng.choice(("SIGKILL", "SIGSTOP", "SIGSEGV", "run killed"))
    children: list[int] = []
    while not process.has_ended and not (children and process.cpu_seconds >= moment):
        children = _children_of(process.pid)
        threading.Event().wait(0.002)
    if not process.has_ended:
        if action == "run killed":
            process.send(signal.SIGKILL)
        else:
            for child in children:
                _signal(child, signal.Signals[action])
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
        _check_finished(world, folder, variant="data workers")
    return f"{action} of a worker" if action != "run killed" else "SIGKILL of the run with workers"


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:
        return []
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


AREAS: dict[str, tuple[Scenario, int]] = {
    "training": (training, 40),
    "checkpoint writing": (checkpoint, 40),
    "resume": (resuming, 24),
    "two ranks": (two_ranks, 8),
    "full disk": (disk, 8),
    "damaged checkpoints": (corruption, 24),
    "damaged records": (records, 12),
    "export": (export, 16),
    "conversion": (conversion, 24),
    "evaluation": (evaluation, 16),
    "data workers": (workers, 8),
    "rollout serving": (serving, 24),
}
"""By name: the scenario, and how many seeds CI runs."""
