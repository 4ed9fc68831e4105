"""The one table of weight names: Megatron's tensors, Hugging Face's tensors, and how to convert between them.

Every Megatron tensor is a concatenation of slices of Hugging Face tensors along one axis (plus zeros where a
size was padded for tensor parallelism). A rule names the slices. Reading a shard and writing it back use the same
list of slices in opposite directions, so that the round trip is exact by construction. Loading, export of weights
and of gradients, and the offline converter all use this file.

Transforms, with N heads, K key-value heads of size H, F the MLP's inner size:

    copy          the tensor itself (the patch embedding's [D, C, t, p, p] is flattened to [D, C*t*p*p])
    qkv_by_group  q [N*H], k [K*H], v [K*H] -> per group: the group's N/K query heads, its key head, its value head
    qkv_by_head   one tensor q|k|v, each [N*H] -> per head: its query, key and value rows
    gate_up       gate [F], up [F] -> [gate; up]; tensor-parallel shard i is [gate shard i; up shard i]
    pad           copy, then zeros up to a multiple of the tensor-parallel size
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.qwen2_5_vl.config import Qwen2_5_VLConfig

Transform = Literal["copy", "qkv_by_group", "qkv_by_head", "gate_up", "pad"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """``length`` entries along the concatenation axis: a slice of Hugging Face tensor ``source``, or zeros (None)."""

    source: int | None
    start: int
    length: int


@dataclass(frozen=True)
class WeightSpec:
    """One Megatron tensor of a concrete model: its unsharded, unpadded shape and the source of its values."""

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    shape: Shape
    transform: Transform
    axis: int | None
    num_groups: int = 1
    """Query groups (qkv_by_group) or heads (qkv_by_head)."""
    is_tied_copy: bool = False
    """The last stage's copy of a tied embedding: filled on load, never exported or stored."""

    @property
    def concat_axis(self) -> int:
        return self.axis or 0

    @property
    def is_padded(self) -> bool:
        """Whether a tensor-parallel layout may append zeros."""
        return self.transform in ("pad", "gate_up")

    def num_shards(self, local_shape: Shape, *, tensor_size: int) -> int:
        """The number of shards: ``tensor_size``, or 1 if the module keeps the whole tensor on every rank.

        Raises:
            ValueError: the local shape fits neither, because the model was built for another configuration.
        """
        if tuple(local_shape) == self.shape:
            return 1
        axis = self.concat_axis
        whole = [n * tensor_size if i == axis else n for i, n in enumerate(local_shape)]
        padding = whole[axis] - self.shape[axis]
        whole[axis] = self.shape[axis]
        if self.axis is None or tuple(whole) != self.shape or padding < 0 or (padding and not self.is_padded):
            raise ValueError(
                f"{self.name}: a shard of {tuple(local_shape)} does not belong to {self.shape} split in {tensor_size}"
            )
        return tensor_size

    def segments(self, local_shape: Shape, *, index: int = 0, count: int = 1) -> list[Segment]:
        """The slices that make up shard ``index`` of ``count``, in order."""
        length = local_shape[self.concat_axis]
        if self.transform != "gate_up":
            return _cut(self._whole_segments(length * count), index * length, length)
        size, half = self.hf_shapes[0][0], length // 2
        pieces = []
        for source in range(2):
            pieces += _cut([Segment(source, 0, size), Segment(None, 0, half * count)], index * half, half)
        return pieces

    def _whole_segments(self, padded_length: int) -> list[Segment]:
        length = self.shape[self.concat_axis]
        groups = range(self.num_groups)
        if self.transform == "qkv_by_group":
            per_group = [shape[0] // self.num_groups for shape in self.hf_shapes]
            return [Segment(i, g * rows, rows) for g in groups for i, rows in enumerate(per_group)]
        if self.transform == "qkv_by_head":
            rows = length // 3 // self.num_groups
            return [Segment(0, part * (length // 3) + g * rows, rows) for g in groups for part in range(3)]
        padding = [Segment(None, 0, padded_length - length)] if padded_length > length else []
        return [Segment(0, 0, length), *padding]

    def read_shard(
        self, read: Callable[[str, int, int, int], Tensor], local_shape: Shape, *, index: int = 0, count: int = 1
    ) -> Tensor:
        """Builds shard ``index`` of ``count`` from ``read(hf_name, axis, start, length)``.

        At most the shard and one slice are in memory.
        """
        axis, offset, shard = self.concat_axis, 0, None
        segments = self.segments(local_shape, index=index, count=count)
        for segment in segments:
            if segment.source is not None:
                piece = read(self.hf_names[segment.source], axis, segment.start, segment.length)
                piece = piece.reshape([*local_shape[:axis], segment.length, *local_shape[axis + 1 :]])
                if len(segments) == 1:
                    return piece
                if shard is None:
                    shard = torch.zeros(local_shape, dtype=piece.dtype, device=piece.device)
                if piece.dtype != shard.dtype:
                    raise TypeError(f"{', '.join(self.hf_names)}: expected one dtype, got {shard.dtype}, {piece.dtype}")
                shard.narrow(axis, offset, segment.length).copy_(piece)
            offset += segment.length
        # No slice was read, so the shard is all padding. That happens on the last ranks if a tensor is small and the
        # tensor-parallel size is large.
        return torch.zeros(local_shape) if shard is None else shard

    def write_shard(self, shard: Tensor, hf_tensors: tuple[Tensor, ...], *, index: int = 0, count: int = 1) -> None:
        """Copies shard ``index`` of ``count`` to its places in ``hf_tensors`` (shapes ``hf_shapes``); drops padding."""
        axis, offset = self.concat_axis, 0
        flat = [tensor.flatten(1) if tensor.ndim > 2 else tensor for tensor in hf_tensors]
        for segment in self.segments(tuple(shard.shape), index=index, count=count):
            if segment.source is not None:
                target = flat[segment.source].narrow(axis, segment.start, segment.length)
                target.copy_(shard.narrow(axis, offset, segment.length))
            offset += segment.length

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The Hugging Face tensors of a whole (perhaps padded) Megatron tensor; a view if nothing is reordered."""
        if self.transform in ("copy", "pad"):
            return (whole.narrow(self.concat_axis, 0, self.shape[self.concat_axis]).reshape(self.hf_shapes[0]),)
        hf_tensors = tuple(whole.new_empty(shape) for shape in self.hf_shapes)
        self.write_shard(whole, hf_tensors)
        return hf_tensors


def _cut(segments: list[Segment], start: int, length: int) -> list[Segment]:
    """The part [start, start + length) of a concatenation."""
    cut, position = [], 0
    for segment in segments:
        low, high = max(start, position), min(start + length, position + segment.length)
        if low < high:
            source_start = segment.start + low - position if segment.source is not None else 0
            cut.append(Segment(segment.source, source_start, high - low))
        position += segment.length
    return cut


@dataclass(frozen=True)
class WeightRule:
    """One row of the table. ``hf`` entries read ``name [sizes]``; the size letters are explained by ``_sizes``."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform = "copy"
    axis: int | None = None
    """The axis that tensor parallelism splits; None: every rank holds the whole tensor."""


def _rule(megatron: str, *hf: str, transform: Transform = "copy", axis: int | None = None) -> WeightRule:
    return WeightRule(megatron, hf, transform, axis)


PATCH_EMBED = _rule("vision.patch_embed.weight", "visual.patch_embed.proj.weight [D C t p p]")

VISION_LAYER = (
    _rule("input_layernorm.weight", "norm1.weight [D]"),
    _rule("self_attention.linear_qkv.weight", "attn.qkv.weight [3D D]", transform="qkv_by_head", axis=0),
    _rule("self_attention.linear_qkv.bias", "attn.qkv.bias [3D]", transform="qkv_by_head", axis=0),
    _rule("self_attention.linear_proj.weight", "attn.proj.weight [D D]", axis=1),
    _rule("self_attention.linear_proj.bias", "attn.proj.bias [D]"),
    _rule("pre_mlp_layernorm.weight", "norm2.weight [D]"),
    _rule(
        "mlp.linear_fc1.weight", "mlp.gate_proj.weight [F D]", "mlp.up_proj.weight [F D]", transform="gate_up", axis=0
    ),
    _rule("mlp.linear_fc1.bias", "mlp.gate_proj.bias [F]", "mlp.up_proj.bias [F]", transform="gate_up", axis=0),
    _rule("mlp.linear_fc2.weight", "mlp.down_proj.weight [D F]", transform="pad", axis=1),
    _rule("mlp.linear_fc2.bias", "mlp.down_proj.bias [D]"),
)
"""Rules of one vision layer; the prefixes are ``vision.decoder.layers.n`` and ``visual.blocks.n``."""

MERGER = (
    _rule("vision.merger.ln_q.weight", "visual.merger.ln_q.weight [D]"),
    _rule("vision.merger.linear_fc1.weight", "visual.merger.mlp.0.weight [M M]", axis=0),
    _rule("vision.merger.linear_fc1.bias", "visual.merger.mlp.0.bias [M]", axis=0),
    _rule("vision.merger.linear_fc2.weight", "visual.merger.mlp.2.weight [O M]", axis=1),
    _rule("vision.merger.linear_fc2.bias", "visual.merger.mlp.2.bias [O]"),
)

EMBEDDING = _rule(
    "language.embedding.word_embeddings.weight", "model.embed_tokens.weight [V D]", transform="pad", axis=0
)

LANGUAGE_LAYER = (
    _rule("input_layernorm.weight", "input_layernorm.weight [D]"),
    _rule(
        "self_attention.linear_qkv.weight",
        "self_attn.q_proj.weight [Q D]",
        "self_attn.k_proj.weight [K D]",
        "self_attn.v_proj.weight [K D]",
        transform="qkv_by_group",
        axis=0,
    ),
    _rule(
        "self_attention.linear_qkv.bias",
        "self_attn.q_proj.bias [Q]",
        "self_attn.k_proj.bias [K]",
        "self_attn.v_proj.bias [K]",
        transform="qkv_by_group",
        axis=0,
    ),
    _rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight [D Q]", axis=1),
    _rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight [D]"),
    _rule(
        "mlp.linear_fc1.weight", "mlp.gate_proj.weight [F D]", "mlp.up_proj.weight [F D]", transform="gate_up", axis=0
    ),
    _rule("mlp.linear_fc2.weight", "mlp.down_proj.weight [D F]", axis=1),
)
"""Rules of one language layer; the prefixes are ``language.decoder.layers.n`` and ``model.layers.n``."""

FINAL_NORM = _rule("language.decoder.final_layernorm.weight", "model.norm.weight [D]")
HEAD = _rule("language.output_layer.weight", "lm_head.weight [V D]", transform="pad", axis=0)

TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's names of the norms that it fuses into the linear layers after them, and their plain names."""


def weight_specs(config: Qwen2_5_VLConfig) -> list[WeightSpec]:
    """Every Megatron tensor of this model, vision first, layer by layer: the order of export."""
    text, vision = config.text, config.vision
    sizes = _sizes(config)
    specs = [_resolve(PATCH_EMBED, sizes["vision"])]
    for n in range(vision.depth):
        places = (f"vision.decoder.layers.{n}.", f"visual.blocks.{n}.")
        specs += [_resolve(rule, sizes["vision"], places, num_groups=vision.num_heads) for rule in VISION_LAYER]
    specs += [_resolve(rule, sizes["vision"]) for rule in MERGER]
    specs.append(_resolve(EMBEDDING, sizes["language"]))
    for n in range(text.num_hidden_layers):
        places = (f"language.decoder.layers.{n}.", f"model.layers.{n}.")
        groups = text.num_key_value_heads
        specs += [_resolve(rule, sizes["language"], places, num_groups=groups) for rule in LANGUAGE_LAYER]
    specs.append(_resolve(FINAL_NORM, sizes["language"]))
    if config.tie_word_embeddings:
        tied = dataclasses.replace(EMBEDDING, megatron=HEAD.megatron)
        return [*specs, dataclasses.replace(_resolve(tied, sizes["language"]), is_tied_copy=True)]
    return [*specs, _resolve(HEAD, sizes["language"])]


def _sizes(config: Qwen2_5_VLConfig) -> dict[str, dict[str, int]]:
    text, vision = config.text, config.vision
    return {
        "vision": {
            "D": vision.hidden_size,
            "3D": 3 * vision.hidden_size,
            "F": vision.intermediate_size,
            "M": vision.merged_hidden_size,
            "O": vision.out_hidden_size,
            "C": vision.in_channels,
            "t": vision.temporal_patch_size,
            "p": vision.patch_size,
        },
        "language": {
            "V": text.vocab_size,
            "D": text.hidden_size,
            "Q": text.num_attention_heads * text.head_size,
            "K": text.num_key_value_heads * text.head_size,
            "F": text.intermediate_size,
        },
    }


def _resolve(
    rule: WeightRule, sizes: dict[str, int], places: tuple[str, str] = ("", ""), *, num_groups: int = 1
) -> WeightSpec:
    names, shapes = [], []
    for entry in rule.hf:
        name, letters = entry.rstrip("]").split(" [")
        names.append(places[1] + name)
        shapes.append(tuple(sizes[letter] for letter in letters.split()))
    first = shapes[0]
    trailing = first[1:] if len(first) <= 2 else (math.prod(first[1:]),)
    shape = (sum(shape[0] for shape in shapes), *trailing)
    return WeightSpec(
        places[0] + rule.megatron, tuple(names), tuple(shapes), shape, rule.transform, rule.axis, num_groups
    )
