"""FP8 in megatron-core's and Transformer Engine's terms: configuration, single passes, parameters kept in FP8.

Only the four linear layers of a decoder layer run in FP8 (qkv, proj, fc1, fc2); attention, norms, residuals,
embedding, vocabulary head and, by default, the vision encoder stay in bf16. ``megatron_ktr/config/fp8_rules.py`` says
which numbers of rows and which layer sizes FP8 accepts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ktr.config.fp8_rules import Fp8Recipe, why_not_of_sizes, why_not_on_device
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from models.qwen2_5_vl.config import Qwen2_5_VLConfig, TextConfig, VisionConfig
from models.qwen2_5_vl.layer_specs import resolve_transformer_impl
from models.qwen2_5_vl.products import LanguageConfig

if TYPE_CHECKING:
    from megatron_ktr.config.part_options import ModelOptions
    from megatron_ktr.config.sections import ModelSection


def used_recipe(config: TransformerConfig) -> Fp8Recipe:
    """The recipe of an FP8 configuration; it is never megatron-core's "custom", which we do not offer."""
    assert config.fp8_recipe is not None and config.fp8_recipe != "custom", config.fp8_recipe
    return config.fp8_recipe


def fp8_settings(
    model_config: Qwen2_5_VLConfig, *, sizes: ParallelSizes, options: ModelOptions | None
) -> dict[str, Any]:
    """The FP8 fields of the language model's ``TransformerConfig``; empty if training is not in FP8.

    Raises:
        UserError: some pass uses FP8, but the device, a missing package or a size of the model does not allow it.
    """
    if options is None or not options.uses_fp8:
        return {}
    section = options.model
    option = f"--fp8-recipe {section.fp8_recipe}"
    platform = current()
    problem = why_not_on_device(
        section.fp8_recipe, capability=platform.compute_capability, toolkit=platform.toolkit_version
    )
    if problem is None and resolve_transformer_impl(section.transformer_impl) != "te":
        problem = "FP8 products are Transformer Engine's, which is not installed"
    if problem is None:
        problem = why_not_of_sizes(
            section.fp8_recipe,
            sizes=_language_sizes(model_config.text, sizes.tensor),
            hidden_size=model_config.text.hidden_size,
            gathers=sizes.sequence_parallel,
        )
    if problem is None and section.fp8_vision:
        problem = _why_not_vision(model_config.vision, section=section, tensor_size=sizes.tensor)
    if problem is not None:
        raise UserError(f"{option}: {problem}")
    return training_fields(section) if section.fp8_format is not None else {}


def training_fields(section: ModelSection) -> dict[str, Any]:
    """``TransformerConfig``'s fields for training in FP8, without any check of the device."""
    return dict(
        fp8=section.fp8_format,
        fp8_recipe=section.fp8_recipe,
        fp8_param=section.fp8_param_gather,
        first_last_layers_bf16=section.first_last_layers_bf16,
        num_layers_at_start_in_bf16=section.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=section.num_layers_at_end_in_bf16,
        # With delayed scaling, ranks exchange their maxima after every forward, so all ranks of that group must run the
        # same number of forwards. Replicas may run different numbers, because micro-batches are packed by tokens;
        # exchanging maxima with other replicas would hang.
        tp_only_amax_red=True,
        # With delayed scaling, use Transformer Engine's default window of maxima. Core's default is the last step's
        # maximum alone. On the tiny model, the gradient's cosine similarity with fp32 was 0.907 with core's default and
        # 0.975 with the window (docs/numerics.md).
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
    )


def vision_fields(base: TransformerConfig, *, is_on: bool) -> dict[str, Any]:
    """The vision encoder's FP8 fields: the language model's, without the rule for first and last layers.

    They are empty if FP8 is off for the encoder.
    """
    names = ("fp8", "fp8_recipe", "fp8_param", "tp_only_amax_red", "fp8_amax_history_len", "fp8_amax_compute_algo")
    return {name: getattr(base, name) for name in names} if is_on else {}


@contextlib.contextmanager
def pass_precision(transformer_config: LanguageConfig, precision: str, *, section: ModelSection) -> Iterator[None]:
    """A context in which forward passes of the language model run in ``precision``: ``same``, ``bf16`` or ``fp8``.

    It switches fields of the configuration that all layers share. An autocast around the pass would not do. torch's
    autocast would lower more than products (``products.py``). Transformer Engine's would bypass what core does in
    training: core keeps some layers in bf16, and quantises the weights anew in a schedule's first micro-batch. Without
    the latter, a second scoring pass would use the weights of the first.
    """
    wanted: dict[str, Any] = {}
    if precision == "fp8" and transformer_config.fp8 is None:
        wanted = training_fields(section) | {"fp8": section.fp8_format or "hybrid", "fp8_param": False}
    elif precision == "bf16":
        is_wider = transformer_config.params_dtype is torch.float32
        wanted = {"fp8": None, "product_dtype": torch.bfloat16 if is_wider else None}
    before = {name: getattr(transformer_config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(transformer_config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(transformer_config, name, value)


def plain_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or its values in bf16 if it is a parameter kept in FP8 (``--fp8-param-gather``)."""
    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor


@torch.no_grad()
def set_parameter(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Copies ``value`` into the parameter, and into the high-precision copy that a parameter in FP8 also carries.

    The optimizer will make its fp32 main copy from that high-precision copy, which first holds the random
    initialisation. If it were left alone, the optimizer's first step would bring the initialisation back and undo the
    loading.
    """
    parameter.copy_(value)
    first = initial_values(parameter)
    if first is not None:
        first.copy_(value)


def initial_values(parameter: torch.nn.Parameter) -> Tensor | None:
    """The high-precision values, in host memory, from which a parameter in FP8 was made; None once they are dropped."""
    getter = getattr(parameter, "get_high_precision_init_val", None)
    return None if getter is None else getter()


def drop_initial_values(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Frees the initial values of parameters that no optimizer will read; they fill host memory with a whole model."""
    for parameter in parameters:
        if initial_values(parameter) is not None:
            getattr(parameter, "clear_high_precision_init_val")()  # noqa: B009  # of Transformer Engine's parameters


def _language_sizes(text: TextConfig, tensor_size: int) -> dict[str, int]:
    heads, keys = text.num_attention_heads * text.head_size, text.num_key_value_heads * text.head_size
    return {
        "the hidden size": text.hidden_size,
        "the size of query, key and value": (heads + 2 * keys) // tensor_size,
        "the size of the attention's heads": heads // tensor_size,
        "the MLP size": text.intermediate_size // tensor_size,
    }


def _why_not_vision(vision: VisionConfig, *, section: ModelSection, tensor_size: int) -> str | None:
    # The MLP's size (3420 in 3B and 7B) needs no check: it is padded with zeros to a size that fits, which is exact.
    problem = why_not_of_sizes(
        section.fp8_recipe,
        sizes={
            "the hidden size": vision.hidden_size,
            "the size of query, key and value": 3 * vision.hidden_size // tensor_size,
            "the size of the attention's heads": vision.hidden_size // tensor_size,
        },
        hidden_size=vision.hidden_size,
        gathers=False,
    )
    return None if problem is None else f"the vision encoder cannot take it: {problem}; leave out --fp8-vision"
