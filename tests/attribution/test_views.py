"""Counterfactual views: what they show, where they apply, and what they depend on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.accounting.flops import count_step, count_vision
from megatron_ktr.accounting.planner import Request, find_plans
from megatron_ktr.accounting.rates import settings_of
from megatron_ktr.accounting.work import GroupWork
from megatron_ktr.attribution.views.base import CounterfactualView, ViewDraw
from megatron_ktr.config import configuration_page, load_config, view_registry
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.config.view_registry import load_view, register_view, temporal_views, visual_views
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import build_objective
from megatron_ktr.types import MediaKind, Prompt, VisualInput
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tests.support.groups import MEDIA
from tests.support.steps import example_groups, run_steps
from tests.support.tiny import save_tiny_hf
from tests.support.views import draw_of

SETTINGS = PreprocessSettings()
PIXELS = dataclasses.replace(MEDIA, patchify=SETTINGS.patchify)


def pictures(num_frames: int, *, grid=(2, 4, 6), kind: MediaKind = "video", seed=0) -> VisualInput:
    """Frames without a black pixel."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(1, 256, (num_frames, 3, 14 * grid[1], 14 * grid[2]), generator=generator, dtype=torch.uint8)
    return VisualInput(kind=kind, frames_FCHW=frames, grid_thw=grid, seconds_per_grid=1.0 if kind == "video" else 0.0)


def prompt_of(*media: VisualInput, problem_id: str = "p") -> Prompt:
    return Prompt(problem_id=problem_id, token_ids=(1,), media=media)


MIXED = prompt_of(pictures(4), pictures(1, grid=(1, 6, 4), kind="image", seed=1), pictures(3, seed=2))


