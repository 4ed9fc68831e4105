"""Counts the floating-point operations of a training step, by pass and by part.

Conventions: a multiply-add is 2 operations. Only matrix products count (norms, softmax, rotary embedding and
activations are below a percent), and looking up embeddings is 0. Attention counts exactly the pairs of rows that
attend each other: a causal sequence of n rows has n (n + 1) / 2 pairs, each with 4 H operations per head in forward
(q . k and p v) and 8 H in backward. ``EXECUTED`` instead counts what kernels without a causal shortcut run: whole
blocks, masked pairs included.

    linear layer of the language model, one row, forward    2 (D (A + 2 K) + A D + 3 D F)
    vision layer, one patch, forward                        2 (4 W^2 + 3 W I)
    patch embedding, one patch                              2 W patch_dim
    merger, one visual token                                2 (M^2 + M D), M = merge_unit W
    attention, forward                                      4 A pairs
    head, one row, forward                                  2 D V

D hidden size, A query heads x head size, K key heads x head size, F MLP size, V vocabulary; W, I the encoder's widths.
Backward costs twice forward if inputs and weights both need gradients, and once forward if only one of them does. The
streamed head recomputes its logits in backward, for key rows only, which makes 3 x forward of those rows. Where the KL
to the reference model is taken over the whole vocabulary, the reference's logits are made in every intact pass instead
of in the reference's own, and recomputed in backward if that KL has a gradient: 4 x forward of key rows. Parallel
layouts do not change these numbers: padding, replicated work and any other recomputation do not count.

Parts: ``vision``, ``prompt`` and ``response`` (linear layers on those rows), ``attention_prompt``,
``attention_response``, ``head``, ``embedding``. Passes: ``policy_forward``, ``policy_recompute``, ``policy_backward``,
``reference``, ``selection``, ``noise``, and one for each counterfactual view, by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_ktr.accounting.work import EACH_ONCE, Grid, GroupWork, StepSettings, num_patches
from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig

Part = Literal["vision", "prompt", "response", "attention_prompt", "attention_response", "head", "embedding"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class AttentionCount:
    """How attention is counted: ``PAIRS`` counts what the step needs, ``EXECUTED`` what plain torch runs."""

    has_masked_pairs: bool = False
    """Count whole blocks of queries x keys, as kernels without a causal shortcut compute them."""
    backward_products: int = 4
    """The number of products of the size of the scores in backward: 4, or 5 if a fused kernel recomputes the scores."""


PAIRS = AttentionCount()
EXECUTED = AttentionCount(has_masked_pairs=True)


@dataclass
class Flops:
    """Operations by (pass, part)."""

    cells: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, name: str, parts: Mapping[str, float], *, times: float = 1.0) -> None:
        for part, value in parts.items():
            key = (name, part)
            self.cells[key] = self.cells.get(key, 0.0) + times * value

    def merge(self, other: Flops) -> None:
        for (name, part), value in other.cells.items():
            self.add(name, {part: value})

    @property
    def total(self) -> float:
        return sum(self.cells.values())

    def by_pass(self) -> dict[str, float]:
        return self._sums(0)

    def of(self, *passes: str, parts: Iterable[str] = PARTS) -> float:
        """The sum over these passes (all if none is named) and parts."""
        wanted = set(parts)
        return sum(v for (name, part), v in self.cells.items() if part in wanted and (not passes or name in passes))

    def _sums(self, index: int) -> dict[str, float]:
        sums: dict[str, float] = {}
        for key, value in self.cells.items():
            sums[key[index]] = sums.get(key[index], 0.0) + value
        return sums


def count_step(
    config: Qwen2_5_VLConfig,
    groups: Sequence[GroupWork],
    *,
    settings: StepSettings = EACH_ONCE,
    attention: AttentionCount = PAIRS,
) -> Flops:
    """Operations of one step on ``groups``, summed over all ranks; they do not depend on micro-batches."""
    flops = Flops()
    for group in groups:
        flops.merge(_count_group(config, group, settings=settings, attention=attention))
    return flops


def _count_group(
    config: Qwen2_5_VLConfig, group: GroupWork, *, settings: StepSettings, attention: AttentionCount
) -> Flops:
    flops = Flops()
    copies = 1 if settings.has_shared_prefix else len(group.response_lengths)
    intact = count_language(config, group, settings=settings, attention=attention)
    vision = copies * count_vision(config.vision, group.grids).total
    is_once = settings.has_vision_once

    updates = settings.num_updates
    # The reference's logits are made in the pass that compares them.
    compared = {"head": intact["head"] * settings.compares_reference}
    flops.add("policy_forward", intact, times=updates)
    flops.add("policy_forward", compared, times=updates)
    # Frozen weights give the same features in every update.
    flops.add("policy_forward", {"vision": vision}, times=1 if is_once and settings.is_vision_frozen else updates)
    if settings.is_policy_trained:
        backward, again = _backward(config, group, intact, settings=settings, attention=attention, copies=copies)
        flops.add("policy_backward", backward, times=updates)
        flops.add("policy_recompute", again, times=updates)
    if settings.has_selection:
        # The first mini-batch's update shares the features of this pass. Its optimizer step makes the others stale,
        # unless the encoder is frozen.
        shared = 1.0 if settings.is_vision_frozen else 1 / settings.mini_batches
        flops.add("selection", {**intact, "vision": vision * (1 - shared) if is_once else vision})
        flops.add("selection", compared)
    if settings.has_reference:
        is_shared = is_once and settings.is_vision_frozen
        head = 0.0 if settings.compares_reference else intact["head"]
        flops.add("reference", {**intact, "head": head, "vision": 0.0 if is_shared else vision})
    if settings.noise_passes:
        # Two passes share one run of the encoder; frozen weights share that of the update, too.
        again = 0.0 if is_once and settings.is_vision_frozen else vision / 2 if is_once else vision
        flops.add("noise", {**intact, "vision": again}, times=settings.noise_passes)
    for view in settings.views:
        if group.has(view):
            rows = count_language(config, group.seen_in(view), settings=settings, attention=attention)
            encoded = group.encoded_in(view, has_vision_once=is_once)
            encoder = copies * count_vision(config.vision, encoded.grids).total
            flops.add(view.name, {**rows, "vision": encoder}, times=view.passes)
    return flops


def _backward(
    config: Qwen2_5_VLConfig,
    group: GroupWork,
    intact: Mapping[str, float],
    *,
    settings: StepSettings,
    attention: AttentionCount,
    copies: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """(operations for gradients, recomputed forward operations) of the policy pass, by part."""
    frozen = settings.frozen
    has_input_grad = "language" not in frozen or not settings.is_vision_frozen or settings.has_adapters
    linear = has_input_grad + ("language" not in frozen)
    through_attention = attention.backward_products / 2 * has_input_grad
    backward = {part: linear * intact[part] for part in ("prompt", "response")}
    backward |= {part: through_attention * intact[part] for part in ("attention_prompt", "attention_response")}
    backward["head"] = linear * settings.key_share * intact["head"]
    again: dict[str, float] = {}
    attention_parts = ("attention_prompt", "attention_response")
    if settings.recompute != "none":
        repeated = attention_parts if settings.recompute == "selective" else ("prompt", "response", *attention_parts)
        again |= {part: intact[part] * has_input_grad for part in repeated}
    if settings.has_streamed_head:
        again["head"] = settings.key_share * intact["head"] * (1 + settings.has_reference_kl_gradient)
    backward["vision"], again["vision"] = _vision_backward(config, group, settings=settings, attention=attention)
    backward["vision"] *= copies
    again["vision"] *= copies
    return backward, again


def _vision_backward(
    config: Qwen2_5_VLConfig, group: GroupWork, *, settings: StepSettings, attention: AttentionCount
) -> tuple[float, float]:
    if settings.is_vision_frozen:
        return 0.0, 0.0
    run = count_vision(config.vision, group.grids)
    merger = run.merger * (2 if "merger" not in settings.frozen else 1)
    if "vision" in settings.frozen:
        return merger, run.total * settings.recompute_vision
    # Pixels need no gradient, so the patch embedding's backward has only one product.
    layers = 2 * run.linear + attention.backward_products / 2 * run.attention
    again = {"none": 0.0, "selective": run.attention, "full": run.linear + run.attention}[settings.recompute]
    return run.patch_embed + layers + merger, again + run.total * settings.recompute_vision


def count_language(
    config: Qwen2_5_VLConfig, group: GroupWork, *, settings: StepSettings, attention: AttentionCount = PAIRS
) -> dict[str, float]:
    """Operations of one forward of the language model, with its head, on a group's rows; by part."""
    text = config.text
    prompt, lengths = group.prompt_length(config), group.response_lengths
    prompt_rows = prompt * (1 if settings.has_shared_prefix else len(lengths))
    response_rows = sum(lengths)
    pairs_prompt, pairs_response = language_pairs(prompt, lengths, settings=settings, attention=attention)
    per_row = text.num_hidden_layers * layer_flops_per_row(config)
    per_pair = text.num_hidden_layers * 4 * text.num_attention_heads * text.head_size
    head_rows = prompt_rows + response_rows if settings.has_head_everywhere else response_rows
    return {
        "prompt": per_row * prompt_rows,
        "response": per_row * response_rows,
        "attention_prompt": per_pair * pairs_prompt,
        "attention_response": per_pair * pairs_response,
        "head": 2 * text.hidden_size * text.vocab_size * head_rows,
        "embedding": 0.0,
    }


