"""Counts the bytes that forward keeps for backward, layer by layer, and those that backward needs besides.

The letters are sizes of one micro-batch on one rank: T rows of the packed sequence (its context-parallel share),
t = T / tp under sequence parallelism, else T; A, K, F the widths of queries, keys and MLP on this tensor rank;
S patches, W the encoder's width; b bytes per number. A language layer keeps

    norms        2 x n t D          n = 12 in fp32 (input, normalised, result); 8 in 16 bits in plain torch (fp32 copy
                                    of the input, normalised, result); 2 b with fused norms (input, result)
    q, k, v      T (2 A + 3 K) b    after the rotation, and the projection's output, which the values are a view of
    rotation     4 T H b            cosine and sine, for queries and for keys
    attention    2 T A b + 4 T N    its output twice (for its own backward and for the projection's); log-sum-exp; if
                                    an implementation makes them, copies of keys and values per response, and masks;
                                    under context parallelism the keys and values of all ranks
    MLP          s T F b            s = 5: gate and up, silu(gate), up + offset, product; 3 with fused SwiGLU

If the MLP processes the rows in several parts, the parts together keep as much. Its backward then holds the gradients
of the inner rows, 2 T F b, for one part at a time.

Selective recomputation drops the attention's inner part. Full recomputation keeps only t D b per layer; in backward it
holds everything of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.accounting.layout import Layout
from megatron_ktr.accounting.rows import share_rows
from megatron_ktr.accounting.work import GroupWork, StepSettings, num_patches
from models.qwen2_5_vl.config import Qwen2_5_VLConfig

TILE_BYTES = 64 * 2**20
"""The working memory of the streamed head. This is its budget; small heads need less."""


@dataclass(frozen=True)
class Kernels:
    """What an implementation keeps: ``TORCH_CPU`` runs on CPU, and ``FUSED`` stands for Transformer Engine's layers."""

    bytes_per_number: int = 2
    has_fused_norm: bool = False
    has_fused_swiglu: bool = False
    gathers_keys: bool = False
    """Every response has its own copy of the prompt's keys and values."""
    has_masks: bool = False
    """Responses attend with an explicit mask, which is in the activations' precision."""

    @property
    def norm_bytes(self) -> int:
        """The bytes kept per number of a norm's input, including input and result."""
        if self.has_fused_norm:
            return 2 * self.bytes_per_number
        return 12 if self.bytes_per_number == 4 else 8

    @property
    def norm_keeps_input(self) -> bool:
        """Whether a norm keeps its input itself, rather than an fp32 copy of it."""
        return self.has_fused_norm or self.bytes_per_number == 4

    @property
    def mlp_copies(self) -> int:
        return 3 if self.has_fused_swiglu else 5


TORCH_CPU = Kernels(bytes_per_number=4, gathers_keys=True, has_masks=True)
TORCH_GPU = Kernels(has_fused_swiglu=True)
FUSED = Kernels(has_fused_norm=True, has_fused_swiglu=True, gathers_keys=True)


@dataclass(frozen=True)
class LayerBytes:
    """The bytes of one layer for one micro-batch."""

    saved: float
    """Kept until the layer's backward, under the layout's recomputation."""
    again: float
    """Recomputed in backward, because recomputation did not keep it."""
    extra: float
    """The most that the layer's backward needs besides: gradients of the MLP's inner rows."""


def count_rows(config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], layout: Layout) -> tuple[int, int]:
    """(T, t): the rows on a context rank, and the rows of norms and residuals on a tensor rank."""
    rows = share_rows(config, groups, layout)
    return rows.on_context_rank, rows.on_tensor_rank