def black_units(shown: VisualInput, *, side: int) -> torch.Tensor:
    """bool [time, height, width] of units of ``side`` pixels. Fails where a unit is neither black nor free of black."""
    num_t, num_h, num_w = shown.grid_thw
    frames = shown.frames_FCHW
    size = 2 if num_t > 1 else 1
    missing = num_t * size - len(frames)
    frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    cells = (frames == 0).reshape(num_t, size, 3, num_h * 14 // side, side, num_w * 14 // side, side)
    of_unit = cells.permute(0, 3, 5, 1, 2, 4, 6).flatten(3)
    assert torch.equal(of_unit.all(-1), of_unit.any(-1)), "all frames, channels and pixels of a unit are alike"
    return of_unit.all(-1)


@pytest.mark.parametrize(("unit", "side"), [("merged", 28), ("vit", 14)])
@pytest.mark.parametrize("share", [0.5, 0.3, 0.001, 1.0])
def test_patches_blacken_the_documented_share_of_whole_units(unit: str, side: int, share: float) -> None:
    shown = load_view("patches").shown(MIXED, draw_of(patch_unit=unit, patch_share=share))
    for medium, black in zip(MIXED.media, shown, strict=True):
        is_black = black_units(black, side=side)
        assert int(is_black.sum()) == max(1, round(share * is_black.numel()))
        kept = black.frames_FCHW != 0
        assert torch.equal(black.frames_FCHW[kept], medium.frames_FCHW[kept]) and black.grid_thw == medium.grid_thw


@pytest.mark.parametrize("view", ["patches", "noise", "shuffled"])
def test_random_views_depend_on_seed_step_prompt_medium_and_draw_alone(view: str) -> None:
    twins = prompt_of(pictures(8, grid=(4, 2, 2)), pictures(8, grid=(4, 2, 2)))

    def seen(prompt: Prompt = twins, **draw: int) -> list[bytes]:
        shown = load_view(view).shown(prompt, draw_of(media=PIXELS, **draw))
        return [medium.frames_FCHW.numpy().tobytes() for medium in shown]

    first = seen()
    assert first == seen() == seen(dataclasses.replace(twins, token_ids=(5, 6), source="of a mixture"))
    assert first[0] != first[1], "the media of a prompt get draws of their own"
    others = [seen(seed=1), seen(step=1), seen(draw=1), seen(dataclasses.replace(twins, draw_number=1))]
    assert len({tuple(one) for one in [first, *others]}) == 5


def test_noise_has_its_standard_deviation_after_normalisation() -> None:
    settings = dataclasses.replace(SETTINGS, image_std=(0.2, 0.5, 0.9))
    media = dataclasses.replace(MEDIA, patchify=settings.patchify)
    shown = load_view("noise").shown(MIXED, draw_of(media=media, noise_std=1.5))
    for medium, noisy in zip(MIXED.media, shown, strict=True):
        added_SCP = (settings.patchify(noisy.frames_FCHW) - settings.patchify(medium.frames_FCHW)).unflatten(1, (3, -1))
        # At least 8,400 numbers a channel: the standard error of a deviation is 0.8%, that of the mean 0.011 sigma.
        assert added_SCP.transpose(0, 1).flatten(1).std(dim=1).tolist() == pytest.approx([1.5] * 3, rel=0.04)
        assert added_SCP.transpose(0, 1).flatten(1).mean(dim=1).tolist() == pytest.approx([0.0] * 3, abs=0.09)


@pytest.mark.parametrize("unit", ["frame", "temporal_patch"])
def test_reversed_twice_is_intact(unit: str) -> None:
    view, draw = load_view("reversed"), draw_of(shuffle_unit=unit)
    prompt = prompt_of(pictures(6, grid=(3, 2, 2)), pictures(1, grid=(1, 2, 2), kind="image"))
    once = view.shown(prompt, draw)
    order = [5, 4, 3, 2, 1, 0] if unit == "frame" else [4, 5, 2, 3, 0, 1]
    assert torch.equal(once[0].frames_FCHW, prompt.media[0].frames_FCHW[order]) and once[1] is prompt.media[1]
    twice = view.shown(dataclasses.replace(prompt, media=once), draw)
    assert torch.equal(twice[0].frames_FCHW, prompt.media[0].frames_FCHW)
    # An odd number of frames is filled up first, as the encoder's preprocessing does.
    (odd,) = view.shown(prompt_of(pictures(3)), draw)
    assert len(odd.frames_FCHW) == (3 if unit == "frame" else 4)


def test_views_apply_where_they_change_something() -> None:
    frames = pictures(4).frames_FCHW

    def of(*order: int) -> Prompt:
        return prompt_of(dataclasses.replace(pictures(4), frames_FCHW=frames[list(order)]))

    black = dataclasses.replace(pictures(4), frames_FCHW=torch.zeros_like(frames))
    prompts = {
        "video": of(0, 1, 2, 3),
        "still": of(0, 0, 0, 0),
        "mirror of frames": of(0, 1, 1, 0),
        "mirror of pairs": of(0, 1, 0, 1),
        "black": prompt_of(black),
        "image": prompt_of(pictures(1, grid=(1, 4, 6), kind="image")),
        "text": prompt_of(),
    }
    expected = {
        "hidden": {"video", "still", "mirror of frames", "mirror of pairs", "black", "image"},
        "noise": {"video", "still", "mirror of frames", "mirror of pairs", "black", "image"},
        "patches": {"video", "still", "mirror of frames", "mirror of pairs", "image"},
        "shuffled": {"video", "mirror of frames", "mirror of pairs"},
        "reversed": {"video"},
        "other_video": set(),
    }
    assert expected.keys() == {*visual_views(), *temporal_views()}
    found = {view: {name for name, prompt in prompts.items() if load_view(view).applies(prompt)} for view in expected}
    assert found == expected
    other = dataclasses.replace(of(0, 1, 2, 3), other_media=(pictures(4, seed=9),))
    assert load_view("other_video").applies(other)
    assert load_view("other_video").shown(other, draw_of()) == other.other_media


def test_names_of_views_are_unique_and_unknown_ones_name_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown view 'reverse'.*did you mean reversed"):
        load_view("reverse")
    with pytest.raises(ValueError, match="two views are called 'hidden'"):
        register_view("hidden", "tests.somewhere:ELSE", is_temporal=False)


class Striped(CounterfactualView):
    """Every second line of every picture is black. A view of one's own: nothing else in the project knows it."""

    name = "striped"
    is_random = False

    def applies(self, prompt: Prompt) -> bool:
        return bool(prompt.media)

    def shown(self, prompt: Prompt, draw: ViewDraw) -> tuple[VisualInput, ...]:
        striped = [medium.frames_FCHW.clone() for medium in prompt.media]
        for frames_FCHW in striped:
            frames_FCHW[:, :, ::2] = 0
        pairs = zip(prompt.media, striped, strict=True)
        return tuple(dataclasses.replace(medium, frames_FCHW=frames_FCHW) for medium, frames_FCHW in pairs)


STRIPED = Striped()


def test_a_view_of_ones_own_is_configured_trained_with_counted_and_planned(
    one_rank: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_registry, "VISUAL_VIEWS", dict(view_registry.VISUAL_VIEWS))
    register_view("striped", f"{__name__}:STRIPED", is_temporal=False)
    values = {"visual_view": "striped", "signals": ("visual",)}
    flags = ["--model", "m", "--replay-path", "r.jsonl", "--visual-view", "striped", "--signals", "visual"]
    config = load_config(flags)
    assert config.objective.visual_view == "striped" and "striped" in configuration_page()
    with pytest.raises(UserError, match="--patch-share is not read with --visual-view striped"):
        load_config([*flags, "--patch-share", "0.2"])

    save_tiny_hf(tmp_path)
    (record,) = run_steps(one_rank, hf_dir=tmp_path, rollout_groups=example_groups("mixed", "text"), values=values)
    assert record.values["has_stepped"] == 1.0 and record.values["key_token_ratio/visual"] > 0
    # Each picture and its striped form ran through the encoder: the policy's own run once, the reference's once more.
    assert record.values["vision_runs_per_prompt"] == 3.0

    settings = settings_of(StepOptions.of(config), build_objective(config.objective))
    model = PUBLISHED_CONFIGS["3B"]
    flops = count_step(model, [GroupWork(100, (50,), video_grids=((4, 8, 8),))], settings=settings)
    assert flops.of("striped", parts=("vision",)) == count_vision(model.vision, ((4, 8, 8),)).total
    request = Request(config=model, num_gpus=8, gpu_memory_gb=80, num_frames=16, prompts_per_step=8, settings=settings)
    without = dataclasses.replace(request, settings=dataclasses.replace(settings, views=()))
    assert find_plans(request)[0].time.total > find_plans(without)[0].time.total
