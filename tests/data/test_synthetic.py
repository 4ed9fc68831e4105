"""The demo's data and tiny model: right answers, real videos, disjoint splits, a tokenizer that keeps texts whole."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.video import FrameSampling, read_video
from megatron_ktr.data.records import read_records
from megatron_ktr.data.synthetic import (
    COLOURS,
    DIRECTIONS,
    TASKS,
    corpus,
    draw_scene,
    guess,
    lookup_record,
    make_dataset,
    record_of,
    render,
)
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import UserError
from megatron_ktr.rewards import load_reward

accuracy_reward, format_reward = load_reward("accuracy"), load_reward("format")


def dominant_colour(frame: np.ndarray) -> str | None:
    """The palette colour with most pixels, found from the picture alone; None on an empty frame."""
    counts = {name: int((np.abs(frame.astype(int) - rgb).sum(-1) < 60).sum()) for name, rgb in COLOURS.items()}
    name = max(counts, key=counts.get)
    return name if counts[name] > 20 else None


def components(frame: np.ndarray) -> int:
    """Number of connected bright regions, by flood fill."""
    is_shape = frame.max(-1) > 100
    count = 0
    while is_shape.any():
        count += 1
        stack = [tuple(np.argwhere(is_shape)[0])]
        while stack:
            y, x = stack.pop()
            if 0 <= y < is_shape.shape[0] and 0 <= x < is_shape.shape[1] and is_shape[y, x]:
                is_shape[y, x] = False
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return count


@pytest.mark.parametrize("task", TASKS)
def test_the_picture_holds_the_answer(task: str) -> None:
    rng = random.Random(3)
    for _ in range(20):
        scene = draw_scene(task, rng)
        frames = render(scene)
        if task == "colour":
            assert dominant_colour(frames[0]) == scene.answer
        elif task == "count":
            assert components(frames[0]) == int(scene.answer)
        elif task == "order":
            first, last = dominant_colour(frames[0]), dominant_colour(frames[-1])
            assert scene.answer == (first if scene.problem.endswith("first") else last)
            unseen = [option for option in scene.options if option not in (first, last)]
            assert len(unseen) == 2 and first != last
        elif task == "motion":
            centres = [np.argwhere(frame.max(-1) > 100).mean(0) for frame in (frames[0], frames[-1])]
            moved = (centres[1] - centres[0])[::-1]
            assert np.dot(moved, DIRECTIONS[scene.answer]) > 10
        else:
            # Share of the bounding box: 1 for a square, pi/4 for a circle, about 1/2 for a triangle.
            points = np.argwhere(frames[0].max(-1) > 100)
            box = np.prod(points.max(0) - points.min(0) + 1)
            nearest = min(
                {"square": 1.0, "circle": 0.785, "triangle": 0.5}.items(), key=lambda i: abs(i[1] - len(points) / box)
            )
            assert nearest[0] == scene.answer


def test_right_responses_earn_full_reward_and_guesses_are_right_by_chance() -> None:
    rng = random.Random(0)
    scenes = [draw_scene(task, rng) for task in ("colour", "count", "order") for _ in range(200)]
    records = [record_of(scene, problem_id="1", path="a.mp4") for scene in scenes]
    for scene, record in zip(scenes, records, strict=True):
        assert accuracy_reward(scene.response(), record) == format_reward(scene.response(), record) == 1.0
    hits = [accuracy_reward(guess(s, rng), r) for s, r in zip(scenes, records, strict=True)]
    # 600 draws at 1/4: five standard deviations are 0.09.
    assert abs(sum(hits) / len(hits) - 0.25) < 0.09


def test_lookup_answers_stand_behind_their_letter() -> None:
    rng = random.Random(1)
    for number in range(50):
        record = lookup_record(rng, number=number)
        word = record["problem"].split()[-1]
        letter = next(option[0] for option in record["options"] if option[2:] == word)
        assert record["solution"] == f"<answer>{letter}</answer>" and "path" not in record


def test_dataset_is_reproducible_real_video_without_shared_scenes(tmp_path) -> None:
    first = make_dataset(tmp_path / "a", num_train=12, num_eval=6, seed=4)
    second = make_dataset(tmp_path / "b", num_train=12, num_eval=6, seed=4)
    assert first == second
    videos = {}
    for split in ("train", "eval"):
        for record in first[split]:
            video = read_video(tmp_path / "a" / record["path"], sampling=FrameSampling(num_frames=8))
            assert tuple(video.frames_FCHW.shape) == (8, 3, 56, 56) and video.native_fps == 2
            videos[record["path"]] = video.frames_FCHW
    train = [frames for path, frames in videos.items() if "train" in path]
    held_out = [frames for path, frames in videos.items() if "eval" in path]
    assert all(not torch.equal(a, b) for a in train for b in held_out)
    assert json.loads((tmp_path / "a" / "train.json").read_text()) == first["train"]
    with pytest.raises(UserError, match="already holds"):
        make_dataset(tmp_path / "a", num_train=2, num_eval=2)


def test_video_keeps_the_colours_of_the_drawing(tmp_path) -> None:
    make_dataset(tmp_path, num_train=8, num_eval=1, seed=1, tasks=("colour",))
    for record in read_records(tmp_path / "train.json"):
        video = read_video(tmp_path / record["path"], sampling=FrameSampling(num_frames=8))
        answer = record["options"]["ABCD".index(record["solution"][8])][2:]
        assert dominant_colour(video.frames_FCHW[0].permute(1, 2, 0).numpy()) == answer


def test_unknown_task_and_impossible_sizes_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="expected some of colour"):
        make_dataset(tmp_path / "x", num_train=1, num_eval=1, tasks=("colr",))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_model(directory, corpus=corpus())
    return directory


def test_tokenizer_json_and_sentencepiece_agree_and_keep_text(tiny) -> None:
    tokenizer = load_tokenizer(tiny)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny / "tokenizer.model"))
    for text in ("which colour came first A red B blue", "unseen wörd 42!"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == pieces.encode(text)
        assert tokenizer.decode(ids).strip() == text
    response = draw_scene("order", random.Random(0)).response()
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(response.split())  # every word and tag is one token
    text = tokenizer.decode(ids)
    record = {"solution": response.split("<answer> ")[1].split()[0], "problem_type": "multiple choice"}
    assert accuracy_reward(text, record) == format_reward(text, record) == 1.0


def test_prompts_of_the_demo_are_short(tiny, tmp_path) -> None:
    make_dataset(tmp_path, num_train=4, num_eval=1)
    loader = PromptLoader.from_model(
        tiny,
        media_root=tmp_path,
        sampling=FrameSampling(num_frames=8, max_frames=8),
        prompt_template=tiny / "prompt_template.txt",
    )
    for record in read_records(tmp_path / "train.json"):
        prompt = loader.load(record)
        assert prompt.media[0].grid_thw == (4, 4, 4) and prompt.media[0].seconds_per_grid == 1.0
        assert len(prompt.token_ids) <= 36  # 16 visual tokens, the question, four options, the chat's frame


def test_tiny_model_is_reproducible_complete_and_never_overwritten(tiny, tmp_path) -> None:
    save_tiny_model(tmp_path / "again", corpus=corpus())
    first = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny).state_dict()
    second = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {path.name for path in tiny.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "generation_config.json",
        "preprocessor_config.json",
    }
    with pytest.raises(UserError, match="not empty"):
        save_tiny_model(tiny, corpus=corpus())
