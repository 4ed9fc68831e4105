"""Benchmarks in their official layouts, in Video-R1's, and as any question file: items, ids, categories and media."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ktr.data.records import check_record
from megatron_ktr.errors import TransientError, UserError
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.protocols import PROTOCOL_NAMES, judge_all
from megatron_ktr.evaluation.reading.media_places import place_media
from megatron_ktr.evaluation.registry import BENCHMARKS, load_benchmark
from tests.support.benchmark_files import TEMPCOMPASS, VIDEO_HOLMES, VIDEOMME, write_benchmark
from tests.support.failing_files import failing
from tests.support.videos import SHARED_VIDEOS_VARIABLE, shared_data

EXPECTED: dict[str, list[tuple[str, str, dict[str, str], str, str]]] = {
    # item id, right answer, categories, path of the video, question
    "video_holmes": [
        ("RSm-1", "C", {"subtask": "SR"}, "videos/RSm.mp4", "Which colour, 1?"),
        ("RSm-2", "A", {"subtask": "TCI"}, "videos/RSm.mp4", "Which colour, 2?"),
        ("x_-Y-1", "F", {"subtask": "SR"}, "videos/x_-Y.mp4", "Which colour, 1?"),
    ],
    "video_mmmu": [
        (
            f"{track}-{name}",
            answer,
            {"track": track, "discipline": discipline, "subject": subject},
            f"{discipline}/{name}.mp4",
            f"What of {name}?",
        )
        for track, name, answer, discipline, subject in (
            ("Perception", "validation_Art_Theory_1", "B", "Art", "Art_Theory"),
            ("Comprehension", "validation_Art_Theory_1", "J", "Art", "Art_Theory"),
            ("Adaptation", "validation_Art_Theory_1", "12.97", "Art", "Art_Theory"),
            ("Adaptation", "dev_Math_2", "a circle", "Science", "Math"),
        )
    ],
    "mmvu": [
        (
            "validation_0",
            "E",
            {"discipline": "Engineering", "subject": "Civil_Engineering"},
            "videos/Civil_Engineering/0.mp4",
            "Which?",
        ),
        (
            "validation_2",
            "A",
            {"discipline": "Humanities and Social Science", "subject": "Law"},
            "videos/Law/2.mp4",
            "Which?",
        ),
    ],
    "tempcompass": [
        (
            f"{video}-{dimension}-{task}-{n}",
            answer,
            {"dimension": dimension, "task": task},
            f"videos/{video}.mp4",
            asked,
        )
        for video, dimension, task, n, answer, asked in (
            ("103", "action", "multi-choice", 1, "B", "What is done?"),
            ("103", "speed", "multi-choice", 1, "A", "How fast?"),
            ("103_reverse", "direction", "multi-choice", 1, "A", "Where to?"),
            ("103", "action", "yes_no", 1, "A", "Is it thrown?"),
            ("103", "action", "yes_no", 2, "B", "Hit?"),
            ("103", "order", "caption_matching", 1, "B", "Which?"),
            ("103", "order", "caption_matching", 2, "A", "Which?"),
        )
    ],
    "videomme": [
        (
            f"00{video}-{n}",
            answer,
            {"duration": duration, "domain": "Knowledge", "sub_category": "Law", "task_type": "Counting Problem"},
            f"data/v-{video}_x.mp4",
            "How many?",
        )
        for video, n, answer, duration in ((1, 1, "B", "short"), (1, 2, "D", "short"), (2, 1, "A", "long"))
    ],
    "mvbench": [
        (f"{task}-1", answer, {"task": task, "source": source}, f"video/{path}", asked)
        for task, answer, source, path, asked in (
            ("action_sequence", "B", "star", "star/Charades_v1_480/A.mp4", "Then?"),
            ("action_antonym", "C", "ssv2_video", "ssv2_video/166583.webm", "Which?"),
            ("episodic_reasoning", "A", "tvqa", "tvqa/frames_fps3_hq/s03e16_seg02/", "Why?"),
        )
    ],
    "vsibench": [
        (
            str(n),
            answer,
            {"type": kind, "question_type": question_type, "dataset": "scannet"},
            "scannet/scene0011_00.mp4",
            "How far?",
        )
        for n, answer, kind, question_type in (
            (0, "4", "object_counting", "object_counting"),
            (1, "B", "object_rel_direction", "object_rel_direction_easy"),
            (2, "A", "object_rel_direction", "object_rel_direction_hard"),
            (3, "C", "route_planning", "route_planning"),
        )
    ],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_official_layout_becomes_items(tmp_path: Path, name: str) -> None:
    benchmark = load_benchmark(name)
    items = benchmark.read(write_benchmark(tmp_path, name))
    found = [
        (
            item.item_id,
            item.record["solution"].removeprefix("<answer>").removesuffix("</answer>"),
            dict(item.categories),
            item.record["media"][0][1],
            item.record["problem"],
        )
        for item in items
    ]
    assert sorted(found) == sorted(EXPECTED[name]) and len(found) > 1
    assert all(item.benchmark == name and item.video_id == item.record["video"] for item in items)
    assert all(set(item.categories) <= set(benchmark.axes) for item in items)
    for item in items:
        assert check_record(item.record, number=1)["media"] == item.record["media"], "the record is a checked one"
        verdicts = judge_all(benchmark, item, f"<think>x</think>{item.record['solution']}")
        is_text = item.record["problem_type"] == "free-form"
        assert {protocol: verdict.score for protocol, verdict in verdicts.items()} == {
            protocol: float(not (is_text and protocol == "official")) for protocol in verdicts
        }, item.item_id
        assert tuple(verdicts)[:3] == PROTOCOL_NAMES


def test_tables_of_the_hub_give_the_same_items_of_tempcompass(tmp_path: Path) -> None:
    expected = load_benchmark("tempcompass").read(write_benchmark(tmp_path, "tempcompass"))
    for task in ("multi-choice", "yes_no", "caption_matching", "captioning"):
        rows = [
            {**question, "video_id": video, "dim": dimension}
            for video, dimensions in TEMPCOMPASS[task].items()
            for dimension, questions in dimensions.items()
            for question in questions
        ]
        (tmp_path / "hub" / task).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / task / "test-00000-of-00001.parquet")
    assert load_benchmark("tempcompass").read(tmp_path / "hub") == expected


def test_clips_and_folders_of_pictures_of_mvbench_keep_their_requests(tmp_path: Path) -> None:
    items = {item.item_id: item for item in load_benchmark("mvbench").read(write_benchmark(tmp_path, "mvbench"))}
    assert items["action_sequence-1"].record["media_requests"] == [{"video_start": 1.5, "video_end": 4.0}]
    assert items["episodic_reasoning-1"].record["media_requests"] == [{"fps": 3, "video_start": 0.0, "video_end": 25.4}]
    assert items["action_antonym-1"].record["media_requests"] == [{}]


def video_r1(video: str, **fields: Any) -> dict[str, Any]:
    """A record as Video-R1's evaluation files have it."""
    return {
        **{"problem_id": 7, "problem": "Which?", "data_type": "video", "problem_type": "multiple choice"},
        **{"options": ["A. red", "B. blue"], "process": "", "solution": "<answer>B</answer>", "path": video, **fields},
    }


