"""The length-bucketed order: what it keeps of a shuffle, what it sorts, and how it resumes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ktr.config import load_config
from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.lengths import record_lengths
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.mixture import RecordSource
from megatron_ktr.data.order import BucketedOrder, EpochOrder, LengthBuckets
from megatron_ktr.data.records import check_record
from megatron_ktr.data.reply import reply_group
from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.data.store.record_store import RecordRules, open_store
from megatron_ktr.data.template import PromptBuilder, VisualTokens
from megatron_ktr.errors import UserError
from tests.support.tokenizer import tiny_tokenizer
from tests.support.videos import numbered_frames, write_video

SIZE, BUCKETS = 4, 3


def buckets(lengths: list[int], *, left_out: tuple[int, ...] = (), num_buckets: int = BUCKETS) -> LengthBuckets:
    is_left_out = np.isin(np.arange(len(lengths)), left_out)
    return LengthBuckets(np.array(lengths), is_left_out, num_buckets=num_buckets, step_size=SIZE)


def some_lengths(number: int) -> list[int]:
    return torch.randint(1, 500, (number,), generator=torch.Generator().manual_seed(3)).tolist()


def walk(order: EpochOrder, start: int, stop: int) -> list[int]:
    return [order.place_of(element) for element in range(start, stop)]


def test_a_window_worked_by_hand() -> None:
    """Eight records, two steps of four: the four shortest are one step, the four longest the other."""
    lengths = [80, 10, 70, 20, 60, 30, 50, 40]
    order = walk(BucketedOrder(buckets(lengths, num_buckets=2), seed=0), 0, 8)
    steps = [[lengths[place] for place in order[:4]], [lengths[place] for place in order[4:]]]
    assert sorted(steps) == [[10, 20, 30, 40], [50, 60, 70, 80]], "shortest first within a step"
    firsts = {walk(BucketedOrder(buckets(lengths, num_buckets=2), seed=seed), 0, 1)[0] for seed in range(20)}
    assert {lengths[place] for place in firsts} == {10, 50}, "either step may come first"


@pytest.mark.parametrize("left_out", [(), (0, 5, 17, 36)])
def test_every_epoch_is_a_permutation_and_its_steps_are_as_alike_as_sorting_makes_them(left_out) -> None:
    lengths = some_lengths(37)
    about = buckets(lengths, left_out=left_out)
    order, plain = BucketedOrder(about, seed=5), EpochOrder(37, seed=5, shuffle=True)
    kept_so_far = 0
    for epoch in range(4):
        places = walk(order, 37 * epoch, 37 * (epoch + 1))
        drawn = walk(plain, 37 * epoch, 37 * (epoch + 1))
        assert sorted(places) == list(range(37))
        num_kept = 37 - len(left_out)
        kept = [place for place in drawn if place not in left_out]
        assert places[num_kept:] == [place for place in drawn if place in left_out], "at the end: nothing else moves"
        first = -kept_so_far % SIZE  # completes the step that the epoch before began
        last = first + (num_kept - first) // SIZE * SIZE
        assert places[:first] + places[last:num_kept] == kept[:first] + kept[last:], "parts of steps stay as drawn"
        for start in range(first, last, SIZE * BUCKETS):
            stop = min(start + SIZE * BUCKETS, last)
            in_order = sorted(lengths[place] for place in kept[start:stop])
            expected = [in_order[at : at + SIZE] for at in range(0, len(in_order), SIZE)]
            steps = [[lengths[place] for place in places[at : at + SIZE]] for at in range(start, stop, SIZE)]
            assert sorted(steps) == sorted(expected)
        kept_so_far += num_kept
    orders = [
        walk(BucketedOrder(about, seed=seed), 37 * epoch, 37 * (epoch + 1)) for seed in (5, 6) for epoch in (0, 1)
    ]
    assert len(set(map(tuple, orders))) == 4, "every seed and every epoch has an order of its own"


def test_the_order_is_the_same_walked_and_looked_up() -> None:
    about = buckets(some_lengths(23))
    walked = walk(BucketedOrder(about, seed=1), 0, 100)
    looked_up = BucketedOrder(about, seed=1)
    mixed = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    assert {element: looked_up.place_of(element) for element in mixed} == dict(enumerate(walked))
    assert walk(BucketedOrder(about, seed=1), 61, 100) == walked[61:]


def text_records(number: int) -> list[dict[str, Any]]:
    fields = {"data_type": "text", "problem_type": "free-form", "solution": "x"}
    return [
        check_record({**fields, "problem_id": str(place), "problem": "a" * (1 + 7 * place % 19)}, number=place + 1)
        for place in range(number)
    ]


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> PromptLoader:
    tokenizer = tiny_tokenizer()
    builder = PromptBuilder(tokenizer, visual_tokens=VisualTokens.from_model("nowhere", tokenizer))
    settings = PreprocessSettings(video_min_pixels=784, image_min_pixels=784)
    root = tmp_path_factory.mktemp("media")
    return PromptLoader(builder, media_root=root, settings=settings, sampling=FrameSampling(fps=2, max_frames=8))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_steps_are_the_same_for_any_number_of_replicas_and_resume_at_every_place(loader, size: int) -> None:
    records = text_records(11)
    lengths = record_lengths(RecordSource(records, loader, (2,)))

    def make(rank: int, size: int) -> PromptDataset:
        about = buckets(lengths.tolist(), left_out=(2,))
        source = RecordSource(records, loader, (2,), buckets=about)
        return PromptDataset.of_sources([source], seed=4, rank=rank, size=size)

    def steps_of(datasets: list[PromptDataset], number: int) -> list[list[str]]:
        share = SIZE // len(datasets)
        return [sorted(p.problem_id for data in datasets for p in data.next(share)) for _ in range(number)]

    # In one epoch; one record left out may shift the replicas by one place against each other after it.
    expected = steps_of([make(0, 1)], 2)
    assert steps_of([make(rank, size) for rank in range(size)], 2) == expected
    whole = steps_of([make(rank, size) for rank in range(size)], 7)
    for place in range(7):
        first = [make(rank, size) for rank in range(size)]
        steps_of(first, place)
        states = json.loads(json.dumps([data.state_dict() for data in first]))
        resumed = [make(rank, size) for rank in range(size)]
        for rank, data in enumerate(resumed):
            data.load_state_dict(reshard_states(states, rank=rank, size=size))
        assert steps_of(resumed, 7 - place) == whole[place:]


def test_other_lengths_cannot_resume(loader) -> None:
    records = text_records(8)

    def make(about: LengthBuckets | None) -> PromptDataset:
        return PromptDataset.of_sources([RecordSource(records, loader, buckets=about)])

    state = make(buckets([1, 2, 3, 4, 5, 6, 7, 8])).state_dict()
    make(buckets([1, 2, 3, 4, 5, 6, 7, 8])).load_state_dict(state)
    for other in (buckets([1, 2, 3, 4, 5, 6, 7, 9]), buckets([1, 2, 3, 4, 5, 6, 7, 8], left_out=(3,)), None):
        with pytest.raises(UserError, match="lengths of the records, by which --length-buckets orders them"):
            make(other).load_state_dict(state)


def test_lengths_are_those_of_the_loaded_groups_and_are_kept_beside_a_store(loader, tmp_path, monkeypatch) -> None:
    """A video, a damaged one, a talk of several turns: found without decoding, equal to what is packed."""
    write_video(loader.media_root / "one.mp4", numbered_frames(20, height=56, width=84))
    (loader.media_root / "broken.mp4").write_bytes(b"no video")
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    rows = [
        {"problem": "What?", "response": "Nothing.", "video": "one.mp4"},
        {"problem": "What?", "response": "Nothing.", "video": "broken.mp4"},
        {"messages": talk},
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = RecordRules(needs_solution=False, needs_reply=True)
    store = open_store(path, rules, directory=str(tmp_path / "store"), show_progress=False)
    assert store.file is not None, "a directory was named"
    found = record_lengths(RecordSource(store, loader))
    loaded = {place: reply_group(loader.load(store[place]), builder=loader.builder) for place in (0, 2)}
    assert {place: found[place] for place in loaded} == {place: one.num_tokens for place, one in loaded.items()}
    assert found[1] < found[0], "its text alone"
    with monkeypatch.context() as patch:  # read again, nothing is looked at
        patch.setattr("megatron_ktr.data.lengths.look_at_media", lambda *_, **__: pytest.fail("looked again"))
        assert record_lengths(RecordSource(store, loader)).tolist() == found.tolist()
    assert record_lengths(RecordSource(store, loader, (0,))).tolist() == [0, *found[1:]]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--objective", "grpo", "--engine", "hf"], "not known before they are sampled"),
        (["--objective", "sft", "--no-shuffle-data"], "--no-shuffle-data forbids"),
        (["--objective", "sft", "--length-buckets", "1"], "sorts nothing"),
        (["--objective", "sft", "--data-path", "a.jsonl:1,b.jsonl:2"], "mixes several"),
    ],
)
def test_what_buckets_do_not_go_with_is_refused(flags: list[str], told: str) -> None:
    common = ["--model", "m", "--data-path", "a.jsonl", "--length-buckets", "8", "--kl-beta", "0"]
    # A repeated --data-path adds a file: the mixture replaces it.
    if "--data-path" in flags:
        common = [*common[:2], *common[4:]]
    with pytest.raises(UserError, match=told):
        load_config([*common, *flags])
