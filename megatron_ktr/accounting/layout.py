"""How a model is divided among ranks, and which parameters lie on each rank."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.accounting.work import Recompute
from megatron_ktr.config.words import VisionParallel
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class Layout:
    """The size of every parallel dimension, and the other choices that decide memory and time."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    virtual: int = 1
    """The number of pipeline chunks on a rank."""
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    """``full`` means that every layer is recomputed by itself (``uniform``, one layer)."""
    recompute_vision: bool = False
    mlp_chunks: int = 1
    """The number of parts of the rows that the language model's MLPs process one after another."""
    vision_parallel: VisionParallel = "tensor"
    uses_distributed_optimizer: bool = True

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def num_chunks(self) -> int:
        """The number of chunks over all pipeline ranks."""
        return self.pipeline * self.virtual

    def is_first_chunk(self, rank: int, chunk: int) -> bool:
        return rank == 0 and chunk == 0

    def is_last_chunk(self, rank: int, chunk: int) -> bool:
        return rank == self.pipeline - 1 and chunk == self.virtual - 1

    @property
    def vision_shards(self) -> int:
        """The number of ranks over which the encoder's weights are split."""
        return self.tensor if self.vision_parallel == "tensor" else 1

    @property
    def vision_frames_split(self) -> int:
        """The number of ranks over which temporal patches are split."""
        return self.tensor * self.context if self.vision_parallel == "frame" else 1


def why_not(config: Qwen2_5_VLConfig, layout: Layout) -> str | None:
    """The model's divisibility rule that ``layout`` breaks, in words; None if it breaks none."""
    text, vision, tensor = config.text, config.vision, layout.tensor
    if text.num_attention_heads % tensor or text.intermediate_size % tensor:
        return (
            f"tensor-parallel size {tensor} must divide the {text.num_attention_heads} attention heads and the MLP "
            f"size {text.intermediate_size}"
        )
    if max(text.num_key_value_heads, tensor) % min(text.num_key_value_heads, tensor):
        return (
            f"tensor-parallel size {tensor} and {text.num_key_value_heads} key/value heads: one must divide the other"
        )
    if layout.vision_parallel == "tensor" and vision.num_heads % tensor:
        return f"tensor-parallel size {tensor} must divide the {vision.num_heads} heads of the vision encoder"
    if text.num_hidden_layers % layout.num_chunks:
        return f"{layout.num_chunks} pipeline chunks must divide the {text.num_hidden_layers} layers"
    if layout.virtual > 1 and layout.pipeline == 1:
        return "virtual pipeline chunks need a pipeline"
    if layout.sequence_parallel and tensor == 1:
        return "sequence parallelism needs tensor parallelism"
    return None


@dataclass(frozen=True)
class Parameters:
    """The numbers of parameters on one rank, by part; their sum is what the rank's modules hold."""

    layers: int
    embedding: int
    head: int
    """The output weight, or the last stage's copy of a tied embedding; and the final norm."""
    vision: int
    """The encoder without its merger."""
    merger: int

    @property
    def total(self) -> int:
        return self.layers + self.embedding + self.head + self.vision + self.merger

    def trainable(self, frozen: frozenset[str]) -> int:
        language = 0 if "language" in frozen else self.layers + self.embedding + self.head
        return language + (0 if "vision" in frozen else self.vision) + (0 if "merger" in frozen else self.merger)


def count_parameters(config: Qwen2_5_VLConfig, layout: Layout, *, rank: int) -> Parameters:
    """The numbers of parameters on pipeline rank ``rank``, on each tensor rank, padding included.

    layer       D ((A + 2 K) + A + 3 F) / tp + (A + 2 K) / tp + 2 D
    embedding   ceil(V / tp) D on the first stage, again on the last: the output weight, or the tied copy
    vision      on the first stage; matrices and column biases / tp, norms and row biases on every rank
    """
    text, tp = config.text, layout.tensor
    width, kv = text.num_attention_heads * text.head_size, text.num_key_value_heads * text.head_size
    qkv = width + 2 * kv
    matrices = text.hidden_size * (qkv + width + 3 * text.intermediate_size) + qkv
    layer = matrices // tp + 2 * text.hidden_size
    embedding = -(-text.vocab_size // tp) * text.hidden_size
    is_first, is_last = rank == 0, rank == layout.pipeline - 1
    shares_one_stage = is_first and is_last and config.tie_word_embeddings
    vision, merger = _vision_parameters(config, layout) if is_first else (0, 0)
    return Parameters(
        layers=text.num_hidden_layers // layout.pipeline * layer,
        embedding=embedding if is_first else 0,
        head=(0 if shares_one_stage else embedding) + text.hidden_size if is_last else 0,
        vision=vision,
        merger=merger,
    )


def count_product_weights(config: Qwen2_5_VLConfig, layout: Layout, *, rank: int) -> tuple[int, int]:
    """(language, vision): the numbers of weights of the layers' linear products on pipeline rank ``rank``.

    These are the weights that may be in FP8.

    language    layers / pp x D ((A + 2 K) + A + 3 F) / tp
    vision      on the first stage: depth x (4 W W + 3 W F) / tp
    """
    text, vision = config.text, config.vision
    width, kv = text.num_attention_heads * text.head_size, text.num_key_value_heads * text.head_size
    layer = text.hidden_size * (2 * width + 2 * kv + 3 * text.intermediate_size) // layout.tensor
    ffn = vision.padded_intermediate_size(layout.vision_shards)
    block = vision.hidden_size * (4 * vision.hidden_size + 3 * ffn) // layout.vision_shards
    return text.num_hidden_layers // layout.pipeline * layer, vision.depth * block if rank == 0 else 0


def _vision_parameters(config: Qwen2_5_VLConfig, layout: Layout) -> tuple[int, int]:
    vision, tp = config.vision, layout.vision_shards
    width, ffn, merged = vision.hidden_size, vision.padded_intermediate_size(tp), vision.merged_hidden_size
    attention = (4 * width * width + 3 * width) // tp + width
    mlp = (3 * width * ffn + 2 * ffn) // tp + width
    encoder = width * vision.patch_dim + vision.depth * (attention + mlp + 2 * width)
    merger = width + (merged * merged + merged + merged * vision.out_hidden_size) // tp + vision.out_hidden_size
    return encoder, merger
