"""The residual addition after attention and MLP; it replaces megatron-core's fused bias, dropout and residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Addition = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def add_residual(training: bool, fused: bool) -> Addition:
    """Returns ``f((x, bias), residual, 0.0)``, which computes residual + (x + bias). These models have no dropout.

    megatron-core's function goes through ``torch.compile``, once for every combination of trained and frozen operands,
    bias or no bias, and sizes. These are more than the 8 variants of a function that torch compiles; it runs any
    further variant uncompiled, with the dropout kernel. The limit can be raised only for the calling thread, and
    recomputed layers run in the thread of backward. Without dropout and bias, the language model's function is a single
    addition anyway, so there is nothing to fuse.
    """
    return _added


def _added(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
    assert dropout == 0.0, dropout
    x, bias = x_with_bias
    return residual + (x if bias is None else x + bias)


RESIDUAL_ADDITION: Any = add_residual
"""``add_residual`` typed for a layer specification: megatron-core declares a class there but accepts a function."""
