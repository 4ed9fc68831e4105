"""The vision encoder against Hugging Face: features and the gradient of every parameter, at several TP sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf_modeling
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from models.qwen2_5_vl.vision_layout import plan_vision
from tests.support.tiny import tiny_hf_config
from tests.support.vision import (
    Grids,
    build_encoder,
    build_with_odd_heads,
    config_of,
    hf_features_and_grads,
    hf_visual,
    megatron_shards,
    relative_difference,
    run_encoder,
    run_without_media,
    vision_config,
)

MIXED_GRIDS: Grids = [(1, 6, 10), (3, 4, 6), (1, 2, 2), (2, 10, 2)]
"""Image, video, smallest image, narrow video; with windows of 2 units every kind of cut-off window occurs."""

VISION_OPTIONS: dict[str, dict[str, Any]] = {
    "windows of 2, one full block": dict(),
    "windows of 4 (the published side), full first and last": dict(window_size=112, fullatt_block_indexes=(0, 2)),
    "windows only": dict(fullatt_block_indexes=(), seed=3),
    "full only, odd window of 3": dict(fullatt_block_indexes=(0, 1, 2), window_size=84, seed=4),
    "windows of 3, eight heads": dict(vision_num_heads=8, window_size=84, vision_hidden_size=64, seed=5),
    "mlp that 4 does not divide": dict(vision_ffn_size=42, seed=6),
}


# --- index planning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [28, 56, 84, 112])
@pytest.mark.parametrize("grids", [MIXED_GRIDS, [(1, 8, 8)], [(1, 2, 18)], [(4, 14, 6), (1, 16, 16)]])
def test_layout_equals_hugging_face(grids: Grids, window_size: int) -> None:
    hf_config = tiny_hf_config(window_size=window_size).vision_config
    layout = plan_vision(grids, config=vision_config(window_size=window_size))
    grid_thw = torch.tensor(grids)
    index, window_bounds = get_vision_window_index(grid_thw, 2, window_size, 14)
    assert torch.equal(layout.unit_order, index)
    assert torch.equal(layout.window_bounds, window_bounds)
    assert torch.equal(layout.frame_bounds, get_vision_cu_seqlens(grid_thw))
    rotary = hf_modeling.Qwen2_5_VLVisionRotaryEmbedding(hf_config)
    cos, sin = rotary(torch.zeros(1), get_vision_position_ids(grid_thw, 2))
    for ours, theirs in ((layout.cos_SH, cos), (layout.sin_SH, sin)):
        assert torch.equal(ours, theirs.unflatten(0, (-1, 4))[index].flatten(0, 1))


def test_layout_keeps_its_invariants() -> None:
    layout = plan_vision(MIXED_GRIDS, config=vision_config())
    num_units = sum(t * h * w for t, h, w in MIXED_GRIDS) // 4
    assert layout.unit_order.sort().values.tolist() == list(range(num_units))
    assert layout.unit_order[layout.unit_position].tolist() == list(range(num_units))
    for bounds in (layout.window_bounds, layout.frame_bounds):
        assert bounds[0] == 0 and bounds[-1] == 4 * num_units and bool((bounds.diff() > 0).all())
    # Windows refine frames: every frame boundary is a window boundary.
    assert set(layout.frame_bounds.tolist()) <= set(layout.window_bounds.tolist())


def test_layout_of_the_docstring() -> None:
    layout = plan_vision([(1, 4, 6)], config=vision_config(window_size=56))
    assert layout.unit_order.tolist() == [0, 1, 3, 4, 2, 5]
    assert layout.unit_position.tolist() == [0, 1, 4, 2, 3, 5]
    assert layout.window_bounds.tolist() == [0, 16, 24]
    assert layout.frame_bounds.tolist() == [0, 24]


@pytest.mark.parametrize("grid", [(1, 3, 4), (0, 2, 2), (1, 2, 5)])
def test_grid_that_does_not_merge_is_an_error(grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        plan_vision([grid], config=vision_config())


# --- against Hugging Face -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tensor_size"), [(name, tp) for name in VISION_OPTIONS for tp in (1, 2, 4)])
def test_features_and_gradients_equal_hugging_face(name: str, tensor_size: int, ranks, monkeypatch) -> None:
    """In fp64, so that nothing but a difference in the mathematics can be left: 1e-10 is far above fp64 rounding
    (1e-15 seen in features, 3e-15 in gradients) and far below any mistake. Hugging Face's norm, rotation and softmax
    are lifted to fp64 for it."""
    options = VISION_OPTIONS[name]
    expected, expected_grads = hf_features_and_grads(options, MIXED_GRIDS, dtype=torch.float64, monkeypatch=monkeypatch)
    results = ranks(
        run_encoder, world_size=tensor_size, options=options, grids=MIXED_GRIDS, dtype=torch.float64, tensor=tensor_size
    )
    config = vision_config(**VISION_OPTIONS[name])
    for rank, (features, grads) in enumerate(results):
        assert relative_difference(features, expected) < 1e-10
        shards = megatron_shards(expected_grads, config=config, rank=rank, tensor_size=tensor_size)
        assert shards.keys() == grads.keys()
        worst = max(grads, key=lambda key: relative_difference(grads[key], shards[key]))
        assert relative_difference(grads[worst], shards[worst]) < 1e-10, worst


@pytest.mark.parametrize("name", list(VISION_OPTIONS))
def test_fp32_equals_unmodified_hugging_face(name: str, ranks) -> None:
    """fp32 with Hugging Face as it is: 1e-5 of the largest feature, 1e-4 of each gradient's norm. Another order
    of summation over three layers was seen to make 1e-6 and 2e-6."""
    options = VISION_OPTIONS[name]
    expected, expected_grads = hf_features_and_grads(options, MIXED_GRIDS, dtype=torch.float32)
    [(features, grads)] = ranks(
        run_encoder, world_size=1, options=options, grids=MIXED_GRIDS, dtype=torch.float32, tensor=1
    )
    assert relative_difference(features, expected) < 1e-5
    shards = megatron_shards(expected_grads, config=vision_config(**options), rank=0, tensor_size=1)
    for key, grad in grads.items():
        # The bias of keys has no effect on softmax: its true gradient is zero, what is left is rounding.
        scale = max(shards[key].norm().item(), 1e-3 * expected_grads["merger.mlp.0.weight"].norm().item())
        assert (grad - shards[key]).norm().item() < 1e-4 * scale, key


def test_bf16_is_as_close_to_the_truth_as_hugging_face(ranks, monkeypatch) -> None:
    """Truth: fp64. Hugging Face in bf16 is the yardstick; the margin of 1.2 covers another order of rounding
    (1.06 seen)."""
    options = VISION_OPTIONS["windows of 2, one full block"]
    naive, _ = hf_features_and_grads(options, MIXED_GRIDS, dtype=torch.bfloat16)
    truth, _ = hf_features_and_grads(options, MIXED_GRIDS, dtype=torch.float64, monkeypatch=monkeypatch)
    [(ours, _)] = ranks(run_encoder, world_size=1, options=options, grids=MIXED_GRIDS, dtype=torch.bfloat16, tensor=1)
    assert (ours.double() - truth).norm() < 1.2 * (naive.double() - truth).norm()


@pytest.mark.parametrize(
    ("recompute", "tolerance"),
    [
        (dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1), 0.0),
        # Of three layers: groups of 2 would leave one over, so the encoder's have 1.
        (dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2), 0.0),
        (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=40), 0.0),
        (dict(recompute_granularity="selective", recompute_modules=["core_attn"]), 0.0),
        # Autograd then adds a norm's input gradient and the residual's in the other order: rounding only.
        (dict(recompute_granularity="selective", recompute_modules=["layernorm"]), 1e-5),
    ],
)
def test_recomputation_changes_nothing(recompute: dict[str, Any], tolerance: float, ranks) -> None:
    """The same operations in the same order: equal bit for bit, unless said. 40 layers are more than there are."""
    options = VISION_OPTIONS["windows of 2, one full block"]
    common = dict(options=options, grids=MIXED_GRIDS, dtype=torch.float32, tensor=2)
    plain = ranks(run_encoder, world_size=2, **common)
    recomputed = ranks(run_encoder, world_size=2, recompute=recompute, **common)
    for (features, grads), (again, grads_again) in zip(plain, recomputed, strict=True):
        assert torch.equal(features, again)
        for key, grad in grads.items():
            assert relative_difference(grads_again[key], grad) <= tolerance, key


def test_padding_gets_no_gradient_and_changes_nothing(ranks) -> None:
    """42 at TP 4 is padded to 44: the last rank's shard of 11 rows ends in 2 zero rows, whose gradient is exactly 0."""
    options = VISION_OPTIONS["mlp that 4 does not divide"]
    results = ranks(run_encoder, world_size=4, options=options, grids=MIXED_GRIDS, dtype=torch.float32, tensor=4)
    _, grads = results[-1]
    for layer in range(3):
        prefix = f"decoder.layers.{layer}.mlp."
        for name in ("linear_fc1.weight", "linear_fc1.bias"):
            gate, up = grads[prefix + name].chunk(2)
            assert not gate[-2:].any() and not up[-2:].any()
            assert gate[:-2].any() and up[:-2].any()
        assert not grads[prefix + "linear_fc2.weight"][:, -2:].any()


