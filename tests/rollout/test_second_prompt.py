"""The second prompt of a group: which prompts have one, that it disturbs nothing, and that it survives a resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_ktr.attribution.counterfactuals import draw_permutations
from megatron_ktr.config.reward_section import RewardSection
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.rewards import Rewarder
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rollout import second_prompt
from megatron_ktr.rollout.base import counts_of
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.second_prompt import SHUFFLED, SecondPrompt, SecondsAlone
from megatron_ktr.rollout.source import ReplicaSource, Sampler
from megatron_ktr.types import Prompt, RolloutGroup
from tests.rollout.test_source import FailingEngine, NumberedSource
from tests.support.groups import group_of, image, video

SECOND = SecondPrompt(num_generations=3, num_responses=2, seed=5)


def frames_of(prompt: Prompt, medium: int) -> list[int]:
    return prompt.media[medium].frames_FCHW[:, 0, 0, 0].tolist()


def still(num_frames: int = 4) -> Any:
    moving = video(num_frames)
    return dataclasses.replace(moving, frames_FCHW=torch.ones_like(moving.frames_FCHW))


def test_every_video_with_an_order_is_shuffled_and_nothing_else_changes() -> None:
    parts = (1, video(4), 2, image(), 3, video(6), 4, still())
    prompt = dataclasses.replace(group_of(*parts, responses=[]).prompt, draw_number=3)
    for step in range(20):
        second = SECOND.of(prompt, step=step)
        assert (second.token_ids, second.problem_id, second.record) == (prompt.token_ids, "p", prompt.record)
        assert second.variant == SHUFFLED and second.identity == "3/shuffled p" and prompt.identity == "3 p"
        for medium, is_shuffled in enumerate((True, False, True, False)):
            before, after = frames_of(prompt, medium), frames_of(second, medium)
            assert sorted(after) == sorted(before) and (after != before) == is_shuffled
            assert second.media[medium].grid_thw == prompt.media[medium].grid_thw


@pytest.mark.parametrize("parts", [(1, 2), (1, image()), (1, video(2)), (1, still())])
def test_a_prompt_without_an_order_to_lose_is_asked_once(parts: Any) -> None:
    assert SECOND.of(group_of(*parts, responses=[]).prompt, step=1) is None


def test_the_order_hangs_on_seed_step_and_draw_and_is_not_that_of_the_shuffled_view() -> None:
    prompt = group_of(1, video(16), responses=[]).prompt
    found = {
        (name, tuple(frames_of(second.of(asked, step=step), 0)))
        for name, second, asked, step in (
            ("same", SECOND, prompt, 1),
            ("same", SECOND, prompt, 1),
            ("seed", dataclasses.replace(SECOND, seed=6), prompt, 1),
            ("step", SECOND, prompt, 2),
            ("draw", SECOND, dataclasses.replace(prompt, draw_number=1), 1),
        )
    }
    (view,) = draw_permutations(prompt, seed=5, step=1)
    assert len({order for _, order in found} | {tuple((view + 1).tolist())}) == 5 and len(found) == 4


def test_counts_are_one_for_each_prompt() -> None:
    prompts = [Prompt("a", (1,)), Prompt("b", (1,))]
    sampling = SamplingSettings(num_generations=3, max_response_length=1)
    assert counts_of(prompts, counts=None, sampling=sampling) == [3, 3]
    for counts in ([3], [3, 0], [1, 2, 3]):
        with pytest.raises(ValueError, match="expected 2 counts"):
            counts_of(prompts, counts=counts, sampling=sampling)


# --- the source -----------------------------------------------------------------------------------------------


class MixedSource(NumberedSource):
    """Draws a video, a picture, a video, a picture ..., or pictures alone."""

    def __init__(self, *, has_videos: bool = True) -> None:
        super().__init__()
        self.has_videos = has_videos

    def next(self, num_prompts: int) -> list[RolloutGroup]:
        self.num_skipped += 1
        kinds = [video(4) if self.has_videos and place % 2 == 0 else image() for place in range(num_prompts)]
        groups = [group_of(1, kind, responses=[], problem_id=f"{place}") for place, kind in enumerate(kinds)]
        return [
            dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, draw_number=self.num_skipped))
            for group in groups
        ]


class FramesEngine(FailingEngine):
    """Its responses are the frames it saw and the number of the sample; groups come in reversed order."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def stream(self, prompts, *, step=0, sampling=None, counts=None):
        numbers = counts or [SECOND.num_generations] * len(prompts)
        self.calls.append(numbers)
        for index in reversed(range(len(prompts))):
            (medium,) = prompts[index].media
            tokens = [*medium.frames_FCHW[:, 0, 0, 0].tolist(), step]
            rollouts = group_of(1, responses=[[*tokens, sample] for sample in range(numbers[index])]).rollouts
            named = tuple(dataclasses.replace(rollout, text=prompts[index].variant) for rollout in rollouts)
            yield index, RolloutGroup(prompts[index], named)


