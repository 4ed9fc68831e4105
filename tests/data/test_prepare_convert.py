"""Published files become question files: each layout, tables, what is refused, hostile input, constant memory."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.prepare import layouts
from megatron_ktr.data.prepare.answers import options_in_text
from megatron_ktr.data.prepare.conversion import Conversion
from megatron_ktr.data.prepare.embedded import EmbeddedMedia
from megatron_ktr.data.prepare.layout import Keyed, Options
from megatron_ktr.data.prepare.tally import Tally
from megatron_ktr.data.prepare.unique_ids import UniqueIds
from megatron_ktr.data.records import read_records
from megatron_ktr.errors import UserError
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.published import (
    ACTIVITYNET,
    LETTERED,
    NAMES,
    OBJECTS,
    PERCEPTION,
    SAMPLES,
    VIDEO_R1,
    write_published,
)
from tests.support.tokenizer import save_tiny_tokenizer
from tests.support.videos import numbered_frames, shared_data, write_video

_SPEC = importlib.util.spec_from_file_location("prepare_dataset", REPOSITORY / "tools" / "prepare_dataset.py")
assert _SPEC is not None and _SPEC.loader is not None
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


def convert(capsys: Any, *arguments: Any) -> list[dict[str, Any]]:
    """The reports of a conversion, one for each file."""
    assert tool.main(["convert", "--json", *map(str, arguments)]) == 0
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 1
    return json.loads(output[0])["files"]


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def converted(capsys: Any, folder: Path, layout: str, *arguments: Any) -> list[dict[str, Any]]:
    """The records of a layout's sample."""
    (report,) = convert(capsys, "--from", layout, write_published(folder, layout), "--out", folder / "out", *arguments)
    assert report["num_skipped"] == 0
    return lines(report["out"])


