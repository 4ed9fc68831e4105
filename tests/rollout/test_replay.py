"""Recorded rollouts: what a line may hold, what is refused and how, and that what is written can be replayed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.errors import UserError
from megatron_ktr.rollout import replay
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.replay import ReplayEngine, ReplaySource, Required, write_rollouts
from megatron_ktr.rollout.second_prompt import SecondPrompt
from megatron_ktr.types import Prompt, Rollout, RolloutGroup
from tests.support.tiny import EOS_ID, VOCAB_SIZE
from tests.support.tokenizer import save_tiny_tokenizer, tiny_tokenizer
from tests.support.videos import numbered_frames, write_video

TOKENIZER = tiny_tokenizer()
RESPONSES: list[dict[str, Any]] = [
    {"text": "<answer>A</answer>", "rewards": {"accuracy": 1, "format": 0.5}},
    {"token_ids": [5, 6, EOS_ID], "logprobs": [-0.5, -1, 0], "reward": 0},
]


def line(**changes: Any) -> dict[str, Any]:
    record = {"problem_id": "p", "problem": "Which?", "video": "clip.mp4", "responses": RESPONSES, **changes}
    return {name: value for name, value in record.items() if value is not ...}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("\n\n".join(json.dumps(value) for value in lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    save_tiny_tokenizer(folder)
    write_video(folder / "clip.mp4", numbered_frames(20, height=56, width=84))
    return folder


@pytest.fixture
def loader(folder: Path) -> PromptLoader:
    sampling = FrameSampling(max_frames=4)
    return PromptLoader.from_model(folder, media_root=folder, sampling=sampling, video_min_pixels=784)


def source_of(engine: ReplayEngine, loader: PromptLoader, *, shuffle: bool = False) -> ReplaySource:
    return ReplaySource(PromptDataset(engine.records, loader=loader, shuffle=shuffle), engine=engine)


def test_responses_are_read_from_text_and_from_tokens(tmp_path: Path, loader: PromptLoader) -> None:
    engine = ReplayEngine(write_lines(tmp_path / "r.jsonl", [line()]), tokenizer=TOKENIZER)
    assert isinstance(engine, RolloutEngine)
    (group,) = source_of(engine, loader, shuffle=True).next(1)
    from_text, from_tokens = group.rollouts
    assert from_text.token_ids[-1] == EOS_ID
    assert TOKENIZER.decode(from_text.token_ids[:-1]) == from_text.text == "<answer>A</answer>"
    assert from_text.reward == 1.5 and from_text.sampler_logprobs is None and from_text.is_finished
    assert from_tokens.token_ids == (5, 6, EOS_ID) and from_tokens.sampler_logprobs == (-0.5, -1.0, 0.0)
    assert from_tokens.rewards == {"reward": 0.0} and from_tokens.text == TOKENIZER.decode([5, 6])
    assert group.prompt.media[0].grid_thw == (2, 4, 6) and "responses" not in group.prompt.record


def test_an_unfinished_response_gets_no_end_token(tmp_path: Path) -> None:
    responses = [{"text": "cut", "is_finished": False, "reward": 0}, {"token_ids": [5, 6], "reward": 0}]
    path = write_lines(tmp_path / "r.jsonl", [line(responses=responses)])
    engine = ReplayEngine(path, tokenizer=TOKENIZER)
    prompt = Prompt("p", (1,), record=engine.records[0])
    first, second = engine.generate([prompt])[0].rollouts
    assert len(first.token_ids) == 3 and not first.is_finished
    assert second.token_ids == (5, 6) and not second.is_finished


def test_repeated_problem_ids_keep_their_own_responses(tmp_path: Path, loader: PromptLoader) -> None:
    lines = [line(video=..., responses=[{"text": str(number), "reward": number}] * 2) for number in range(3)]
    engine = ReplayEngine(write_lines(tmp_path / "r.jsonl", lines), tokenizer=TOKENIZER)
    groups = source_of(engine, loader).next(3)
    assert [group.rollouts[0].text for group in groups] == ["0", "1", "2"]


def test_the_first_responses_are_taken_where_fewer_are_wanted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", [line()])
    engine = ReplayEngine(path, tokenizer=TOKENIZER, num_generations=1)
    assert len(engine.generate([Prompt("p", (1,), record=engine.records[0])])[0].rollouts) == 1
    with pytest.raises(UserError, match="2 responses, but num_generations is 3"):
        ReplayEngine(path, tokenizer=TOKENIZER, num_generations=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses": ...}, "list of responses"),
        ({"responses": []}, "list of responses"),
        ({"responses": ["text"]}, "response 1: expected an object"),
        ({"responses": [RESPONSES[0], {"reward": 1}]}, "response 2: expected 'text' or 'token_ids'"),
        ({"responses": [{"text": "x"}]}, "'rewards'"),
        ({"responses": [{"text": "x", "rewards": {}}]}, "'rewards'"),
        ({"responses": [{"text": "x", "rewards": {"a": "1"}}]}, "finite numbers by name"),
        ({"responses": [{"text": "x", "reward": float("nan")}]}, "finite"),
        ({"responses": [{"token_ids": [VOCAB_SIZE], "reward": 1}]}, "outside the vocabulary"),
        ({"responses": [{"token_ids": [1.5], "reward": 1}]}, "whole numbers"),
        ({"responses": [{"token_ids": [], "reward": 1}]}, "no tokens"),
        ({"responses": [{"token_ids": [1, 2], "logprobs": [-1], "reward": 1}]}, "1 logprobs for 2 tokens"),
        ({"responses": [{"token_ids": [1], "logprobs": [0.5], "reward": 1}]}, "<= 0"),
        ({"problem": ...}, "'problem'"),
    ],
)
def test_a_bad_line_is_named_by_number_and_reason(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", [line(), line(**changes)])
    with pytest.raises(UserError, match="replay_path: .*record 3") as caught:  # a blank line stands between
        ReplayEngine(path, tokenizer=TOKENIZER)
    assert message in str(caught.value)


def test_a_response_without_a_required_reward_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", [line()])  # its second response has one number for a reward
    because = "the bonus needs it: set --length-bonus 0"
    with pytest.raises(UserError, match="record 1 .*response 2: no reward 'accuracy', only 'reward'; .*-bonus 0"):
        ReplayEngine(path, tokenizer=TOKENIZER, required=Required({"accuracy": because}))
    ReplayEngine(path, tokenizer=TOKENIZER, required=Required({"accuracy": because}), num_generations=1)
    ReplayEngine(path, tokenizer=TOKENIZER)


def test_the_documented_example_is_read_as_it_stands_with_the_length_bonus_on(tmp_path: Path) -> None:
    block = (replay.__doc__ or "").split("One line is one group:")[1].split("The question is")[0]
    example = json.loads(block)
    example["responses"][1]["token_ids"] = [5, 6, EOS_ID]  # the tiny vocabulary ends below the real ids
    path = write_lines(tmp_path / "r.jsonl", [example])
    engine = ReplayEngine(path, tokenizer=TOKENIZER, required=Required({"accuracy": "the bonus needs it"}))
    first, second = engine.generate([Prompt("7", (1,), record=engine.records[0])])[0].rollouts
    assert (first.reward, second.reward, second.sampler_logprobs) == (2.0, 0.0, (-0.1, -0.7, 0.0))


def test_written_rollouts_replay_exactly(tmp_path: Path, loader: PromptLoader) -> None:
    engine = ReplayEngine(
        write_lines(tmp_path / "r.jsonl", [line(), line(problem_id=2, video=...)]), tokenizer=TOKENIZER
    )
    groups = source_of(engine, loader).next(2)
    assert write_rollouts(tmp_path / "runs" / "out.jsonl", groups[:1]) == 1
    write_rollouts(tmp_path / "runs" / "out.jsonl", groups[1:])
    again = source_of(ReplayEngine(tmp_path / "runs" / "out.jsonl", tokenizer=TOKENIZER), loader)
    for before, after in zip(groups, again.next(2), strict=True):
        assert after.rollouts == before.rollouts
        assert (after.prompt.problem_id, after.prompt.token_ids) == (before.prompt.problem_id, before.prompt.token_ids)
        assert [medium.grid_thw for medium in after.prompt.media] == [medium.grid_thw for medium in before.prompt.media]


NONE_SHUFFLED = {"shuffled_responses": []}
TEMPORAL = Required(num_shuffled=2)


def test_responses_to_shuffled_frames_are_written_and_replay_exactly(tmp_path: Path, loader: PromptLoader) -> None:
    shuffled = [{"token_ids": [7, number, EOS_ID], "rewards": {"accuracy": number / 10}} for number in (5, 6, 8)]
    lines = [line(shuffled_responses=shuffled), line(problem_id=2, video=...)]
    path = write_lines(tmp_path / "r.jsonl", lines)
    second = SecondPrompt(num_generations=2, num_responses=2, seed=0)

    def read(path: Path, required: Required = TEMPORAL) -> list[RolloutGroup]:
        engine = ReplayEngine(path, tokenizer=TOKENIZER, num_generations=2, required=required)
        dataset = PromptDataset(engine.records, loader=loader, shuffle=False)
        return ReplaySource(dataset, engine=engine, second=second if required.num_shuffled else None).next(2)

    groups = read(path)
    assert [[rollout.token_ids[1] for rollout in group.shuffled] for group in groups] == [[5, 6], []]
    assert [rollout.reward for rollout in groups[0].shuffled] == [0.5, 0.6] and len(groups[0].rollouts) == 2
    write_rollouts(tmp_path / "out.jsonl", groups, with_shuffled=True)
    assert [json.loads(text).get("shuffled_responses") is not None for text in open(tmp_path / "out.jsonl")] == [1, 1]
    again = read(tmp_path / "out.jsonl")
    assert [(group.rollouts, group.shuffled) for group in again] == [(g.rollouts, g.shuffled) for g in groups]
    # Another objective replays the same file, and passes them over.
    assert [group.shuffled for group in read(tmp_path / "out.jsonl", Required())] == [(), ()]
    # A run whose rewards of them failed has none left. Its replay compares nothing either.
    failed = [dataclasses.replace(group, shuffled=()) for group in groups]
    write_rollouts(tmp_path / "failed.jsonl", failed, with_shuffled=True)
    assert [json.loads(text)["shuffled_responses"] for text in open(tmp_path / "failed.jsonl")] == [None, []]
    assert [(group.rollouts, group.shuffled) for group in read(tmp_path / "failed.jsonl")] == [
        (group.rollouts, ()) for group in groups
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no 'shuffled_responses', with which --temporal-bonus compares"),
        ({"shuffled_responses": RESPONSES[:1]}, "1 shuffled_responses, but 2 are asked for"),
        ({"shuffled_responses": RESPONSES}, "shuffled_responses: response 2: no reward 'accuracy'"),
        ({"shuffled_responses": [5]}, "shuffled_responses: response 1: expected an object"),
        ({"shuffled_responses": {}}, "shuffled_responses: expected a list of responses"),
    ],
)
def test_bad_responses_to_shuffled_frames_are_named_by_line(tmp_path: Path, changes: Any, message: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", [line(**NONE_SHUFFLED), line(**changes)])
    with pytest.raises(UserError, match=f"record 3 .*{message}"):
        ReplayEngine(path, tokenizer=TOKENIZER, required=TEMPORAL)


def test_a_video_that_was_recorded_without_an_order_and_now_has_one_is_refused(
    tmp_path: Path, loader: PromptLoader
) -> None:
    engine = ReplayEngine(
        write_lines(tmp_path / "r.jsonl", [line(**NONE_SHUFFLED)]), tokenizer=TOKENIZER, required=TEMPORAL
    )
    dataset = PromptDataset(engine.records, loader=loader, shuffle=False)
    source = ReplaySource(dataset, engine=engine, second=SecondPrompt(2, 2, seed=0))
    with pytest.raises(UserError, match="record 1 .*its shuffled_responses are empty"):
        source.next(1)


def test_unfinished_and_unicode_rollouts_survive_writing(tmp_path: Path) -> None:
    rollout = Rollout((5, 6), (-0.1, -0.2), text="é\u2028x", is_finished=False, rewards={"accuracy": 0.25})
    record = {"problem": "Q?", "solution": "1"}
    write_rollouts(tmp_path / "o.jsonl", [RolloutGroup(Prompt("id", (1, 2), record=record), (rollout,))])
    engine = ReplayEngine(tmp_path / "o.jsonl", tokenizer=TOKENIZER)
    assert engine.generate([Prompt("id", (1, 2), record=engine.records[0])])[0].rollouts == (rollout,)


def test_other_prompt_length_than_recorded_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "r.jsonl", [line(prompt_length=9)])
    engine = ReplayEngine(path, tokenizer=TOKENIZER)
    engine.generate([Prompt("p", (1,) * 9, record=engine.records[0])])
    assert not caplog.records
    engine.generate([Prompt("p", (1,) * 8, record=engine.records[0])])
    assert "8 tokens, 9 when" in caplog.text
    with pytest.raises(UserError, match="no recorded responses"):
        engine.generate([Prompt("stranger", (1,))])


def test_weights_are_read_to_the_end(tmp_path: Path) -> None:
    """The producer gathers over ranks: one rank that stops early would leave the others waiting."""
    seen = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            seen.append(name)
            yield name, torch.zeros(1)

    ReplayEngine(write_lines(tmp_path / "r.jsonl", [line()]), tokenizer=TOKENIZER).load_weights(stream())
    assert seen == ["a", "b", "c"]
