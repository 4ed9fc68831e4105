"""The sum behind attention and MLP, in the place of megatron-core's fused bias, dropout and residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Addition = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def add_residual(training: bool, fused: bool) -> Addition:
    """``f((x, bias), residual, 0.0)``: residual + (x + bias), without dropout, which these models have none of.

    megatron-core's is compiled, once for every combination of trained and frozen operands, with and without bias, rows
    and widths that vary: more than the 8 forms of a function after which torch runs the rest as they are written, with
    the dropout kernel. (The limit can be raised for the thread that asks only; layers run again in backward's.)
    Without dropout the language model's is a single addition, which there is nothing to fuse with.
    """
    return _added


def _added(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
    assert dropout == 0.0, dropout
    x, bias = x_with_bias
    return residual + (x if bias is None else x + bias)


RESIDUAL_ADDITION: Any = add_residual
"""As a layer's specification takes it: megatron-core declares a class there, and builds functions as well."""
