"""The trainer's vision features in place of pixels: same on every rank and from any shards; vLLM, given them, builds no
encoder and gives the log-probs and greedy tokens it gives from pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.config import config_from_values
from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.template import PromptBuilder, VisualTokens, load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.rollout.check.probes import IMAGE, LONG, TIMING, probe_prompts
from megatron_ktr.rollout.check.sampler import trainer_logprobs
from megatron_ktr.rollout.colocated.inputs import FEATURE_OPTIONS, engine_input, feature_data
from megatron_ktr.rollout.colocated.weights import load_weights
from megatron_ktr.rollout.features import FeatureSender, build_feature_sender
from megatron_ktr.types import Prompt, Rollout, RolloutGroup, VisualInput
from tests.support.groups import MEDIA, group_of, image, video

SHARDS = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
TOLERANCE = 1e-4
"""Nats per token, mean: both sides compute in fp32 in different orders; 1e-5 is seen."""
RESPONSE_TOKENS = 16


# --- inputs of vLLM ---------------------------------------------------------------------------------------------


def test_features_go_over_with_grid_and_seconds_by_kind() -> None:
    prompt = group_of(1, image(), video(num_frames=4, seconds=0.5), image(height=4), responses=[[5]]).prompt
    counts = [MEDIA.num_visual_tokens(medium) for medium in prompt.media]
    features = [torch.full((count, 3), float(index)) for index, count in enumerate(counts)]
    media = [dataclasses.replace(m, features=f) for m, f in zip(prompt.media, features, strict=True)]
    request = engine_input(dataclasses.replace(prompt, media=tuple(media)), media=MEDIA)
    data = request["multi_modal_data"]
    assert torch.equal(data["image"]["image_embeds"], torch.cat([features[0], features[2]]))
    assert data["image"]["image_grid_thw"].tolist() == [[1, 2, 2], [1, 4, 2]]
    assert torch.equal(data["video"]["video_embeds"], features[1])
    assert data["video"]["video_grid_thw"].tolist() == [[2, 2, 4]]
    assert data["video"]["second_per_grid_ts"].tolist() == [0.5]
    assert "mm_processor_kwargs" not in request and "pixel" not in str(data)


def test_a_medium_is_known_by_features_grid_and_speed() -> None:
    medium = dataclasses.replace(video(num_frames=4, seconds=0.5), features=torch.ones(4, 3))

    def identity(**changes: Any) -> str:
        return feature_data([dataclasses.replace(medium, **changes)])["multi_modal_uuids"]["video"][0]

    others = [
        dict(seconds_per_grid=1.0),
        dict(grid_thw=(2, 4, 2)),
        dict(features=torch.ones(4, 3).bfloat16()),
        dict(features=torch.ones(4, 3) + 1e-6),
    ]
    assert identity() == identity(source="elsewhere", features=torch.ones(4, 3))
    assert len({identity(), *(identity(**change) for change in others)}) == 5


# --- from shards ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Two sets of weights of one architecture, and prompts with media."""

    folder: Path
    prompts: dict[str, Prompt]
    media: MediaSpec

    @property
    def weights(self) -> list[Path]:
        return [self.folder / "first", self.folder / "second"]


