"""Which checkpoints of a run are kept: the newest ones, those of every N-th step, and the best one.

``--keep-checkpoints`` counts verified ones: checkpoints that were read again after they were written, and were what had
been written. A checkpoint goes only when so many newer ones are verified, so a damaged one never costs a good one its
place. Checkpoints of steps that ``--keep-every`` divides stay for ever, and with ``--keep-best METRIC`` the best one.

That is the checkpoint of the step in which a metric of evaluation is highest, or a loss lowest. ``best.json`` names it:

    {"metric": "eval/held_out/accuracy", "step": 30, "value": 0.71, "checkpoint": "checkpoints/step_00000030"}

Of equal values the earliest counts, and a value that is not a number never does. A new best step is a candidate until
its checkpoint is verified. Until then the old best checkpoint stays, and ``best.json`` names it.

A resumed run takes the best step from ``metrics.jsonl``: of the steps that it does not do again, and whose checkpoints
are there. So it needs no memory of its own, and ``--keep-best`` may name another metric than before, which is then
said. A metric is of one thing as long as the run lasts (``evaluation/training/same_sets.py``). A checkpoint that
``best.json`` does not name is verified first: the part of the run that wrote it may not have come to that.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_ktr.distributed.agreement import on_every_rank, result_of_rank_zero
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.shared_verification import SharedVerification
from megatron_ktr.errors import UserError
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.run.directory import CHECKPOINTS, list_checkpoints, step_name
from megatron_ktr.run.metrics import read_records, rounded

FILE = "best.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestStep:
    """An evaluated step and the value of the metric there."""

    step: int
    value: float


class BestCheckpoint:
    """Knows the best step so far. Every rank holds one and gives it the same values, so that all decide alike."""

    def __init__(self, metric: str, *, kept: BestStep | None = None) -> None:
        self.metric = metric
        self.kept = kept
        """The best step whose checkpoint is verified."""
        self.candidate: BestStep | None = None
        """A better step whose checkpoint is not verified yet."""
        self.named = kept
        """The step that ``best.json`` names, on the rank that writes it. It is behind while the disk is full."""

    @property
    def steps(self) -> frozenset[int]:
        """The steps whose checkpoints must stay."""
        return frozenset(best.step for best in (self.kept, self.candidate, self.named) if best is not None)

    def take(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether ``step`` is the best so far. It is then the candidate, until ``publish``."""
        value = rounded(values.get(self.metric, math.nan))
        best = self.candidate or self.kept
        if not math.isfinite(value) or (best is not None and not _is_better(value, best.value, self.metric)):
            return False
        self.candidate = BestStep(step, value)
        return True

    def is_candidate(self, step: int) -> bool:
        return self.candidate is not None and self.candidate.step == step

    def publish(self, step: int) -> bool:
        """The checkpoint of ``step`` is verified. Whether that makes it the best one."""
        if not self.is_candidate(step):
            return False
        self.kept, self.candidate = self.candidate, None
        return True

    def drop(self, step: int) -> None:
        """The checkpoint of ``step`` is damaged, or could not be written: it is a candidate no longer."""
        if self.is_candidate(step):
            self.candidate = None

    def write(self, run_dir: Path) -> None:
        """Writes ``best.json``, or removes it if there is no best step yet.

        Raises:
            UserError: it cannot be written.
        """
        path = run_dir / FILE
        try:
            if self.kept is None:
                path.unlink(missing_ok=True)
                self.named = None
                return
            checkpoint = f"{CHECKPOINTS}/{step_name(self.kept.step)}"
            content = {"metric": self.metric, "step": self.kept.step, "value": self.kept.value}
            write_atomically(path, json.dumps({**content, "checkpoint": checkpoint}, indent=1) + "\n")
            self.named = self.kept
        except OSError as error:
            raise UserError(f"--run-dir: cannot write {path}: {error.strerror}") from error


