"""Layers with Transformer Engine's parameter names and checkpoint entries on torch's arithmetic: it cannot run here."""

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


class NormColumnLinear(ColumnParallelLinear):
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
    from models.qwen2_5_vl import layer_specs, vision_layer_spec

    modules = SimpleNamespace(
        PrefixCoreAttention=PrefixCoreAttention,
        norm=RMSNorm,
        norm_column_linear=NormColumnLinear,
        rotates=False,
        row_linear=RowParallelLinear,
    )
    with ExitStack() as stack:
        for module in (layer_specs, vision_layer_spec):
            stack.enter_context(patch.object(module, "te_modules", lambda: modules))
            resolve = lambda impl: "te" if impl == "te" else "local"  # noqa: E731
            stack.enter_context(patch.object(module, "resolve_transformer_impl", resolve))
        yield
