"""The sizes of all parameters of one chunk, one by one, from which the sizes of gradient buckets follow."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.accounting.layout import Layout
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class ChunkParameters:
    """The number of elements of each parameter on one tensor rank."""

    language: tuple[int, ...]
    vision: tuple[int, ...] = ()
    """The encoder without its merger."""
    merger: tuple[int, ...] = ()

    def trainable(self, frozen: frozenset[str] = frozenset()) -> tuple[int, ...]:
        parts = {"language": self.language, "vision": self.vision, "merger": self.merger}
        return tuple(size for name, sizes in parts.items() if name not in frozen for size in sizes)


def chunk_parameters(config: Qwen2_5_VLConfig, layout: Layout, *, number: int) -> ChunkParameters:
    """The parameters of chunk ``number`` of all p v chunks; over a rank's chunks they sum to ``count_parameters``."""
    text, tp = config.text, layout.tensor
    hidden, ffn = text.hidden_size, text.intermediate_size
    width, qkv = (n * text.head_size for n in (text.num_attention_heads, _num_qkv_heads(config)))
    layer = (hidden * qkv // tp, qkv // tp, width * hidden // tp, 2 * hidden * ffn // tp, ffn * hidden // tp)
    layer += (hidden, hidden)
    embedding = -(-text.vocab_size // tp) * hidden
    is_first, is_last = number == 0, number == layout.num_chunks - 1
    shares_one_stage = is_first and is_last and config.tie_word_embeddings
    language = (embedding,) * is_first + layer * (text.num_hidden_layers // layout.num_chunks)
    language += (hidden,) * is_last + (embedding,) * (is_last and not shares_one_stage)
    vision, merger = _vision_parameters(config, layout) if is_first else ((), ())
    return ChunkParameters(language, vision, merger)


def _num_qkv_heads(config: Qwen2_5_VLConfig) -> int:
    return config.text.num_attention_heads + 2 * config.text.num_key_value_heads


def _vision_parameters(config: Qwen2_5_VLConfig, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    vision, tp = config.vision, layout.vision_shards
    width, ffn, merged = vision.hidden_size, vision.padded_intermediate_size(tp), vision.merged_hidden_size
    attention = (3 * width * width // tp, 3 * width // tp, width * width // tp, width)
    mlp = (2 * width * ffn // tp, 2 * ffn // tp, width * ffn // tp, width)
    encoder = (width * vision.patch_dim,) + (*attention, *mlp, width, width) * vision.depth
    out = vision.out_hidden_size
    return encoder, (width, merged * merged // tp, merged // tp, merged * out // tp, out)
