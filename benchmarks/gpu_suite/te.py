"""Transformer Engine by itself, for ``run.py``: one linear layer in every FP8 recipe, and its packed attention.

The suite's other parts use it through the model's layers; if those fail, this says whether the library works here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite.common import Skipped
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.doctor.attention import transformer_engine_attention
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan

TOLERANCE = {"forward": 0.08, "grad_input": 0.12, "grad_weight": 0.12}
"""Relative to bf16, twice what rounding to the formats gives on normal numbers: e4m3 in both operands 3.7%, e5m2
gradients 5.9%."""


def transformer_engine() -> Any:
    """Its torch module; ``Skipped`` where it is not installed."""
    try:
        import transformer_engine.pytorch as te
    except ImportError as error:
        raise Skipped(f"Transformer Engine cannot be imported: {' '.join(str(error).split())[:200]}") from error
    return te


def recipes() -> dict[str, Callable[[], Any]]:
    """By the names of ``--fp8-recipe``; each makes the recipe or raises ``Skipped`` with what the device lacks."""
    transformer_engine()
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as State

    def of(make: Callable[[], Any], check: Callable[[], tuple[bool, str]]) -> Callable[[], Any]:
        def build() -> Any:
            is_available, reason = check()
            if not is_available:
                raise Skipped(reason)
            return make()

        return build

    hybrid = recipe.Format.HYBRID
    return {
        "tensorwise": of(lambda: recipe.Float8CurrentScaling(fp8_format=hybrid), State.is_fp8_available),
        "delayed": of(lambda: recipe.DelayedScaling(fp8_format=hybrid), State.is_fp8_available),
        "blockwise": of(lambda: recipe.Float8BlockScaling(), State.is_fp8_block_scaling_available),
        "mxfp8": of(lambda: recipe.MXFP8BlockScaling(), State.is_mxfp8_available),
    }


def linear_against_bf16(make_recipe: Callable[[], Any], platform: Platform) -> dict[str, Any]:
    """Relative differences of output and gradients of one linear layer, in FP8 from in bf16."""
    te, recipe = transformer_engine(), make_recipe()
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator).to(platform.device, torch.bfloat16)
        for size in ((1024, 2048), (4096, 2048), (1024, 4096))
    )
    layer = te.Linear(2048, 4096, bias=False, params_dtype=torch.bfloat16, device=platform.device)
    with torch.no_grad():
        layer.weight.copy_(weight / 2048**0.5)
    found = {}
    for precision in ("bf16", "fp8"):
        layer.weight.grad, given = None, x.clone().requires_grad_()
        with te.fp8_autocast(enabled=precision == "fp8", fp8_recipe=recipe):
            out = layer(given)
        out.backward(grad)
        found[precision] = {"forward": out.detach(), "grad_input": given.grad, "grad_weight": layer.weight.grad}
    differences = {
        name: relative(found["fp8"][name], exact) for name, exact in found["bf16"].items() if exact is not None
    }
    return {"differences": differences, "within": all(differences[name] <= TOLERANCE[name] for name in TOLERANCE)}


def packed_attention(q: Tensor, k: Tensor, v: Tensor, *, plan: AttentionPlan) -> Tensor:
    """The doctor's call of it; ``Skipped`` where it is not installed."""
    transformer_engine()
    return transformer_engine_attention(q, k, v, plan=plan)


def relative(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return float((ours - exact).norm() / exact.norm())
