"""When a training run is evaluated, and what becomes of it: metrics, the best checkpoint, a request to leave.

A run that is asked to leave during an evaluation abandons it and saves. A run that is resumed at a step that is due,
and whose record lacks figures of a set, evaluates it on these sets before it goes on: it had left or died, or did not
have the sets then. That a figure under the name of a set is of this set, ``same_sets.py`` has seen to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from megatron_ktr.config.part_options import EvaluationTimes
from megatron_ktr.distributed.agreement import result_of_rank_zero
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.directory import RunStart
from megatron_ktr.run.interruption import LeaveRequest
from megatron_ktr.run.metrics import MetricsWriter, evaluation_line, figures_of_step
from megatron_ktr.trainer import Trainer


class StepEvaluation(Protocol):
    """Something that is measured between steps. Every rank holds one; calls are collective over the world."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Of each set, a metric that every evaluation of it records."""
        ...

    def __call__(self, step: int, *, is_leaving: Callable[[], bool], known: Collection[str]) -> dict[str, float] | None:
        """The metrics of the model that ``step`` left; None if the run is asked to leave meanwhile. Sets whose
        ``figures`` are among ``known`` are left out."""
        ...


class BetweenSteps:
    """Evaluates a run where that is due. Every rank holds one; calls are collective over the world."""

    def __init__(
        self,
        evaluations: Sequence[StepEvaluation],
        *,
        times: EvaluationTimes,
        trainer: Trainer,
        writer: MetricsWriter,
        checkpoints: Checkpoints,
        leave: LeaveRequest,
    ) -> None:
        self._evaluations = evaluations
        self._times = times
        self._trainer = trainer
        self._writer = writer
        self._checkpoints = checkpoints
        self._leave = leave

    def after(self, step: int, *, known: Collection[str] = ()) -> str | None:
        """Evaluates the model that ``step`` left, if that is due, on the sets whose figures are not ``known``. The step
        is recorded, and saved if a checkpoint is due, so that a run that dies meanwhile has lost nothing but the
        evaluation.

        Returns the signal that made the run abandon the evaluation, if any.
        """
        checkpoints = self._checkpoints
        if not self._evaluations or not self._times.is_due(step):
            return None
        ranks = checkpoints.ranks
        signals: list[str] = []

        def is_leaving() -> bool:
            asked_by = self._leave.agreed(ranks.world)
            signals.extend([asked_by] if asked_by else [])
            return bool(asked_by)

        def measure() -> dict[str, float] | None:
            values: dict[str, float] = {}
            for evaluation in self._evaluations:
                found = evaluation(step, is_leaving=is_leaving, known=known)
                if found is None:
                    return None
                values |= found
            return values

        values = self._trainer.evaluate(measure)
        if signals:
            return signals[0]
        if step:
            self._writer.add(step, values)
        else:
            self._writer.write(step, values)
        best = checkpoints.best
        is_best = best is not None and step > 0 and best.take(step, values)  # the start has no checkpoint
        if ranks.rank == 0:
            print(evaluation_line(step, values, note="best so far" if is_best else ""), flush=True)
        checkpoints.after_evaluation(step)
        return None

    def at_start(self, start: RunStart) -> str | None:
        """Evaluates a new model before its first step, or the model of a resumed run if its figures are missing. Like
        ``after`` otherwise."""
        if not self._evaluations:
            return None
        ranks = self._checkpoints.ranks
        known = result_of_rank_zero(lambda: figures_of_step(start.run_dir, step=start.step), ranks=ranks)
        wanted = {figure for evaluation in self._evaluations for figure in evaluation.figures}
        return self.after(start.step, known=known) if wanted - known else None