def test_only_the_time_in_which_second_prompts_alone_are_answered_is_theirs(monkeypatch) -> None:
    """By hand, two calls side by side, each with one first and one second prompt. A is asked at 0, and its first answer
    comes at 10; B is asked at 10 and has its first answer at 15. The second ones come at 25 and 40: 25 seconds."""
    now = 0.0
    monkeypatch.setattr(second_prompt.time, "perf_counter", lambda: now)
    alone, group = SecondsAlone(), group_of(1, responses=[[2]])

    def answers(*times: float) -> Iterator[tuple[int, RolloutGroup]]:
        nonlocal now
        for place, time in enumerate(times):
            now = time
            yield place, group

    a, b = (alone.timed(answers(*times), num_first=1, num_second=1) for times in ((10.0, 25.0), (15.0, 40.0)))
    assert [next(call)[0] for call in (a, b, a, b)] == [0, 0, 1, 1]
    assert list(a) == list(b) == [] and alone.take() == 25.0 and alone.take() == 0.0
    # A call that is given up leaves nothing open, and one without second prompts takes no time.
    given_up = alone.timed(answers(50.0, 60.0), num_first=1, num_second=1)
    next(given_up)
    given_up.close()
    assert list(alone.timed(answers(100.0), num_first=1, num_second=0)) and alone.take() == 0.0


class TogetherEngine(FramesEngine):
    """A collective engine: its ranks would wait for each other if one called more often."""

    is_collective = True

    def stream(self, prompts, *, step=0, sampling=None, counts=None):
        self.seen: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(self.seen, len(prompts))
        yield from super().stream(prompts, step=step, sampling=sampling, counts=counts)


def constant_reward(response: str, record: dict) -> float:
    return 0.5


def reward_of_ordered(response: str, record: dict) -> float:
    if response == SHUFFLED:
        raise ValueError("made so")
    return 0.5


def source_of(engine: FramesEngine, local: Any, groups: Any, *, lag: int = 0, prepare: Any = None) -> ReplicaSource:
    sampler = Sampler(engine, rewards=(f"{__name__}:constant_reward",), second=SECOND)
    return ReplicaSource(local, ranks=groups, sampler=sampler, lag=lag, prepare=prepare)


def answered_in_one_call(context) -> dict[str, Any]:
    groups = context.init(ParallelSizes())
    engine, prepared = FramesEngine(), []

    def prepare(prompts: list[Prompt]) -> list[Prompt]:
        prepared.append([prompt.variant for prompt in prompts])
        return [dataclasses.replace(prompt, record={"is_prepared": True}) for prompt in prompts]

    source = source_of(engine, MixedSource(), groups, lag=1, prepare=prepare)
    source.begin(3, step=4)
    state = json.loads(json.dumps(source.state_dict()))
    finished = source.finish()
    seconds = source.shuffled_seconds
    source.close()

    fresh = FramesEngine()
    resumed = source_of(fresh, MixedSource(), groups, lag=1)
    resumed.load_state_dict(state)
    resumed.begin(3, step=4)
    again = resumed.finish()
    resumed.begin(3, step=5)
    resumed.finish()
    resumed.close()

    # A checkpoint of a run that asked once: the videos are asked anew, as a whole; the picture is known.
    once = {**state, "pending": {name: found for name, found in state["pending"].items() if "/" not in name}}
    third = FramesEngine()
    other = source_of(third, MixedSource(), groups, lag=1)
    other.load_state_dict(once)
    other.begin(3, step=4)
    completed = other.finish()
    other.close()
    return {
        "groups": finished,
        "seconds": seconds,
        "calls": [engine.calls, fresh.calls, third.calls],
        "prepared": prepared,
        "same": [answers_of(found) == answers_of(finished) for found in (again, completed)],
    }


