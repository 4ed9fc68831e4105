"""What a run is evaluated on, read and checked before its model is built, and what then measures it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ktr.config import Config
from megatron_ktr.config.part_options import EvaluationOptions
from megatron_ktr.data.template import PromptBuilder, VisualTokens, load_tokenizer
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.distributed.agreement import on_every_rank, result_of_rank_zero
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.evaluation.engines.prompts import PromptMaker
from megatron_ktr.evaluation.training.between_steps import StepEvaluation
from megatron_ktr.evaluation.training.held_out import HeldOut, held_out_of_run
from megatron_ktr.evaluation.training.held_out_loss import TOTAL, HeldOutResponses, LossEvaluation
from megatron_ktr.evaluation.training.in_training import TrainingEvaluation
from megatron_ktr.evaluation.training.same_sets import (
    lacking_sets,
    measured_totals,
    require_same_held_out,
    require_unchanged,
    write_settings,
)
from megatron_ktr.rollout.build import worker_pool
from megatron_ktr.rollout.questions import read_held_out_responses
from megatron_ktr.rollout.source import ReplicaSource
from megatron_ktr.trainer import Trainer


@dataclass(frozen=True)
class RunSets:
    """The held-out sets of a run: questions to answer, and responses whose loss is measured. Every rank holds one."""

    asking: EvaluationOptions | None
    """None if no questions are asked."""
    questions: HeldOut | None
    """On reading ranks, if there are any; None on the others."""
    responses: HeldOutResponses | None
    """Likewise."""

    @classmethod
    def read(cls, config: Config, *, ranks: ParallelGroups, tokenizer: Tokenizer) -> RunSets:
        """Reads and checks them, and compares the reading ranks. Collective over the world.

        Raises:
            UserError: on every rank.
        """
        asking = EvaluationOptions.of(config, data_parallel_size=ranks.data_size)
        questions = held_out_of_run(asking, ranks=ranks, tokenizer=tokenizer)
        return cls(asking, questions, _responses(config, ranks=ranks, tokenizer=tokenizer))

    @property
    def lines(self) -> list[str]:
        """What is asked and measured, for the console."""
        return [line for one in (self.questions, self.responses) if one is not None for line in one.lines]

    def require_unchanged(self, config: Config) -> None:
        """Raises ``UserError`` if the run that ``config`` resumes was evaluated on other sets of the same names. Rank 0
        calls it; nothing is changed."""
        for one in (self.questions, self.responses):
            if one is not None:
                require_unchanged(Path(config.trainer.run_dir), one, keep_best=config.evaluation.keep_best)

    def lacking(self, run_dir: Path, *, step: int) -> list[str]:
        """The sets of which no figures after ``step`` are recorded. Rank 0 calls it."""
        return [
            name
            for one in (self.questions, self.responses)
            if one is not None
            for name in lacking_sets(run_dir, one, step=step)
        ]

    def write(self, run_dir: Path) -> None:
        """Notes what the sets are, for a run that continues this one. Rank 0 calls it."""
        for one in (self.questions, self.responses):
            if one is not None:
                write_settings(run_dir, one)

    def evaluations(self, config: Config, *, trainer: Trainer, tokenizer: Tokenizer) -> list[StepEvaluation]:
        """What is measured between steps, after ``write``. Collective over the world."""
        found: list[StepEvaluation] = []
        if self.asking is not None:
            found.append(_asking(self.asking, self.questions, trainer=trainer, tokenizer=tokenizer))
        if config.evaluation.eval_loss_data:
            responses, run_dir = self.responses, Path(config.trainer.run_dir)
            totals = result_of_rank_zero(
                lambda: measured_totals(run_dir, responses) if responses is not None else [],
                ranks=trainer.policy.ranks,
            )
            make_pool = partial(worker_pool, config.data)
            found.append(LossEvaluation(responses, trainer=trainer, has_total=TOTAL in totals, make_pool=make_pool))
        return found


def sets_to_make_up_for(step: int, *, config: Config, ranks: ParallelGroups) -> list[str]:
    """The sets that the run which ``config`` resumes was not evaluated on after ``step``, its last one. Collective over
    the world.

    Raises:
        UserError: on every rank: a set cannot be read, or is not what the run was evaluated on under its name.
    """
    tokenizer = on_every_rank(
        lambda: load_tokenizer(config.model.model, chat_template=config.data.chat_template), ranks=ranks
    )
    sets = RunSets.read(config, ranks=ranks, tokenizer=tokenizer)

    def find() -> list[str]:
        sets.require_unchanged(config)
        return sets.lacking(Path(config.trainer.run_dir), step=step)

    return result_of_rank_zero(find, ranks=ranks)


def _responses(config: Config, *, ranks: ParallelGroups, tokenizer: Tokenizer) -> HeldOutResponses | None:
    """The held-out responses on reading ranks, the same on all of them; None on other ranks, and if there are none."""
    if not config.evaluation.eval_loss_data:
        return None

    def read() -> HeldOutResponses | None:
        if not ranks.is_source:
            return None
        sources = read_held_out_responses(config, tokenizer=tokenizer, is_spokesman=ranks.rank == 0)
        return HeldOutResponses.of(sources, limit=config.evaluation.eval_max_items)

    responses = on_every_rank(read, ranks=ranks)
    require_same_held_out(responses, ranks=ranks)
    return responses


def _asking(
    options: EvaluationOptions, questions: HeldOut | None, *, trainer: Trainer, tokenizer: Tokenizer
) -> TrainingEvaluation:
    """What asks the held-out questions. Collective over the world."""
    assert isinstance(trainer.source, ReplicaSource)  # other sources have no engine
    builder = PromptBuilder(
        tokenizer,
        visual_tokens=VisualTokens.from_model(options.model, tokenizer),
        merge_size=trainer.policy.model_config.vision.spatial_merge_size,
    )
    return TrainingEvaluation(
        questions,
        options=options,
        ranks=trainer.policy.ranks,
        source=trainer.source,
        prompts=PromptMaker(builder, max_model_len=options.data.max_prompt_length + options.max_tokens),
        send_weights=trainer.send_weights,
        make_pool=lambda: worker_pool(options.data),
    )
