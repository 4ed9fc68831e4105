"""Transformer Engine's FP8 recipes on CPU: linear layers that compute what its kernels would, by quantising, going back
to fp32 and multiplying there.

    product            left operand             right operand            scaled along
    y  = x W^T         x   [T, K]               W   [N, K]               K
    dx = dy W          dy  [T, N]               W   [N, K]               N
    dW = dy^T x        dy  [T, N]               x   [T, K]               T

``hybrid`` holds x and W in e4m3 and dy in e5m2, ``e4m3`` holds all three in e4m3. How each is scaled:

=============  ========================================================================================
tensorwise     one scale per tensor, largest / amax of this very tensor (``Float8CurrentScaling``)
delayed        one scale per tensor, largest / amax of earlier passes (``DelayedScaling``); what exceeds it saturates
blockwise      1 x 128 along the product's summed dimension, W in 128 x 128; powers of two (``Float8BlockScaling``)
mxfp8          1 x 32 along the summed dimension, all three; powers of two in 8 bits (``MXFP8BlockScaling``)
=============  ========================================================================================

Sums are in fp32 and rounded once to the layer's precision, bias included; Hopper's fast accumulation, which
``tensorwise`` allows forward, keeps fewer bits. The bias gradient is summed from dy as it came. One tensor-parallel
rank. For measurements and tests: nothing here is fast.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_ktr.config.words import Fp8Format, Fp8Recipe

Role = Literal["input", "weight", "gradient"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (E4M3, E5M2)}
"""448 and 57,344."""
BLOCKS: dict[tuple[Fp8Recipe, Role], tuple[int, int]] = {
    ("blockwise", "input"): (1, 128),
    ("blockwise", "weight"): (128, 128),
    ("blockwise", "gradient"): (1, 128),
    ("mxfp8", "input"): (1, 32),
    ("mxfp8", "weight"): (1, 32),
    ("mxfp8", "gradient"): (1, 32),
}
"""Rows x columns that share a scale; the other recipes have one scale per tensor."""


@dataclass(frozen=True)
class Recipe:
    """What ``--fp8-recipe`` and ``--fp8-format`` choose. The last two fields are of ``delayed`` alone."""

    name: Fp8Recipe
    format: Fp8Format = "hybrid"
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] = "max"

    def dtype_of(self, role: Role) -> torch.dtype:
        return E5M2 if role == "gradient" and self.format == "hybrid" else E4M3


def quantise(values: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """The FP8 numbers nearest to ``values * scale``; beyond the largest, the largest.

    Clamped first: torch's cast to e5m2 overflows to infinity, the hardware's saturates.
    """
    return (values.float() * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def tensor_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """largest / amax; 1 where there is nothing to scale."""
    scale = (LARGEST[dtype] / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax == 0) | ~amax.isfinite(), torch.ones_like(scale), scale)


def power_of_two_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two at or below ``tensor_scale``: dividing by it is exact."""
    _, exponent = torch.frexp(tensor_scale(amax, dtype))
    return torch.ldexp(torch.ones_like(amax), exponent - 1)


def e8m0_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / s, where s is the power of two at or above amax / largest that 8 bits of exponent hold."""
    # 2**-127 at least, so that the quotient does not vanish.
    mantissa, exponent = torch.frexp((amax / LARGEST[dtype]).clamp(min=2.0**-127))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(max=127)
    return torch.where(amax == 0, torch.ones_like(amax), torch.ldexp(torch.ones_like(amax), -exponent))


SCALES = {"blockwise": power_of_two_scale, "mxfp8": e8m0_scale}


def block_amax(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of each block of [rows, columns], in the place of every one of its elements; blocks at the
    edges may be incomplete."""
    (rows, columns), (height, width) = values.shape, block
    padded = nn.functional.pad(values.abs(), (0, -columns % width, 0, -rows % height))
    amax = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).amax(dim=(1, 3))
    return amax.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]


