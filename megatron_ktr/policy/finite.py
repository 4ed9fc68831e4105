"""Checks that find NaN and infinity before a run learns from them or saves them.

The checks are needed because NaN hides: every comparison with NaN is false, so a token with a NaN score is never a key
token, and the loss of a batch without key tokens is a perfect 0. Hence NaN is looked for where it can enter:

- In the weights that a run starts from, and in the log-probs of the sampler: the run ends, every rank with the same
  error of one line. Nothing is skipped there: a sampler whose numbers are not finite samples from weights, or by
  arithmetic, that are broken, and the next step would sample from the same.
- In the log-probs of the trainer, the loss and the gradient: the update is skipped (``batch/skips.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_ktr.batch.micro_batch import UpdateResult
from megatron_ktr.batch.skips import SkipReason
from megatron_ktr.distributed.agreement import gather_objects
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError, same_on_every_rank
from megatron_ktr.objectives.base import Objective
from megatron_ktr.types import RolloutGroup
from models.qwen2_5_vl.conversion import model_config, named_model_parameters
from models.qwen2_5_vl.fp8 import plain_tensor
from models.qwen2_5_vl.weight_map import weight_specs


@torch.no_grad()
def require_finite_weights(chunks: Sequence[torch.nn.Module], *, hf_dir: Path, ranks: ParallelGroups) -> None:
    """Raises ``UserError``, on every rank, naming the first tensor of ``hf_dir`` that is not finite in the model."""
    hf_names = {spec.name: spec.hf_names for spec in weight_specs(model_config(chunks))}
    damaged = [name for name, parameter in named_model_parameters(chunks) if not _is_finite(plain_tensor(parameter))]
    names = sorted({name for part in gather_objects(damaged, group=ranks.world) for name in part})
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        with same_on_every_rank():
            raise UserError(
                f"--model {hf_dir}: the weights are not finite: {' or '.join(hf_names[names[0]])}{more} holds NaN or "
                "infinity, in its file or once it is in --params-dtype"
            )


def require_finite_samples(
    groups: Sequence[RolloutGroup], *, step: int, global_count: Callable[[float], float]
) -> None:
    """Raises ``UserError``, on every rank, if the sampler's log-probs of any response are not finite."""
    num_damaged = sum(
        1
        for group in groups
        for rollout in group.rollouts
        if not all(map(math.isfinite, rollout.sampler_logprobs or ()))
    )
    total = global_count(num_damaged)
    if total:
        with same_on_every_rank():
            raise UserError(
                f"step {step}: the sampler's log-probs of {total:.0f} responses are not finite: the weights it was "
                "sent, or its own arithmetic, hold NaN or infinity; the run stops, older checkpoints stay"
            )


def reason_before_step(result: UpdateResult, objective: Objective) -> SkipReason | None:
    """Why an update must not reach the optimizer, from its log-probs and its loss; None if it may. The same on every
    rank, because ``result`` is summed over all of them."""
    # A finite loss is no proof: a token with NaN scores is no key token, and without key tokens the loss is 0.
    if result.num_not_finite:
        return "log_prob"
    if math.isfinite(result.loss) or not result.has_gradient:
        return None
    return "loss" if objective.reason_to_skip(result.metrics) is None else "objective"


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number is finite. Minimum and maximum tell, since NaN propagates through them; a mask as large as
    the tensor is not needed."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))
