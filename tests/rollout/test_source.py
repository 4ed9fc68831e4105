"""Sources of groups: what is refused before the first step, and one replica's ranks that share one reader."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.config import Config, config_from_values
from megatron_ktr.config.sections import RewardSection
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.data.template import PromptBuilder, VisualTokens
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.rewards import Rewarder, RewardOptions
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.build import build_local_source
from megatron_ktr.rollout.check.probes import probe_prompts
from megatron_ktr.rollout.colocated.inputs import engine_input, feature_data
from megatron_ktr.rollout.hf import HFEngine
from megatron_ktr.rollout.questions import prompt_loader
from megatron_ktr.rollout.sampling import SamplingSettings, sample_seed
from megatron_ktr.rollout.server.wire import medium_item
from megatron_ktr.rollout.source import ReplicaSource, Sampler
from megatron_ktr.types import Prompt, Rollout, RolloutGroup
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec
from tests.support.groups import MEDIA
from tests.support.patience import PATIENCE_SECONDS
from tests.support.tiny import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, VOCAB_SIZE, save_tiny_hf
from tests.support.tokenizer import save_tiny_tokenizer, tiny_tokenizer
from tests.support.videos import numbered_frames, write_video

READER = SimpleNamespace(is_source=True, data_rank=0, data_size=1)


def build(config: Config) -> Any:
    return build_local_source(config, ranks=READER, tokenizer=tiny_tokenizer(), vocab_size=VOCAB_SIZE)


def write_jsonl(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# --- refused at read time -------------------------------------------------------------------------------------


QUESTIONS = (
    {"problem": "Which?", "problem_type": "multiple choice", "solution": "A", "response": "A"},
    {"problem_id": "odd", "problem": "Which?", "problem_type": "multiple-choice", "solution": "A", "response": "A"},
)


@pytest.mark.parametrize("rewards", [(), ("format", "accuracy")])
def test_a_problem_type_that_accuracy_cannot_judge_is_refused_before_the_first_step(tmp_path: Path, rewards) -> None:
    data = write_jsonl(tmp_path / "q.jsonl", *QUESTIONS)
    config = config_from_values(dict(model="nowhere", engine="hf", data_path=data, reward_functions=rewards))
    with pytest.raises(UserError, match=r"record 2 \(problem_id odd\): .*'multiple-choice'.*'OCR', 'free-form'"):
        build(config)


@pytest.mark.parametrize(
    "change", [dict(reward_functions=("format",)), dict(objective="sft"), dict(problem_types=("multiple choice",))]
)
def test_problem_types_are_free_where_accuracy_does_not_read_them(tmp_path: Path, change: dict[str, Any]) -> None:
    save_tiny_tokenizer(tmp_path)
    data = write_jsonl(tmp_path / "q.jsonl", *QUESTIONS)
    config = config_from_values(dict(model=str(tmp_path), engine="hf", data_path=data) | change)
    assert build(config).dataset.records


def test_recorded_rollouts_without_accuracy_need_the_length_bonus_off(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    path = write_jsonl(
        tmp_path / "r.jsonl", {"problem": "Q?", "responses": [{"text": "a", "reward": 1}, {"text": "b", "reward": 0}]}
    )
    values = dict(model=str(tmp_path), replay_path=path, num_generations=2)
    with pytest.raises(UserError, match="record 1 .*response 1: no reward 'accuracy'.*--length-bonus 0"):
        build(config_from_values(values))
    (group,) = build(config_from_values({**values, "length_bonus": 0.0})).next(1)
    assert [rollout.reward for rollout in group.rollouts] == [1.0, 0.0]


@pytest.mark.parametrize("option", [dict(importance_sampling="token"), dict(importance_mask=(0.5, 2.0))])
def test_recorded_rollouts_without_logprobs_cannot_be_corrected(tmp_path: Path, option: dict[str, Any]) -> None:
    save_tiny_tokenizer(tmp_path)
    responses = [{"text": "a", "reward": 1, "logprobs": [-1.0, -0.5]}, {"text": "b", "reward": 0}]
    path = write_jsonl(tmp_path / "r.jsonl", {"problem": "Q?", "responses": responses})
    values = dict(model=str(tmp_path), replay_path=path, num_generations=2, length_bonus=0.0)
    assert build(config_from_values(values))
    with pytest.raises(UserError, match="record 1 .*response 2: no 'logprobs'.*--importance-sampling"):
        build(config_from_values(values | option))


def test_original_compat_counts_one_second_per_temporal_patch_for_trainer_and_every_engine(tmp_path: Path) -> None:
    """8 frames of a second each: 2 s per temporal patch, and positions 0, 4, 8, 12 in time at 2 tokens a second."""
    save_tiny_hf(tmp_path)
    save_tiny_tokenizer(tmp_path)
    write_video(tmp_path / "slow.mp4", numbered_frames(8, height=28, width=56), fps=1)
    record = {"problem_id": "1", "problem": "Q?", "media": [("video", "slow.mp4")]}
    spec = media_spec(Qwen2_5_VLConfig.from_hf(tmp_path), patchify=PreprocessSettings().patchify)
    sampling = SamplingSettings(num_generations=1, max_response_length=1)
    engine = HFEngine(str(tmp_path), tokenizer=tiny_tokenizer(), media=spec, sampling=sampling)
    found = {}
    for compat in (False, True):
        values = dict(model=str(tmp_path), replay_path=str(tmp_path / "r.jsonl"), original_compat=compat)
        values |= dict(video_fps=1.0, video_min_pixels=784)
        config = config_from_values(values)
        prompt = prompt_loader(config, tokenizer=tiny_tokenizer()).load(record)
        # Trainer: hidden, shuffled, reference and policy passes pack the prompt as it is.
        packed = pack_groups([RolloutGroup(prompt, (Rollout((1,)),))], view="intact", media=spec)
        times = packed.position_ids_3T[0, packed.visual_rows]
        # vLLM in the ranks, with frames and with features; vLLM's servers; transformers.
        ((_, metadata),) = engine_input(prompt, media=spec)["multi_modal_data"]["video"]
        featured = dataclasses.replace(prompt.media[0], features=torch.zeros(len(times), 4))
        features = feature_data([featured])["multi_modal_data"]["video"]["second_per_grid_ts"]
        wire = medium_item(prompt.media[0], media=spec)["second_per_grid_ts"]["data"]
        _, positions_3P = engine._embed(prompt)
        assert torch.equal(positions_3P[0, packed.visual_rows], times)
        found[compat] = ((times - times[0]).unique().tolist(), 2 / metadata["fps"], features.item(), wire.item())
    assert found == {False: ([0, 4, 8, 12], 2.0, 2.0, 2.0), True: ([0, 2, 4, 6], 1.0, 1.0, 1.0)}


def test_the_sampler_is_checked_at_the_timing_of_the_run(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    builder = PromptBuilder(tiny_tokenizer(), visual_tokens=VisualTokens.from_model(tmp_path, tiny_tokenizer()))
    spec = dataclasses.replace(MEDIA, image_token_id=IMAGE_TOKEN_ID, video_token_id=VIDEO_TOKEN_ID)
    seconds = {}
    for fixed in (None, 1.0):
        prompts = probe_prompts(builder, media=spec, video_max_pixels=3136, seconds_per_grid=fixed)
        media = [medium for prompt in prompts.values() for medium in prompt.media]
        seconds[fixed] = [medium.seconds_per_grid for medium in media if medium.kind == "video"]
    assert seconds == {None: [1.0, 1.0, 1.5, 2.5, 0.5], 1.0: [1.0] * 4}


def test_the_named_substitute_is_shown_with_original_compat_and_without_one_the_question_is_skipped(
    tmp_path: Path,
) -> None:
    save_tiny_tokenizer(tmp_path)
    write_video(tmp_path / "other.mp4", numbered_frames(8, height=28, width=56))
    record = {"problem_id": "1", "problem": "Q?", "media": [("video", "missing.mp4")]}
    values = dict(
        model=str(tmp_path), replay_path=str(tmp_path / "r.jsonl"), original_compat=True, video_min_pixels=784
    )
    with pytest.raises(UnusableMedia):
        prompt_loader(config_from_values(values), tokenizer=tiny_tokenizer()).load(record)
    loader = prompt_loader(config_from_values({**values, "substitute_video": "other.mp4"}), tokenizer=tiny_tokenizer())
    assert loader.load(record).media[0].source.endswith("other.mp4") and loader.counts["substituted_media"] == 1


# --- one reader, several ranks --------------------------------------------------------------------------------


class NumberedSource:
    """Counts more with every draw; its prompts have no media."""

    def __init__(self) -> None:
        self.num_skipped = 0

    @property
    def counts(self) -> dict[str, int]:
        return {"decoder/pyav": 2 * self.num_skipped, "skipped/unusable_media": self.num_skipped}

    def next(self, num_prompts: int) -> list[RolloutGroup]:
        self.num_skipped += 3
        return [RolloutGroup(Prompt(f"p{self.num_skipped}.{i}", (1, 2)), ()) for i in range(num_prompts)]

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_skipped = state["num_skipped"]

    def close(self) -> None:
        """Nothing to close."""


class FailingEngine(RolloutEngine):
    """Gives up after the first tensor."""

    def load_weights(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        next(named_tensors)
        raise UserError("the engine does not know this tensor")

    def stream(self, prompts, *, step=0, sampling=None, counts=None):
        for index, prompt in enumerate(prompts):
            yield index, RolloutGroup(prompt, (Rollout(token_ids=(step, 3), text="ab"),))


def length_reward(response: str, record: dict) -> float:
    return float(len(response))


def sampler_of(engine: RolloutEngine) -> Sampler:
    """With a reward that needs no process of its own."""
    rewarder = Rewarder(RewardOptions(RewardSection(reward_workers=0)))
    return Sampler(engine, rewards=(f"{__name__}:length_reward",), rewarder=rewarder)


def share_one_source(context) -> tuple[str, int, dict[str, int], dict[str, int], list]:
    groups = context.init(ParallelSizes(tensor=2))
    local = NumberedSource() if groups.is_source else None
    sampler = sampler_of(FailingEngine()) if groups.is_source else None
    source = ReplicaSource(local, ranks=groups, sampler=sampler)
    before = dict(source.counts)

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            tensor = torch.ones(1)
            torch.distributed.all_reduce(tensor, group=groups.tensor)
            yield name, tensor

    try:
        source.load_weights(gathered())
        said = "nothing"
    except UserError as error:
        said = f"{error.is_on_every_rank} {error}"
    source.begin(2, step=7)
    found = [
        (group.prompt.problem_id, group.rollouts[0].token_ids, group.rollouts[0].reward) for group in source.finish()
    ]
    counts = dict(source.counts)
    assert counts.pop("reward_seconds/length_reward", 0.0) >= 0  # of the step, and the same on no two machines
    return said, source.num_skipped, before, counts, found


def test_a_reader_that_fails_on_a_tensor_leaves_no_rank_waiting_and_its_counts_reach_all(ranks) -> None:
    """Were the tensors after it not gathered, the other rank would wait in the next one; and the two would then
    answer each other's collectives."""
    counts = {"decoder/pyav": 6, "skipped/unusable_media": 3}
    groups = [("p3.0", (7, 3), 2.0), ("p3.1", (7, 3), 2.0)]
    expected = ("True the engine does not know this tensor", 3, {}, counts, groups)
    assert ranks(share_one_source, world_size=2) == [expected, expected]