def make_media(model_dir: Path) -> MediaSpec:
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec

    return media_spec(Qwen2_5_VLConfig.from_hf(model_dir), patchify=PreprocessSettings.from_model(model_dir).patchify)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    from megatron_ktr.distributed.platform import start

    start("cpu")
    folder = tmp_path_factory.mktemp("features")
    for seed, name in enumerate(("first", "second")):
        save_tiny_model(folder / name, corpus=corpus(), num_layers=2, seed=seed)
    media, tokenizer = make_media(folder / "first"), load_tokenizer(folder / "first")
    builder = PromptBuilder(
        tokenizer, visual_tokens=VisualTokens.from_model(folder / "first", tokenizer), merge_size=media.merge_size
    )
    prompts = probe_prompts(builder, media=media, video_max_pixels=12 * 28 * 28)
    mixed = [*prompts[IMAGE].media, *prompts[LONG].media, *prompts[IMAGE].media]
    prompts["mixed"] = builder.build({"problem_id": "mixed", "problem": "which colour came first"}, mixed)
    # More visual tokens than a block of the prefix cache (128 on CPU): their keys can be taken from it.
    frames_FCHW = torch.randint(0, 256, (80, 3, 28, 112), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    many = VisualInput("video", frames_FCHW, grid_thw=(40, 2, 8), seconds_per_grid=1.0)
    prompts["many"] = builder.build({"problem_id": "many", "problem": "which colour came first"}, [many])
    num_t, height, width = prompts[LONG].media[0].grid_thw
    assert num_t * prompts[LONG].media[0].seconds_per_grid > max(height, width), "longer than wide"
    return Inputs(folder, prompts, media)


@dataclass(frozen=True)
class FromShards:
    """What one rank knows."""

    prompts: list[Prompt]
    """With features where the rank was given any."""
    exported: dict[str, Tensor]
    """The language model; on the reading rank only."""
    logprobs: list[list[float]] | None


def use_shards(
    context: Any,
    *,
    model_dir: Path,
    prompts: Sequence[Prompt],
    values: Mapping[str, Any],
    groups: Sequence[RolloutGroup] = (),
) -> FromShards:
    """Features and language weights of a policy in the layout of ``values``; with ``groups``, their log-probs."""
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.policy.policy import Policy

    sizes = ParallelSizes(
        tensor=values.get("tensor_model_parallel_size", 1), pipeline=values.get("pipeline_model_parallel_size", 1)
    )
    parallel = context.init(sizes)
    values = {"engine": "vllm_colocated", "share_vision_features": True, "data_path": "unread.json", **values}
    config = config_from_values({"model": str(model_dir), **values})
    policy = Policy(model_dir, options=PolicyOptions.of(config), ranks=parallel, platform=current(), num_steps=1)
    media = make_media(model_dir)
    sender = build_feature_sender(config.rollout, policy=policy, media=media)
    exported = {name: tensor.clone() for name, tensor in policy.export(gather_to="source", with_vision=False)}
    logprobs = trainer_logprobs(groups, policy=policy, media=media) if groups else None
    return FromShards(sender(prompts), exported, logprobs)


def test_every_rank_of_tp2_pp2_has_the_features_of_one_process(ranks: Any, inputs: Inputs) -> None:
    prompts = list(inputs.prompts.values())
    work = dict(model_dir=inputs.weights[0], prompts=prompts)
    (alone,) = ranks(use_shards, world_size=1, values={}, **work)
    found = ranks(use_shards, world_size=4, values=SHARDS, **work)
    assert any(prompt.media for prompt in prompts) and any(not prompt.media for prompt in prompts)
    for index, prompt in enumerate(prompts):
        for place, medium in enumerate(prompt.media):
            expected = alone.prompts[index].media[place].features
            assert expected.shape == (inputs.media.num_visual_tokens(medium), 128)
            parts = [rank.prompts[index].media[place].features for rank in found]
            # Sent, not computed again: to the bit. Ranks 0 and 2 are the first and second stage of tensor rank 0.
            assert torch.equal(parts[0], parts[2]) and torch.equal(parts[1], parts[3])
            # Values of a few units; fp32 sums split over two ranks.
            torch.testing.assert_close(parts[0], expected, atol=2e-5, rtol=1e-5)
    names = [set(rank.exported) for rank in found]
    assert names[1:] == [set()] * 3 and names[0] == set(alone.exported)
    assert names[0] and not any(name.startswith("visual.") for name in names[0])


def test_only_the_first_stage_has_them_where_the_engine_is_elsewhere() -> None:
    prompt = group_of(1, video(num_frames=4), responses=[[5]]).prompt
    given = [(torch.ones(4, 3),)]

    def sender(features: Any) -> FeatureSender:
        groups = SimpleNamespace(sizes=ParallelSizes(pipeline=2), pipeline=None)  # any communication would fail
        return FeatureSender(
            encode=lambda prompts: features,
            ranks=groups,
            media=MEDIA,
            feature_size=3,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    (first,) = sender(given)([prompt])
    assert torch.equal(first.media[0].features, given[0][0]) and first.media[0].features is not given[0][0]
    (later,) = sender(None)([prompt])
    assert later is prompt
    assert build_feature_sender(config_from_values({"model": "nowhere"}).rollout, policy=None, media=MEDIA) is None


# --- vLLM -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What one engine made of the prompts: greedy tokens, sampled tokens with log-probs."""

    greedy: dict[str, tuple[int, ...]]
    sampled: dict[str, RolloutGroup]
    num_encoder_calls: int


class Engine:
    """vLLM in this process, with its encoder's calls counted."""

    def __init__(self, model_dir: Path, *, media: MediaSpec, **options: Any) -> None:
        from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

        from megatron_ktr.rollout.vllm.cpu import start_vllm_on_cpu

        self.media = media
        self.num_calls = 0
        self._patch = pytest.MonkeyPatch()
        forward = Qwen2_5_VisionTransformer.forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            return forward(*args, **kwargs)

        self._patch.setattr(Qwen2_5_VisionTransformer, "forward", counting)
        self.llm = start_vllm_on_cpu(model_dir, max_model_len=1024, max_num_batched_tokens=2048, **options)

    def answer(self, prompts: Mapping[str, Prompt]) -> Answers:
        before = self.num_calls
        greedy = self._generate(prompts, temperature=0.0)
        sampled = self._generate(prompts, n=2, temperature=1.0, seed=0)
        return Answers(
            greedy={name: group.rollouts[0].token_ids for name, group in greedy.items()},
            sampled=sampled,
            num_encoder_calls=self.num_calls - before,
        )

    def _generate(self, prompts: Mapping[str, Prompt], **options: Any) -> dict[str, RolloutGroup]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=RESPONSE_TOKENS, logprobs=0, ignore_eos=True, detokenize=False, **options)
        requests = [engine_input(prompt, media=self.media) for prompt in prompts.values()]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        groups = {}
        for (name, prompt), output in zip(prompts.items(), outputs, strict=True):
            assert tuple(output.prompt_token_ids) == prompt.token_ids
            rollouts = [
                Rollout(
                    token_ids=tuple(sample.token_ids),
                    sampler_logprobs=tuple(
                        step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)
                    ),
                )
                for sample in output.outputs
            ]
            groups[name] = RolloutGroup(prompt, tuple(rollouts))
        return groups

    def stop(self) -> None:
        from megatron_ktr.rollout.vllm.cpu import stop_vllm_in_process

        stop_vllm_in_process(self.llm)
        self._patch.undo()