def round_trip(values: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """fp32: what is left of ``values`` after quantisation."""
    return quantise(values, scale, dtype).float() / scale


@dataclass
class DelayedScale:
    """The scale of one tensor of one layer, from the passes before.

    Every pass leaves its amax; passes with gradient then move on to the next scale. Until the first of them it is 1.
    """

    dtype: torch.dtype
    history: deque[float]
    algorithm: str
    scale: float = 1.0
    pending: float = 0.0

    def use(self, values: Tensor, *, moves_on: bool) -> float:
        """The scale for ``values``, which does not know them yet."""
        scale = self.scale
        self.pending = max(self.pending, float(values.abs().max()) if values.numel() else 0.0)
        if moves_on:
            self.history.append(self.pending)
            amax = max(self.history) if self.algorithm == "max" else self.pending
            self.pending = 0.0
            if math.isfinite(amax) and amax > 0:
                self.scale = LARGEST[self.dtype] / amax
        return scale


class EmulatedLinear:
    """``x W^T + bias`` and its gradients in one recipe; called in the place of a linear layer's own product."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.delayed: dict[Role, DelayedScale] = {}
        if recipe.name == "delayed":
            for role in ("input", "weight", "gradient"):
                history: deque[float] = deque(maxlen=recipe.amax_history_len)
                self.delayed[role] = DelayedScale(recipe.dtype_of(role), history, recipe.amax_compute_algo)
        self.row_errors: list[Tensor] | None = None
        """Where a list, every backward adds the relative error of each row of dy [T], NaN for rows of zeros."""

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:  # noqa: A002
        return _EmulatedProduct.apply(input, weight, bias, self, torch.is_grad_enabled())

    def along_rows_and_columns(self, values: Tensor, role: Role, *, moves_on: bool) -> tuple[Tensor, Tensor]:
        """``values`` [rows, columns] after quantisation: as an operand of a product that sums along each row, and of
        one that sums along each column."""
        dtype, name = self.recipe.dtype_of(role), self.recipe.name
        if name == "delayed":
            both = round_trip(values, self.delayed[role].use(values, moves_on=moves_on), dtype)
            return both, both
        if name == "tensorwise":
            both = round_trip(values, tensor_scale(values.abs().amax(), dtype), dtype)
            return both, both
        block = BLOCKS[name, role]
        rows = round_trip(values, SCALES[name](block_amax(values, block), dtype), dtype)
        if block[0] == block[1]:
            return rows, rows
        # Both from the original: quantising twice would round twice.
        return rows, round_trip(values, SCALES[name](block_amax(values, block[::-1]), dtype), dtype)


class _EmulatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: EmulatedLinear, has_grad: bool
    ) -> Tensor:
        x_TK = x.reshape(-1, x.shape[-1]).float()
        x_for_y, x_for_dw = linear.along_rows_and_columns(x_TK, "input", moves_on=has_grad)
        w_for_y, w_for_dx = linear.along_rows_and_columns(weight.float(), "weight", moves_on=has_grad)
        y_TN = x_for_y @ w_for_y.T
        if bias is not None:
            y_TN = y_TN + bias.float()
        ctx.save_for_backward(x_for_dw, w_for_dx)
        ctx.linear, ctx.dtypes, ctx.shape = linear, (x.dtype, weight.dtype, bias is not None and bias.dtype), x.shape
        return y_TN.to(x.dtype).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_for_dw, w_for_dx = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dy_TN = dy.reshape(-1, dy.shape[-1]).float()
        dy_for_dx, dy_for_dw = ctx.linear.along_rows_and_columns(dy_TN, "gradient", moves_on=True)
        if ctx.linear.row_errors is not None:
            ctx.linear.row_errors.append((dy_for_dx - dy_TN).norm(dim=1) / dy_TN.norm(dim=1))
        dx = (dy_for_dx @ w_for_dx).to(x_dtype).reshape(ctx.shape)
        dw = (dy_for_dw.T @ x_for_dw).to(weight_dtype)
        return dx, dw, dy_TN.sum(0).to(bias_dtype) if bias_dtype else None, None, None


@dataclass
class Emulation:
    """Puts ``recipe`` in the place of the products of ``linears`` (megatron-core's, by name), where asked to."""

    linears: Mapping[str, nn.Module]
    recipe: Recipe
    products: dict[str, EmulatedLinear] = field(init=False)

    def __post_init__(self) -> None:
        self.products = {name: EmulatedLinear(self.recipe) for name in self.linears}

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Within it the layers compute in FP8; may be nested. Delayed scales live on from one use to the next."""
        # Both classes of megatron-core's parallel layers call their product by this name.
        was_on = [name for name, linear in self.linears.items() if "_forward_impl" in vars(linear)]
        try:
            for name, linear in self.linears.items():
                linear._forward_impl = self.products[name]
            yield
        finally:
            for name, linear in self.linears.items():
                if name not in was_on:
                    del linear._forward_impl

    @contextlib.contextmanager
    def without_memory(self) -> Iterator[None]:
        """Afterwards the delayed scales are what they were before."""
        kept = {name: copy.deepcopy(product.delayed) for name, product in self.products.items()}
        try:
            yield
        finally:
            for name, product in self.products.items():
                product.delayed = kept[name]


def language_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The four linears of every language layer of a (bare) model, the ones that Transformer Engine runs in FP8, by
    ``layer.part``."""
    found = {}
    for index, layer in enumerate(model.language.decoder.layers):
        attention, mlp = layer.self_attention, layer.mlp
        parts = dict(qkv=attention.linear_qkv, proj=attention.linear_proj, fc1=mlp.linear_fc1, fc2=mlp.linear_fc2)
        found |= {f"{index}.{name}": linear for name, linear in parts.items()}
    return found
