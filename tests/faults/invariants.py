"""What must hold after every fault. Each check raises ``AssertionError`` in words.

I1  no step is lost beyond the last good checkpoint, and none is done twice
I2  nothing damaged is used
I3  the resumed run equals the uninterrupted one to the bit
I4  nothing is left behind: no process, no scratch file, no lock
I5  an error is one line with a documented exit code, and nothing that was good is lost
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ktr import errors
from megatron_ktr.errors import (
    EXIT_ALARM,
    EXIT_HANG,
    EXIT_INTERNAL,
    EXIT_OTHER_RANK,
    EXIT_OUTPUT_CLOSED,
    EXIT_TRANSIENT,
    EXIT_USER,
)
from megatron_ktr.files.checksums import find_damage
from megatron_ktr.run.directory import ABANDONED_START, list_checkpoints
from tests.faults.zygote import Ended

ERRORS = {EXIT_USER, EXIT_TRANSIENT, EXIT_OTHER_RANK}
DOCUMENTED = {0, *(getattr(errors, name) for name in vars(errors) if name.startswith("EXIT_"))}
"""Every code that the program gives itself; ``docs/launching.md`` says what they mean."""
EXPECTED = DOCUMENTED - {EXIT_INTERNAL, EXIT_ALARM, EXIT_HANG, EXIT_OUTPUT_CLOSED} | {-signal.SIGKILL, -signal.SIGTERM}
"""Those with which a command may end after a fault, where a scenario does not say otherwise: not by a mistake of the
program, nor by an alarm or a hang that nobody has caused."""
VARIES = (
    *("second", "tflops", "mfu", "sampler_check", "vision_runs_per_prompt", "data_wait_fraction"),
    *("data_workers/", "ranks/", "server/"),
)
"""Parts of the names of metrics that measure time or memory, that say what a worker or a server did, or that only the
first step after a start has."""


@dataclass(frozen=True)
class Facts:
    """What two runs are compared by."""

    metrics: dict[int, dict[str, Any]]
    rollouts: dict[str, Any]
    weights: dict[str, str]


def check_end(ended: Ended, *, allowed: Iterable[int] = EXPECTED) -> None:
    """I5."""
    said = f"exit code {ended.code}\n{ended.out[-600:]}\n{ended.error[-3000:]}"
    assert "Traceback" not in ended.error + ended.out, f"I5: a traceback: {said}"
    assert ended.code in DOCUMENTED or ended.code < 0, f"I5: no documented exit code: {said}"
    assert ended.code in set(allowed), f"I5: expected to end with one of {sorted(allowed)}: {said}"
    errors = [line for line in ended.error.splitlines() if line.startswith("error")]
    if ended.code in ERRORS:
        assert len(errors) == 1, f"I5: expected one line of error: {said}"


def check_checkpoints(run_dir: Path) -> int:
    """I2: whatever has the name of a checkpoint is whole. Returns the step of the newest, 0 without one."""
    found = list_checkpoints(run_dir)
    for _, path in found:
        damage = find_damage(path)
        assert not damage, f"I2: {path} has its final name and is damaged: {damage[0]}"
    return found[-1][0] if found else 0


def check_resumed(run_dir: Path, *, step: int, out: str) -> None:
    """I1: the run went on from the checkpoint of ``step``, or said that nothing is left to do after it."""
    if "the run is finished" in out:
        assert f"all {step} steps are done" in out, f"I1: the newest intact checkpoint is of step {step}: {out}"
        return
    firsts = [line for line in out.splitlines() if line.startswith("[") and "step " in line]
    if firsts:
        first = int(firsts[0].split("step ")[1].split("/")[0])
        assert first == step + 1, f"I1: resumed with step {first}; the newest intact checkpoint is of step {step}"
    if step:
        assert list(run_dir.glob(f"config_from_step_{step + 1:08d}*.yaml")), f"I1: not resumed from step {step}"


def facts_of(run_dir: Path, *, num_steps: int) -> Facts:
    """Reads a finished run. I1: every step is recorded once."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == list(range(1, num_steps + 1)), f"I1: metrics.jsonl has the steps {steps}"
    metrics = {
        record["step"]: {name: value for name, value in record.items() if not any(part in name for part in VARIES)}
        for record in records
    }
    rollouts = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))
    }
    return Facts(metrics, rollouts, digests(run_dir / "export"))


def digests(directory: Path) -> dict[str, str]:
    """Of every file of weights; of an export or a converted checkpoint."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.suffix in (".safetensors", ".distcp")
    }


def check_same(found: Facts, expected: Facts) -> None:
    """I3."""
    _check_steps(found, expected)
    assert found.weights and found.weights == expected.weights, "I3: the exported weights differ"


def _check_steps(found: Facts, expected: Facts, *, before: float = math.inf) -> None:
    for step, record in expected.metrics.items():
        if step >= before:
            break
        ours = found.metrics[step]
        differing = {
            name: (ours.get(name), record.get(name)) for name in ours | record if ours.get(name) != record.get(name)
        }
        assert not differing, f"I3: step {step} differs from the uninterrupted run: {differing}"
    assert found.rollouts.keys() == expected.rollouts.keys(), f"I3: rollouts of {sorted(found.rollouts)}"
    for name, lines in expected.rollouts.items():
        if int(name.removeprefix("step_")[:8]) < before:
            assert found.rollouts[name] == lines, f"I3: {name} differs from the uninterrupted run"


def check_same_but_for_skips(found: Facts, expected: Facts) -> None:
    """I3 where data workers decode: a worker that dies may cost its sample, and from there on the run has other
    prompts. With sampling one step ahead, a sample that is skipped is counted one step after the batch that it would
    have been in. A batch of other prompts has another padding, so even the prompts that stayed have log-probs that
    differ in their last digits."""
    skips = [
        step
        for step, record in expected.metrics.items()
        if found.metrics[step].get("num_skipped") != record.get("num_skipped")
    ]
    if not skips:
        check_same(found, expected)
        return
    _check_steps(found, expected, before=min(skips) - 1)


def check_clean(*directories: Path) -> None:
    """I4: no scratch file is left in finished work. Scratch files of this project have hidden names; so has the one
    file of megatron-core's format that stays."""
    for directory in directories:
        # What could not be removed (a disk that refuses it) is set aside with the rest of a start without a checkpoint.
        found = [path for path in directory.rglob(".*") if path.name != ".metadata"]
        left = [path for path in found if ABANDONED_START not in path.relative_to(directory).parts]
        assert not left, f"I4: left behind: {', '.join(map(str, left))}"


def check_nothing_left(scratch: Path, shared_memory: Path) -> None:
    """I4, when all commands of a fault have ended: their TMPDIR and their /dev/shm are empty. A file of shared memory,
    a temporary file and a socket that somebody could connect to would lie there."""
    for directory in (scratch, shared_memory):
        left = sorted(str(path.relative_to(directory)) for path in directory.rglob("*")) if directory.exists() else []
        assert not left, f"I4: left behind in {directory.name}: {', '.join(left)}"