class GatedEngine(FailingEngine):
    """Answers only when told to; says which step it answered, and how often it was asked."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls = 0

    def stream(self, prompts, *, step=0, sampling=None, counts=None):
        assert self.gate.wait(timeout=PATIENCE_SECONDS)
        self.calls += 1
        yield from super().stream(prompts, step=step)


def lagged(engine: RolloutEngine, groups: Any, local: Any = None) -> ReplicaSource:
    return ReplicaSource(local or NumberedSource(), ranks=groups, sampler=sampler_of(engine), lag=1)


def overlap_and_resume(context) -> dict[str, Any]:
    groups = context.init(ParallelSizes())
    engine = GatedEngine()
    source = lagged(engine, groups)
    source.begin(2, step=4)  # returns although nothing can be generated yet
    asked_before = engine.calls
    engine.gate.set()
    state = json.loads(json.dumps(source.state_dict()))
    finished = source.finish()
    source.close()

    fresh = GatedEngine()  # its gate stays shut: asking it would hang
    resumed = lagged(fresh, groups)
    resumed.load_state_dict(state)
    resumed.begin(2, step=4)
    again = resumed.finish()
    resumed.close()
    return {
        "asked_before": asked_before,
        "same": again == finished,
        "calls": fresh.calls,
        "skipped": source.num_skipped,
    }


def test_with_lag_generation_runs_beside_and_its_responses_survive_a_resume(ranks) -> None:
    (found,) = ranks(overlap_and_resume, world_size=1)
    assert found == {"asked_before": 0, "same": True, "calls": 0, "skipped": 3}


# --- problem ids that repeat ----------------------------------------------------------------------------------

REPEATED_IDS = (0, 1, 2, 2, 4, 5, 7, 7)


def question_file(folder: Path) -> str:
    records = [
        {"problem_id": problem_id, "problem": f"question {number}", "problem_type": "OCR", "solution": "x"}
        for number, problem_id in enumerate(REPEATED_IDS)
    ]
    return write_jsonl(folder / "repeated.jsonl", *records)


class EchoEngine(FailingEngine):
    """Repeats the question's last tokens, and the seeds its sampling would have."""

    def __init__(self) -> None:
        self.calls = 0

    def stream(self, prompts, *, step=0, sampling=None, counts=None):
        self.calls += len(prompts)
        for index, prompt in enumerate(prompts):
            seed = sample_seed(seed=0, step=step, identity=prompt.identity, sample=0)
            text = f"{prompt.record['problem']}, drawn as {seed}"
            yield index, RolloutGroup(prompt, (Rollout(token_ids=prompt.token_ids, text=text),))