def layer_flops_per_row(config: Qwen2_5_VLConfig) -> float:
    """Forward operations of the linear layers of one language layer, for one row."""
    text = config.text
    width, kv_width = text.num_attention_heads * text.head_size, text.num_key_value_heads * text.head_size
    return 2 * text.hidden_size * (2 * width + 2 * kv_width + 3 * text.intermediate_size)


def language_pairs(
    prompt: int, lengths: Sequence[int], *, settings: StepSettings, attention: AttentionCount = PAIRS
) -> tuple[float, float]:
    """The numbers of (query, key) pairs whose query is a prompt row, and a response row; of one layer and head."""
    copies = 1 if settings.has_shared_prefix else len(lengths)
    if not attention.has_masked_pairs:
        return copies * prompt * (prompt + 1) / 2, sum(n * prompt + n * (n + 1) / 2 for n in lengths)
    response = sum(n * (prompt + n) for n in lengths)
    if settings.has_shared_prefix:
        return prompt**2, response
    return sum(prompt * (prompt + n) for n in lengths), response


@dataclass(frozen=True)
class VisionFlops:
    """Operations of one run of the encoder."""

    patch_embed: float
    linear: float
    attention: float
    merger: float

    @property
    def total(self) -> float:
        return self.patch_embed + self.linear + self.attention + self.merger


