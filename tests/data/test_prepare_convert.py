"""What records of published files become: each layout, its fields, options and answers, and what is skipped."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.prepare import layouts
from megatron_ktr.data.prepare.answers import options_in_text
from megatron_ktr.data.records import read_records
from tests.support.conversions import convert, converted, lines, put
from tests.support.published import (
    LETTERED,
    NAMES,
    SAMPLES,
    VIDEO_R1,
    write_published,
)
from tests.support.tokenizer import save_tiny_tokenizer
from tests.support.videos import numbered_frames, shared_data, write_video


@pytest.mark.parametrize("layout", NAMES)
def test_each_layout_is_recognised_and_becomes_records_that_training_reads(capsys, tmp_path, layout) -> None:
    (report,) = convert(capsys, "--from", "auto", write_published(tmp_path, layout), "--out", tmp_path / "out")
    assert report["layouts"] == [layout] and report["num_skipped"] == 0
    is_supervised = layout == "conversations"
    records = read_records(report["out"], needs_solution=not is_supervised, needs_reply=is_supervised)
    assert len(records) == report["num_records"] == report["num_read"] > 0
    assert len({record["problem_id"] for record in records}) == len(records)
    assert json.loads((tmp_path / "out" / Path(report["out"]).name.replace("jsonl", "report.json")).read_text())


def test_every_layout_has_a_sample() -> None:
    assert sorted(NAMES) == sorted(layouts.NAMES)
    assert all(name == layout.name for name, layout in layouts.load_layouts().items())


@pytest.mark.parametrize(
    ("layout", "number", "expected"),
    [
        (
            "video_holmes",
            0,
            {
                **{"problem_id": "RSm-1", "problem": "Which?", "video": "RSm.mp4", "options": LETTERED},
                **{"solution": "<answer>C</answer>", "original_question_type": "SR", "explanation": "It is green."},
            },
        ),
        ("video_r1", 0, {"problem_id": "2", "video": "clips/one.mp4", "options": LETTERED, "data_source": "CLEVRER"}),
        ("video_r1", 1, {"process": "<think>x</think>\n", "solution": "<answer>B</answer>"}),
        ("video_r1", 2, {"problem_type": "numerical", "solution": "<answer>5</answer>"}),
        ("video_r1", 3, {"image": "Math/a.png", "data_type": "image"}),
        ("video_r1", 4, {"video_start": 0.0, "video_end": 9.5, "raw_fps": 3}),
        ("onethinker", 0, {"problem": "<video>Which?", "videos": ["QA/a.mp4"], "solution": "<answer>A</answer>"}),
        (
            "onethinker",
            1,
            {"problem_type": "spatial grounding", "solution": '<answer>{"boxes": [1, 2, 3, 4]}</answer>'},
        ),
        ("onethinker", 2, {"solution": "<answer>from 12.3 to 25.7 seconds</answer>", "answer_span": [12.3, 25.7]}),
        ("onethinker", 3, {"problem_type": "free-form", "solution": "<answer>Rain.</answer>"}),
        ("video_rts", 0, {"problem_id": "BV1-16", "video": "BV1.mp4", "problem": "Which?", "options": LETTERED}),
        ("video_rts", 0, {"solution": "<answer>B</answer>"}),
        ("tw_grpo", 0, {"problem": "why not", "options": LETTERED, "solution": "<answer>B,C</answer>"}),
        ("tw_grpo", 1, {"problem_id": "2", "problem": "What if?", "options": LETTERED[:2]}),
        ("perception_test", 1, {"problem_id": "video_7-1", "video": "video_7.mp4", "solution": "<answer>C</answer>"}),
        ("activitynet_captions", 1, {"answer_span": [9.5, 20.0], "video": "v_Q.mp4", "duration": 20.0}),
        ("charades_sta", 1, {"problem_type": "temporal grounding", "answer_span": [4.2, 8.0], "video": "AO8RW.mp4"}),
        ("star", 0, {"video_start": 11.1, "video_end": 19.6, "video": "6H78U.mp4", "solution": "<answer>B</answer>"}),
        ("mvbench", 1, {"video_start": 1.5, "video_end": 3, "raw_fps": 3, "solution": "<answer>A</answer>"}),
        ("videomme", 0, {"problem_id": "001-1", "video": "fFj_-x.mp4", "options": LETTERED, "duration": "short"}),
        ("mmvu", 0, {"problem_id": "validation_0", "video": "videos/Law/0.mp4", "options": LETTERED}),
        ("mmvu", 1, {"problem_type": "free-form", "video": "videos/Art/1.mp4", "subject": "Art"}),
        ("video_mmmu", 0, {"video": "validation_Basic_Medical_Science_7.mp4", "solution": "<answer>A</answer>"}),
        ("video_mmmu", 1, {"problem_type": "numerical", "solution": "<answer>12.97</answer>"}),
        ("vsibench", 0, {"problem_type": "regression", "solution": "<answer>4</answer>", "problem_id": "0"}),
        ("vsibench", 1, {"video": "scannet/scene0011_00.mp4", "solution": "<answer>B</answer>"}),
        ("tempcompass", 0, {"problem": "What?", "options": ["A. dunking", "B. throwing"], "video": "103.mp4"}),
        ("tempcompass", 1, {"problem": "Is it?", "options": ["A. yes", "B. no"], "solution": "<answer>A</answer>"}),
        ("tempcompass", 2, {"problem_id": "103-order-caption_matching-1", "options": ["A. One runs.", "B. One sits."]}),
        ("nextqa", 0, {"problem_id": "4010069381-6", "video": "4010069381.mp4", "problem": "how, then"}),
        ("nextqa", 0, {"solution": "<answer>B</answer>"}),
        ("llava_video", 0, {"problem": "Which?", "options": LETTERED[:2], "solution": "<answer>B</answer>"}),
        ("llava_video", 1, {"problem": "And then?", "solution": "<answer>A</answer>", "problem_id": "101-1"}),
        ("llava_video", 2, {"problem_type": "free-form", "solution": "<answer>Two balls.</answer>"}),
        ("conversations", 0, {"messages": SAMPLES["conversations"][0]["messages"], "videos": ["a.mp4"]}),
        (
            "conversations",
            1,
            {
                "messages": [
                    {"role": "user", "content": "<video>\nWhich?"},
                    {"role": "assistant", "content": "Red."},
                ]
            },
        ),
        ("plain", 0, {"problem_type": "numerical", "solution": "<answer>3</answer>", "problem_id": "1"}),
        ("plain", 1, {"problem_type": "multiple choice", "options": LETTERED, "solution": "<answer>B</answer>"}),
        ("plain", 2, {"problem_type": "free-form", "image": "a.png"}),
    ],
)
def test_fields_of_a_layout_become_ours(capsys, tmp_path, layout, number, expected) -> None:
    record = converted(capsys, tmp_path, layout)[number]
    assert {name: record.get(name) for name in expected} == expected


def test_release_files_convert_without_a_skip(capsys, tmp_path) -> None:
    """The samples of published files, where this machine has them."""
    folder = shared_data() / "qa"
    files = [folder / "video_holmes_questions_example.json", *sorted(folder.glob("eval_*_sample.json"))]
    files = [path for path in files if path.is_file()]
    if not files:
        pytest.skip("no published samples on this machine")
    for report in convert(capsys, "--from", "auto", *files, "--out", tmp_path):
        records, raw = read_records(report["out"]), json.loads(Path(report["inputs"][0]).read_text())
        assert len(records) == len(raw) == report["num_records"] and report["num_skipped"] == 0
        if "solution" in raw[0]:
            assert [record["solution"] for record in records] == [record["solution"] for record in raw]
            assert [record["options"] for record in records] == [record["options"] for record in raw]


@pytest.mark.parametrize("layout", ["video_r1", "star", "conversations"])
def test_converted_records_become_prompts(capsys, tmp_path, layout) -> None:
    save_tiny_tokenizer(tmp_path)
    records = converted(capsys, tmp_path, layout)
    names: list[str] = []
    for record in records:
        names += record.get("videos", [record["video"]] if "video" in record else [])
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        # 13 seconds: some records ask about a clip that begins after 11.
        write_video(tmp_path / name, numbered_frames(26, height=56, width=84), fps=2)
    loader = PromptLoader.from_model(
        tmp_path, media_root=tmp_path, sampling=FrameSampling(fps=2, max_frames=4), video_min_pixels=784
    )
    is_supervised = layout == "conversations"
    read = read_records(
        tmp_path / "out" / f"{layout}.jsonl", needs_solution=not is_supervised, needs_reply=is_supervised
    )
    of_videos = [record for record in read if record["media"][0][0] == "video"]
    assert of_videos
    for record in of_videos:
        assert len(loader.load(record).media) == 1


def test_columns_are_named_by_the_user(capsys, tmp_path) -> None:
    path = tmp_path / "qa.tsv"
    path.write_text("clip\tq\tright\to1\to2\to3\nx/a.mp4\tWhich?\t1\tred\tblue\t\n")
    columns = "video=clip,question=q,answer_index=right,options=o1+o2+o3"
    (report,) = convert(
        capsys,
        *["--from", "plain", path, "--out", tmp_path, "--columns", columns],
        *["--strip-prefix", "x/", "--add-prefix", "b/c/"],
    )
    (record,) = lines(report["out"])
    assert record["video"] == "b/c/a.mp4" and record["options"] == LETTERED[:2]
    assert record["solution"] == "<answer>B</answer>"


def test_video_map_gives_the_path_of_an_id(capsys, tmp_path) -> None:
    video_map = put(tmp_path, {"4010069381": "1164/4010069381"}, name="map.json")
    (record,) = converted(capsys, tmp_path, "nextqa", "--video-map", video_map)
    assert record["video"] == "1164/4010069381.mp4"


@pytest.mark.parametrize(
    ("heading", "row", "expected"),
    [
        ("video,question,answer,qid,type,a0,a1,a2,a3,a4", "7,why,1,6,CW,red,blue,c,d,e", "<answer>B</answer>"),
        ("video_id,question,answer,qid,type,a0,a1,a2,a3,a4", "7,why,blue,6,CW,red,blue,c,d,e", "<answer>B</answer>"),
        ("video_id,question,answer,qid,type,a0,a1,a2,a3,a4", "7,why,4,6,CW,red,blue,c,d,e", "<answer>E</answer>"),
        ("video,question,answer,qid,type", "7,why,to play,6,CW", "<answer>to play</answer>"),
    ],
    ids=["NExT-QA", "NExT-GQA", "IntentQA", "NExT-OE"],
)
def test_the_data_sets_of_nextqa_name_the_right_answer_each_in_its_way(
    capsys, tmp_path, heading, row, expected
) -> None:
    path = tmp_path / "val.csv"
    path.write_text(f"{heading}\n{row}\n")
    (report,) = convert(capsys, "--from", "auto", path, "--out", tmp_path / "out")
    (record,) = lines(report["out"])
    assert report["layouts"] == ["nextqa"] and record["solution"] == expected and record["problem_id"] == "7-6"
    assert record["problem_type"] == ("multiple choice" if "a0" in heading else "free-form")


def test_a_video_of_mvbench_without_a_suffix_is_a_folder_of_pictures(capsys, tmp_path) -> None:
    asked = {
        "question": "Which?",
        "candidates": ["red", "blue"],
        "answer": "blue ",
        "start": 0.0,
        "end": 25.4,
        "fps": 3,
    }
    rows = [{**asked, "video": "s03e16_seg02_clip_04"}, {**asked, "video": "a.mp4"}]
    (report,) = convert(
        capsys, *["--from", "mvbench", put(tmp_path, rows), "--out", tmp_path / "out"], *["--add-prefix", "tvqa/frames"]
    )
    folder, file = lines(report["out"])
    assert folder["video"] == "tvqa/frames/s03e16_seg02_clip_04/" and folder["fps"] == 3 and "raw_fps" not in folder
    assert file["video"] == "tvqa/frames/a.mp4" and file["raw_fps"] == 3 and "fps" not in file


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"solution": "<answer>D</answer>"}, "not among the options A to C"),
        ({"solution": "<answer></answer>"}, "not among the options"),
        ({"options": ["A. red"]}, "expected 2 to 26 options"),
        ({"options": [["red"], "b"]}, "to be texts"),
        ({"path": "../../etc/passwd"}, "leads out of the media root"),
        ({"path": "https://host/a.mp4"}, "expected a file's path"),
        ({"path": "C:\\a.mp4"}, "expected a file's path"),
        ({"path": "a\0.mp4"}, "control characters"),
        ({"path": "/"}, "leads out of the media root"),
        ({"path": None}, "expected a path in 'path'"),
        ({"problem": ["x"]}, "expected text in 'problem'"),
        ({"problem": " "}, "missing or empty"),
        ({"problem": "x\x1b[2J"}, r"control character U\+001B"),
        ({"problem": "x" * 200_000}, "more than 100000"),
        ({"problem": "\ud800"}, "whole characters"),
        ({"problem": "<video> and <video>"}, "2 markers <video> in the text for 1 videos"),
        ({"problem_type": 7.5, "solution": math.inf}, "expected text in 'solution'"),
        ({"data_type": "audio"}, "expected data_type to be"),
        ({"start": 5, "end": 2}, "to end after its start"),
        ({"start": math.nan, "end": 2}, "expected seconds"),
        ({"path": "a.png"}, "names one picture"),
    ],
)
def test_a_record_that_training_could_not_use_is_skipped_with_its_reason(capsys, tmp_path, changes, reason) -> None:
    rows = put(tmp_path, [{**VIDEO_R1, **changes}, VIDEO_R1])
    (report,) = convert(capsys, "--from", "video_r1", rows, "--out", tmp_path / "out", "--max-skip-share", 0.5)
    assert report["num_records"] == 1 and report["num_skipped"] == 1
    (kind,) = report["skipped"]
    assert re.search(reason, kind["examples"][0]) and kind["examples"][0].startswith("record 1:")


def test_options_in_a_text_are_its_last_lines_in_order() -> None:
    assert options_in_text("Which?\nA. red\nB. blue") == ("Which?", ["red", "blue"], "")
    assert options_in_text("A. first\nWhich?\n(A) red\n(B) blue\nPlease say.") == (
        "A. first\nWhich?",
        ["red", "blue"],
        "Please say.",
    )
    assert options_in_text("A man and a dog?\nB. none") == ("A man and a dog?\nB. none", [], "")


_PLAIN = {"video": "a.mp4", "question": "Which?"}
_NEXT = {"video": "a", "question": "Which?", "qid": 1, "type": "CH"}


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        # The letters in the options say another order than their places.
        ("plain", {**_PLAIN, "options": ["B. red", "A. blue"], "answer": "A"}, "to have the letters A, B, got B, A"),
        ("plain", {**_PLAIN, "options": ["b) red", "a) blue"], "answer": "a"}, "got B, A"),
        ("plain", {**_PLAIN, "options": ["A. x", "B. y", "D. z"], "answer": "C"}, "got A, B, D"),
        ("video_r1", {**VIDEO_R1, "options": ["B - red", "A - blue"]}, "got B, A"),
        ("nextqa", {**_NEXT, "answer": 0, **{f"a{n}": f"{'BACDE'[n]}、x" for n in range(5)}}, "got B, A, C, D, E"),
        # Letters that are the text of another option.
        ("plain", {**_PLAIN, "options": ["C", "A", "B"], "answer": "A"}, "the text of option B"),
        ("plain", {**_PLAIN, "options": ["cup", "book", "CD", "DVD"], "answer": "CD"}, r"the letter\(s\) C, D"),
        ("video_r1", {**VIDEO_R1, "options": ["BAD", "x", "y", "z"], "solution": "BAD"}, r"the letter\(s\) A, B, D"),
        ("plain", {**_PLAIN, "options": ["w", "x"], "answer": "A", "answer_index": 1}, "differ"),
        ("plain", {**_PLAIN, "options": ["w", "x", math.nan], "answer": "B"}, "to be texts, got nan"),
        # Options that are not read: the question would become free-form, with a letter as its text.
        ("plain", {**_PLAIN, "A": "red", "B": "blue", "answer": "B"}, "look like options"),
        ("plain", {**_PLAIN, "option_1": "red", "option_2": "blue", "answer": "1"}, "look like options"),
        ("plain", {**_PLAIN, "question": "Which?\n1\nA. red\nor\nB. blue", "answer": "B"}, "is a letter"),
        ("nextqa", {**_NEXT, "answer": "B", "options": ["red", "blue"]}, "not NExT-QA's"),
        ("nextqa", {**_NEXT, "answer": "B", "A": "red", "B": "blue"}, "look like options"),
        ("video_r1", {**VIDEO_R1, "problem_type": "numerical"}, "options and the answer"),
        ("plain", {**_PLAIN, "answer": "", "label": "7"}, "missing or empty"),
        # What is seen or learnt would be changed.
        ("plain", {**_PLAIN, "answer": 3, "start_time": 1, "end_time": 2}, "'start_time' would be lost"),
        ("video_r1", {**VIDEO_R1, "video_start": 1.5}, "'video_start' would be lost"),
        ("conversations", {"messages": [{"role": "user", "content": "x", "weight": 0}], "video": "a"}, "'weight'"),
        ("conversations", {"messages": [{"role": "user", "content": "x"}], "video_path": "a"}, "'video_path'"),
        ("conversations", {"messages": [{"role": "user", "content": "x"}], "video": "a", "start": 1}, "'start'"),
    ],
)
def test_what_could_become_another_answer_or_another_clip_is_skipped(capsys, tmp_path, layout, row, reason) -> None:
    good = SAMPLES[layout][0] if layout in SAMPLES else {**_NEXT, "answer": 0, **{f"a{n}": str(n) for n in range(5)}}
    rows = put(tmp_path, [row, good])
    (report,) = convert(capsys, "--from", layout, rows, "--out", tmp_path / "out", "--max-skip-share", 0.5)
    assert report["num_records"] == 1 and report["num_skipped"] == 1
    assert re.search(reason, report["skipped"][0]["examples"][0])


@pytest.mark.parametrize(
    ("row", "options", "answer"),
    [
        ({"options": ["A、red", "B、blue"], "answer": "Ｂ。"}, ["A. red", "B. blue"], "B"),  # noqa: RUF001
        ({"options": ["a) red", "b) blue"], "answer": "b"}, ["A. red", "B. blue"], "B"),
        ({"options": ["A.M.", "P.M."], "answer": "P.M."}, ["A. A.M.", "B. P.M."], "B"),
        ({"options": ["J. Smith", "A. Jones"], "answer": "A"}, ["A. J. Smith", "B. A. Jones"], "A"),
        ({"options": ["A", "B"], "answer": "B"}, ["A. A", "B. B"], "B"),
        ({"options": ["3", "1", "2"], "answer": 1}, ["A. 3", "B. 1", "C. 2"], "B"),
        ({"question": "Which?\nA. red\nB. blue", "answer": "B. blue"}, ["A. red", "B. blue"], "B"),
        ({"options": ["red", "blue"], "answer": "B", "problem_type": "Multiple-Choice"}, ["A. red", "B. blue"], "B"),
    ],
)
def test_options_and_answers_are_read_in_common_forms(capsys, tmp_path, row, options, answer) -> None:
    (report,) = convert(capsys, "--from", "plain", put(tmp_path, [{**_PLAIN, **row}]), "--out", tmp_path / "out")
    (record,) = lines(report["out"])
    assert record["options"] == options and record["solution"] == f"<answer>{answer}</answer>"


def test_fields_that_are_only_data_are_named_by_the_user(capsys, tmp_path) -> None:
    rows = put(tmp_path, [{**_PLAIN, "answer": 3, "start_time": 1, "clip": "x"}])
    (report,) = convert(
        capsys, "--from", "plain", rows, "--out", tmp_path / "out", "--ignore-fields", "start_time,clip"
    )
    assert report["num_records"] == 1
