"""The options that each part of a run receives: its own sections, and facts that follow from several options together.

``Config`` is taken apart here, once, at the start. So every rule that combines options (how many rows a rank must hold,
whether any pass is in FP8) is in one place, and a part can be built without a whole configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ktr.config.fp8_rules import rows_per_rank
from megatron_ktr.config.load import Config, resolved_text
from megatron_ktr.config.sections import (
    DataSection,
    EvaluationSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    TrainerSection,
)
from megatron_ktr.config.words import SaveFailure

MOST_QUESTIONS_TOGETHER = 64
"""Of evaluation: their frames are in memory at a time."""


def uses_fp8(config: Config) -> bool:
    """Whether any pass of the run is in FP8."""
    return config.model.fp8_format is not None or config.objective.scoring_precision == "fp8"


def row_multiple(config: Config) -> int:
    """The number that the packed rows T of one context rank must be a multiple of. Sequence parallelism splits the rows
    over the tensor ranks, and FP8 needs whole blocks of rows on each."""
    parallel = config.parallel
    num_shares = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    if not uses_fp8(config):
        return num_shares
    return num_shares * rows_per_rank(config.model.fp8_recipe, sequence_parallel=parallel.sequence_parallel)


@dataclass(frozen=True)
class ModelOptions:
    """The options for building a model. By default they are those of a model without a data-parallel wrapper."""

    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    uses_fp8: bool = False
    """Whether any pass of the run is in FP8; the layers must then support it."""
    row_multiple: int = 1
    """The packed rows of one context rank are a multiple of it."""

    @classmethod
    def of(cls, config: Config) -> ModelOptions:
        return cls(config.model, config.parallel, uses_fp8=uses_fp8(config), row_multiple=row_multiple(config))


@dataclass(frozen=True)
class PolicyOptions:
    """The options of the policy: those of its model and its optimizer, and the temperature that divides logits."""

    build: ModelOptions = field(default_factory=ModelOptions)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    temperature: float = 1.0
    """All log-probs are computed from logits / temperature."""
    seed: int = 0
    """The seed for the initial values of LoRA adapters."""
    chat_template: str | None = None
    """The text of the chat template that exports and checkpoints get in place of the model's own; None keeps that."""

    @property
    def model(self) -> ModelSection:
        return self.build.model

    @property
    def parallel(self) -> ParallelSection:
        return self.build.parallel

    @classmethod
    def of(cls, config: Config) -> PolicyOptions:
        return cls(ModelOptions.of(config), config.optimizer, config.rollout.temperature, seed=config.trainer.seed)


@dataclass(frozen=True)
class StepOptions:
    """The options of a training step: how it scores, how it is split into micro-batches, what it reports."""

    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    row_multiple: int = 1
    num_shuffled: int = 0
    """Responses to shuffled frames for every prompt with a video."""
    offload_during_rollout: bool = False
    frozen: frozenset[str] = frozenset()
    """Parts of the model whose weights get no gradient: vision, merger, language."""
    has_adapters: bool = False

    @classmethod
    def of(cls, config: Config) -> StepOptions:
        has_adapters = config.model.lora_rank > 0
        return cls(
            config.objective,
            config.trainer,
            row_multiple=row_multiple(config),
            num_shuffled=config.rollout.num_shuffled,
            offload_during_rollout=config.optimizer.offload_during_rollout,
            frozen=frozenset(("vision", "merger", "language") if has_adapters else config.model.freeze),
            has_adapters=has_adapters,
        )


@dataclass(frozen=True)
class CheckpointOptions:
    """The options of checkpoints: when they are written, how many are kept, and what they record of the run."""

    resolved: str
    """Every option of the run, as YAML; a resumed run is compared with it."""
    num_steps: int | None = None
    """The steps of the whole run. A checkpoint is written after the last one."""
    save_interval: int = 0
    """Steps between two checkpoints; 0 = no checkpoints."""
    keep_checkpoints: int = 0
    """How many of the newest verified checkpoints are kept; 0 = all."""
    keep_best: str | None = None
    """The metric of evaluation whose best checkpoint is kept too."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this stay for ever; 0 = none does for that."""
    save_failure: SaveFailure = "stop"
    """What a run does when a checkpoint cannot be written."""

    @classmethod
    def of(cls, config: Config) -> CheckpointOptions:
        trainer = config.trainer
        return cls(
            resolved_text(config),
            trainer.train_steps,
            trainer.save_interval,
            trainer.keep_checkpoints,
            config.evaluation.keep_best,
            config.resilience.keep_every,
            config.resilience.save_failure,
        )


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of the questions that are asked during training."""

    evaluation: EvaluationSection
    data: DataSection
    """How training shows questions; held-out files of one's own are shown alike."""
    model: str
    run_dir: str
    engine: str
    max_response_length: int
    questions_together: int
    """The most questions that a replica's engine answers together: as many as a step has responses."""

    @classmethod
    def of(cls, config: Config, *, data_parallel_size: int) -> EvaluationOptions | None:
        """None if no questions are asked."""
        if not config.evaluates:
            return None
        trainer, rollout = config.trainer, config.rollout
        return cls(
            config.evaluation,
            config.data,
            model=config.model.model,
            run_dir=trainer.run_dir,
            engine=rollout.engine,
            max_response_length=rollout.max_response_length,
            questions_together=min(
                MOST_QUESTIONS_TOGETHER, trainer.prompts_per_replica(data_parallel_size) * rollout.num_generations
            ),
        )

    @property
    def frames(self) -> int:
        """The most frames of one video."""
        return self.evaluation.eval_frames or self.data.video_num_frames or self.data.video_max_frames

    @property
    def max_tokens(self) -> int:
        return self.evaluation.eval_max_tokens or self.max_response_length


@dataclass(frozen=True)
class EvaluationTimes:
    """When a run is evaluated."""

    interval: int
    """Steps between evaluations; 0 = only at the start."""
    at_start: bool
    num_steps: int
    """The steps of the whole run. It is evaluated after the last one, too, if there is an interval."""

    @classmethod
    def of(cls, config: Config, *, num_steps: int) -> EvaluationTimes:
        return cls(config.trainer.eval_interval, config.evaluation.eval_at_start, num_steps)

    def is_due(self, step: int) -> bool:
        """Whether the run is evaluated after ``step``; step 0 is its start."""
        if step == 0:
            return self.at_start
        return self.interval > 0 and (step % self.interval == 0 or step == self.num_steps)