CHARADES = "star/Charades_v1_480"
NUMERIC = {"problem_type": "regression", "options": None, "solution": "<answer>3</answer>"}


@pytest.mark.parametrize(
    ("name", "record", "video", "categories"),
    [
        (
            "video_holmes",
            video_r1("/nas/Video-Holmes/videos/Ab3.mp4", original_question_type="MHR"),
            "videos/Ab3.mp4",
            {"subtask": "MHR"},
        ),
        (
            "video_mmmu",
            video_r1("./Evaluation/VideoMMMU/dev_Math_3.mp4", original_question_type="multiple-choice"),
            "Science/dev_Math_3.mp4",
            {"discipline": "Science", "subject": "Math"},
        ),
        (
            "mmvu",
            video_r1("./Evaluation/MMVU/videos/Art/0.mp4"),
            "videos/Art/0.mp4",
            {"discipline": "Humanities and Social Science", "subject": "Art"},
        ),
        ("tempcompass", video_r1("./Evaluation/TempCompass/videos/103_reverse.mp4"), "videos/103_reverse.mp4", {}),
        ("videomme", video_r1("/videoMME/data/x.mp4", duration="long"), "data/x.mp4", {"duration": "long"}),
        (
            "mvbench",
            video_r1("/MVBench/vlnqa/left/l0.mp4", original_question_type=""),
            "video/vlnqa/left/l0.mp4",
            {"task": "egocentric_navigation", "source": "vlnqa"},
        ),
        ("mvbench", video_r1("/MVBench/star/Charades_v1_480/A.mp4"), f"video/{CHARADES}/A.mp4", {"source": "star"}),
        (
            "vsibench",
            {**video_r1("./Evaluation/VSI/scannet/s_00.mp4"), **NUMERIC},
            "scannet/s_00.mp4",
            {"dataset": "scannet"},
        ),
    ],
)  # fmt: skip
def test_video_r1_file_of_a_benchmark_becomes_items(
    tmp_path: Path, name: str, record: dict[str, Any], video: str, categories: dict[str, str]
) -> None:
    path = tmp_path / f"eval_{name}.json"
    path.write_text(json.dumps([record]))
    (item,) = load_benchmark(name).read(path)
    assert (item.item_id, item.record["media"], dict(item.categories)) == ("7", [("video", video)], categories)


