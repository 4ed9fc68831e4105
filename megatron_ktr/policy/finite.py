"""Checks that end a run when a number is NaN or infinite, before the run learns from it or saves it.

Every rank then raises the same error of one line. The checks are needed because NaN hides: every comparison with NaN is
false, so a token with a NaN score is never a key token, and the loss of a batch without key tokens is a perfect 0.
Hence NaN is looked for where it can enter: in the weights that a run starts from, in the log-probs of the sampler, and
in the log-probs of the trainer (``Policy.update``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_ktr.distributed.agreement import gather_objects
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError, same_on_every_rank
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
                "sent, or its own arithmetic, hold NaN or infinity; the run stops, earlier checkpoints are intact"
            )


def require_finite(name: str, value: float) -> None:
    """Raises ``UserError`` unless ``value`` is finite, so that no checkpoint or export can hold what would follow from
    it. ``value`` must be the same on every rank."""
    if not math.isfinite(value):
        with same_on_every_rank():
            raise UserError(
                f"the {name} is {value}: the run stops, earlier checkpoints are intact; lower --lr or --clip-grad, or "
                "look at the last rollouts"
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number is finite. Minimum and maximum tell, since NaN propagates through them; a mask as large as
    the tensor is not needed."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))
