"""Low-rank adapters on the language model's linear layers: y = W x + (alpha / rank) B (A x), with W frozen.

=====================  =======================  ====================  =================================================
layers                 A [rank, in]             B [out, rank]         what travels over tensor-parallel ranks
=====================  =======================  ====================  =================================================
linear_qkv             whole on every rank      split as W, axis 0    forward: A x, gathered under sequence parallelism;
linear_fc1                                                            backward: the gradient of A x, summed
linear_proj            split as W, axis 1       whole on every rank   forward: A x, summed (under sequence parallelism
linear_fc2                                                            summed and scattered); backward: gathered there
=====================  =======================  ====================  =================================================

So ranks exchange only ``rank`` numbers per row (the size of A x), never a whole row. Under sequence parallelism a
matrix that is whole on every rank sees that rank's rows only. It carries the mark ``sequence_parallel``, so that
megatron-core sums its gradients over the tensor ranks, as it does for norms.

q, k and v share one A, and so do gate and up, because Megatron computes them in one product. PEFT has a pair of
matrices for every Hugging Face module, so the export of adapters writes the shared A once for each module; that is the
same function.

Adapters are parameters of the layer they extend, so that megatron-core's hooks, checkpoints and optimizers treat them
like W. Under ``adapters_off`` the model is the one that training started from: the reference model, without a copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

from megatron_ktr.distributed.agreement import raise_on_every_rank
from megatron_ktr.files.checksums import write_manifest
from megatron_ktr.files.hf_files import new_directory, write_shard
from models.qwen2_5_vl.conversion import (
    ADAPTERS,
    GatherTo,
    TensorOf,
    export_hf_tensors,
    model_config,
    unwrap_model,
)
from models.qwen2_5_vl.products import LanguageConfig, LinearBase
from models.qwen2_5_vl.weight_map import WeightSpec, weight_specs

if TYPE_CHECKING:
    from megatron_ktr.config.sections import ModelSection
    from megatron_ktr.distributed.groups import ParallelGroups

PLACES = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
"""The places in a decoder layer of the linear layers that can have adapters."""
IS_COLUMN_PARALLEL = {"linear_qkv": True, "linear_proj": False, "linear_fc1": True, "linear_fc2": False}
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""The names that PEFT and vLLM give to the files of an adapter."""


@dataclass(frozen=True)
class LoraSettings:
    """Says which layers have adapters, and which size the adapters have."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int = 0
    """The seed of A's initial values, which are the same in every layout. B starts at zero, so that training starts
    from the base model."""

    @classmethod
    def of(cls, section: ModelSection, *, seed: int) -> LoraSettings | None:
        """The settings of a run; None if it trains without adapters."""
        if not section.lora_rank:
            return None
        return cls(section.lora_rank, section.lora_alpha, section.lora_targets, seed=seed)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_adapters(chunks: Sequence[nn.Module], settings: LoraSettings, *, ranks: ParallelGroups) -> None:
    """Freezes the whole model and adds trainable adapters to it. Call it before the model is wrapped in DDP."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        # Recomputed layers, and pipeline stages without a layer, need an input that requires a gradient.
        model = unwrap_model(chunk)
        model.keeps_graph = True
        layers: Any = model.language.decoder.layers
        for layer in layers:
            for target in settings.targets:
                place = f"language.decoder.layers.{layer.layer_number - 1}.{PLACES[target]}"
                module = layer.get_submodule(PLACES[target])
                module.__class__ = _with_adapter(type(module))
                module.init_adapter(settings, group=ranks.tensor, target=target, place=place)


@cache
def _with_adapter(layer_class: type) -> type:
    return type(f"{layer_class.__name__}WithAdapter", (_Adapter, layer_class), {})