@pytest.mark.parametrize(
    ("name", "file", "number"),
    [
        ("video_holmes", "video_holmes_questions_example.json", 8),
        *((name, f"eval_{name}_sample.json", 40) for name in ("mmvu", "mvbench", "videomme")),
    ],
)
def test_published_samples_parse_as_their_benchmarks(name: str, file: str, number: int) -> None:
    path = shared_data() / "qa" / file
    if not path.is_file():
        pytest.skip(f"no published samples here: set {SHARED_VIDEOS_VARIABLE}, or put them into {path}")
    items = load_benchmark(name).read(path)
    assert len({item.item_id for item in items}) == len(items) == number
    assert all(item.categories for item in items)
    if name != "video_holmes":  # whose layout is not that of our records
        of_file = load_benchmark(str(path)).read(path)
        assert [item.item_id for item in of_file] == [item.record["problem_id"] for item in items]


def test_any_question_file_is_a_benchmark_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [video_r1("a.mp4", task="order"), {**video_r1("a.mp4"), "problem_id": 8, "problem_type": "free-form"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = load_benchmark(str(path))
    first, second = benchmark.read(path)
    assert (benchmark.name, first.benchmark, first.item_id, first.video_id) == ("mine", "mine", "7", "a.mp4")
    assert first.categories == {"problem_type": "multiple choice", "task": "order"}
    assert second.categories == {"problem_type": "free-form"}


BAD_FILES = {
    "empty": ("mine.json", "[]", "no records at all"),
    "no JSON": ("mine.json", "[{", "not valid JSON"),
    "unknown type": (
        "mine.json",
        [video_r1("a.mp4", problem_type="riddle")],
        "record 1: evaluation does not know problem_type 'riddle'",
    ),
    "no such option": ("mine.json", [video_r1("a.mp4", solution="E")], "record 1: the right answer 'E' is not among"),
    "same id": ("mine.json", [video_r1("a.mp4"), video_r1("b.mp4")], "problem_id '7' more than once"),
    "half a character": ("mine.json", [video_r1("a.mp4", problem="\ud800")], "record 1: expected text"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_question_file_is_refused_in_words(tmp_path: Path, what: str) -> None:
    name, content, reason = BAD_FILES[what]
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=reason) as raised:
        load_benchmark(str(path)).read(path)
    assert str(path) in str(raised.value)


def refused(benchmark: Benchmark, path: Path) -> str:
    with pytest.raises(UserError) as raised:
        benchmark.read(path)
    assert f"--benchmark {benchmark.name}" in str(raised.value)
    return str(raised.value)


def test_files_that_are_not_the_benchmark_are_refused_in_words(tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path, "tempcompass")
    assert "language model" in refused(load_benchmark("tempcompass"), folder / "questions" / "captioning.json")
    assert "looked in" in refused(load_benchmark("mmvu"), folder)
    assert "no such file" in refused(load_benchmark("mmvu"), tmp_path / "nowhere.json")
    (tmp_path / "x.pdf").write_text("x")
    assert "ends in" in refused(load_benchmark("videomme"), tmp_path / "x.pdf")
    other = write_benchmark(tmp_path, "videomme") / "videomme" / "test-00000-of-00001.parquet"
    assert "in the layout video_r1 or vsibench" in refused(load_benchmark("vsibench"), other)
    assert "name of a task" in refused(load_benchmark("mvbench"), folder / "questions" / "yes_no.json")
    (tmp_path / "eval_mmvu.json").write_text(json.dumps([video_r1("MMVU/videos/Alchemy/0.mp4")]))
    assert "one of the 27 subjects" in refused(load_benchmark("mmvu"), tmp_path / "eval_mmvu.json")
    track = write_benchmark(tmp_path, "video_mmmu") / "Adaptation" / "test-00000-of-00001.parquet"
    track.rename(tmp_path / "test.parquet")
    assert "to tell the track" in refused(load_benchmark("video_mmmu"), tmp_path / "test.parquet")


def test_items_with_one_id_are_an_error_that_names_both(tmp_path: Path) -> None:
    path = tmp_path / "test_Video-Holmes.json"
    path.write_text(json.dumps([*VIDEO_HOLMES, VIDEO_HOLMES[0]]))
    assert f"record 4 has the id 'RSm-1' of {path}, record 1" in refused(load_benchmark("video_holmes"), path)


def test_a_rare_damaged_record_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**VIDEOMME[0], "question_id": f"{number}-1"} for number in range(120)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "answer": "Z"}]))
    assert len(load_benchmark("videomme").read(path)) == 120
    assert "1 of 121 records cannot be used" in caplog.text and "record 121" in caplog.text
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:50], {**rows[0], "answer": "Z"}]))
    assert "1 of 51 records cannot be used" in refused(load_benchmark("videomme"), path)