def open_best(run_dir: Path, *, metric: str | None, start_step: int, ranks: ParallelGroups) -> BestCheckpoint | None:
    """What a run that continues after ``start_step`` (0: a new one) knows of its best checkpoint; None without a
    metric. ``best.json`` says the same afterwards. Collective over the world."""

    found = (
        [] if metric is None else result_of_rank_zero(lambda: _found(run_dir, metric, until=start_step), ranks=ranks)
    )
    shared, kept = SharedVerification(ranks), None
    for best, is_verified in found:
        path = run_dir / CHECKPOINTS / step_name(best.step)
        damage = [] if is_verified or best.step == start_step else shared.verify(path)
        if not damage:
            kept = best
            break
        if ranks.rank == 0:
            _log.warning("%s is damaged (%s): another checkpoint is the best one", path, damage[0])
    on_every_rank(lambda: _write_best(run_dir, metric, kept) if ranks.rank == 0 else None, ranks=ranks)
    return None if metric is None else BestCheckpoint(metric, kept=kept)


def _write_best(run_dir: Path, metric: str | None, kept: BestStep | None) -> None:
    named = named_best(run_dir)
    if metric is not None and named is not None and named.metric != metric:
        now = "there is none so far" if kept is None else f"it is that of step {kept.step}"
        _log.warning(
            "%s named the checkpoint of step %s as the best by %s; by %s %s", run_dir / FILE, *named, metric, now
        )
    BestCheckpoint(metric or "", kept=kept).write(run_dir)


def _found(run_dir: Path, metric: str, *, until: int) -> list[tuple[BestStep, bool]]:
    """The evaluated steps whose checkpoints are there, the best one first, and whether ``best.json`` names the step, as
    it does only for verified checkpoints."""
    kept = {step for step, _ in list_checkpoints(run_dir) if step <= until}
    named = named_best(run_dir)
    values: dict[int, float] = {}
    for record in read_records(run_dir):
        step, value = record["step"], record.get(metric)
        if step in kept and isinstance(value, int | float) and abs(value) <= sys.float_info.max:
            values.setdefault(step, float(value))
    sign = 1 if _is_loss(metric) else -1
    ordered = sorted(values.items(), key=lambda one: (sign * one[1], one[0]))
    return [(BestStep(step, value), named == (step, metric)) for step, value in ordered]


class NamedBest(NamedTuple):
    """What ``best.json`` names."""

    step: int
    metric: str


def named_best(run_dir: Path) -> NamedBest | None:
    """The step and the metric that ``best.json`` names; None if it names none, or is no such file."""
    try:
        content = parse_json((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    step, metric = (content.get("step"), content.get("metric")) if isinstance(content, dict) else (None, None)
    return NamedBest(step, metric) if isinstance(step, int) and isinstance(metric, str) else None


def _is_better(value: float, other: float, metric: str) -> bool:
    return value < other if _is_loss(metric) else value > other


def _is_loss(metric: str) -> bool:
    return metric == "eval_loss" or (metric.startswith("eval/") and metric.split("/")[2:] == ["loss"])


def steps_to_remove(
    steps: Sequence[int], *, verified: Collection[int], number: int, keep_every: int = 0, best: Collection[int] = ()
) -> list[int]:
    """Of the ``steps`` that have checkpoints, oldest first, those that may go: older than the ``number`` newest
    verified ones (0: none may), not a multiple of ``keep_every``, and not among ``best``.

    >>> steps_to_remove([10, 20, 30, 40], verified={10, 20, 30}, number=2)  # 40 is not verified: it does not count
    [10]
    >>> steps_to_remove([10, 20, 30, 40], verified={30, 40}, number=1, keep_every=20, best={10})
    [30]
    """
    good = [step for step in steps if step in verified]
    if not number or len(good) < number:
        return []
    return [
        step
        for step in steps
        if step < good[-number] and step not in best and not (keep_every and step % keep_every == 0)
    ]


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that no directory named ``step_*`` is ever incomplete."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
