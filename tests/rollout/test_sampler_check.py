"""The comparison of sampler and trainer before the first step: engines that are wrong in one way each are stopped with
the part that is wrong, right ones go on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.template import PromptBuilder, VisualTokens, load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.build import build_sampler_check
from megatron_ktr.rollout.check.probes import IMAGE, LONG, PATCH, SIZED, TEXT, TIMING, VIDEO, probe_prompts
from megatron_ktr.rollout.check.sampler import (
    Gap,
    SamplerCheck,
    check_line,
    describe,
    measure,
    trainer_logprobs,
)
from megatron_ktr.rollout.hf import HFEngine
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.types import Prompt, Rollout, RolloutGroup, VisualInput

NAMES = [TEXT, IMAGE, PATCH, VIDEO, TIMING, LONG, SIZED]
LIMIT = 1e-3
"""Nats: a right engine is seen to differ by 1e-6, the mistakes below by 1e-2 and more."""
TEMPERATURE = 0.8


@dataclass
class Pair:
    """A policy and what an engine beside it is made from; their weights are those of ``model_dir``."""

    model_dir: Path
    other_dir: Path
    """The same architecture with other weights."""
    policy: Any
    media: MediaSpec
    tokenizer: Any

    def engine(self, kind: type[HFEngine] = HFEngine, *, media: MediaSpec | None = None, **options: Any) -> HFEngine:
        settings = SamplingSettings(num_generations=1, max_response_length=1)
        directory = options.pop("directory", self.model_dir)
        return kind(directory, tokenizer=self.tokenizer, media=media or self.media, sampling=settings, **options)

    def check(self, engine: HFEngine, *, limit: float = LIMIT) -> SamplerCheck:
        builder = PromptBuilder(
            self.tokenizer, visual_tokens=VisualTokens.from_model(self.model_dir, self.tokenizer), merge_size=2
        )
        return SamplerCheck(
            prompts=probe_prompts(builder, media=self.media, video_max_pixels=24 * 28 * 28),
            sampling=SamplingSettings(num_generations=2, max_response_length=12, temperature=TEMPERATURE, seed=3),
            limit=limit,
            sample=lambda prompts, sampling: engine.generate(prompts, sampling=sampling),
            score=partial(trainer_logprobs, policy=self.policy, media=self.media),
            send_weights=lambda: engine.load_weights(self.policy.export()),
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
    from megatron_ktr.distributed.platform import start
    from megatron_ktr.policy.policy import Policy
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec

    folder = tmp_path_factory.mktemp("check")
    for seed, name in enumerate(("model", "other")):
        # Heads of 32: vLLM's attention on CPU takes no smaller ones.
        save_tiny_model(folder / name, corpus=corpus(), num_layers=2, seed=seed)
    platform = start("cpu")
    groups = init_parallel(ParallelSizes(), platform=platform)
    config = config_from_values({"model": str(folder / "model"), "temperature": TEMPERATURE})
    policy = Policy(folder / "model", options=PolicyOptions.of(config), ranks=groups, platform=platform, num_steps=1)
    yield Pair(
        model_dir=folder / "model",
        other_dir=folder / "other",
        policy=policy,
        media=media_spec(
            Qwen2_5_VLConfig.from_hf(folder / "model"),
            patchify=PreprocessSettings.from_model(folder / "model").patchify,
        ),
        tokenizer=load_tokenizer(folder / "model"),
    )
    destroy_parallel()


# --- right and wrong engines ----------------------------------------------------------------------------------


def test_a_right_engine_passes_and_its_gap_is_reported(pair: Pair) -> None:
    found = pair.check(pair.engine()).run()
    # 2e-5 as in the parity test of this engine: cached, left-padded attention against one packed pass in fp32.
    assert 0 < found["sampler_check/gap_mean"] <= found["sampler_check/gap_max"] < 2e-5
    assert "at most" in check_line(found) and not check_line({"loss": 1.0})


class AtTemperatureOne(HFEngine):
    """Its log-probs know no temperature."""

    def stream(self, prompts: Any, *, step: int = 0, sampling: Any = None, counts: Any = None) -> Any:
        return super().stream(prompts, step=step, sampling=dataclasses.replace(sampling, temperature=1.0))


class Forgetful(HFEngine):
    """Never takes the tensors whose names begin with ``forgets``."""

    forgets = ""

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        own = self._parameters
        super().load_weights(
            (name, own[name].clone() if name.startswith(self.forgets) else tensor) for name, tensor in named_tensors
        )


class WithoutVision(Forgetful):
    forgets = "visual."


def with_stale_vision(pair: Pair) -> HFEngine:
    engine = pair.engine(WithoutVision, directory=pair.other_dir)
    engine.load_weights(pair.policy.export())
    engine.forgets = "nothing"
    return engine


def with_patches(pair: Pair, change: Callable[[Tensor, VisualInput], Tensor]) -> HFEngine:
    """An engine that sees other frames: float [F, C, H, W] of 0 to 255 as ``change`` leaves them."""

    def patchify(frames_FCHW: Tensor, medium: VisualInput) -> Tensor:
        return pair.media.patchify(change(frames_FCHW.float(), medium).round().to(torch.uint8), medium)

    return pair.engine(media=dataclasses.replace(pair.media, patchify=patchify))


def darker(frames_FCHW: Tensor, medium: VisualInput) -> Tensor:
    return frames_FCHW / 2 + 20


def only(kind: str, change: Callable[[Tensor, VisualInput], Tensor]) -> Callable[[Tensor, VisualInput], Tensor]:
    return lambda frames, medium: change(frames, medium) if medium.kind == kind else frames


def patches_backwards(frames_FCHW: Tensor, medium: VisualInput) -> Tensor:
    return frames_FCHW.unflatten(0, (-1, 2)).flip(0).flatten(0, 1) if medium.kind == "video" else frames_FCHW


def shrunk_if_large(frames_FCHW: Tensor, medium: VisualInput) -> Tensor:
    """As a limit on pixels would: small and large again; the largest of the smaller probes has 2 x 8 units."""
    height, width = frames_FCHW.shape[-2:]
    if height * width <= 16 * 28 * 28:
        return frames_FCHW
    small = torch.nn.functional.interpolate(frames_FCHW, scale_factor=0.25, mode="area")
    return torch.nn.functional.interpolate(small, size=(height, width), mode="nearest")


def with_seconds(pair: Pair, seconds_of: Callable[[float], float]) -> HFEngine:
    def positions(token_ids: Any, *, seconds_per_grid: Any, **media: Any) -> tuple[Tensor, int]:
        return pair.media.positions(token_ids, seconds_per_grid=list(map(seconds_of, seconds_per_grid)), **media)

    return pair.engine(media=dataclasses.replace(pair.media, positions=positions))


def with_the_other_rule(pair: Pair) -> HFEngine:
    """Text goes on after the larger side of the frame, as in transformers 5.16, whatever the video's length."""

    def positions(token_ids: Any, *, grid_thw: Any, **media: Any) -> tuple[Tensor, int]:
        positions_3T, next_position = pair.media.positions(token_ids, grid_thw=grid_thw, **media)
        if not grid_thw:
            return positions_3T, next_position
        last = max(row for row, token in enumerate(token_ids) if pair.media.is_visual(token))
        first = min(row for row, token in enumerate(token_ids) if pair.media.is_visual(token))
        expected = int(positions_3T[:, first].max()) + max(grid_thw[0][1:]) // 2
        shift = int(positions_3T[0, last + 1]) - expected
        is_after_T = torch.arange(positions_3T.shape[1]) > last
        return torch.where(is_after_T, positions_3T - shift, positions_3T), next_position - shift

    return pair.engine(media=dataclasses.replace(pair.media, positions=positions))