def answers_of(groups: list[RolloutGroup]) -> list[Any]:
    return [(group.prompt.identity, group.rollouts, group.shuffled) for group in groups]


def test_second_prompts_are_answered_rewarded_and_resumed_with_the_first(ranks) -> None:
    (found,) = ranks(answered_in_one_call, world_size=1)
    assert found["calls"] == [[[3, 3, 3, 2, 2]], [[3, 3, 3, 2, 2]], [[3, 3, 2, 2]]]
    assert found["prepared"] == [["", "", "", SHUFFLED, SHUFFLED]], "vision features of both, in one call"
    assert found["same"] == [True, True] and found["seconds"] >= 0
    assert [len(group.shuffled) for group in found["groups"]] == [2, 0, 2]
    for group in found["groups"]:
        (medium,) = group.prompt.media
        assert not group.prompt.variant and not group.prompt.record, "the trainer's prompt, not the engine's"
        ordered = medium.frames_FCHW[:, 0, 0, 0].tolist()
        assert [rollout.token_ids for rollout in group.rollouts] == [(*ordered, 4, sample) for sample in range(3)]
        for sample, rollout in enumerate(group.shuffled):
            *frames, step, number = rollout.token_ids
            assert (sorted(frames), step, number) == (ordered, 4, sample) and frames != ordered
        assert all(rollout.reward == 0.5 for rollout in (*group.rollouts, *group.shuffled))
        assert group.num_response_tokens == sum(len(rollout.token_ids) for rollout in group.rollouts)


def answered_by_failed_rewards(context) -> list[Any]:
    """With ``skip_group`` no response to a second prompt is left. The group is answered all the same."""
    groups = context.init(ParallelSizes())
    section = RewardSection(reward_on_error="skip_group", reward_workers=0)
    rewarder = Rewarder(RewardOptions(section=section))
    engines, found, state = [FramesEngine(), FramesEngine()], [], MixedSource().state_dict()
    for engine in engines:
        sampler = Sampler(engine, rewards=(f"{__name__}:reward_of_ordered",), rewarder=rewarder, second=SECOND)
        source = ReplicaSource(MixedSource(), ranks=groups, sampler=sampler, lag=1)  # pyright: ignore[reportArgumentType]
        source.load_state_dict(state)
        source.begin(2, step=4)
        state = json.loads(json.dumps(source.state_dict()))
        found.append(answers_of(source.finish()))
        source.close()
    return [found, [engine.calls for engine in engines]]


def test_a_second_prompt_whose_rewards_failed_is_not_asked_again_after_a_resume(ranks) -> None:
    """Asked again, its group would have responses of newer weights than the uninterrupted run."""
    ((found, calls),) = ranks(answered_by_failed_rewards, world_size=1)
    assert found[0] == found[1] and calls == [[[3, 3, 2]], []]
    assert [(len(rollouts), shuffled) for _, rollouts, shuffled in found[0]] == [(3, ()), (3, ())]


def with_uneven_videos(context) -> list[Any]:
    """Two replicas of one rank; only the first draws videos."""
    groups = context.init(ParallelSizes())
    engine = TogetherEngine()
    source = source_of(engine, MixedSource(has_videos=context.rank == 0), groups)
    found = []
    for step in (1, 2):
        source.begin(2, step=step)
        found.append([(len(group.rollouts), len(group.shuffled)) for group in source.finish()])
    return [found, engine.calls, engine.seen]


def test_replicas_with_and_without_videos_call_a_collective_engine_equally_often(ranks) -> None:
    first, second = ranks(with_uneven_videos, world_size=2)
    assert first == [[[(3, 2), (3, 0)]] * 2, [[3, 3, 2]] * 2, [3, 2]]
    assert second == [[[(3, 0), (3, 0)]] * 2, [[3, 3]] * 2, [3, 2]]
