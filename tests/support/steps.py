"""Whole training steps in any layout, and what came out of them in a form that layouts can be compared by.

``example_groups`` are prompts with real frames and rewarded responses; ``run_steps`` sends them through the product's
own Trainer and Policy, watched from three places: the source hands out fixed groups, the objective records the scores
it selects by (and can be told to use other masks), the policy records what each update did.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.attribution.key_tokens import KeyTokens
from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.part_options import PolicyOptions, StepOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.random_groups import FixedSource
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes
from megatron_ktr.objectives import build_objective
from megatron_ktr.objectives.policy_gradient import PolicyGradient
from megatron_ktr.types import (
    BatchFacts,
    Prompt,
    Rollout,
    RolloutGroup,
    ScoredBatch,
    Selection,
    TokenScores,
    VisualInput,
)
from tests.support.parity import max_relative_difference
from tests.support.tiny import FIRST_SPECIAL_ID, IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, VISION_END_ID, VISION_START_ID

Masks = dict[str, dict[str, Tensor]]
"""Selected tokens by problem id and signal, bool [response tokens of the group]."""

LENGTHS = {"mixed": (6, 1, 4), "text": (5, 3, 2), "long video": (3, 7, 5), "even": (4, 2, 6), "image": (5, 6, 3)}
REWARDS = {
    "mixed": ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0)),
    "text": ((0.0, 0.5), (1.0, 1.0), (0.25, 0.0)),
    "long video": ((1.0, 1.0), (0.5, 0.0), (1.0, 0.0)),
    "even": ((1.0, 0.0), (1.0, 0.0), (1.0, 0.0)),
    "image": ((0.0, 1.0), (0.3, 0.0), (1.0, 1.0)),
}
"""(accuracy, format) of each response. The group "even" has equal rewards: no advantage, a KL term only."""


def _frames(num_frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Coarse random pictures that change from frame to frame: neighbouring patches differ, so that order matters."""
    cells = torch.randint(0, 256, (num_frames, 3, height // 14, width // 14), generator=generator)
    noise = torch.randint(0, 40, (num_frames, 3, height, width), generator=generator)
    return (cells.repeat_interleave(14, 2).repeat_interleave(14, 3) * 215 // 255 + noise).to(torch.uint8)


def example_groups(*names: str, problem_suffix: str = "") -> list[RolloutGroup]:
    """Groups by name (keys of ``LENGTHS``), each the same in every process.

    mixed: an image and a video of an odd number of frames. text: no media. long video: lasts longer than it is wide
    (temporal positions decide where the text goes on). even: text, all rewards equal. image: one image.
    """
    groups = []
    for name in names:
        generator = torch.Generator().manual_seed(list(LENGTHS).index(name) + 1)
        media = {
            "mixed": (
                VisualInput("image", _frames(1, 56, 84, generator), (1, 4, 6)),
                VisualInput("video", _frames(5, 56, 28, generator), (3, 4, 2), seconds_per_grid=0.7),
            ),
            "long video": (VisualInput("video", _frames(8, 28, 56, generator), (4, 2, 4), seconds_per_grid=2.5),),
            "image": (VisualInput("image", _frames(1, 84, 28, generator), (1, 6, 2)),),
        }.get(name, ())

        def text(length: int, generator: torch.Generator = generator) -> list[int]:
            return torch.randint(0, FIRST_SPECIAL_ID, (length,), generator=generator).tolist()

        tokens = text(3)
        for medium in media:
            t, h, w = medium.grid_thw
            placeholder = IMAGE_TOKEN_ID if medium.kind == "image" else VIDEO_TOKEN_ID
            tokens += [VISION_START_ID, *[placeholder] * (t * h * w // 4), VISION_END_ID, *text(2)]
        rollouts = [
            Rollout(tuple(text(length)), rewards={"accuracy": accuracy, "format": form})
            for length, (accuracy, form) in zip(LENGTHS[name], REWARDS[name], strict=True)
        ]
        groups.append(RolloutGroup(Prompt(name + problem_suffix, tuple(tokens), media), tuple(rollouts)))
    return groups


@dataclass
class Selections:
    """What the objective saw and chose, by problem id, and the masks it was told to choose instead (by step)."""

    injected: list[Masks] | None = None
    step: int = 0
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    chosen: Masks = field(default_factory=dict)

    def reset(self, step: int) -> None:
        self.step, self.scores, self.chosen = step, {}, {}


@dataclass(frozen=True)
class WatchedKeyTokens(KeyTokens):
    """Key tokens that record scores and selection, and use injected masks where there are any.

    A score within rounding distance of the threshold may be selected in one layout and not in another, and a single
    token moves a gradient by several percent: comparisons of gradients must agree on the tokens first.
    """

    selections: Selections = field(default_factory=Selections)

    def select(self, items: Sequence[ScoredBatch], facts: BatchFacts, **options: Any) -> list[Selection]:
        selections = super().select(items, facts, **options)
        return [self._watched(item, found) for item, found in zip(items, selections, strict=True)]

    def _watched(self, item: ScoredBatch, found: Selection) -> Selection:
        scores, chosen, watched = item.scores, found.by_signal, self.selections
        parts = []
        for index, group in enumerate(item.groups):
            of_group = item.batch.group_R == index
            name = group.prompt.problem_id
            watched.scores[name] = {key: value[of_group] for key, value in tensors_of(scores.detach()).items()}
            watched.chosen[name] = {signal: mask_R[of_group] for signal, mask_R in chosen.items()}
            parts.append(watched.injected[watched.step][name] if watched.injected else watched.chosen[name])
        if not watched.injected:
            return found
        # Injected masks come from another process, perhaps from another device.
        masks = {signal: torch.cat([part[signal] for part in parts]).to(mask_R) for signal, mask_R in chosen.items()}
        return dataclasses.replace(found, is_key_R=Selection.union(masks).is_key_R, by_signal=masks)


def tensors_of(scores: TokenScores) -> dict[str, Tensor]:
    """Every score by name; those of views as ``logprob/VIEW`` and ``kl/VIEW``."""
    values = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
    for kind in ("logprob", "kl"):
        values |= {f"{kind}/{view}": value_R for view, value_R in values.pop(f"{kind}_of_view").items()}
    return {name: value for name, value in values.items() if value is not None}


@dataclass
class UpdateRecord:
    """One update. Gradients by published name (frozen parameters have none), complete on every rank; a distributed
    optimizer leaves each rank with its own shard of them, so they are None then."""

    loss: float
    has_stepped: bool
    grad_norm: float
    gradients: dict[str, Tensor] | None
    gradient_dtypes: set[torch.dtype]
    num_micro_batches: int = 0
    """Of this replica."""


@dataclass
class StepRecord:
    """One training step as this rank saw it; ``scores`` and ``chosen`` on the last pipeline stage only."""

    values: dict[str, float]
    """The step's report, without what measures time."""
    updates: list[UpdateRecord]
    scores: dict[str, dict[str, Tensor]]
    chosen: Masks
    key_tokens: dict[str, list[tuple[bool, ...]]]
    """By problem id and response; empty where the step had nothing to learn."""
    weights: dict[str, Tensor]
    """After the step, by published name, complete on every rank; empty between steps whose gathering overlaps."""
    batching: dict[str, float] = field(default_factory=dict)
    """The report's numbers named in ``BATCHING``."""


DEFAULTS: dict[str, Any] = dict(
    optimizer="sgd",
    lr=0.1,
    lr_decay_style="constant",
    weight_decay=0.0,
    clip_grad=0.0,
    kl_beta=0.04,
    length_bonus=0.0,
    use_distributed_optimizer=False,
    selection_ratio=(0.3,),
    num_generations=3,
    platform="cpu",
    train_steps=10,
    # Tests say which groups a replica has; moving them is a layout of its own.
    balance_replicas=False,
)
"""SGD, because the same gradients up to rounding give the same weights up to rounding; Adam divides an element by its
own magnitude, so that rounding noise moves it as far as a gradient."""

RATES = ("tokens_per_second", "tflops_per_gpu", "mfu")
"""What a report divides by time."""
BATCHING = ("flops_imbalance/before", "flops_imbalance/after", "groups_moved", "num_micro_batches", "oversized_groups")
"""What a report says about where groups were put, which nothing else may depend on."""

_EPSILON = 1e6
DISTRIBUTED_SGD: dict[str, Any] = dict(
    use_distributed_optimizer=True,
    optimizer="adam",
    lr=DEFAULTS["lr"] * _EPSILON,
    adam_eps=_EPSILON,
    adam_beta1=0.0,
    adam_beta2=0.0,
)
"""megatron-core's distributed optimizer knows Adam alone. Without memory, Adam steps by lr * g / (|g| + epsilon); an
epsilon of a million and a learning rate as many times larger make that SGD, to a millionth of |g|."""


def make_config(hf_dir: Path, values: Mapping[str, Any], *, num_prompts: int, sizes: ParallelSizes) -> Config:
    """A training configuration on ``hf_dir`` with ``values`` over ``DEFAULTS``; sizes from the layout."""
    return config_from_values(
        {
            **DEFAULTS,
            "model": str(hf_dir),
            "prompts_per_step": num_prompts,
            "tensor_model_parallel_size": sizes.tensor,
            "pipeline_model_parallel_size": sizes.pipeline,
            "context_parallel_size": sizes.context,
            "sequence_parallel": sizes.sequence_parallel,
            **values,
        }
    )


def run_steps(
    ranks: ParallelGroups,
    *,
    hf_dir: Path,
    rollout_groups: Sequence[RolloutGroup],
    values: Mapping[str, Any] | None = None,
    reference_dir: Path | None = None,
    num_steps: int = 1,
    masks: list[Masks] | None = None,
    bucket_size: int | None = None,
    before: Callable[[Any], None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> list[StepRecord]:
    """``num_steps`` training steps on fixed groups, through Trainer and Policy.

    Args:
        reference_dir: weights of the reference model; by default the policy's own first ones.
        masks: key tokens to use in place of the selected ones, one entry per step.
        bucket_size: elements of a gradient bucket; small, so that overlapped communication has several to order.
        before, after: called with the policy before the first step and after the last.
    """
    # Imported here: these build on megatron-core, which must not be touched before the platform is started.
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.trainer import Trainer
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec

    config = make_config(hf_dir, values or {}, num_prompts=len(rollout_groups), sizes=ranks.sizes)
    with _small_buckets(bucket_size):
        policy = _watched_policy(
            hf_dir,
            options=PolicyOptions.of(config),
            ranks=ranks,
            platform=current(),
            num_steps=config.trainer.train_steps,
        )
    objective = build_objective(config.objective, reward=config.reward, rollout=config.rollout)
    selections = Selections(injected=masks)
    if isinstance(objective, PolicyGradient) and objective.selection is not None:
        settings = {f.name: getattr(objective.selection, f.name) for f in dataclasses.fields(objective.selection)}
        objective = dataclasses.replace(objective, selection=WatchedKeyTokens(**settings, selections=selections))
    if objective.needs_reference:
        policy.add_reference(reference_dir)
    trainer = Trainer(
        options=StepOptions.of(config),
        policy=policy,
        source=FixedSource(rollout_groups[ranks.data_rank :: ranks.data_size]),
        objective=objective,
        media=media_spec(Qwen2_5_VLConfig.from_hf(hf_dir), patchify=PreprocessSettings().patchify),
    )
    if before is not None:
        before(policy)
    records = []
    for step in range(num_steps):
        selections.reset(step)
        policy.updates = []
        report = trainer.train_step(step)
        values_ = {key: v for key, v in report.values.items() if not key.startswith(("seconds/", *RATES))}
        batching = {key: values_.pop(key) for key in BATCHING if key in values_}
        key_tokens = {
            group.prompt.problem_id: [response.is_key_token for response in responses]
            for group, responses in zip(report.groups, report.selections, strict=bool(report.selections))
        }
        # Reading weights gathers them first; the next step must find them as the optimizer left them.
        is_read = step == num_steps - 1 or not config.parallel.overlap_param_gather
        weights = _cloned(policy.export()) if is_read else {}
        records.append(
            StepRecord(values_, policy.updates, selections.scores, selections.chosen, key_tokens, weights, batching)
        )
    if after is not None:
        after(policy)
    return records


def _watched_policy(*args: Any, **kwargs: Any) -> Any:
    from megatron_ktr.policy.policy import Policy

    class WatchedPolicy(Policy):
        updates: list[UpdateRecord]

        def update(self, micro_batches: Sequence[Any], **kwargs: Any) -> Any:
            result = super().update(micro_batches, **kwargs)
            gradients = None
            if not self.options.optimizer.use_distributed_optimizer:
                gradients = _gradients(self)
            parameters = [p for chunk in self.chunks for p in chunk.parameters() if p.requires_grad]
            record = UpdateRecord(
                loss=result.loss,
                has_stepped=result.has_stepped,
                grad_norm=result.grad_norm,
                gradients=gradients,
                gradient_dtypes={parameter.main_grad.dtype for parameter in parameters},
                num_micro_batches=len(micro_batches),
            )
            self.updates.append(record)
            return result

    return WatchedPolicy(*args, **kwargs)


def _gradients(policy: Any) -> dict[str, Tensor]:
    def tensor_of(parameter: Tensor) -> Tensor | None:
        return getattr(parameter, "main_grad", None)

    found = _cloned(policy.export(tensor_of=tensor_of))
    if policy.lora is not None:
        from models.qwen2_5_vl.lora import export_adapters

        found |= _cloned(export_adapters(policy.bare_chunks, policy.lora, ranks=policy.ranks, tensor_of=tensor_of))
    return found


def _cloned(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


class _small_buckets:
    """Within it, data-parallel buckets hold ``size`` elements; core's default would put a tiny model into one."""

    def __init__(self, size: int | None) -> None:
        self._size = size

    def __enter__(self) -> None:
        from megatron_ktr.distributed import optimizer

        self._original = optimizer.DistributedDataParallelConfig
        if self._size is not None:
            optimizer.DistributedDataParallelConfig = lambda **options: self._original(
                **options, bucket_size=self._size
            )

    def __exit__(self, *error: object) -> None:
        from megatron_ktr.distributed import optimizer

        optimizer.DistributedDataParallelConfig = self._original


@dataclass(frozen=True)
class StepDifference:
    """Largest differences of one rank's steps from those of a single process; what a rank does not know is 0."""

    loss: float = 0.0
    score: float = 0.0
    value: float = 0.0
    """Relative, over the report's numbers."""
    worst_value: str = ""
    gradient: float = 0.0
    update: float = 0.0
    """Of what the steps changed in the weights, relative per tensor."""


def score_difference(ours_R: Tensor, theirs_R: Tensor) -> float:
    """Largest difference; infinite where only one of the two is NaN (a view that does not apply to the prompt)."""
    one_sided_R = ours_R.isnan() != theirs_R.isnan()
    if one_sided_R.any():
        return math.inf
    return float((ours_R - theirs_R).abs().nan_to_num(0.0).max())


def compare_steps(
    ours: Sequence[StepRecord], expected: Sequence[StepRecord], *, initial: Mapping[str, Tensor]
) -> StepDifference:
    """``ours`` against the first steps of ``expected``; ``initial`` are the weights before the first step."""
    loss = score = gradient = update = 0.0
    worst = (0.0, "")
    for mine, theirs in zip(ours, expected, strict=False):
        assert mine.values.keys() == theirs.values.keys(), mine.values.keys() ^ theirs.values.keys()
        for name, value in mine.values.items():
            if name == "learning_rate":
                continue
            relative = abs(value - theirs.values[name]) / max(abs(theirs.values[name]), 0.01)
            worst = max(worst, (relative, name))
        for name, columns in mine.scores.items():
            for key, values_R in columns.items():
                score = max(score, score_difference(values_R, theirs.scores[name][key]))
        for name, key_tokens in mine.key_tokens.items():
            assert key_tokens == theirs.key_tokens[name], name
        assert len(mine.updates) == len(theirs.updates)
        for one, other in zip(mine.updates, theirs.updates, strict=True):
            assert one.has_stepped == other.has_stepped
            loss = max(loss, abs(one.loss - other.loss))
            if one.gradients is not None:
                known = {name: other.gradients[name] for name in one.gradients}
                gradient = max(gradient, max_relative_difference(one.gradients, known))
        if mine.weights:
            changes = [{name: record.weights[name] - initial[name] for name in initial} for record in (mine, theirs)]
            update = max(update, max_relative_difference(*changes))
    return StepDifference(loss, score, worst[0], worst[1], gradient, update)
