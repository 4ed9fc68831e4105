"""The media of another question beside a prompt: whose they are, in which size, and that no layout changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.records import check_record
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.types import Prompt
from tests.data.test_dataset import make_loader, model_dir, question  # noqa: F401
from tests.support.patience import PATIENCE_SECONDS
from tests.support.videos import numbered_frames, write_video


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of three sizes and lengths, one that is broken, and two pictures."""
    folder = tmp_path_factory.mktemp("media")
    for name, num, height, width in (("a", 20, 56, 84), ("b", 8, 84, 56), ("c", 30, 56, 56)):
        write_video(folder / f"{name}.mp4", numbered_frames(num, height=height, width=width))
    (folder / "broken.mp4").write_bytes(b"no video")
    for name, size in (("p", 56), ("q", 84)):
        Image.fromarray(numbered_frames(1, height=size, width=size)[0]).save(folder / f"{name}.png")
    return folder


def records_of(*paths: str) -> list[Any]:
    kind = {"mp4": "video", "png": "image"}
    return [
        check_record(question(problem_id=i, path=path, data_type=kind[path[-3:]]), number=i)
        for i, path in enumerate(paths)
    ]


def dataset_of(model: Path, root: Path, records: list[Any], **options: Any) -> PromptDataset:
    return PromptDataset(records, loader=make_loader(model, root), skips=SkipCounter(max_skip_share=1.0), **options)


def named(prompts: list[Prompt]) -> dict[int, tuple[Any, ...]]:
    """By draw number: the file of the prompt, those of its other media, and their pixels."""
    return {
        prompt.draw_number: (
            Path(prompt.media[0].source).name,
            [Path(medium.source).name for medium in prompt.other_media],
            [medium.frames_FCHW.numpy().tobytes() for medium in prompt.other_media],
        )
        for prompt in prompts
    }


MANY = ("a.mp4", "./b.mp4", "a.mp4", "broken.mp4", "c.mp4", "p.png", "q.png", "./a.mp4")


def test_other_media_are_of_another_file_in_the_prompts_own_grid(model_dir: Path, root: Path) -> None:  # noqa: F811
    dataset = dataset_of(model_dir, root, records_of(*MANY), seed=3)
    dataset.show_other_media()
    chosen: dict[str, set[str]] = {}
    for prompt in dataset.next(42):
        assert len(prompt.other_media) == len(prompt.media) == 1
        own, other = prompt.media[0], prompt.other_media[0]
        assert Path(other.source).name != Path(own.source).name and other.kind == own.kind
        assert (other.grid_thw, other.seconds_per_grid) == (own.grid_thw, own.seconds_per_grid)
        assert other.frames_FCHW.shape == own.frames_FCHW.shape and (other.frames_FCHW != own.frames_FCHW).any()
        chosen.setdefault(Path(own.source).name, set()).add(Path(other.source).name)
    assert chosen["a.mp4"] == {"b.mp4", "c.mp4"} and chosen["p.png"] == {"q.png"}, "all others are met, none twice over"


def test_other_media_do_not_depend_on_replicas_workers_or_resuming(model_dir: Path, root: Path) -> None:  # noqa: F811
    records = records_of(*MANY)

    def drawn(*numbers: int, rank: int = 0, size: int = 1, seed: int = 3, workers: bool = False, state: Any = None):
        dataset = dataset_of(model_dir, root, records, seed=seed, rank=rank, size=size)
        if workers:
            dataset.read_ahead(WorkerPool(1, timeout_seconds=PATIENCE_SECONDS), prefetch_steps=1)
        dataset.show_other_media()
        if state is not None:
            dataset.load_state_dict(state)
        found = [prompt for number in numbers for prompt in dataset.next(number)]
        state = dataset.state_dict()
        dataset.close()
        return named(found), state

    alone, _ = drawn(12)
    halves = drawn(6, rank=0, size=2)[0] | drawn(6, rank=1, size=2)[0]
    shared = alone.keys() & halves.keys()
    assert len(shared) >= 10 and all(alone[number] == halves[number] for number in shared)
    assert drawn(4, 4, 4, workers=True)[0] == alone
    begun, state = drawn(5)
    assert begun | drawn(7, state=state)[0] == alone
    assert {number: one[1] for number, one in drawn(12, seed=4)[0].items()} != {n: one[1] for n, one in alone.items()}


def test_a_prompt_without_other_media_is_kept_counted_and_has_no_such_view(
    model_dir: Path,  # noqa: F811
    root: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = dataset_of(model_dir, root, records_of("a.mp4", "./a.mp4", "broken.mp4", "p.png"), shuffle=False)
    dataset.show_other_media()
    prompts = dataset.next(3)
    assert [prompt.other_media for prompt in prompts] == [(), (), ()]
    assert dataset.counts["no_other_media"] == 3 and "no other question" in caplog.text
    plain = dataset_of(model_dir, root, records_of("a.mp4", "b.mp4"), shuffle=False)
    assert plain.next(1)[0].other_media == () and "no_other_media" not in plain.counts
