"""The real vLLM engine against the trainer: same tokens, pixels, positions and log-probs, on real video files.

One engine and one policy serve all tests of this file. The engine starts from a directory that the policy exported,
with weights that no initialisation gives (norms and biases are random too, so that a mix-up shows).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec, pack_groups
from megatron_ktr.config import config_from_values
from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.data import synthetic
from megatron_ktr.data.media.preprocess import PreprocessSettings, load_media
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.template import PromptBuilder, VisualTokens, WordingTemplate, load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.rollout.colocated.inputs import engine_input
from megatron_ktr.rollout.colocated.weights import load_weights
from megatron_ktr.types import Prompt, Rollout, RolloutGroup, VisualInput
from tests.support.videos import numbered_frames, shared_videos

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
"""Nats per token. Both sides compute in fp32 in different orders; 1e-5 is seen. A wrong position moves 1e-2 and more
(asserted below), a frame resized twice or other seconds likewise."""
RESPONSE_TOKENS = 24


@dataclass
class SeenRequest:
    """What reached vLLM's model for one request."""

    token_ids: list[int]
    media: list[dict[str, Any]]
    """kind, grid, seconds (videos), patches."""
    positions_3T: Tensor
    next_position: int


@dataclass
class Pair:
    """Trainer and engine with the same weights."""

    initial_dir: Path
    """What ``save_tiny_model`` wrote; the policy's own source of config and tokenizer."""
    files: Path
    policy: Any
    llm: Any
    media: MediaSpec
    builder: PromptBuilder
    start_seconds: float
    seen: list[SeenRequest] = field(default_factory=list)

    def score(self, prompt: Prompt, responses: Sequence[Sequence[int]], media: MediaSpec | None = None) -> list[Tensor]:
        """The trainer's log-probs of each response, from one packed group."""
        group = RolloutGroup(prompt, tuple(Rollout(token_ids=tuple(response)) for response in responses))
        batch = pack_groups([group], view="intact", media=media or self.media)
        (statistics,) = self.policy.score([batch])
        return list(statistics.logprob_R.split([len(response) for response in responses]))

    def score_in_vllm(self, prompt: Prompt, responses: Sequence[Sequence[int]]) -> list[Tensor]:
        """The engine's log-probs of given responses."""
        from vllm import SamplingParams

        requests = [engine_input(prompt, media=self.media, response=response) for response in responses]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        logprobs = []
        for output, response in zip(outputs, responses, strict=True):
            assert tuple(output.prompt_token_ids) == (*prompt.token_ids, *response)
            steps = output.prompt_logprobs[-len(response) :]
            logprobs.append(torch.tensor([step[token].logprob for step, token in zip(steps, response, strict=True)]))
        return logprobs

    def sample(self, prompt: Prompt, *, num_responses: int, **options: Any) -> tuple[list[list[int]], list[Tensor]]:
        """Responses sampled by the engine at temperature 1, with their log-probs."""
        from vllm import SamplingParams

        params = SamplingParams(
            **{
                "n": num_responses,
                "max_tokens": RESPONSE_TOKENS,
                "temperature": 1.0,
                "logprobs": 0,
                "ignore_eos": True,
                "detokenize": False,
                "seed": 0,
                **options,
            }
        )
        (output,) = self.llm.generate([engine_input(prompt, media=self.media)], params, use_tqdm=False)
        assert tuple(output.prompt_token_ids) == prompt.token_ids
        tokens = [list(sample.token_ids) for sample in output.outputs]
        logprobs = [
            torch.tensor([step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)])
            for sample in output.outputs
        ]
        return tokens, logprobs

    def load_directory(self, directory: Path) -> None:
        """The same stored weights on both sides."""
        from models.qwen2_5_vl.conversion import load_hf_weights

        load_hf_weights(self.policy.bare_chunks, directory, ranks=self.policy.ranks)
        self.policy.vision.forget()
        load_weights(self.llm, directory)

    def stream_new_weights(self, *, seed: int) -> None:
        """New weights in the trainer, streamed to the engine under HF names."""
        disturb(self.policy, seed=seed)
        load_weights(self.llm, self.policy.export())

    def video(self, name: str, **options: Any) -> VisualInput:
        return load(self.files / name, kind="video", model_dir=self.initial_dir, **options)

    def image(self, name: str, **options: Any) -> VisualInput:
        return load(self.files / name, kind="image", model_dir=self.initial_dir, **options)

    def prompt(self, *media: VisualInput) -> Prompt:
        record = {"problem_id": "p", "problem": "which colour came first", "options": ["A red", "B blue"]}
        return self.builder.build(record, media)


