"""What can be known of records without decoding is told before a model is built: all at once, by number."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.files import MediaFiles, resolve_media_path
from megatron_ktr.data.records import check_record
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import TransientError, UserError
from megatron_ktr.evaluation.reading.benchmark_files import missing_media
from megatron_ktr.rollout.build import build_local_source
from tests.support.failing_files import failing
from tests.support.tiny import VOCAB_SIZE
from tests.support.tokenizer import save_tiny_tokenizer, tiny_tokenizer
from tests.support.videos import numbered_frames, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    save_tiny_tokenizer(folder)
    write_video(folder / "clip.mp4", numbered_frames(20, height=56, width=84))
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "frames").mkdir()
    return folder


def good(number: int, **changes: Any) -> dict[str, Any]:
    record = {"problem_id": f"p{number}", "problem": "Which?", "problem_type": "numerical", "solution": "1"}
    record |= {"video": "clip.mp4", "response": "One.", **changes}
    return {name: value for name, value in record.items() if value is not ...}


def build(folder: Path, records: list[Any], *, groups: Any = None, **values: Any) -> Any:
    path = folder / f"{abs(hash(json.dumps(records, sort_keys=True)))}.json"
    path.write_text(json.dumps(records))
    config = config_from_values(
        dict(model=str(folder), engine="hf", data_path=str(path), media_root=str(folder)) | values
    )
    groups = groups or SimpleNamespace(is_source=True, data_rank=0, data_size=1)
    return build_local_source(config, ranks=groups, tokenizer=tiny_tokenizer(), vocab_size=VOCAB_SIZE)


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"response": ...}, {"objective": "sft"}, "no response to imitate"),
    ({"response": "x<|video_pad|>"}, {"objective": "sft"}, "control token"),
    ({"solution": ...}, {}, "'solution'"),
    ({"video": "https://host/a.mp4"}, {}, "'https://host/a.mp4': expected a path below media_root"),
    ({"video": "../a.mp4"}, {}, "without '..' or scheme"),
    ({"video": "nowhere.mp4"}, {}, "'nowhere.mp4': no such file"),
    ({"video": ["a.png", "b.png"]}, {}, "'a.png': no such file"),
    ({"video": "frames"}, {}, "must end in '/'"),
    ({"video": "frames/"}, {}, "is a folder without a picture"),
    ({"video": "clip.mp4/"}, {}, "is a file, and"),
    ({"image": "frames/", "video": ...}, {}, "names a folder"),
    ({"video": "a.jpg"}, {}, "names one picture"),
    ({"problem": "<image>?"}, {}, "places for images"),
    ({"problem": "x<|im_end|>"}, {}, "control token"),
    ({"options": ["<|vision_start|>"]}, {}, "control token"),
    ({"problem_type": "essay"}, {}, "the reward accuracy does not know problem_type 'essay'"),
    ({"problem_type": "OCR"}, {"reward_functions": ("soft_choice",), "problem_types": ()}, ""),
    ({"problem_type": "essay"}, {"reward_functions": ("soft_choice",)}, "the reward soft_choice does not know"),
    ({"nframes": 64}, {}, "nframes 64 exceeds"),
    ({"start_time": 3}, {}, "'start_time'"),
]


@pytest.mark.parametrize(("changes", "values", "reason"), BAD)
def test_a_bad_record_among_many_is_left_out_and_named_before_the_first_step(
    folder: Path, caplog: pytest.LogCaptureFixture, changes: dict, values: dict, reason: str
) -> None:
    """The 32nd of 32, where a run without this check would end, or skip it, when it is drawn."""
    records = [*(good(number) for number in range(1, 32)), good(32, **changes)]
    source = build(folder, records, shuffle_data=False, **values)
    told = [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()]
    if not reason:
        assert not told
        return
    (message,) = told
    assert "1 of 32 records cannot be used: record 32" in message and reason in message
    names = [group.prompt.problem_id for group in source.next(32)]
    assert names == [f"p{number}" for number in (*range(1, 32), 1)] and source.num_skipped == 0
    with pytest.raises(UserError, match="1 of 32 records cannot be used: record 32.*--max-skip-share 0 ") as caught:
        build(folder, records, max_skip_share=0.0, **values)
    assert reason in str(caught.value)


def test_all_reasons_are_told_at_once_with_counts_and_numbers(folder: Path) -> None:
    records: list[Any] = [good(number) for number in range(1, 11)]
    records += [good(number, video=f"gone{number}.mp4") for number in range(11, 16)]
    records += [good(16, problem=""), "no record", good(18, solution=None), good(19, video="s3://bucket/a.mp4")]
    with pytest.raises(UserError) as caught:
        build(folder, records)
    message = str(caught.value)
    assert "9 of 19 records cannot be used: 5 x record 11 (problem_id p11): 'gone11.mp4': no such file" in message
    assert "(also record 12 (problem_id p12), record 13 (problem_id p13), ...)" in message
    for part in ("1 x record 16: ", "1 x record 17: expected an object", "1 x record 18: ", "1 x record 19 "):
        assert part in message
    assert "\n" not in message


def test_recorded_lines_that_cannot_be_replayed_are_left_out_too(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    responses = [{"text": "a", "rewards": {"accuracy": 1}}, {"text": "b", "rewards": {"accuracy": 0}}]
    lines = [{"problem_id": f"r{number}", "problem": "Q?", "responses": responses} for number in range(1, 21)]
    lines[3]["responses"] = [{"text": "a"}]
    path = folder / "replay.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = dict(engine="replay", replay_path=str(path), data_path=None, num_generations=2, shuffle_data=False)
    source = build(folder, [], **values)
    assert [group.prompt.problem_id for group in source.next(4)] == ["r1", "r2", "r3", "r5"]
    assert "1 of 20 records cannot be used: record 4 (problem_id r4): response 1: " in caplog.text


def test_repeated_ids_and_clips_are_said_once_and_harmless(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [good(number, problem_id=str(number % 3), start=0.5, end=1.5) for number in range(6)]
    assert len(build(folder, records).next(6)) == 6
    said = [record.getMessage() for record in caplog.records]
    assert (
        len(
            [
                text
                for text in said
                if "6 of 6 records share their problem_id with another (records 1 and 4 are both '0')" in text
            ]
        )
        == 1
    )
    assert len([text for text in said if "6 records show only the clip from their 'start'" in text]) == 1
    caplog.clear()
    build(folder, records, groups=SimpleNamespace(is_source=True, data_rank=1, data_size=2))
    assert not caplog.records, "other replicas read the same file and say nothing"


def test_what_only_decoding_tells_is_skipped_named_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = build(folder, [good(number, video="broken.mp4" if number == 2 else "clip.mp4") for number in range(1, 33)])
    source.next(31)
    assert source.counts["skipped/unusable_media"] == 1
    assert "skipped record 2 (unusable_media): " in caplog.text and "broken.mp4" in caplog.text


def test_ignored_fields_are_data(folder: Path) -> None:
    records = [good(number, start="once", start_time=3) for number in range(4)]
    with pytest.raises(UserError, match="--ignore-fields start"):
        build(folder, records)
    assert build(folder, records, ignore_fields=("start", "start_time")).next(4)


def test_what_is_left_out_does_not_move_the_others(folder: Path) -> None:
    """A file that comes or goes between two parts of a run changes neither the order nor where it goes on."""
    records = [check_record(good(number, video=...), number=number) for number in range(12)]
    loader = PromptLoader.from_model(folder, media_root=folder)
    whole = PromptDataset(records, loader=loader, seed=3)
    some = PromptDataset(records, loader=loader, seed=3, left_out={2, 7})
    order = [prompt.problem_id for prompt in whole.next(24)]
    kept = [name for name in order if name not in ("p2", "p7")]
    assert [prompt.problem_id for prompt in some.next(len(kept))] == kept
    assert some.skips.num_drawn == len(kept)
    with pytest.raises(UserError, match="no records"):
        PromptDataset(records, loader=loader, left_out=range(12))


def test_the_quick_look_at_files_answers_as_the_file_system_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for place in (root / "a" / "b", root / "c", outside):
        place.mkdir(parents=True)
        (place / "x.mp4").write_bytes(b"x")
    os.symlink(root / "a" / "x.mp4", root / "c" / "hanging.mp4")
    os.symlink(root / "a" / "b" / "x.mp4", root / "c" / "inside.mp4")
    os.symlink(outside / "x.mp4", root / "c" / "outside.mp4")
    os.symlink(outside, root / "linked")
    os.symlink(root / "a" / "b", root / "alias")
    os.symlink(root / "loop", root / "loop")
    names = [f"{place}/{name}" for place in ("a/b", "a", "c", "linked", "alias", "loop", "nowhere", ".")
             for name in ("x.mp4", "hanging.mp4", "inside.mp4", "outside.mp4", "b")]  # fmt: skip
    names += ["/a/b/x.mp4", str(root / "a" / "b" / "x.mp4"), "file:///a/b/x.mp4", f"file://{root}/a/b/x.mp4"]
    names += ["a\\b\\x.mp4", "../root/a/b/x.mp4", "https://h/x.mp4", "data:video/mp4;base64," + "A" * 5000, "c", " "]

    def outcome(check: Any, name: str) -> str:
        try:
            check(name)
        except UserError as error:
            assert len(str(error)) < 600
            return "refused"
        except UnusableMedia:
            return "no file"
        return "file"

    def slowly(name: str) -> None:
        if not resolve_media_path(root, name).is_file():
            raise UnusableMedia(name, "no file")

    for lookups in (0, 3, 1000):  # folders listed at once, after a few files, never
        monkeypatch.setattr("megatron_ktr.data.media.files._LOOKUPS_BEFORE_LISTING", lookups)
        files = MediaFiles(root)
        for name in random.Random(lookups).sample(names, len(names)):
            assert outcome(files.check, name) == outcome(slowly, name), name


@pytest.mark.parametrize("lookups", [0, 1000])  # the folder is listed, or each file is looked at
def test_a_file_server_that_is_away_leaves_no_record_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lookups: int
) -> None:
    monkeypatch.setattr("megatron_ktr.data.media.files._LOOKUPS_BEFORE_LISTING", lookups)
    build(folder, [good(1)])
    benchmark: Any = SimpleNamespace(
        media_root=folder, items=[SimpleNamespace(record={"media": [("video", "clip.mp4")]})]
    )
    assert not list(missing_media(benchmark))
    with failing(folder / "clip.mp4" if lookups else folder, errno.ESTALE):
        with pytest.raises(TransientError, match="media path 'clip.mp4' .*Stale file handle"):
            build(folder, [good(1)])
        with pytest.raises(TransientError, match="Stale file handle"):  # the item would count as wrong
            list(missing_media(benchmark))


def bad_on_one_rank(context: Any, folder: str) -> str:
    groups = context.init(ParallelSizes(tensor=2))
    try:
        on_every_rank(lambda: build(Path(folder), [good(1, video="gone.mp4")], groups=groups), ranks=groups)
    except UserError as error:
        return str(error)
    return "nothing"


def test_every_rank_ends_with_the_reading_ranks_message(folder: Path, ranks: Any) -> None:
    first, second = ranks(bad_on_one_rank, world_size=2, folder=str(folder))
    assert first == second and "1 of 1 records cannot be used: record 1 (problem_id p1)" in first
