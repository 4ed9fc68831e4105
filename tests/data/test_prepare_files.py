"""Files that are converted: tables, several inputs, misuse, damage, whatever a record holds, constant memory."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_ktr.data.prepare import layouts
from megatron_ktr.data.prepare.conversion import Conversion
from megatron_ktr.data.prepare.embedded import EmbeddedMedia
from megatron_ktr.data.prepare.layout import Keyed, Options
from megatron_ktr.data.prepare.tables import iter_table_rows
from megatron_ktr.data.prepare.tally import Tally
from megatron_ktr.data.prepare.unique_ids import UniqueIds
from megatron_ktr.errors import TransientError, UserError
from tests.support.conversions import convert, converted, lines, put, tool
from tests.support.failing_files import failing
from tests.support.fuzzing import fuzzed
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS
from tests.support.published import (
    ACTIVITYNET,
    OBJECTS,
    PERCEPTION,
    SAMPLES,
    VIDEO_R1,
    write_published,
)

_PLAIN = {"video": "a.mp4", "question": "Which?"}


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


def test_tables_that_a_file_server_does_not_list_are_not_taken_for_none(tmp_path) -> None:
    snapshot = tables(tmp_path / "tables", SAMPLES["video_r1"])["snapshot"]
    for lost in (snapshot / "data", snapshot):
        with failing(lost, errno.ESTALE), pytest.raises(TransientError, match="Stale file handle"):
            list(iter_table_rows(snapshot, split=None))


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


def test_report_names_the_options_to_train_with(capsys, tmp_path, monkeypatch) -> None:
    def options(layout: str) -> str:
        (report,) = convert(capsys, "--from", layout, write_published(tmp_path, layout), "--out", tmp_path / "out")
        return " ".join(report["options"])

    assert options("conversations").endswith("--media-root MEDIA_ROOT --objective sft")
    assert "--reward-functions soft_choice,format" in options("tw_grpo")
    # Its records of mathematics have a reward of their own, and those of grounding their own prompt.
    assert options("onethinker").endswith("--media-root MEDIA_ROOT --prompt-template grounding")
    assert options("charades_sta").endswith("--media-root MEDIA_ROOT --prompt-template grounding")
    monkeypatch.setattr("megatron_ktr.data.prepare.suggestion.known_types", frozenset)  # as if no reward judged them
    assert "YOUR_MODULE:YOUR_REWARD" in options("plain")


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
    "tempcompass": [
        Keyed("103", OBJECTS["tempcompass"]["103"]),
        {"video_id": "103", "dim": "action", "question": "What?\nA. up\nB. down", "answer": "A. up"},
    ],
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
@fuzzed(60)
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