class _Adapter(LinearBase):
    """A mix-in that adds an adapter to a column- or row-parallel linear layer (local or Transformer Engine's).

    It is the first base, before the layer's class.
    """

    config: LanguageConfig
    weight: nn.Parameter

    def init_adapter(
        self, settings: LoraSettings, *, group: torch.distributed.ProcessGroup, target: str, place: str
    ) -> None:
        self.adapter_settings, self.adapter_group, self.adapter_is_on = settings, group, True
        self.is_column_parallel, self.is_gated = IS_COLUMN_PARALLEL[target], target == "linear_fc1"
        out_size, in_size = self.weight.shape
        first, num_in = 0, in_size
        if not self.is_column_parallel:
            first, num_in = group.rank() * in_size, group.size() * in_size
        generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed} {place}".encode()))
        whole_a = torch.empty(settings.rank, num_in).uniform_(-1, 1, generator=generator) / math.sqrt(num_in)
        dtype, device = self.config.params_dtype, self.weight.device
        self.lora_a = nn.Parameter(whole_a.narrow(1, first, in_size).to(device, dtype, copy=True))
        self.lora_b = nn.Parameter(torch.zeros(out_size, settings.rank, dtype=dtype, device=device))
        split, axis = (self.lora_b, 0) if self.is_column_parallel else (self.lora_a, 1)
        whole = self.lora_a if self.is_column_parallel else self.lora_b
        set_tensor_model_parallel_attributes(split, is_parallel=True, dim=axis, stride=1)
        setattr(whole, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010  # a mark that core reads

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        return (output + self._delta(input_) if self.adapter_is_on else output), bias

    def _delta(self, input_: Tensor) -> Tensor:
        group, is_split = self.adapter_group, self.config.sequence_parallel
        norm = getattr(self, "layer_norm_weight", None)
        if norm is not None:
            # Transformer Engine fuses the norm into this layer and does not return the normalised rows.
            input_ = rms_norm(input_, norm.shape, norm, self.config.layernorm_epsilon)
        inner = linear(input_, self.lora_a) * self.adapter_settings.scale
        if self.is_column_parallel and is_split:
            inner = gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=group)
        elif self.is_column_parallel:
            inner = copy_to_tensor_model_parallel_region(inner, group=group)
        elif is_split:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=group)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner, group=group)
        return linear(inner, self.lora_b)

    def merged_weight(self) -> Tensor:
        """This rank's shard of W + scale B A, added in fp32 and rounded once; the rank holds both factors it needs."""
        weight = self.weight.detach()
        delta = self.lora_b.detach().float() @ self.lora_a.detach().float()
        return (weight.float() + self.adapter_settings.scale * delta).to(weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        assert metadata is not None, "core hands it from layer to layer"
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        name, axis = ("lora_b", 0) if self.is_column_parallel else ("lora_a", 1)
        # The layer's own method knows only its weight's axes; it would treat every other parameter as a copy.
        split = make_sharded_tensors_for_checkpoint(
            {name: getattr(self, name)},
            prefix,
            {name: axis},
            sharded_offsets,
            tp_group=self.adapter_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.is_gated:
            split = {key: apply_swiglu_sharded_factory(value, sharded_offsets) for key, value in split.items()}
        return {**state, **split}


def adapted_layers(chunks: Sequence[nn.Module]) -> list[_Adapter]:
    """The layers of wrapped or bare chunks that have adapters."""
    return [module for chunk in chunks for module in unwrap_model(chunk).modules() if isinstance(module, _Adapter)]


@contextlib.contextmanager
def adapters_off(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """A context in which the model computes what it computed before adapters were added."""
    layers = adapted_layers(chunks)
    for layer in layers:
        layer.adapter_is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_is_on = True


def merged_weights(chunks: Sequence[nn.Module]) -> TensorOf:
    """The ``tensor_of`` that makes ``export_hf_tensors`` export one model with the adapters merged into it."""
    layers = {id(layer.weight): layer for layer in adapted_layers(chunks)}

    def tensor_of(parameter: nn.Parameter) -> Tensor:
        layer = layers.get(id(parameter))
        return parameter if layer is None else layer.merged_weight()

    return tensor_of


# Adapters on their own


def adapter_specs(config: Any, settings: LoraSettings) -> list[WeightSpec]:
    """The adapters' rows of the weight table. A fused B is assembled from Hugging Face's parts in the same way as W."""
    targets = {PLACES[target]: target for target in settings.targets}
    specs = []
    for spec in weight_specs(config):
        owner, _, kind = spec.name.rpartition(".")
        place = ".".join(owner.split(".")[4:])
        if not spec.name.startswith("language.decoder.layers.") or kind != "weight" or place not in targets:
            continue
        rank, axis = settings.rank, 0 if IS_COLUMN_PARALLEL[targets[place]] else 1
        inner_a, shapes_b = (rank, spec.shape[1]), tuple((shape[0], rank) for shape in spec.hf_shapes)
        names = {side: tuple(_peft_name(name, side) for name in spec.hf_names) for side in "AB"}
        specs.append(WeightSpec(f"{owner}.lora_a", names["A"][:1], (inner_a,), inner_a, "copy", axis or None))
        specs.append(
            dataclasses.replace(
                spec,
                name=f"{owner}.lora_b",
                hf_names=names["B"],
                hf_shapes=shapes_b,
                shape=(spec.shape[0], rank),
                axis=None if axis else 0,
            )
        )
    return specs


def _peft_name(hf_name: str, side: str) -> str:
    """PEFT's name of one matrix, under the module's name in transformers from 4.52 on (vLLM knows it too)."""
    module = hf_name.removesuffix(".weight").removeprefix("model.")
    return f"base_model.model.model.language_model.{module}.lora_{side}.weight"


def export_adapters(
    chunks: Sequence[nn.Module],
    settings: LoraSettings,
    *,
    ranks: Any = None,
    tensor_of: TensorOf | None = None,
    gather_to: GatherTo = "all",
) -> Iterator[tuple[str, Tensor]]:
    """Yields (PEFT's name, whole matrix) of every adapter. Collective; the options are those of ``export_hf_tensors``.

    The A of a fused layer is yielded once per Hugging Face module, each time as the same tensor.
    """
    config = model_config(chunks)
    specs = adapter_specs(config, settings)
    shares = {a.hf_names[0]: [name.replace("lora_B", "lora_A") for name in b.hf_names] for a, b in _pairs(specs)}
    tensors = export_hf_tensors(chunks, ranks=ranks, tensor_of=tensor_of, gather_to=gather_to, adapters=specs)
    for name, tensor in tensors:
        for shared_name in shares.get(name, [name]):
            yield shared_name, tensor


def _pairs(specs: Sequence[WeightSpec]) -> list[tuple[WeightSpec, WeightSpec]]:
    return list(zip(specs[::2], specs[1::2], strict=True))


def save_adapters(
    chunks: Sequence[nn.Module],
    out_dir: Path | str,
    *,
    settings: LoraSettings,
    ranks: ParallelGroups,
    base: Path | str,
) -> None:
    """Writes the adapters as a directory that PEFT and vLLM load beside the base model ``base``.

    Every rank must call this; the first replica's source rank writes.

    Raises:
        UserError: ``out_dir`` exists, or the disk is full; raised on every rank.
    """
    failure: Exception | None = None
    if ranks.data_rank == ranks.context_rank == 0:
        tensors = [
            (name, tensor.cpu()) for name, tensor in export_adapters(chunks, settings, ranks=ranks, gather_to="source")
        ]
        if ranks.is_source:
            try:
                _write_adapters(Path(out_dir), tensors, settings, base=base)
            except Exception as error:
                failure = error
    raise_on_every_rank(failure, group=None if ranks is None else ranks.world)


def _write_adapters(
    out_dir: Path, tensors: Sequence[tuple[str, Tensor]], settings: LoraSettings, *, base: Path | str
) -> None:
    num_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    modules = sorted({name.split(".")[-3] for name, _ in tensors})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # A regular expression, because the vision encoder has modules of the same names.
        "target_modules": rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(modules)})",
    }
    with new_directory(out_dir, option="--run-dir", need_bytes=num_bytes) as scratch:
        (scratch / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_manifest(scratch, known={WEIGHTS_FILE: write_shard(scratch / WEIGHTS_FILE, tensors)})


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a key of a state dict, is an adapter's."""
    return name.rpartition(".")[2] in ADAPTERS
