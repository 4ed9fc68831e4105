"""Matrix products in bf16 in an fp32 model (``--scoring-precision bf16``), and nothing else in bf16.

=====================================================  =============================================================
in bf16 while ``LanguageConfig.product_dtype`` says so  in the model's own precision, always
=====================================================  =============================================================
qkv, proj, fc1 and fc2 of every decoder layer           rotary angles, their sine and cosine, the rotation
query x key and weights x value of its attention        norms, softmax, activation, biases, residuals, sums over ranks
\\                                                      embedding, vocabulary head, vision encoder, adapters
=====================================================  =============================================================

Each product rounds its operands to bf16 and returns its result in the operands' original dtype, so nothing else ever
sees bf16. torch's autocast around the pass is no alternative, because it lowers operations by their kind, wherever they
stand. It would lower the product of positions and rotary frequencies (with the 8 significant bits of bf16, an angle of
3,000 rad is off by 8 rad). megatron-core adds residuals in a layer's output dtype, so autocast would also lower the
residual stream and the messages between pipeline stages.

Transformer Engine's layers contain more than the product, and all of it is lowered: the norm before qkv and fc1 reads
rounded rows, and the sum over tensor ranks after proj and fc2 is in bf16, as in a bf16 model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ktr.distributed.platform import current


@dataclass
class LanguageConfig(TransformerConfig):
    """megatron-core's configuration, shared by all layers of the language model, plus the fields our layers read."""

    product_dtype: torch.dtype | None = None
    """The dtype to which products round their operands; None: they keep the operands' dtype."""
    fuses_weight_gradients: bool = False
    """Whether decoder layers add their weight gradients to ``main_grad`` themselves.

    Core's own field for this (``gradient_accumulation_fusion``) stays off, because core's output layer reads it too.
    That layer refuses the field without APEX's kernel, although Transformer Engine's layers do not need the kernel and
    the output layer's own product never runs (``StatisticsHead``)."""


def product_dtype(config: TransformerConfig) -> torch.dtype | None:
    """The dtype of product operands that ``config`` asks for; always None for the vision encoder's layers."""
    return config.product_dtype if isinstance(config, LanguageConfig) else None


def fuses_weight_gradients(config: TransformerConfig) -> bool:
    """Whether layers add their weight gradients to ``main_grad`` themselves; always False for the vision encoder.

    In a step's first micro-batch Transformer Engine overwrites ``main_grad`` instead of adding to it, and the vision
    encoder is told before every run that it is in the first one (``VisionEncoder.forward``).
    """
    return isinstance(config, LanguageConfig) and config.fuses_weight_gradients


if TYPE_CHECKING:
    LinearBase = ColumnParallelLinear
else:
    LinearBase = object
"""The base that type checkers see for a mix-in of a linear layer. At run time the mix-in is a plain class."""


class _Product(LinearBase):
    """A mix-in that lowers the product of one of megatron-core's parallel linear layers; it is the first base."""

    config: TransformerConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gradient_accumulation_fusion = fuses_weight_gradients(self.config)

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *args: Any, bias: Tensor | None = None, **options: Any
    ) -> Tensor:  # noqa: A002
        """Computes the product in the lower dtype.

        This method gathers the rows under sequence parallelism; core sums over tensor ranks only after it, in the
        original dtype.
        """
        dtype = product_dtype(self.config)
        if dtype is None:
            return super()._forward_impl(input, weight, *args, bias=bias, **options)
        output = super()._forward_impl(input.to(dtype), weight.to(dtype), *args, bias=None, **options).to(input.dtype)
        return output if bias is None else output + bias


class ColumnLinear(_Product, ColumnParallelLinear):
    """megatron-core's ``ColumnParallelLinear``, whose product can run in a lower dtype."""


class RowLinear(_Product, RowParallelLinear):
    """megatron-core's ``RowParallelLinear``, whose product can run in a lower dtype."""


@cache
def lowerable(layer_class: type) -> type:
    """A subclass of ``layer_class`` that can run as a whole in a lower dtype.

    It is for linear layers whose product alone cannot be intercepted: those of Transformer Engine.
    """
    return type(layer_class.__name__, (_WholeLayer, layer_class), {})


class _WholeLayer(LinearBase):
    config: TransformerConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Transformer Engine's name of the flag. Its backward reads the flag of the layer that ran forward.
        self.fuse_wgrad_accumulation = fuses_weight_gradients(self.config)

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        dtype = product_dtype(self.config)
        if dtype is None:
            return super().forward(input_, *args, **options)
        with torch.autocast(current().device.type, dtype):
            output, bias = super().forward(input_, *args, **options)
        return output.to(input_.dtype), bias