def test_without_media_every_parameter_still_gets_a_zero_gradient(ranks) -> None:
    for shape, grads in ranks(run_without_media, world_size=2):
        assert shape == (0, 64)
        assert all(grad is not None and not grad.any() for grad in grads.values())


def test_media_do_not_see_each_other(ranks) -> None:
    """Encoding two media together equals encoding them apart: exact up to the batch size of matrix products."""
    options = VISION_OPTIONS["windows of 2, one full block"]
    common = dict(options=options, dtype=torch.float64, tensor=1)
    [(together, _)] = ranks(run_encoder, world_size=1, grids=[(1, 6, 10), (3, 4, 6)], **common)
    [(first, _)] = ranks(run_encoder, world_size=1, grids=[(1, 6, 10)], **common)
    assert relative_difference(together[:15], first) < 1e-12


def test_heads_that_the_tensor_ranks_cannot_share_are_a_user_error(ranks) -> None:
    [message] = set(ranks(build_with_odd_heads, world_size=2))
    assert "3 attention heads" in message and "--tensor-model-parallel-size" in message


def test_patches_that_do_not_fit_the_grids_are_an_error(one_rank) -> None:
    encoder = build_encoder(vision_config(), groups=one_rank, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"expected \[4, 1176\].*got \[3, 1176\]"):
        encoder(torch.zeros(3, 1176), torch.tensor([(1, 2, 2)]))
    with pytest.raises(ValueError, match="got None"):
        encoder(None, torch.tensor([(1, 2, 2)]))


def test_parameters_have_the_names_and_sizes_that_conversion_expects(one_rank) -> None:
    options = VISION_OPTIONS["windows of 2, one full block"]
    config = vision_config(**options)
    encoder = build_encoder(config, groups=one_rank, dtype=torch.float32)
    hf = dict(hf_visual(options, dtype=torch.float32).named_parameters())
    expected = megatron_shards(hf, config=config, rank=0, tensor_size=1)
    assert {name: p.shape for name, p in encoder.named_parameters()} == {k: v.shape for k, v in expected.items()}
    assert sum(p.numel() for p in encoder.parameters()) == config_of(options).num_vision_parameters


def test_published_encoders_split_over_eight_ranks() -> None:
    """16 heads and a merged width of 5120 divide by every size a node has; only the MLP needs padding."""
    for config in PUBLISHED_CONFIGS.values():
        for tensor_size in (1, 2, 4, 8):
            assert config.vision.num_heads % tensor_size == config.vision.merged_hidden_size % tensor_size == 0
            assert config.vision.padded_intermediate_size(tensor_size) % tensor_size == 0