def test_parts_of_a_benchmark_that_are_not_there_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_benchmark(tmp_path, "tempcompass")
    assert len(load_benchmark("tempcompass").read(folder)) == 7 and not caplog.text
    (folder / "questions" / "yes_no.json").unlink()
    assert len(load_benchmark("tempcompass").read(folder)) == 5 and "has no questions for yes_no" in caplog.text
    (write_benchmark(tmp_path, "video_mmmu") / "Adaptation" / "test-00000-of-00001.parquet").unlink()
    assert len(load_benchmark("video_mmmu").read(tmp_path / "video_mmmu")) == 2
    assert "has no table for Adaptation" in caplog.text
    assert len(load_benchmark("mvbench").read(write_benchmark(tmp_path, "mvbench"))) == 3
    assert "has no file for action_prediction, fine_grained_action" in caplog.text


def test_a_folder_that_a_file_server_does_not_list_is_not_taken_for_a_missing_part(tmp_path: Path) -> None:
    lectures = write_benchmark(tmp_path, "video_mmmu")
    # A link to a folder is followed if it has the name of a track.
    (tmp_path / "aside").mkdir()
    shutil.move(lectures / "Adaptation", tmp_path / "aside")
    (lectures / "inner").mkdir()
    (lectures / "inner" / "Adaptation").symlink_to(tmp_path / "aside" / "Adaptation")
    assert len(load_benchmark("video_mmmu").read(lectures)) == 4
    tables = tmp_path / "hub"
    for task in ("multi-choice", "yes_no"):
        (tables / task).mkdir(parents=True)
    holmes = write_benchmark(tmp_path, "video_holmes")
    for name, folder, lost in (
        ("video_mmmu", lectures, lectures / "inner" / "Adaptation"),
        ("video_mmmu", lectures, lectures / "inner"),
        ("tempcompass", tables, tables / "yes_no"),
        ("video_holmes", holmes, holmes / "Benchmark"),
    ):
        with failing(lost, errno.ESTALE), pytest.raises(TransientError, match="Stale file handle"):
            load_benchmark(name).read(folder)


def test_a_video_that_a_file_server_does_not_show_is_not_looked_for_elsewhere(tmp_path: Path, monkeypatch) -> None:
    benchmark = load_benchmark("video_holmes")
    items = benchmark.read(write_benchmark(tmp_path, "video_holmes"))

    def fails(path: Path, **_: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "stat", fails)
    with pytest.raises(TransientError, match="RSm.mp4 cannot be read: Stale"):
        place_media(items, benchmark.media_folders, media_root=tmp_path)


def test_videos_are_found_where_a_download_has_them(tmp_path: Path) -> None:
    benchmark = load_benchmark("video_holmes")
    items = benchmark.read(write_benchmark(tmp_path, "video_holmes"))
    for place in ("videos_cropped/RSm.MP4", "Benchmark/videos/x_-Y.mp4"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    placed = place_media(items, benchmark.media_folders, media_root=tmp_path)
    assert [item.record["media"][0][1] for item in placed] == [
        *["videos_cropped/RSm.MP4"] * 2,
        "Benchmark/videos/x_-Y.mp4",
    ]
    assert [item.item_id for item in placed] == [item.item_id for item in items]
    assert place_media(items, benchmark.media_folders, media_root=tmp_path / "empty") == items
    lectures = load_benchmark("video_mmmu")
    items = lectures.read(write_benchmark(tmp_path, "video_mmmu"))
    (tmp_path / "VideoMMMU").mkdir()
    (tmp_path / "VideoMMMU" / "dev_Math_2.mp4").touch()
    placed = place_media(items, lectures.media_folders, media_root=tmp_path)
    assert placed[-1].record["video"] == "VideoMMMU/dev_Math_2.mp4" and placed[:-1] == items[:-1]


def test_unknown_names_are_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a benchmark nor a file: expected video_holmes, video_mmmu, mmvu"):
        load_benchmark("mmmu")
    with pytest.raises(UserError, match="is a folder"):
        load_benchmark(str(tmp_path))
    (tmp_path / "mmvu.json").write_text("[]")
    with pytest.raises(UserError, match="give the file another name"):
        load_benchmark(str(tmp_path / "mmvu.json"))


def test_every_benchmark_is_described() -> None:
    for name in BENCHMARKS:
        benchmark = load_benchmark(name)
        assert benchmark.name == name and benchmark.title and benchmark.axes and benchmark.source
        assert not set(PROTOCOL_NAMES) & set(benchmark.other_judges)
        assert benchmark.macro_axis in (None, *benchmark.axes)
        assert benchmark.inner_axis is None or benchmark.macro_axis in set(benchmark.axes) - {benchmark.inner_axis}