def load(path: Path, *, kind: str, model_dir: Path, sampling: FrameSampling | None = None, **limits: int) -> Any:
    settings = PreprocessSettings.from_model(model_dir, **limits)
    return load_media(path, kind=kind, settings=settings, sampling=sampling or FrameSampling()).visual


def disturb(policy: Any, *, seed: int) -> None:
    """Adds noise to every weight, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for chunk in policy.bare_chunks:
            for parameter in chunk.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.08)
    policy.vision.forget()


def given_responses(pair: Pair, *, seed: int, num: int = 2) -> list[list[int]]:
    """Random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.tensor(
        [token for token in range(len(pair.builder.tokenizer)) if not pair.media.is_visual(token)]
    )
    picks = torch.randint(0, len(vocabulary), (num, RESPONSE_TOKENS), generator=generator)
    return vocabulary[picks].tolist()


def write_media(folder: Path) -> None:
    rng = np.random.default_rng(0)
    long = np.concatenate([numbered_frames(20, height=56, width=56), numbered_frames(20, height=56, width=56)[::-1]])
    synthetic.write_video(folder / "long.mp4", long, fps=2)
    synthetic.write_video(folder / "fast.mp4", numbered_frames(44, height=64, width=96), fps=20)
    synthetic.write_video(folder / "wide.mp4", numbered_frames(48, height=140, width=196), fps=12)
    Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(folder / "noise.png")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pytest.importorskip("vllm", reason="the vLLM environment only")
    from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
    from megatron_ktr.distributed.platform import start
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.rollout.vllm.cpu import start_vllm_on_cpu, stop_vllm_in_process
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec

    folder = tmp_path_factory.mktemp("vllm")
    initial_dir, export_dir = folder / "initial", folder / "export"
    save_tiny_model(initial_dir, corpus=synthetic.corpus())
    write_media(folder)
    platform = start("cpu")
    groups = init_parallel(ParallelSizes(), platform=platform)
    policy = Policy(
        initial_dir,
        options=PolicyOptions.of(config_from_values({"model": str(initial_dir)})),
        ranks=groups,
        platform=platform,
        num_steps=1,
    )
    disturb(policy, seed=1)
    policy.save_hf(export_dir)

    started = time.monotonic()
    llm = start_vllm_on_cpu(
        export_dir,
        max_model_len=2048,
        max_num_batched_tokens=4096,
        limit_mm_per_prompt={"image": 2, "video": 2},
        # As ``vllm serve`` would by default: normalised in the model, by what the exported processor files say.
        mm_device_do_normalize=True,
    )
    tokenizer = load_tokenizer(initial_dir)
    pair = Pair(
        initial_dir=initial_dir,
        files=folder,
        policy=policy,
        llm=llm,
        media=media_spec(
            Qwen2_5_VLConfig.from_hf(initial_dir), patchify=PreprocessSettings.from_model(initial_dir).patchify
        ),
        builder=PromptBuilder(
            tokenizer,
            visual_tokens=VisualTokens.from_model(initial_dir, tokenizer),
            wording=WordingTemplate(initial_dir / "prompt_template.txt"),
        ),
        start_seconds=time.monotonic() - started,
    )
    print(f"the engine started in {pair.start_seconds:.1f} s")
    with pytest.MonkeyPatch.context() as patch:
        record_requests(patch, pair)
        yield pair
    stop_vllm_in_process(llm)
    pair.score(pair.prompt(), [[1, 2]])  # the engine ends alone, the trainer goes on
    destroy_parallel()


