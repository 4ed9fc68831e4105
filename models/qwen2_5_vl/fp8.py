"""FP8 in megatron-core's and Transformer Engine's terms: configuration, single passes, parameters kept in FP8.

Only the four linear layers of a decoder layer run in FP8 (qkv, proj, fc1, fc2); attention, norms, residuals,
embedding, vocabulary head and, by default, the vision encoder stay in bf16. Which rows and sizes that takes is in
``megatron_ktr/config/fp8_rules.py``.
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
    """The recipe of a configuration in FP8; ours never name megatron-core's "custom"."""
    assert config.fp8_recipe is not None and config.fp8_recipe != "custom", config.fp8_recipe
    return config.fp8_recipe


def fp8_settings(
    model_config: Qwen2_5_VLConfig, *, sizes: ParallelSizes, options: ModelOptions | None
) -> dict[str, Any]:
    """Fields of the language model's ``TransformerConfig``; empty where training is not in FP8.

    Raises:
        UserError: FP8 in any pass where the device, a missing package or a size of the model does not allow it.
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
    """``TransformerConfig``'s fields for training in FP8, whatever the device."""
    return dict(
        fp8=section.fp8_format,
        fp8_recipe=section.fp8_recipe,
        fp8_param=section.fp8_param_gather,
        first_last_layers_bf16=section.first_last_layers_bf16,
        num_layers_at_start_in_bf16=section.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=section.num_layers_at_end_in_bf16,
        # Delayed scales are agreed on after every forward, among ranks that must all run as many. Replicas may not
        # (micro-batches packed by tokens): agreeing with them would hang.
        tp_only_amax_red=True,
        # Delayed scales: Transformer Engine's own window. Core's default is the last step's maximum alone, with which
        # the gradient's cosine with fp32 was 0.907 on the tiny model, 0.975 with the window (docs/numerics.md).
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
    )


def vision_fields(base: TransformerConfig, *, is_on: bool) -> dict[str, Any]:
    """The vision encoder's: as the language model's, without its rule for first and last layers; empty where off."""
    names = ("fp8", "fp8_recipe", "fp8_param", "tp_only_amax_red", "fp8_amax_history_len", "fp8_amax_compute_algo")
    return {name: getattr(base, name) for name in names} if is_on else {}


@contextlib.contextmanager
def pass_precision(transformer_config: LanguageConfig, precision: str, *, section: ModelSection) -> Iterator[None]:
    """Within it, forward passes of the language model run in ``precision``: ``same``, ``bf16`` or ``fp8``.

    The fields of the layers' shared configuration are switched, rather than an autocast wrapped around the pass:
    torch's would lower more than products (``products.py``), and Transformer Engine's would leave out what core does as
    in training (which layers stay in bf16, and quantising the weights anew in a schedule's first micro-batch, without
    which a second scoring pass would see the weights of the first).
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
    """``tensor`` itself, or its numbers in bf16 where a parameter is kept in FP8 (``--fp8-param-gather``)."""
    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor


@torch.no_grad()
def set_parameter(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Copies ``value`` into the parameter, quantised where the parameter is, and exact where its fp32 main copy will
    be taken from.

    A parameter made in FP8 carries its first values in high precision, for the optimizer: those are the random
    initialisation. Left alone, the optimizer's first step would bring it back and undo the loading.
    """
    parameter.copy_(value)
    first = initial_values(parameter)
    if first is not None:
        first.copy_(value)


def initial_values(parameter: torch.nn.Parameter) -> Tensor | None:
    """The values in high precision (on the host) that a parameter in FP8 was made from, until they are dropped."""
    getter = getattr(parameter, "get_high_precision_init_val", None)
    return None if getter is None else getter()


def drop_initial_values(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Frees those of parameters that no optimizer will read: a whole model in host memory otherwise."""
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
    # Its MLP (3420 in 3B and 7B) is padded with zeros to what fits, exactly.
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