def begun_and_resumed(context, *, folder: Path, size: int, new_size: int) -> list[list[tuple[str, str]]]:
    """(question, response) of the groups begun by ``size`` replicas before a save, and by ``new_size`` after it."""
    groups = context.init(ParallelSizes())
    config = config_from_values(
        dict(model=str(folder), engine="hf", data_path=str(folder / "repeated.jsonl"), media_root=str(folder))
    )

    def sources(number: int) -> list[ReplicaSource]:
        replicas = [SimpleNamespace(is_source=True, data_rank=rank, data_size=number) for rank in range(number)]
        locals_ = [
            build_local_source(config, ranks=replica, tokenizer=tiny_tokenizer(), vocab_size=VOCAB_SIZE)
            for replica in replicas
        ]
        return [lagged(EchoEngine(), groups, local) for local in locals_]

    def finish(begun: list[ReplicaSource], number: int) -> list[tuple[str, str]]:
        found = []
        for source in begun:
            source.begin(8 // number, step=2)
            for group in source.finish():
                found.append((group.prompt.record["problem"], group.rollouts[0].text))
            source.close()
        return sorted(found)

    before = sources(size)
    states = []
    for source in before:
        source.begin(8 // size, step=2)
        states.append(json.loads(json.dumps(source.state_dict())))
        source.close()
    resumed = sources(new_size)
    for rank, source in enumerate(resumed):
        source.load_state_dict(reshard_states(states, rank=rank, size=new_size))
    found = finish(resumed, new_size)
    assert not any(source.sampler.engine.calls for source in resumed), "every response was found again"
    return [finish(sources(size), size), found]


@pytest.mark.parametrize(("size", "new_size"), [(1, 1), (2, 2), (1, 2), (4, 2)])
def test_questions_that_share_an_id_keep_their_own_responses_when_a_run_resumes(
    ranks, tmp_path: Path, size: int, new_size: int
) -> None:
    save_tiny_tokenizer(tmp_path)
    question_file(tmp_path)
    ((uninterrupted, resumed),) = ranks(begun_and_resumed, world_size=1, folder=tmp_path, size=size, new_size=new_size)
    assert resumed == uninterrupted
    assert all(response.startswith(f"{question}, drawn as ") for question, response in resumed)
    assert len({response for _, response in resumed}) == len(REPEATED_IDS)


def test_ids_that_repeat_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny_tokenizer(tmp_path)
    config = config_from_values(dict(model=str(tmp_path), engine="hf", data_path=question_file(tmp_path)))
    for rank in range(2):
        reader = SimpleNamespace(is_source=True, data_rank=rank, data_size=2)
        assert build_local_source(config, ranks=reader, tokenizer=tiny_tokenizer(), vocab_size=VOCAB_SIZE)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "repeated.jsonl: 4 of 8 records share their problem_id" in message
    assert "records 3 and 4 are both '2'" in message
