"""When a training run is evaluated, and what becomes of it: metrics, the best checkpoint, a request to leave.

A run that is asked to leave during an evaluation abandons it and saves. The run that is resumed evaluates that step
again, before it goes on, and adds the figures to the step's record. A run whose evaluation was switched on when it was
resumed does the same if the step it is at is due.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ktr.config.part_options import EvaluationOptions
from megatron_ktr.data.template import PromptBuilder, VisualTokens
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.distributed.agreement import result_of_rank_zero
from megatron_ktr.evaluation.engines.prompts import PromptMaker
from megatron_ktr.evaluation.held_out import HeldOut
from megatron_ktr.evaluation.in_training import TrainingEvaluation
from megatron_ktr.rollout.build import worker_pool
from megatron_ktr.rollout.source import ReplicaSource
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.directory import RunStart
from megatron_ktr.run.interruption import LeaveRequest
from megatron_ktr.run.kept import BestCheckpoint
from megatron_ktr.run.metrics import MetricsWriter, evaluation_line, has_evaluation
from megatron_ktr.trainer import Trainer


@dataclass(frozen=True)
class Evaluated:
    """The metrics of an evaluation, none if none was due; or the signal that made the run abandon it."""

    values: Mapping[str, float]
    asked_by: str | None = None

    def joined_to(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values of a step with those of its evaluation; seconds of the same phase add up."""
        both = {name: values[name] + self.values[name] for name in values.keys() & self.values.keys()}
        return {**values, **self.values, **both}


class BetweenSteps:
    """Evaluates a run where that is due. Every rank holds one; calls are collective over the world."""

    def __init__(
        self,
        evaluation: TrainingEvaluation | None,
        *,
        trainer: Trainer,
        best: BestCheckpoint | None,
        leave: LeaveRequest,
    ) -> None:
        self._evaluation = evaluation
        self._trainer = trainer
        self._best = best
        self._leave = leave

    def after(self, step: int) -> Evaluated:
        """Evaluates the model that ``step`` left, if that is due, and prints a line about it. A new best step becomes
        the candidate for the best checkpoint. (Step 0, the start, has no checkpoint.)"""
        evaluation = self._evaluation
        if evaluation is None or not evaluation.options.is_due(step):
            return Evaluated({})
        ranks = self._trainer.policy.ranks
        signals: list[str] = []

        def is_leaving() -> bool:
            asked_by = self._leave.agreed(ranks.world)
            signals.extend([asked_by] if asked_by else [])
            return bool(asked_by)

        values = self._trainer.evaluate(lambda: evaluation(step, is_leaving=is_leaving))
        if signals:
            return Evaluated({}, asked_by=signals[0])
        is_best = self._best is not None and step > 0 and self._best.take(step, values)
        if ranks.rank == 0:
            print(evaluation_line(step, values, note="best so far" if is_best else ""), flush=True)
        return Evaluated(values)

    def at_start(self, start: RunStart, *, writer: MetricsWriter, checkpoints: Checkpoints) -> str | None:
        """Evaluates a new model before its first step, or the model of a resumed run if its figures are missing.
        Returns the signal that made the run abandon it, if any."""
        if self._evaluation is None:
            return None
        step = start.step
        is_there = result_of_rank_zero(lambda: has_evaluation(start.run_dir, step=step), ranks=checkpoints.ranks)
        evaluated = Evaluated({}) if is_there else self.after(step)
        if evaluated.values and step == 0:
            writer.write(step, evaluated.values)
        elif evaluated.values:
            writer.add(step, evaluated.values)
            checkpoints.keep_as_best(step)
        return evaluated.asked_by


def build_evaluation(
    options: EvaluationOptions | None, held_out: HeldOut | None, *, trainer: Trainer, tokenizer: Tokenizer
) -> TrainingEvaluation | None:
    """What asks the held-out questions; None if the run is not evaluated. Collective over the world."""
    if options is None:
        return None
    assert isinstance(trainer.source, ReplicaSource)  # other sources have no engine
    builder = PromptBuilder(
        tokenizer,
        visual_tokens=VisualTokens.from_model(options.model, tokenizer),
        merge_size=trainer.policy.model_config.vision.spatial_merge_size,
    )
    return TrainingEvaluation(
        held_out,
        options=options,
        ranks=trainer.policy.ranks,
        source=trainer.source,
        prompts=PromptMaker(builder, max_model_len=options.data.max_prompt_length + options.max_tokens),
        send_weights=trainer.send_weights,
        make_pool=lambda: worker_pool(options.data),
    )
