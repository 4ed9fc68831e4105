"""Products in bf16 under an fp32 model (``--scoring-precision bf16``): which operations that means, and no other.

=====================================================  =============================================================
in bf16 while ``LanguageConfig.product_dtype`` says so  in the model's own precision, always
=====================================================  =============================================================
qkv, proj, fc1 and fc2 of every decoder layer           rotary angles, their sine and cosine, the rotation
query x key and weights x value of its attention        norms, softmax, activation, biases, residuals, sums over ranks
\\                                                      embedding, vocabulary head, vision encoder, adapters
=====================================================  =============================================================

Operands are rounded on their way into a product and its result returns in the dtype that came, so nothing else ever
sees bf16. torch's autocast around the pass would lower operations by their kind, wherever they stand: the product of
positions and frequencies (8 bits of a rotary angle of 3,000 rad are 8 rad off), and through megatron-core, which adds
residuals in a layer's output dtype, the residual stream and the messages between pipeline stages.

Transformer Engine's layers hold more than the product: there the norm before qkv and fc1 reads rounded rows, and the
sum over tensor ranks behind proj and fc2 is in bf16, as in a bf16 model.
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
    """megatron-core's, shared by all layers of the language model, with what our own layers read besides."""

    product_dtype: torch.dtype | None = None
    """Of the operands of products; None: as they come."""
    fuses_weight_gradients: bool = False
    """Whether decoder layers add their weight gradients to ``main_grad`` themselves. Core's own field stays off: core's
    output layer reads it too and refuses without APEX's kernel, also where Transformer Engine's layers need none; and
    that layer's product never runs (``StatisticsHead``)."""


def product_dtype(config: TransformerConfig) -> torch.dtype | None:
    """None also for layers of other models, such as the vision encoder."""
    return config.product_dtype if isinstance(config, LanguageConfig) else None


def fuses_weight_gradients(config: TransformerConfig) -> bool:
    """False also for layers of other models: Transformer Engine overwrites ``main_grad`` in what it is told is a step's
    first micro-batch, and the vision encoder is told so before every run (``VisionEncoder.forward``)."""
    return isinstance(config, LanguageConfig) and config.fuses_weight_gradients


if TYPE_CHECKING:
    LinearBase = ColumnParallelLinear
else:
    LinearBase = object
"""What a class that stands before a linear layer in the order of bases finds behind it."""


class _Product(LinearBase):
    """Before one of megatron-core's own parallel linear layers in the order of bases."""

    config: TransformerConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gradient_accumulation_fusion = fuses_weight_gradients(self.config)

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *args: Any, bias: Tensor | None = None, **options: Any
    ) -> Tensor:  # noqa: A002
        """The product alone: core adds up over ranks after it, and gathers rows of a sequence inside it."""
        dtype = product_dtype(self.config)
        if dtype is None:
            return super()._forward_impl(input, weight, *args, bias=bias, **options)
        output = super()._forward_impl(input.to(dtype), weight.to(dtype), *args, bias=None, **options).to(input.dtype)
        return output if bias is None else output + bias


class ColumnLinear(_Product, ColumnParallelLinear):
    """megatron-core's, with a product that may be lowered."""


class RowLinear(_Product, RowParallelLinear):
    """megatron-core's, with a product that may be lowered."""


@cache
def lowerable(layer_class: type) -> type:
    """``layer_class``, a linear layer that computes its product out of our reach, lowered as a whole."""
    return type(layer_class.__name__, (_WholeLayer, layer_class), {})


class _WholeLayer(LinearBase):
    config: TransformerConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Transformer Engine's name; its backward asks for the flag of the layer that ran forward.
        self.fuse_wgrad_accumulation = fuses_weight_gradients(self.config)

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        dtype = product_dtype(self.config)
        if dtype is None:
            return super().forward(input_, *args, **options)
        with torch.autocast(current().device.type, dtype):
            output, bias = super().forward(input_, *args, **options)
        return output.to(input_.dtype), bias