def language_layer(
    config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], layout: Layout, kernels: Kernels
) -> LayerBytes:
    text, tp, b = config.text, layout.tensor, kernels.bytes_per_number
    rows, own_rows = count_rows(config, groups, layout)
    hidden = text.hidden_size
    width, kv = text.num_attention_heads * text.head_size / tp, text.num_key_value_heads * text.head_size / tp
    ffn = text.intermediate_size / tp
    norms = 2 * kernels.norm_bytes * own_rows * hidden
    qkv = rows * (2 * width + 3 * kv) * b + 4 * rows * text.head_size * b
    inner = rows * width * b + 4 * rows * text.num_attention_heads / tp
    if kernels.gathers_keys or kernels.has_masks:
        pairs = copied = 0
        for group in groups:
            prompt, tokens = group.prompt_length(config), group.num_response_tokens
            pairs += prompt * tokens + group.num_response_pairs
            copied += prompt * len(group.response_lengths) + tokens
        inner += (copied * 2 * kv * kernels.gathers_keys + pairs * kernels.has_masks) * b / layout.context
    if layout.context > 1:
        inner += rows * layout.context * 2 * kv * b  # keys and values of all context ranks
    mlp = kernels.mlp_copies * rows * ffn * b
    everything = norms + qkv + inner + rows * width * b + mlp
    num_parts = layout.mlp_chunks
    gathered = rows * hidden * b / num_parts if layout.sequence_parallel else 0.0
    of_rows = 2 if num_parts == 1 else 3  # several parts need one more, to join their gradients
    extra = max(
        2 * rows * ffn * b / num_parts + of_rows * own_rows * hidden * b + gathered,
        2 * hidden * ffn * b,  # gradient of the first MLP weight, before it is added to the buffer
    )
    if layout.recompute == "full":
        kept = own_rows * hidden * b
        return LayerBytes(saved=kept, again=everything - kept * kernels.norm_keeps_input, extra=extra)
    if layout.recompute == "selective":
        # Made again after the MLP's backward, in the room that what the MLP kept has left.
        return LayerBytes(saved=everything - inner, again=max(0.0, inner - mlp), extra=extra)
    return LayerBytes(saved=everything, again=0.0, extra=extra)


def vision_layer(config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], layout: Layout, kernels: Kernels) -> LayerBytes:
    """Like a language layer, but without sequence parallelism and grouped queries: every head has its own keys."""
    vision, shards, b = config.vision, layout.vision_shards, kernels.bytes_per_number
    patches = count_patches(groups, layout)
    width = vision.hidden_size
    own_width, ffn = width / shards, vision.padded_intermediate_size(shards) / shards
    norms = 2 * kernels.norm_bytes * patches * width
    inner = patches * own_width * b + 4 * patches * vision.num_heads / shards
    qkv = 5 * patches * own_width * b
    mlp = kernels.mlp_copies * patches * ffn * b
    everything = norms + qkv + inner + mlp
    extra = 2 * patches * ffn * b + 2 * patches * width * b
    if layout.recompute == "full":
        kept = patches * width * b
        return LayerBytes(saved=kept, again=everything - kept * kernels.norm_keeps_input, extra=extra)
    if layout.recompute == "selective":
        # Made again after the MLP's backward, in the room that what the MLP kept has left.
        return LayerBytes(saved=everything - inner, again=max(0.0, inner - mlp), extra=extra)
    return LayerBytes(saved=everything, again=0.0, extra=extra)


def vision_ends(config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], layout: Layout, kernels: Kernels) -> float:
    """The bytes kept outside the encoder's layers: patches for the embedding, the merger's norm and GELU, features."""
    vision, b = config.vision, kernels.bytes_per_number
    patches = count_patches(groups, layout)
    merged = vision.merged_hidden_size / layout.vision_shards
    norm = kernels.norm_bytes * patches * vision.hidden_size
    features = sum(group.num_visual_tokens(vision) for group in groups) * vision.out_hidden_size * b
    return patches * vision.patch_dim * b + norm + 2 * patches / vision.merge_unit * merged * b + features