def record_requests(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    """Notes what vLLM's model is given to compute positions from, and what it computes."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as VLLMModel

    original = VLLMModel.get_mrope_input_positions

    def noting(self: Any, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        positions_3T, delta = original(self, input_tokens, mm_features)
        media = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            kind = feature.modality
            data = {name: element.data for name, element in feature.data.items()}
            patches = data["pixel_values" if kind == "image" else "pixel_values_videos"]
            medium = {"kind": kind, "grid": tuple(data[f"{kind}_grid_thw"].tolist()), "patches": patches}
            media.append(medium | ({"seconds": float(data["second_per_grid_ts"])} if kind == "video" else {}))
        pair.seen.append(SeenRequest(list(input_tokens), media, positions_3T, len(input_tokens) + delta))
        return positions_3T, delta

    patch.setattr(VLLMModel, "get_mrope_input_positions", noting)


def long_video(pair: Pair) -> Prompt:
    """40 frames of 56 x 56, 20 s: 39 positions in time, 2 in height and width."""
    prompt = pair.prompt(pair.video("long.mp4"))
    assert prompt.media[0].grid_thw == (20, 4, 4) and prompt.media[0].seconds_per_grid == 1.0
    return prompt


def fast_video(pair: Pair) -> Prompt:
    """All frames of 20 a second: 0.1 s per temporal patch, which fp32 does not hold exactly."""
    prompt = pair.prompt(pair.video("fast.mp4", sampling=FrameSampling(fps=20.0)))
    assert prompt.media[0].seconds_per_grid == 0.1 and prompt.media[0].grid_thw[0] == 22
    return prompt


def wide_video(pair: Pair) -> Prompt:
    """Frames of several attention windows, ragged at the edge; a fixed count of frames, 4/3 s per temporal patch."""
    sampling = FrameSampling(num_frames=6)
    prompt = pair.prompt(pair.video("wide.mp4", sampling=sampling, video_max_pixels=140 * 196))
    assert prompt.media[0].grid_thw == (3, 10, 14)
    assert prompt.media[0].seconds_per_grid == pytest.approx(4 / 3)
    return prompt


def image(pair: Pair) -> Prompt:
    return pair.prompt(pair.image("noise.png", image_max_pixels=90 * 70))


def image_and_video(pair: Pair) -> Prompt:
    return pair.prompt(pair.image("noise.png"), pair.video("long.mp4", sampling=FrameSampling(num_frames=8)))


def video_and_images(pair: Pair) -> Prompt:
    video = pair.video("fast.mp4", sampling=FrameSampling(fps=3.0))
    return pair.prompt(video, pair.image("noise.png"), pair.image("noise.png", image_max_pixels=112 * 112))


def text(pair: Pair) -> Prompt:
    return pair.prompt()


CASES = [long_video, fast_video, wide_video, image, image_and_video, video_and_images, text]


def check_inputs(pair: Pair, prompt: Prompt, seen: SeenRequest) -> None:
    """Tokens, grids, seconds, pixels and positions that reached vLLM's model are ours."""
    assert tuple(seen.token_ids[: len(prompt.token_ids)]) == prompt.token_ids
    assert [medium["kind"] for medium in seen.media] == [medium.kind for medium in prompt.media]
    for theirs, ours in zip(seen.media, prompt.media, strict=True):
        assert theirs["grid"] == ours.grid_thw
        if ours.kind == "video":
            assert theirs["seconds"] == np.float32(ours.seconds_per_grid)
        # The fixture's engine normalises inside the model and hands over raw pixels; others hand over normalised ones.
        patches_SD = theirs["patches"]
        expected_SD = pair.media.patchify(ours.frames_FCHW, ours)
        if patches_SD.dtype == torch.uint8:
            settings = PreprocessSettings()
            scale = partial(torch.repeat_interleave, repeats=expected_SD.shape[1] // 3)
            mean, std = scale(torch.tensor(settings.image_mean)), scale(torch.tensor(settings.image_std))
            patches_SD = (patches_SD.float() / 255 - mean) / std
        # Values up to 2.7 in fp32, two roundings apart at most.
        torch.testing.assert_close(patches_SD.float(), expected_SD, atol=2e-6, rtol=0)
    ours_3P, next_position = pair.media.positions(
        prompt.token_ids,
        grid_thw=[medium.grid_thw for medium in prompt.media],
        kinds=[medium.kind for medium in prompt.media],
        seconds_per_grid=[medium.seconds_per_grid for medium in prompt.media],
    )
    num_response = len(seen.token_ids) - len(prompt.token_ids)
    assert torch.equal(seen.positions_3T[:, : len(prompt.token_ids)], ours_3P)
    assert seen.next_position == next_position + num_response


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    assert [len(part) for part in ours] == [len(part) for part in theirs]
    difference_R = (torch.cat(list(ours)) - torch.cat(list(theirs))).abs()
    print(
        f"|difference| of {len(difference_R)} log-probs: max {difference_R.max():.1e}, mean {difference_R.mean():.1e}"
    )
    return float(difference_R.max())


def check_given(pair: Pair, prompt: Prompt, *, seed: int = 0) -> float:
    responses = given_responses(pair, seed=seed)
    pair.seen.clear()
    theirs = pair.score_in_vllm(prompt, responses)
    assert len(pair.seen) == len(responses)
    for seen in pair.seen:
        check_inputs(pair, prompt, seen)
    difference = largest_difference(pair.score(prompt, responses), theirs)
    assert difference <= TOLERANCE
    return difference


@pytest.mark.parametrize("case", CASES)
def test_vllm_gives_the_trainers_logprobs_of_a_given_response(pair: Pair, case: Any) -> None:
    check_given(pair, case(pair), seed=CASES.index(case))


@pytest.mark.parametrize("case", CASES)
def test_logprobs_of_sampled_tokens_are_the_trainers(pair: Pair, case: Any) -> None:
    prompt = case(pair)
    responses, theirs = pair.sample(prompt, num_responses=3)
    assert len({tuple(response) for response in responses}) == 3
    difference = largest_difference(pair.score(prompt, responses), theirs)
    assert difference <= TOLERANCE


def test_a_wrong_position_or_second_would_be_seen(pair: Pair) -> None:
    """The other rule (text continues after the larger side of the frame) and a second of another length move these
    log-probs by far more than the tolerance."""
    prompt = long_video(pair)
    responses = given_responses(pair, seed=0)
    theirs = pair.score_in_vllm(prompt, responses)

    def other_rule(token_ids: Any, **media: Any) -> tuple[Tensor, int]:
        positions_3T, next_position = pair.media.positions(token_ids, **media)
        is_after = torch.arange(positions_3T.shape[1]) > max(
            row for row, token in enumerate(token_ids) if pair.media.is_visual(token)
        )
        return torch.where(is_after, positions_3T - 37, positions_3T), next_position - 37

    wrong_rule = dataclasses.replace(pair.media, positions=other_rule)
    assert largest_difference(pair.score(prompt, responses, wrong_rule), theirs) > 100 * TOLERANCE
    slower = dataclasses.replace(prompt, media=(dataclasses.replace(prompt.media[0], seconds_per_grid=1.5),))
    assert largest_difference(pair.score(slower, responses), theirs) > 100 * TOLERANCE


def test_the_same_frames_at_another_speed_are_not_taken_from_a_cache(pair: Pair) -> None:
    """vLLM caches processed media and prompts by hashes of their content; the seconds must be part of it."""
    prompt = long_video(pair)
    for seconds in (1.0, 0.73, 2.5):
        medium = dataclasses.replace(prompt.media[0], seconds_per_grid=seconds)
        check_given(pair, dataclasses.replace(prompt, media=(medium,)))


def test_a_visual_token_in_a_response_is_plain_text_on_both_sides(pair: Pair) -> None:
    prompt = image_and_video(pair)
    visual = [pair.media.image_token_id, pair.media.video_token_id]
    responses, theirs = pair.sample(prompt, num_responses=2, max_tokens=4, allowed_token_ids=visual)
    assert all(pair.media.is_visual(token) for response in responses for token in response)
    assert largest_difference(pair.score(prompt, responses), theirs) <= TOLERANCE
    theirs = pair.score_in_vllm(prompt, responses)
    assert largest_difference(pair.score(prompt, responses), theirs) <= TOLERANCE


def test_directory_of_a_new_model_loads_on_both_sides(pair: Pair) -> None:
    pair.load_directory(pair.initial_dir)
    for case in (long_video, image_and_video, text):
        check_given(pair, case(pair))


def test_streamed_weights_give_the_new_logprobs(pair: Pair) -> None:
    prompt = image_and_video(pair)
    responses = given_responses(pair, seed=0)
    # The whole prompt, so that prefix and encoder caches hold the old weights' values of it.
    pair.sample(prompt, num_responses=2)
    before = pair.score_in_vllm(prompt, responses)
    pair.stream_new_weights(seed=2)
    after = pair.score_in_vllm(prompt, responses)
    assert largest_difference(before, after) > 0.1, "the new weights are other weights"
    assert largest_difference(pair.score(prompt, responses), after) <= TOLERANCE
    tokens, logprobs = pair.sample(prompt, num_responses=2)
    assert largest_difference(pair.score(prompt, tokens), logprobs) <= TOLERANCE


def test_real_videos_give_the_trainers_logprobs(pair: Pair) -> None:
    """Files of cameras and codecs, decoded by decord or PyAV: sizes, rates and rotations as they come."""
    paths = [path for path in shared_videos() if not path.name.startswith("corrupted")]
    if not paths:
        pytest.skip("no folder of real videos on this machine ($KTR_SHARED_DATA)")
    for path in paths:
        sampling = FrameSampling(max_frames=12)
        video = load(path, kind="video", model_dir=pair.initial_dir, sampling=sampling, video_max_pixels=24 * 28 * 28)
        print(path.name, video.grid_thw, video.seconds_per_grid)
        check_given(pair, pair.prompt(video))