WRONG: dict[str, tuple[Callable[[Pair], HFEngine], str]] = {
    "temperature": (lambda pair: pair.engine(AtTemperatureOne), "the sampler's log-probs are those of 1, the run's is"),
    "weights, once": (lambda pair: pair.engine(directory=pair.other_dir), "sent a second time the sampler agrees"),
    "weights, always": (lambda pair: pair.engine(Forgetful, directory=pair.other_dir), "the weights, or how text"),
    "vision weights, once": (lambda pair: with_stale_vision(pair), "sent a second time the sampler agrees"),
    "normalisation": (lambda pair: with_patches(pair, darker), "pixels of images and videos"),
    "image pixels": (lambda pair: with_patches(pair, only("image", darker)), "pixels or grid of images"),
    "video pixels": (lambda pair: with_patches(pair, only("video", darker)), "pixels of videos"),
    "frame order": (lambda pair: with_patches(pair, lambda frames, medium: frames.flip(0)), "pixels of videos"),
    "patch order": (lambda pair: with_patches(pair, patches_backwards), "grid of several temporal patches"),
    "seconds dropped": (lambda pair: with_seconds(pair, lambda own: 1.0), "the sampler counts 1 s for every one"),
    "seconds doubled": (lambda pair: with_seconds(pair, lambda own: 2 * own), "the sampler counts twice as many"),
    "seconds odd": (lambda pair: with_seconds(pair, lambda own: own + 0.6 * (own != 1)), "as 1 s agrees"),
    "positions": (with_the_other_rule, "positions after a video that lasts longer than it is wide"),
    "size": (lambda pair: with_patches(pair, shrunk_if_large), "frames of the run's size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_engine_wrong_in_one_way_is_stopped_with_that_part(pair: Pair, name: str) -> None:
    make, expected = WRONG[name]
    with pytest.raises(UserError) as stopped:
        pair.check(make(pair)).run()
    print(stopped.value)
    assert expected in str(stopped.value) and "\n" not in str(stopped.value)
    assert stopped.value.is_on_every_rank


def test_vision_weights_that_never_arrive_are_named(pair: Pair) -> None:
    engine = pair.engine(WithoutVision, directory=pair.other_dir)
    check = pair.check(engine)
    check.send_weights()
    with pytest.raises(UserError, match=r"vision encoder's weights\. By prompt: text \([^,;]*\) agree; image"):
        check.run()


def test_a_limit_above_the_gap_lets_a_wrong_engine_pass(pair: Pair) -> None:
    """The limit is what decides."""
    found = pair.check(with_patches(pair, darker), limit=100.0).run()
    assert LIMIT < found["sampler_check/gap_mean"] < 100


# --- the real vLLM --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_engine(pair: Pair) -> Iterator[Any]:
    pytest.importorskip("vllm", reason="the vLLM environment only")
    from megatron_ktr.rollout.colocated.engine import ColocatedEngine, EngineSettings

    engine = ColocatedEngine(
        pair.model_dir,
        ranks=pair.policy.ranks,
        tokenizer=pair.tokenizer,
        media=pair.media,
        # The log-probs of an engine are exact for the settings it was built with.
        sampling=SamplingSettings(num_generations=1, max_response_length=12, temperature=TEMPERATURE),
        settings=EngineSettings(max_prompt_length=256, max_response_length=12, max_medium_tokens=128),
    )
    yield engine
    engine.close()


@pytest.mark.vllm
def test_vllm_passes(pair: Pair, vllm_engine: Any) -> None:
    found = pair.check(vllm_engine).run()
    # As in the parity test: fp32 in other orders of summation, 1e-5 at most.
    assert 0 < found["sampler_check/gap_mean"] <= found["sampler_check/gap_max"] < 1e-4


VLLM_WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    # The rate of the frames goes over as metadata; two frames a second make 1 s per temporal patch.
    "seconds": ("_frames_per_second", lambda seconds, patch: 2.0, "the sampler counts 1 s for every one"),
    "images": (
        "_image",
        lambda medium: Image.fromarray(255 - medium.frames_FCHW[0].permute(1, 2, 0).contiguous().numpy()),
        "pixels or grid of images, as videos agree",
    ),
}


@pytest.mark.vllm
@pytest.mark.parametrize("name", VLLM_WRONG)
def test_a_vllm_that_is_shown_something_else_is_stopped(
    pair: Pair, vllm_engine: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from megatron_ktr.rollout.colocated import inputs as vllm_inputs

    function, wrong, expected = VLLM_WRONG[name]
    monkeypatch.setattr(vllm_inputs, function, wrong)
    with pytest.raises(UserError, match=expected):
        pair.check(vllm_engine).run()


@pytest.mark.vllm
def test_a_vllm_that_an_update_did_not_reach_is_stopped(pair: Pair, vllm_engine: Any) -> None:
    from megatron_ktr.rollout.colocated.weights import load_weights

    load_weights(vllm_engine._llm, pair.other_dir)
    with pytest.raises(UserError, match="once they are sent a second time the sampler agrees"):
        pair.check(vllm_engine).run()


# --- numbers --------------------------------------------------------------------------------------------------


def group(*logprobs: tuple[float, ...] | None) -> RolloutGroup:
    rollouts = tuple(Rollout(token_ids=(1,) * len(found or (0,)), sampler_logprobs=found) for found in logprobs)
    return RolloutGroup(Prompt("p", (1,)), rollouts)


def test_the_gap_is_over_all_tokens_of_a_group() -> None:
    assert measure(group((-1.0, -2.0), (-3.0,)), [-1.0, -2.5, -2.0]) == Gap(mean=0.5, max=1.0, num_tokens=3)


def test_a_logprob_that_is_no_number_does_not_agree() -> None:
    gap = measure(group((-1.0, math.nan, -1.0)), [-1.0, -1.0, -1.0])
    assert math.isnan(gap.mean) and math.isnan(gap.max)
    assert describe({TEXT: gap}, limit=1.0) == "nothing agrees; text (nan nats) differ"
    check = SamplerCheck(
        prompts={TEXT: Prompt("p", (1,))},
        sampling=SamplingSettings(num_generations=1, max_response_length=3),
        limit=1.0,
        sample=lambda prompts, sampling: [group((-1.0, math.nan, -1.0))],
        score=lambda groups, **changes: [[-1.0] * 3],
        send_weights=lambda: None,
    )
    with pytest.raises(UserError, match="the weights, or how text is scored"):
        check.run()


def test_an_engine_without_logprobs_is_told_so() -> None:
    with pytest.raises(UserError, match="records no log-probs; choose --no-check-sampler"):
        measure(group(None), [-1.0])


def test_prompts_longer_than_the_runs_are_left_out(pair: Pair) -> None:
    builder = PromptBuilder(
        pair.tokenizer, visual_tokens=VisualTokens.from_model(pair.model_dir, pair.tokenizer), merge_size=2
    )
    make = partial(probe_prompts, builder, media=pair.media, video_max_pixels=24 * 28 * 28)
    found = make()
    assert list(found)[:4] == [TEXT, IMAGE, PATCH, VIDEO] and list(found)[-2:] == [LONG, SIZED]
    height, width = found[SIZED].media[0].frames_FCHW.shape[-2:]
    assert height != width and 0.7 * 24 * 28 * 28 <= height * width <= 24 * 28 * 28
    limit = len(found[PATCH].token_ids)
    shorter = make(max_prompt_length=limit)
    assert all(len(prompt.token_ids) <= limit for prompt in shorter.values())
    assert all(shorter[name].token_ids == p.token_ids for name, p in found.items() if len(p.token_ids) <= limit)


@pytest.mark.parametrize(("max_length", "left_out"), [(40, [VIDEO, TIMING]), (16, NAMES[1:]), (3, NAMES)])
def test_short_prompts_are_compared_with_a_shorter_question_and_what_is_left_out_is_said(
    pair: Pair, capsys: Any, max_length: int, left_out: list[str]
) -> None:
    """Prompts of 27 tokens are a run's that accepts 40, though no prompt with the usual question is so short."""
    config = config_from_values(
        {
            "model": str(pair.model_dir),
            "temperature": TEMPERATURE,
            "engine": "hf",
            "max_response_length": 1,
            "max_prompt_length": max_length,
            "video_max_pixels": 4 * 28 * 28,
        }
    )
    engine = pair.engine()
    source = SimpleNamespace(
        has_engine=True, sample=lambda prompts, sampling: engine.generate(prompts, sampling=sampling)
    )
    check = build_sampler_check(
        config,
        policy=pair.policy,
        source=source,
        media=pair.media,
        tokenizer=pair.tokenizer,
        send_weights=lambda: engine.load_weights(pair.policy.export()),
    )
    what = f"not compared for {', '.join(left_out)}" if len(left_out) < len(NAMES) else "not compared at all"
    assert capsys.readouterr().out == (
        f"sampler and trainer are {what}: such prompts exceed --max-prompt-length {max_length}\n"
    )
    if max_length == 3:
        assert check is None
    else:
        assert list(check.prompts) == [name for name in NAMES if name not in left_out]
        assert check.run()["sampler_check/gap_max"] < LIMIT


def test_the_prompt_of_the_runs_size_is_at_least_one_token_wide(pair: Pair) -> None:
    builder = PromptBuilder(
        pair.tokenizer, visual_tokens=VisualTokens.from_model(pair.model_dir, pair.tokenizer), merge_size=2
    )
    assert probe_prompts(builder, media=pair.media, video_max_pixels=1)[SIZED].media[0].grid_thw == (2, 2, 2)


# --- in a run -------------------------------------------------------------------------------------------------


def uneven_reward(response: str, record: dict) -> float:
    return len(response) % 5 / 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check-run")
    save_tiny_model(folder / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    make_dataset(folder / "data", num_train=6, num_eval=1)
    return folder


def settings(inputs: Path, run_dir: Path, **changes: Any) -> Config:
    return config_from_values(
        {
            "model": str(inputs / "model"),
            "data_path": str(inputs / "data" / "train.json"),
            "prompt_template": str(inputs / "model" / "prompt_template.txt"),
            "video_num_frames": 8,
            "video_max_pixels": 3136,
            "engine": "hf",
            "num_generations": 2,
            "max_response_length": 6,
            "reward_functions": (f"{__name__}:uneven_reward",),
            "reward_workers": 0,
            "length_bonus": 0.0,
            "kl_beta": 0.0,
            "lr": 0.05,
            "train_steps": 2,
            "prompts_per_step": 2,
            "run_dir": str(run_dir),
            **changes,
        }
    )


def run_with_and_without(context: Any, *, inputs: Path, out: Path, changes: dict[str, Any]) -> None:
    from megatron_ktr.train import train

    for name, is_checked in (("with", True), ("without", False)):
        train(settings(inputs, out / name, check_sampler=is_checked, **changes))


@pytest.mark.parametrize("changes", [{}, {"pipeline_model_parallel_size": 2}])
def test_a_run_is_the_same_with_and_without_the_check(ranks: Any, inputs: Path, tmp_path: Path, changes: Any) -> None:
    world_size = changes.get("pipeline_model_parallel_size", 1)
    ranks(run_with_and_without, world_size=world_size, inputs=inputs, out=tmp_path, changes=changes)
    found, expected = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    )
    # fp32, cached generation against one packed pass.
    assert found[0].pop("sampler_check/gap_mean") < 1e-5 and found[0].pop("sampler_check/gap_max") < 1e-4
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        words = ("second", "ranks/", "tflops", "data_wait")
        measured = {name for name in ours | theirs if any(word in name for word in words)}
        assert {k: v for k, v in ours.items() if k not in measured} == {
            k: v for k, v in theirs.items() if k not in measured
        }
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]


def run_with_one_wrong_replica(context: Any, *, inputs: Path, run_dir: Path) -> str:
    from megatron_ktr.rollout import hf
    from megatron_ktr.train import train

    original = hf.HFEngine
    if context.rank == 1:
        hf.HFEngine = AtTemperatureOne
    try:
        train(settings(inputs, run_dir, temperature=0.7))
    except UserError as error:
        return f"{error.is_on_every_rank} {error}"
    finally:
        hf.HFEngine = original  # the process serves other tests
    return "no error"


def test_one_wrong_engine_stops_every_replica_before_the_first_step(ranks: Any, inputs: Path, tmp_path: Path) -> None:
    said = ranks(run_with_one_wrong_replica, world_size=2, inputs=inputs, run_dir=tmp_path / "run")
    assert said[0] == said[1]
    assert said[0].startswith("True sampler and trainer") and "those of 1, the run's is 0.7" in said[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