@dataclass(frozen=True)
class VisionBytes:
    """The bytes of the encoder's run over one micro-batch's media."""

    saved: float
    """Kept until the encoder's backward; with ``recompute_vision`` only the features."""
    features: float
    """The features of all media, which the cache keeps for the step's other passes."""
    extra: float
    """Needed in the encoder's backward, besides what is kept."""
    forward: float
    """The most that forward needs, ``saved`` included: the patches in fp32, made on the device and joined (two copies),
    one more copy in 16 bits, and the inner rows of a layer."""


def vision_pass(
    config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], layout: Layout, kernels: Kernels, settings: StepSettings
) -> VisionBytes:
    vision, b = config.vision, kernels.bytes_per_number
    layer = vision_layer(config, groups, layout, kernels)
    features = sum(group.num_visual_tokens(vision) for group in groups) * vision.out_hidden_size * b
    pixels = count_patches(groups, layout) * vision.patch_dim
    inputs = (8 if b == 4 else 8 + b) * pixels
    kept = features
    if not settings.is_vision_frozen:
        kept = vision_ends(config, groups, layout, kernels)
    if "vision" not in settings.frozen:
        kept += vision.depth * layer.saved
    once = layer.again + layer.extra
    passing = layer.extra
    if layout.recompute == "full" or settings.recompute_vision or "vision" in settings.frozen:
        # Forward without a graph needs two rows of the encoder's width, their norm, everything in the MLP, and a bias.
        ffn = vision.padded_intermediate_size(layout.vision_shards) / layout.vision_shards
        passing = count_patches(groups, layout) * b * (3 * vision.hidden_size + (kernels.mlp_copies + 2) * ffn)
    if settings.recompute_vision and not settings.is_vision_frozen:
        return VisionBytes(
            saved=features, features=features, extra=kept + inputs + once, forward=features + inputs + passing
        )
    extra = 0.0 if "vision" in settings.frozen else once
    return VisionBytes(saved=kept, features=features, extra=extra, forward=kept + inputs + passing)


def count_patches(groups: Sequence[GroupWork], layout: Layout) -> float:
    """The number of patches on a rank; if ranks share the patches, each gets whole temporal patches."""
    split = layout.vision_frames_split
    if split == 1:
        return sum(num_patches(group.grids) for group in groups)
    frames = [h * w for group in groups for t, h, w in group.grids for _ in range(t)]
    return -(-len(frames) // split) * max(frames, default=0)


@dataclass(frozen=True)
class HeadBytes:
    saved: float
    """Kept until backward: hidden rows that predict response tokens, three numbers per row, and the final norm."""
    extra: float
    """Needed in backward: the weight gradient, gradients of the rows, and tiles of logits."""


def reference_rows_bytes(
    config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], layout: Layout, kernels: Kernels, settings: StepSettings
) -> float:
    """The bytes of one micro-batch's hidden rows of the reference model. They wait on the last stage from the
    reference's pass until the end of the step, for every micro-batch at once."""
    rows = share_rows(config, groups, layout).most_predicted
    return float(rows * config.text.hidden_size * kernels.bytes_per_number * settings.compares_reference)


def head(
    config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], layout: Layout, kernels: Kernels, settings: StepSettings
) -> HeadBytes:
    text, b = config.text, kernels.bytes_per_number
    rows, own_rows = count_rows(config, groups, layout)
    response_rows = sum(group.num_response_tokens for group in groups)
    shard = -(-text.vocab_size // layout.tensor)
    norm = (kernels.norm_bytes - b) * own_rows * text.hidden_size
    tiles = min(TILE_BYTES, 8 * response_rows * shard)
    gradients = response_rows * text.hidden_size * (b + 4 * settings.key_share) + rows * text.hidden_size * b
    if settings.has_reference_kl_gradient:
        gradients += response_rows * text.hidden_size * b * settings.key_share  # the reference's rows, key rows alone
    return HeadBytes(
        saved=norm + response_rows * (text.hidden_size * b + 12),
        extra=shard * text.hidden_size * b + gradients + tiles,
    )