@dataclass(frozen=True)
class Runs:
    """Both engines, before and after an update, and the trainer's log-probs of what the second one sampled."""

    pixels: list[Answers]
    features: list[Answers]
    trainer: list[dict[str, list[float]]]
    encoder: str
    num_encoder_parameters: int
    slow_motion: tuple[RolloutGroup, list[float]]


@pytest.fixture(scope="module")
def runs(ranks: Any, inputs: Inputs) -> Iterator[Runs]:
    """Weights and features come from TP2 x PP2 shards."""
    pytest.importorskip("vllm", reason="the vLLM environment only")
    prompts = inputs.prompts
    # The same frames at another speed, so that only the seconds tell them apart.
    slower = dataclasses.replace(prompts["many"].media[0], seconds_per_grid=3.5)
    slow = {"slow": dataclasses.replace(prompts["many"], media=(slower,))}
    shards = [
        ranks(use_shards, world_size=4, model_dir=path, prompts=[*prompts.values(), *slow.values()], values=SHARDS)[0]
        for path in inputs.weights
    ]
    engine = Engine(inputs.weights[0], media=inputs.media, enable_prefix_caching=True, **FEATURE_OPTIONS)
    features = []
    for index, rank in enumerate(shards):
        if index:
            load_weights(engine.llm, iter(rank.exported.items()))
        features.append(engine.answer(dict(zip(prompts, rank.prompts, strict=False))))
    slow_motion = engine.answer({"slow": shards[-1].prompts[-1]}).sampled["slow"]
    encoder, num_parameters = engine.llm.apply_model(_encoder)[0]
    engine.stop()

    engine = Engine(inputs.weights[0], media=inputs.media)
    pixels = [engine.answer(prompts)]
    load_weights(engine.llm, inputs.weights[1])
    pixels.append(engine.answer(prompts))
    engine.stop()

    trainer = []
    for path, answers in zip(inputs.weights, features, strict=True):
        sampled = [*answers.sampled.values(), *([slow_motion] if path == inputs.weights[1] else [])]
        plain = [
            dataclasses.replace(group, prompt=(prompts | slow)[name])
            for name, group in zip([*prompts, "slow"], sampled, strict=False)
        ]
        found = ranks(use_shards, world_size=4, model_dir=path, prompts=[], values=SHARDS, groups=plain)
        trainer.append(dict(zip([*prompts, "slow"], found[0].logprobs, strict=False)))
    yield Runs(pixels, features, trainer, encoder, num_parameters, (slow_motion, trainer[1]["slow"]))