def count_vision(vision: VisionConfig, grids: Sequence[Grid]) -> VisionFlops:
    """Operations of one forward of encoder and merger.

    The encoder's attention has no mask, so the pairs that count and the pairs that are executed are the same.
    """
    patches, width = num_patches(grids), vision.hidden_size
    num_full = len(set(vision.fullatt_block_indexes))
    pairs = sum(
        num_full * _frame_pairs(grid) + (vision.depth - num_full) * window_pairs(vision, grid) for grid in grids
    )
    merged = vision.merged_hidden_size
    return VisionFlops(
        patch_embed=2 * patches * width * vision.patch_dim,
        linear=2 * patches * vision.depth * (4 * width**2 + 3 * width * vision.intermediate_size),
        attention=4 * width * pairs,
        merger=2 * patches / vision.merge_unit * (merged**2 + merged * vision.out_hidden_size),
    )


def _frame_pairs(grid: Grid) -> int:
    t, h, w = grid
    return t * (h * w) ** 2


def window_pairs(vision: VisionConfig, grid: Grid) -> int:
    """The number of pairs within attention windows of ``window_side`` units; windows at the edges are cut off."""
    t, h, w = grid
    squares = [
        sum(size * size for size in _pieces(side // vision.spatial_merge_size, vision.window_side)) for side in (h, w)
    ]
    return t * squares[0] * squares[1] * vision.merge_unit**2


def _pieces(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]
