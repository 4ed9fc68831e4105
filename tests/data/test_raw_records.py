"""Question files are streamed: the values and the messages of ``json.loads``, in memory that does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.data import raw_records
from megatron_ktr.data.raw_records import iter_raw_records
from megatron_ktr.errors import UserError
from tests.support.fuzzing import fuzzed

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def whole_array(text: str) -> list[tuple[int, Any]] | str:
    """What Python's own reader makes of the text at once."""
    try:
        return list(enumerate(json.loads(text), start=1))
    except ValueError as error:
        return str(error)


def streamed(path: Path) -> list[tuple[int, Any]] | str:
    try:
        return list(iter_raw_records(path))
    except UserError as error:
        return str(error)


@fuzzed(60)
@given(
    values=st.lists(JSON_VALUES, max_size=5),
    indent=st.sampled_from([None, 1]),
    change=st.tuples(st.floats(0, 1), st.sampled_from(['"', "[", "]", "}", ",", "\\", "e", "1", "\n", "", None])),
    piece=st.sampled_from([1, 3, 17, 1 << 20]),
)
def test_an_array_in_pieces_of_any_size_gives_what_json_gives_at_once(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, change: Any, piece: int
) -> None:
    """Sound arrays, and arrays with one character changed or cut off after it: values, or message and place."""
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    place, char = int(change[0] * len(text)), change[1]
    text = "[" + (text[:place] if char is None else text[:place] + char + text[place + 1 :])[1:]
    path = tmp_path_factory.mktemp("array") / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_records, "_PIECE_BYTES", piece)
        path.write_bytes(text.encode("utf-8", errors="replace"))
        expected, found = whole_array(path.read_text("utf-8")), streamed(path)
    if isinstance(expected, str):
        assert found == f"data_path: {path} is not valid JSON: {expected}"
    else:
        assert repr(found) == repr(expected)  # repr: NaN is not equal to itself


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_lines_are_numbered_as_an_editor_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(raw_records, "_PIECE_BYTES", piece)
    path = tmp_path / "q.jsonl"
    path.write_bytes('\ufeff\r\n \n{"a": "x\u2028y"}\r\n\n[1]\n{"a": 1, "a": 2}'.encode())
    assert list(iter_raw_records(path)) == [(3, {"a": "x\u2028y"}), (5, [1]), (6, {"a": 2})]
    path.write_bytes(b'\n{"a": 1}\n{"a": }\n')
    with pytest.raises(UserError, match=r"replay_path: .*q.jsonl, line 3 is not valid JSON: .*column 7.*one object a"):
        list(iter_raw_records(path, option="replay_path"))


def test_what_is_no_text_no_file_or_nested_too_deeply_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(b'[{"a": "' + b"x" * 100 + b'\xff"}]')
    with pytest.raises(
        UserError, match=r"cannot be read: 'utf-8(-sig)?' codec can't decode byte 0xff in position 108: inv"
    ):
        list(iter_raw_records(path))
    path.write_bytes(b'{"a": "\xc3')
    with pytest.raises(UserError, match="cannot be read: .* byte 0xc3 in position 7: unexpected end of data"):
        list(iter_raw_records(path))
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match="is not valid JSON: nested too deeply"):
        list(iter_raw_records(path))
    with pytest.raises(UserError, match="data_path: .*missing.json cannot be read"):
        list(iter_raw_records(tmp_path / "missing.json"))


@pytest.mark.parametrize(("text", "told"), [('["a", "{}"]', "record 2 is longer"), ('1\n"{}"\n', "line 2 is longer")])
def test_a_record_that_is_too_long_is_refused_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    monkeypatch.setattr(raw_records, "MAX_RECORD_CHARS", 1000)
    monkeypatch.setattr(raw_records, "_PIECE_BYTES", 64)
    path = tmp_path / "q.json"
    path.write_text(text.replace("{}", "x" * 900))
    assert len(list(iter_raw_records(path))) == 2
    path.write_text(text.replace("{}", "x" * 1100))
    with pytest.raises(UserError, match=told):
        list(iter_raw_records(path))


PEAK = """
import re, sys
from megatron_ktr.data.raw_records import iter_raw_records

def peak_kib():
    # Not ru_maxrss, which begins with what the parent had: below that it never moves.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1))

before = peak_kib()
print(sum(1 for _ in iter_raw_records(sys.argv[1])), peak_kib() - before)
"""


@pytest.mark.parametrize("ends", ["[,]", "\n"])
def test_a_large_file_is_read_in_constant_memory(tmp_path: Path, ends: str) -> None:
    """60 MB of records may cost 12 MB: a few copies of a piece of 1 MiB, whatever the file's size."""
    path, number = tmp_path / "q.json", 120_000
    record = json.dumps({"problem": "x" * 480})
    opening, between, closing = ends if len(ends) == 3 else ("", ends, "")
    with path.open("w") as file:
        file.write(opening + record)
        for _ in range((number - 1) // 1000):
            file.write((between + record) * 1000)
        file.write((between + record) * ((number - 1) % 1000) + closing)
    assert path.stat().st_size > 59e6
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    num_records, grown_kib = map(int, done.stdout.split())
    assert num_records == number and grown_kib < 12_000