def _encoder(model: Any) -> tuple[str, int]:
    names = [name for name, _ in model.named_parameters() if name.startswith("visual")]
    return type(model.visual).__name__, len(names)


def differences(group: RolloutGroup, logprobs: Sequence[float]) -> Tensor:
    theirs = [value for rollout in group.rollouts for value in rollout.sampler_logprobs]
    assert len(theirs) == len(logprobs) == 2 * RESPONSE_TOKENS
    return (torch.tensor(theirs) - torch.tensor(list(logprobs))).abs()


@pytest.mark.vllm
def test_vllm_runs_no_encoder_when_given_features(runs: Runs) -> None:
    assert [answers.num_encoder_calls for answers in runs.features] == [0, 0]
    assert runs.num_encoder_parameters == 0 and runs.encoder == "StageMissingLayer"
    assert all(answers.num_encoder_calls > 0 for answers in runs.pixels), "the count can count"


@pytest.mark.vllm
@pytest.mark.parametrize("update", [0, 1])
def test_features_give_the_tokens_and_logprobs_of_pixels(runs: Runs, update: int) -> None:
    """Before and after a weight update from TP2 x PP2 shards. Where the sampled tokens are the same ones, which equal
    seeds and equal log-probs make them but for rounding at a tie, so are their log-probs."""
    ours, theirs = runs.features[update], runs.pixels[update]
    assert ours.greedy == theirs.greedy
    num_same = 0
    for name, group in ours.sampled.items():
        other = theirs.sampled[name]
        if [r.token_ids for r in group.rollouts] == [r.token_ids for r in other.rollouts]:
            num_same += 1
            logprobs = [value for rollout in other.rollouts for value in rollout.sampler_logprobs]
            assert differences(group, logprobs).mean() < TOLERANCE, name
    assert num_same >= len(ours.sampled) - 1


@pytest.mark.vllm
@pytest.mark.parametrize("update", [0, 1])
def test_features_give_the_trainers_logprobs(runs: Runs, update: int) -> None:
    for name, group in runs.features[update].sampled.items():
        gap = differences(group, runs.trainer[update][name])
        print(f"{name}: mean {gap.mean():.1e}, max {gap.max():.1e}")
        assert gap.mean() < TOLERANCE, name


@pytest.mark.vllm
def test_the_update_changed_what_is_sampled(runs: Runs) -> None:
    """Else the tests above would pass with stale weights or features."""
    assert runs.features[0].greedy != runs.features[1].greedy
    assert runs.features[0].greedy[TIMING] != runs.features[1].greedy[TIMING]


@pytest.mark.vllm
def test_the_same_features_at_another_speed_are_not_taken_from_the_prefix_cache(runs: Runs) -> None:
    group, logprobs = runs.slow_motion
    assert differences(group, logprobs).mean() < TOLERANCE
    # Both have the same visual tokens and the same seeds: what differs is where they are in time.
    assert [r.token_ids for r in group.rollouts] != [r.token_ids for r in runs.features[1].sampled["many"].rollouts]
