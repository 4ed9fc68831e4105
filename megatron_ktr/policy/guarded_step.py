"""The optimizer step, which no rank takes if the gradient of any rank is not finite.

megatron-core looks for NaN and infinity only where there is a loss scale (fp16). Elsewhere a NaN norm clips nothing,
since ``max_norm / NaN < 1`` is false, and the step makes NaN of every weight. So the norm is looked at between the
moment where it is known and the moment where it is used.

The norm is reduced over the model-parallel ranks, and with the distributed optimizer over the world. It does not see
everything: without that optimizer each replica finds its own norm, of gradients that should be the same; and of copies
that several tensor ranks hold, only one is counted. A rank whose copy alone is damaged would skip alone, or step with
it. Hence each rank also looks at the gradients that the norm leaves out, and one further sum over the world tells all
ranks whether any of them has found something.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ktr.batch.skips import SkipReason
from megatron_ktr.transfer import send


@dataclass(frozen=True)
class StepOutcome:
    """What became of an optimizer step; the same on every rank."""

    has_stepped: bool
    grad_norm: float
    """Before clipping; NaN if it was not found, and also where it is finite on this rank but not on another."""
    skip_reason: SkipReason | None = None


class _NotFinite(Exception):
    """Leaves megatron-core's step before it changes anything."""


def guarded_step(optimizer: Any, *, world: ProcessGroup, device: torch.device) -> StepOutcome:
    """Takes the step if the norm of the gradient is finite on every rank of ``world``; otherwise nothing changes but
    the loss scale of fp16. Collective.

    ``optimizer`` is megatron-core's chained optimizer, which is what it builds for every model.
    """
    found: dict[str, float] = {}
    original = optimizer.get_grad_norm

    def checked_norm() -> float:
        norm = found["norm"] = float(original())
        if not _is_finite_everywhere(optimizer, norm, world=world, device=device):
            raise _NotFinite
        return norm

    optimizer.get_grad_norm = checked_norm
    try:
        with _agreeing_on_overflow(optimizer, world=world, device=device):
            succeeded, grad_norm, _ = optimizer.step()
    except _NotFinite:
        norm = found["norm"]
        return StepOutcome(False, math.nan if math.isfinite(norm) else norm, "gradient")
    finally:
        del optimizer.get_grad_norm
    if succeeded:
        return StepOutcome(True, float(grad_norm or 0.0))
    if grad_norm is None:
        return StepOutcome(False, math.nan, "loss_scale" if _can_scale_less(optimizer) else "gradient")
    return StepOutcome(False, float(grad_norm), "threshold")


@contextlib.contextmanager
def _agreeing_on_overflow(optimizer: Any, *, world: ProcessGroup, device: torch.device) -> Iterator[None]:
    """Lets each part with a loss scale find an overflow if it finds one on any rank of ``world``, so that all of them
    skip and scale alike. Parts that look over the whole world by themselves stay as they are."""
    scaled = [part for part in optimizer.chained_optimizers if getattr(part, "grad_scaler", None) is not None]
    parts = [part for part in scaled if part.get_grad_stats_parallel_group().size() < world.size()]

    def found_anywhere(original: Any) -> bool:
        has_overflow = send(torch.tensor(float(original())), device)
        torch.distributed.all_reduce(has_overflow, group=world)
        return float(has_overflow) > 0

    for part in parts:
        part._unscale_main_grads_and_check_for_nan = partial(found_anywhere, part._unscale_main_grads_and_check_for_nan)
    try:
        yield
    finally:
        for part in parts:
            del part._unscale_main_grads_and_check_for_nan


def _can_scale_less(optimizer: Any) -> bool:
    """Whether the loss scale can still become smaller, so that an overflow is no fault."""
    scalers: list[Any] = [getattr(part, "grad_scaler", None) for part in optimizer.chained_optimizers]
    return any(float(one.scale) > float(one.min_scale) for one in scalers if hasattr(one, "min_scale"))


def _is_finite_everywhere(optimizer: Any, norm: float, *, world: ProcessGroup, device: torch.device) -> bool:
    if world.size() == 1:
        return math.isfinite(norm)
    is_damaged = send(torch.tensor(0.0 if math.isfinite(norm) else 1.0), device)
    if copies := _uncounted_gradients(optimizer):
        is_damaged += (~torch.stack(torch._foreach_norm(copies)).isfinite()).sum()
    torch.distributed.all_reduce(is_damaged, group=world)
    return not float(is_damaged)


def _uncounted_gradients(optimizer: Any) -> list[Tensor]:
    """The gradients on this rank that the norm leaves out, because another tensor rank or stage counts its copy."""
    found = []
    for part in optimizer.chained_optimizers:
        counted = {id(gradient) for gradient in _counted_gradients(part)}
        for parameter in part.get_parameters():
            gradient = parameter.grad if parameter.grad is not None else getattr(parameter, "decoupled_grad", None)
            if gradient is not None and gradient.numel() and id(gradient) not in counted:
                found.append(gradient.detach().float())
    return found


def _counted_gradients(part: Any) -> list[Tensor]:
    """The gradients on this rank that the norm is taken of. Each stack has a name of its own for them."""
    if hasattr(part, "get_grads_for_grad_norm"):
        return part.get_grads_for_grad_norm()
    return part.get_main_grads_for_grad_norm()
