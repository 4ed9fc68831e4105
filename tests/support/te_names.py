"""Layers with Transformer Engine's parameter names and checkpoint entries on torch's arithmetic: it cannot run here.

They keep two more of its contracts, as ``module/linear.py`` and ``module/base.py`` of 2.17 and megatron-core's wrappers
have them (read, since none of it runs here):

*Cached weights.* In FP8 the quantised weight is kept and made anew only where ``is_first_microbatch`` says so; forward
lowers that flag. Here the cache holds a plain copy of the weight, so that a stale one shows.

*Fused weight gradients.* With ``fuse_wgrad_accumulation`` backward writes into ``main_grad``: it adds, except in what
forward was told is the first micro-batch, where it overwrites. What autograd gets is a buffer of anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from models.qwen2_5_vl.attention import PrefixCoreAttention
from models.qwen2_5_vl.norm import RMSNorm


class _Contracts:
    """Before one of megatron-core's parallel linear layers in the order of bases."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_first_microbatch = True
        self.fuse_wgrad_accumulation = self.config.gradient_accumulation_fusion
        self.cached_weight: Tensor | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: A002
        is_first, self.is_first_microbatch = self.is_first_microbatch, False
        if self.config.fp8 is not None:
            if is_first or self.cached_weight is None:
                self.cached_weight = weight.detach().clone()
            weight = _InPlaceOf.apply(weight, self.cached_weight)
        if self.fuse_wgrad_accumulation and self.weight.requires_grad:
            weight = _IntoMainGrad.apply(weight, self.weight, is_first)
        return super()._forward_impl(input, weight, *args, **options)


class _InPlaceOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, cached: Tensor) -> Tensor:
        return cached.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _IntoMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, parameter: torch.nn.Parameter, is_first: bool) -> Tensor:
        ctx.parameter, ctx.is_first = parameter, is_first
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        main_grad = ctx.parameter.main_grad
        main_grad.copy_(grad) if ctx.is_first else main_grad.add_(grad)
        ctx.parameter.grad_added_to_main_grad = True
        return torch.full_like(grad, float("nan")), None, None


class RowLinear(_Contracts, RowParallelLinear):
    """``TERowParallelLinear``."""


class NormColumnLinear(_Contracts, ColumnParallelLinear):
    """The norm inside the linear layer behind it: ``layer_norm_weight`` beside ``weight``, and a state of its own."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        norm = RMSNorm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight = norm.weight
        # Not a submodule: Transformer Engine's layer has one parameter, not a module in a module.
        self.__dict__["norm"] = norm

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        self.norm.weight = self.layer_norm_weight
        return super().forward(self.norm(x), *args, **options)

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


@contextmanager
def te_layers() -> Iterator[None]:
    """Within it ``transformer_impl: te`` builds layers with Transformer Engine's names."""
    from models.qwen2_5_vl import fp8, layer_specs, transformer_config, vision_layer_spec

    modules = SimpleNamespace(
        PrefixCoreAttention=PrefixCoreAttention,
        norm=RMSNorm,
        norm_column_linear=NormColumnLinear,
        rotates=False,
        row_linear=RowLinear,
    )
    with ExitStack() as stack:
        for module in (layer_specs, vision_layer_spec):
            stack.enter_context(patch.object(module, "te_modules", lambda: modules))
        for module in (fp8, layer_specs, transformer_config, vision_layer_spec):
            resolve = lambda impl: "te" if impl == "te" else "local"  # noqa: E731
            stack.enter_context(patch.object(module, "resolve_transformer_impl", resolve))
        yield
