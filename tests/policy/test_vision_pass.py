"""Each content is encoded once: the cache, the graph that scoring passes share, frames split over ranks, and what a
whole training step then runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.policy.vision_pass import VisionPass, share_units
from megatron_ktr.types import VisualInput
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import compare_steps, example_groups, run_steps
from tests.support.tiny import save_tiny_hf

MEDIA = MediaSpec(
    image_token_id=1,
    video_token_id=2,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    positions=lambda *_, **__: None,
    patchify=PreprocessSettings().patchify,
)
PATCH_DIM = 3 * 2 * 14 * 14


class CountingEncoder(torch.nn.Module):
    """Sums the four patches of each visual token and projects them; counts patches."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(5, PATCH_DIM, generator=generator, dtype=torch.float64))
        self.calls: list[int] = []

    def forward(self, patches_SD: Tensor | None, grid_thw_M3: Tensor) -> Tensor:
        if patches_SD is None:
            return self.weight.sum() * torch.zeros(0, 5, dtype=torch.float64)
        assert len(patches_SD) == int(grid_thw_M3.prod(dim=1).sum())
        self.calls.append(len(patches_SD))
        return torch.tanh(patches_SD.double().unflatten(0, (-1, 4)).sum(1) @ self.weight.t() / 40)


def video(num_frames: int = 6, seed: int = 1, *, height: int = 28) -> VisualInput:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (num_frames, 3, height, 56), generator=generator, dtype=torch.uint8)
    return VisualInput("video", frames, (-(-num_frames // 2), height // 14, 4), seconds_per_grid=1.0)


def image(seed: int = 7) -> VisualInput:
    frames = torch.randint(0, 256, (1, 3, 56, 28), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return VisualInput("image", frames, (1, 4, 2))


def direct(encoder: CountingEncoder, *media: VisualInput) -> Tensor:
    """All media in one plain call."""
    patches = torch.cat([MEDIA.patchify(medium.frames_FCHW, medium) for medium in media])
    return encoder(patches, torch.tensor([medium.grid_thw for medium in media]))


def make(encoder: CountingEncoder, **options: Any) -> VisionPass:
    settings = dict(media=MEDIA, device=torch.device("cpu"), cache_bytes=1 << 20, is_trainable=True)
    return VisionPass(encoder, **{**settings, **options})


def reordered(medium: VisualInput, order: list[int]) -> VisualInput:
    return VisualInput(medium.kind, medium.frames_FCHW[order], medium.grid_thw, medium.seconds_per_grid)


def test_units_put_together_are_the_media_encoded_at_once() -> None:
    encoder = CountingEncoder()
    shown = (image(), video(5), video(2, seed=3))  # the odd video repeats its last frame
    with torch.no_grad():
        found = make(encoder).features(shown)
    # Equal but for the order of sums inside a matrix product.
    torch.testing.assert_close(found, direct(encoder, *shown), rtol=1e-12, atol=1e-12)
    assert make(encoder).features(()) is None


def test_moved_pairs_cost_nothing_and_moved_frames_cost_one_more_run() -> None:
    encoder = CountingEncoder()
    vision = make(encoder)
    shown = video(6)
    with torch.no_grad():
        intact = vision.features((shown,))
        assert vision.take_counts() == 3
        pairs = vision.features((reordered(shown, [4, 5, 0, 1, 2, 3]),))
        assert vision.take_counts() == 0 and len(encoder.calls) == 1
        frames = vision.features((reordered(shown, [5, 1, 3, 0, 2, 4]),))
        assert vision.take_counts() == 3 and len(encoder.calls) == 2
    per_unit = intact.unflatten(0, (3, -1))
    assert torch.equal(pairs, per_unit[[2, 0, 1]].flatten(0, 1))
    assert not torch.allclose(frames, intact)


def test_a_still_video_is_one_unit_and_its_gradient_counts_every_showing() -> None:
    encoder = CountingEncoder()
    still = reordered(video(2), [0, 1, 0, 1, 0, 1])
    still = VisualInput("video", still.frames_FCHW, (3, 2, 4))
    vision = make(encoder)
    found = vision.features((still,))
    assert vision.take_counts() == 1 and encoder.calls == [8]
    weights = torch.arange(found.numel(), dtype=torch.float64).view_as(found)
    (found * weights).sum().backward()
    ours, encoder.weight.grad = encoder.weight.grad, None
    (direct(encoder, still) * weights).sum().backward()
    torch.testing.assert_close(ours, encoder.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_gradient_is_that_of_a_plain_call_and_prepared_features_share_its_run(
    recompute: bool, is_prepared: bool
) -> None:
    encoder = CountingEncoder()
    vision = make(encoder, recompute=recompute)
    shown = (video(6), image())
    if is_prepared:
        vision.prepare(shown)
        with torch.no_grad():
            scored = vision.features(shown)
        assert not scored.requires_grad
    found = vision.features(shown)
    assert vision.take_counts() == 4  # one run of 3 + 1 units, prepared or not
    found.square().sum().backward()
    assert len(encoder.calls) == (2 if recompute else 1)
    ours, encoder.weight.grad = encoder.weight.grad, None
    direct(encoder, *shown).square().sum().backward()
    torch.testing.assert_close(ours, encoder.weight.grad, rtol=1e-12, atol=1e-12)


def test_features_of_old_weights_are_forgotten() -> None:
    encoder = CountingEncoder()
    vision = make(encoder)
    with torch.no_grad():
        before = vision.features((video(),))
        encoder.weight.mul_(2)
        assert torch.equal(vision.features((video(),)), before)
        vision.forget()
        assert not torch.allclose(vision.features((video(),)), before)


def test_the_cache_drops_the_least_recently_used_and_never_exceeds_its_bytes() -> None:
    encoder = CountingEncoder()
    unit_bytes = 2 * 5 * 8  # 2 visual tokens of 5 fp64
    vision = make(encoder, is_trainable=False, cache_bytes=3 * unit_bytes)
    first, second = video(4, seed=1), video(2, seed=2)
    with torch.no_grad():
        vision.features((first,))
        vision.features((second,))
        vision.features((first,))  # used again: the next to go is the second
        assert vision.take_counts() == 3
        vision.features((video(2, seed=3),))
        vision.features((first,))
        assert vision.take_counts() == 1
        vision.features((second,))
        assert vision.take_counts() == 1
        assert vision._cached_bytes == sum(part.nbytes for part in vision._cache.values()) <= 3 * unit_bytes
        nothing = make(encoder, cache_bytes=0)
        assert torch.equal(nothing.features((first, first)), nothing.features((first, first)))
        assert nothing.take_counts() == 4  # repeated inside a call once, over calls again


def test_shares_are_even_in_tokens_and_cover_everything() -> None:
    assert share_units([4] * 8, num_ranks=4) == [0, 2, 4, 6, 8]
    assert share_units([1, 1, 1, 9], num_ranks=2) == [0, 3, 4]
    assert share_units([5], num_ranks=3) in ([0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1])
    for sizes in ([3, 9, 2, 2, 7, 1, 4], [1] * 13, [10, 1, 1]):
        for num_ranks in (1, 2, 3, 5):
            bounds = share_units(sizes, num_ranks=num_ranks)
            assert (
                bounds[0] == 0
                and bounds[-1] == len(sizes)
                and bounds == sorted(bounds)
                and len(bounds) == num_ranks + 1
            )
            largest = max(sum(sizes[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
            assert largest <= sum(sizes) / num_ranks + max(sizes)


def split_frames(context: RankContext) -> tuple[Tensor, Tensor, list[int]]:
    groups = context.init(ParallelSizes(tensor=context.world_size))
    encoder = CountingEncoder()
    vision = make(encoder, split_over=groups.tensor)
    found = vision.features((video(6), image(), video(5, seed=4)))
    (found * torch.arange(found.numel(), dtype=torch.float64).view_as(found)).sum().backward()
    torch.distributed.all_reduce(encoder.weight.grad, group=groups.tensor)
    return found.detach(), encoder.weight.grad, encoder.calls


@pytest.mark.parametrize("world_size", [2, 4])
def test_frames_split_over_ranks_give_the_features_and_together_the_gradient(ranks: RankPool, world_size: int) -> None:
    encoder = CountingEncoder()
    shown = (video(6), image(), video(5, seed=4))
    expected = direct(encoder, *shown)
    (expected * torch.arange(expected.numel(), dtype=torch.float64).view_as(expected)).sum().backward()
    found = ranks(split_frames, world_size)
    for features, gradient, _ in found:
        torch.testing.assert_close(features, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, encoder.weight.grad, rtol=1e-12, atol=1e-12)
    # 3 + 1 + 3 units of 8 patches: no rank runs more than its share and one unit.
    assert (
        sum(sum(calls) for *_, calls in found) == 56 and max(sum(calls) for *_, calls in found) <= 56 // world_size + 8
    )


# --- whole steps ----------------------------------------------------------------------------------------------


def run_variants(context: RankContext, *, hf_dir: Path, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    parallel = context.init(ParallelSizes())
    groups = example_groups("long video", "image")
    return {
        name: run_steps(parallel, hf_dir=hf_dir, rollout_groups=groups, values=values, num_steps=2)
        for name, values in variants.items()
    }


FROZEN = dict(freeze=("vision", "merger"))
VARIANTS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    # "long video" has 4 temporal patches, "image" 1. The frozen reference model encodes the 5 in the first step only.
    "frame": (dict(), (14 / 5, 9 / 5)),
    "temporal_patch": (dict(shuffle_unit="temporal_patch"), (2.0, 1.0)),
    "grpo": (dict(objective="grpo", kl_beta=0.0), (1.0, 1.0)),
    "several updates": (dict(objective="grpo", kl_beta=0.0, updates_per_rollout=2), (2.0, 2.0)),
    "frozen": (FROZEN, (9 / 5, 4 / 5)),
    "frozen temporal_patch": ({**FROZEN, "shuffle_unit": "temporal_patch"}, (1.0, 0.0)),
}


def test_a_step_runs_the_encoder_as_often_as_said_and_caching_changes_no_number(
    ranks: RankPool, tmp_path: Path
) -> None:
    """Against the same steps without a cache, where every pass runs the encoder itself."""
    initial = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): parameter.detach().clone()
        for name, parameter in save_tiny_hf(tmp_path).named_parameters()
    }
    variants = {name: values for name, (values, _) in VARIANTS.items()}
    uncached = {f"{name}, uncached": {**values, "vision_cache_gb": 0.0} for name, values in variants.items()}
    (found,) = ranks(run_variants, 1, hf_dir=tmp_path, variants={**variants, **uncached})
    for name, (_, runs) in VARIANTS.items():
        steps, plain = found[name], found[f"{name}, uncached"]
        assert [step.values.pop("vision_runs_per_prompt") for step in steps] == pytest.approx(runs), name
        if name.startswith("frozen"):
            assert plain[1].values["vision_runs_per_prompt"] >= 2.8
        for step in plain:
            del step.values["vision_runs_per_prompt"]
        difference = compare_steps(steps, plain, initial=initial)
        # The same kernels on other batch sizes: rounding of fp32 sums.
        assert max(difference.loss, difference.score, difference.value) < 2e-5, (name, difference)
        assert max(difference.gradient, difference.update) < 1e-4, (name, difference)