def put(folder: Path, rows: Any, *, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


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


def tables(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Path]:
    """The same rows as a parquet file, a hub snapshot, and what save_to_disk writes, with and without splits."""
    # A table gives every row all columns, with null where there is nothing.
    columns = {name: None for row in rows for name in row}
    table = pa.Table.from_pylist([{**columns, **row} for row in rows])
    parquet, snapshot = folder / "rows.parquet", folder / "snapshot"
    folder.mkdir(exist_ok=True)
    pq.write_table(table, parquet)
    (snapshot / "data").mkdir(parents=True)
    pq.write_table(table.slice(0, 2), snapshot / "data" / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(2), snapshot / "data" / "train-00001-of-00002-0a1b.parquet")
    saved, splits = folder / "saved", folder / "splits"
    for place in (saved, splits / "train"):
        place.mkdir(parents=True)
        with pa.OSFile(str(place / "data-00000-of-00001.arrow"), "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (splits / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    (splits / "test").mkdir()
    (splits / "test" / "state.json").write_text(json.dumps({"_data_files": []}))
    return {"parquet": parquet, "snapshot": snapshot, "saved": saved, "splits": splits}


def test_tables_give_the_records_of_the_json_file(capsys, tmp_path) -> None:
    expected = converted(capsys, tmp_path, "video_r1")
    for name, path in tables(tmp_path / "tables", SAMPLES["video_r1"]).items():
        split = ["--split", "train"] if name == "splits" else []
        (report,) = convert(capsys, "--from", "video_r1", path, "--out", tmp_path / f"from_{name}", *split)
        assert lines(report["out"]) == expected
    with pytest.raises(UserError, match="has several splits; test, train; name one with --split"):
        tool.main(["convert", "--from", "video_r1", str(tmp_path / "tables" / "splits"), "--out", str(tmp_path / "x")])


def test_embedded_media_are_written_once_by_content(capsys, tmp_path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(content, "PNG")
    picture = {"bytes": content.getvalue(), "path": "../../a.jpg"}
    rows = [{"image": picture, "question": "Which?", "answer": str(number)} for number in range(3)]
    rows.append({"image": {"bytes": b"no picture", "path": "b.jpg"}, "question": "Which?", "answer": "1"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    out = tmp_path / "out"
    arguments = ["--from", "plain", tmp_path / "rows.parquet", "--out", out, "--max-skip-share", 0.5]
    (report,) = convert(capsys, *arguments)
    assert report["num_records"] == 3 and report["num_media_files"] == 1 and report["media_root"] == str(out)
    (name,) = {record["image"] for record in lines(report["out"])}
    assert name.startswith("media/") and name.endswith(".png") and (out / name).read_bytes() == content.getvalue()
    with pytest.raises(UserError, match="--media-limit-gb"):
        tool.main(
            ["convert", "--from", "plain", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "two")]
            + ["--media-limit-gb", "1e-9"]
        )
    assert not list((tmp_path / "two").glob("*.jsonl"))


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


def test_too_many_skips_are_an_error_and_nothing_is_written(tmp_path) -> None:
    rows = put(tmp_path, [VIDEO_R1, {**VIDEO_R1, "path": "../a"}, "text", None])
    with pytest.raises(UserError, match=r"3 of 4 records cannot be converted \(--max-skip-share 0.1\): .*record 2"):
        tool.main(["convert", "--from", "video_r1", str(rows), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())


def test_repeated_ids_become_unique(capsys, tmp_path) -> None:
    rows = put(tmp_path, [VIDEO_R1, VIDEO_R1, {**VIDEO_R1, "problem_id": "2#2"}, {**VIDEO_R1, "problem_id": None}])
    (report,) = convert(capsys, "--from", "video_r1", rows, "--out", tmp_path / "out")
    assert [record["problem_id"] for record in lines(report["out"])] == ["2", "2#2", "2#2#3", "4"]
    assert report["num_ids_changed"] == 2


def test_several_inputs_give_several_files_or_one(capsys, tmp_path) -> None:
    first, second = put(tmp_path, [VIDEO_R1], name="a.json"), put(tmp_path, [VIDEO_R1] * 2, name="b.json")
    reports = convert(capsys, "--from", "video_r1", first, second, "--out", tmp_path / "out")
    assert [Path(report["out"]).name for report in reports] == ["a.jsonl", "b.jsonl"]
    (merged,) = convert(capsys, "--from", "auto", first, second, "--out", tmp_path / "out", "--merge", "both")
    assert len(lines(merged["out"])) == 3 and merged["num_ids_changed"] == 2


def test_report_names_the_options_to_train_with(capsys, tmp_path) -> None:
    def options(layout: str) -> str:
        (report,) = convert(capsys, "--from", layout, write_published(tmp_path, layout), "--out", tmp_path / "out")
        return " ".join(report["options"])

    assert options("conversations").endswith("--media-root MEDIA_ROOT --objective sft")
    assert "--reward-functions soft_choice,format" in options("tw_grpo")
    assert options("onethinker").endswith("--problem-types free-form,multiple choice")
    assert "YOUR_MODULE:YOUR_REWARD" in options("charades_sta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "video_r1", "{rows}"], "needs --from LAYOUT"),
        (["--from", "nothing", "{rows}", "--out", "{out}"], "invalid choice"),
        (["--from", "video_r1", "{rows}.x", "--out", "{out}"], "no such file"),
        (["--from", "video_r1", "{rows}", "--out", "{rows}"], "is a file"),
        (["--from", "video_r1", "{rows}", "--out", "{folder}"], "rows.jsonl exists"),
        (["--from", "video_r1", "{folder}/rows.jsonl", "--out", "{folder}", "--force"], "is an input"),
        (["--from", "video_r1", "{rows}", "{rows}", "--out", "{out}"], "several inputs are called rows"),
        (["--from", "video_r1", "{rows}", "--out", "{out}", "--merge", "../x"], "--merge: expected"),
        (["--from", "video_r1", "{rows}", "--out", "{out}", "--columns", "video=a"], "--columns is not read"),
        (["--from", "auto", "{rows}", "--out", "{out}", "--video-map", "{rows}"], "--video-map"),
        (["--from", "plain", "{rows}", "--out", "{out}", "--columns", "clip=a"], "--columns: expected FIELD=COLUMN"),
        (["--from", "video_r1", "{rows}", "--out", "{out}", "--split", "train"], "--split train"),
        (["--from", "video_r1", "{folder}/videos", "--out", "{out}"], "folder without tables"),
        (["--from", "video_r1", "{folder}", "--out", "{folder}"], "is the data set to convert"),
        (["--from", "auto", "{folder}/empty.json", "--out", "{out}"], "no records at all"),
        (["--from", "video_r1", "{folder}/empty.json", "--out", "{out}"], "no records at all"),
        (["--from", "auto", "{folder}/unknown.json", "--out", "{out}"], r"no known layout \(fields \['x'\]\)"),
        (["--from", "video_r1", "{folder}/broken.json", "--out", "{out}"], "not valid JSON"),
        (["--from", "video_r1", "{folder}/bad.parquet", "--out", "{out}"], "cannot be read as a table"),
        (["--from", "video_r1", "{folder}/bad.arrow", "--out", "{out}"], "cannot be read as a table"),
        (["--from", "plain", "{folder}/quote.csv", "--out", "{out}"], "cannot be read behind row 1"),
        (["--from", "plain", "{folder}/latin.csv", "--out", "{out}"], "cannot be read behind row 0"),
        (["--from", "auto", "{folder}/short.csv", "--out", "{out}"], "expected 3 columns as in the heading, got 2"),
        (["--from", "video_r1", "{folder}/one.json", "--out", "{out}"], "got a file that is one object"),
        (["--from", "plain", "{folder}/twice.csv", "--out", "{out}"], "heading of different names"),
        (["--from", "plain", "{folder}/rows.xml", "--out", "{out}"], "expected a folder or a file that ends in"),
    ],
)
def test_misuse_is_one_line_and_leaves_nothing_behind(tmp_path, arguments, message) -> None:
    rows = put(tmp_path, [VIDEO_R1])
    for name, content in {
        "rows.jsonl": json.dumps(VIDEO_R1).encode(),
        "empty.json": b"",
        "unknown.json": b'[{"x": 1}]',
        "broken.json": json.dumps([VIDEO_R1] * 3).encode()[:-40],
        "bad.parquet": b"PAR1 and nothing else PAR1",
        "bad.arrow": b"\xff\xff\xff\xff\x10\x00\x00\x00ARROW nothing",
        "quote.csv": b'video,question,answer\na,b,c\na,"b,c\n',
        "latin.csv": b"video,question,answer\na.mp4,caf\xe9,1\n",
        "twice.csv": b"video,video\na,b\n",
        "rows.xml": b"<x/>",
        "short.csv": b"video,question,answer\na.mp4,b\nb.mp4,c,d\n",
        "one.json": b'{"video_7": {"x": 1}}',
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "videos").mkdir()
    before = sorted(tmp_path.rglob("*"))
    names = {"rows": rows, "out": tmp_path / "out", "folder": tmp_path}
    with pytest.raises(UserError, match=message):
        tool.main(["convert", *(argument.format(**names) for argument in arguments)])
    assert sorted(path for path in tmp_path.rglob("*") if path != tmp_path / "out") == before


def test_damaged_tables_are_one_line(tmp_path) -> None:
    """Every cut of a table, and bytes that were turned over, end in records or in a ``UserError``."""
    for path in (
        tables(tmp_path, SAMPLES["video_r1"] * 20)["parquet"],
        tmp_path / "saved" / "data-00000-of-00001.arrow",
    ):
        content = path.read_bytes()
        damaged = tmp_path / f"damaged{path.suffix}"
        for place in range(0, len(content), max(1, len(content) // 40)):
            for changed in (content[:place], content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]):
                damaged.write_bytes(changed)
                arguments = ["--from", "video_r1", str(damaged), "--out", str(tmp_path / "out"), "--force"]
                try:
                    assert tool.main(["convert", *arguments]) == 0
                except UserError as error:
                    assert "damaged" in str(error)


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


def test_a_download_that_is_not_whole_and_a_report_that_is_there_are_told(tmp_path) -> None:
    rows = pa.Table.from_pylist([{**_PLAIN, "answer": "3"}])
    for number in (0, 2):
        pq.write_table(rows, tmp_path / f"train-0000{number}-of-00003.parquet")
    pq.write_table(rows, tmp_path / "test-00000-of-00001.parquet")
    command = ["convert", "--from", "plain", str(tmp_path), "--out", str(tmp_path / "out"), "--split"]
    with pytest.raises(UserError, match="2 files of the split train, whose names count 3"):
        tool.main([*command, "train"])
    assert tool.main([*command, "test"]) == 0
    (tmp_path / "out" / f"{tmp_path.name}.jsonl").unlink()
    with pytest.raises(UserError, match="report.json exists"):
        tool.main([*command, "test"])


_RAW = {
    **SAMPLES,
    "perception_test": [Keyed("video_7", PERCEPTION), OBJECTS["perception_test"]["video_7"]["mc_question"][0]],
    "activitynet_captions": [Keyed("v_Q", ACTIVITYNET)],
    "charades_sta": ["AO8RW 0.0 6.9##a person sits.", {"video": "a", "caption": "b", "timestamp": [1, 2]}],
    "nextqa": [
        {"video": 1, "question": "q", "answer": 1, "qid": 6, "type": "CH", **{f"a{n}": str(n) for n in range(5)}}
    ],
}
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.integers(-5, 9)
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["../a.mp4", "/", "a\0b", "\ud800", "<answer>", "<answer>A</answer>", "A", "<video>", "1", "nan"])
    | st.binary(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("ABab") | st.text(max_size=5), inner),
    max_leaves=6,
)


_IDS = UniqueIds()


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in _places(one, (*path, key)))]


def _changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _changed(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("layout", layouts.NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_record_holds_it_is_written_well_or_skipped(tmp_path, layout, data) -> None:
    row = data.draw(st.sampled_from(_RAW[layout]))
    keyed, value = (row.key, row.value) if isinstance(row, Keyed) else (None, row)
    for _ in range(data.draw(st.integers(1, 3))):
        value = _changed(value, data.draw(st.sampled_from(_places(value))), data.draw(_VALUES))
    row = value if keyed is None else Keyed(keyed, value)
    found = layouts.load_layouts()
    assert isinstance(any(one.recognises(row) for one in found.values()), bool)
    tally, file = Tally(), io.BytesIO()
    media = EmbeddedMedia(tmp_path, limit_bytes=1e9)
    Conversion(found[layout], Options(), media, _IDS).convert(iter([(1, row)]), file, tally=tally)
    written = [json.loads(line) for line in file.getvalue().decode().splitlines()]
    assert len(written) == tally.num_written == tally.num_read - tally.skipped.num
    for record in written:
        paths = [record.get(name) for name in ("video", "image")] + record.get("videos", []) + record.get("images", [])
        flat = [path for paths_ in paths if paths_ for path in ([paths_] if isinstance(paths_, str) else paths_)]
        assert all(path and not path.startswith("/") and ".." not in path.split("/") for path in flat)
        if record.get("problem_type") == "multiple choice" and layout != "conversations":
            letters = record["solution"].removeprefix("<answer>").removesuffix("</answer>").split(",")
            assert set(letters) <= {option[0] for option in record["options"]}


_MEASURE = """
import re, runpy, sys
sys.argv = ["prepare_dataset.py", "convert", "--json", "--from", "auto", sys.argv[1], "--out", sys.argv[2]]
try:
    runpy.run_path("tools/prepare_dataset.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
# Not ru_maxrss, which begins with what the parent had.
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1))
"""


def peak_kilobytes(path: Path, out: Path) -> int:
    command = [sys.executable, "-c", _MEASURE, str(path), str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    return int(done.stdout.splitlines()[-1])


def test_memory_does_not_grow_with_the_file(tmp_path) -> None:
    peaks = []
    for num_records in (200, 4000):
        path = tmp_path / f"{num_records}.json"
        path.write_text(
            json.dumps([{**VIDEO_R1, "problem_id": n, "problem": "x" * 10_000} for n in range(num_records)])
        )
        peaks.append(peak_kilobytes(path, tmp_path / "out"))
    # 38 MB more of the file; a reader that keeps them holds several times that.
    assert peaks[1] - peaks[0] < 12_000
