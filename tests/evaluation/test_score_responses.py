"""Scoring stored responses: the numbers, and what is said about files that are none."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.commands.score_responses import run, score_responses
from megatron_ktr.evaluation.protocols import PROTOCOL_NAMES
from tests.support.fuzzing import fuzzed

QUESTION = {"problem_type": "multiple choice", "solution": "<answer>B</answer>", "options": ["A. red", "B. blue"]}


def line(response: Any, **question: Any) -> str:
    return json.dumps({"question": {**QUESTION, **question}, "model_output": response}) + "\n"


def test_scores_are_means_over_all_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text(
        "\ufeff"
        + line("<think>x</think><answer>B</answer>")
        + line("<answer>B.</answer>")
        + "\n"
        + line("blue")
        + line("1.5", problem_type="regression", solution=2, options=None),
        encoding="utf-8",
    )
    assert score_responses(path, "official") == {"num": 4, "accuracy": (1 + 0 + 0 + 0.5) / 4, "format": 0.25}
    assert score_responses(path, "strict") == {"num": 4, "accuracy": 0.5, "format": 0.25}
    assert score_responses(path, "lenient") == {"num": 4, "accuracy": 3.5 / 4, "format": 0.25}
    options = argparse.Namespace(score_responses=path, protocol="strict", json=True)
    assert run(options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == score_responses(path, "strict")
    options.json = False
    assert run(options) == 0 and "accuracy 0.5000" in capsys.readouterr().out


BAD_LINES = {
    "no JSON": ("{", "line 2: Expecting"),
    "no object": ("[1]", "line 2: expected an object with 'question'"),
    "no question": ('{"model_output": "B"}', "line 2: expected an object in 'question'"),
    "no output": ('{"question": {}}', "line 2: expected text in 'model_output', got NoneType"),
    "no type": (line("B", problem_type=None), "line 2: expected problem_type to be one of"),
    "other type": (line("B", problem_type="riddle"), "line 2: expected problem_type to be one of"),
    "no solution": (line("B", solution=None), "line 2: expected the right answer"),
    "NaN": (line("B", problem_type="numerical", solution=float("nan")), "line 2: expected the right answer"),
    "solution that is no option": (line("B", solution="E"), "line 2: the right answer 'E' is not among"),
    "options that are no list": (line("B", options="A B"), "line 2: expected 'options'"),
    "number of many digits": ('{"question": ' + "9" * 5000 + "}", "line 2: Exceeds the limit"),
    "nested deeply": ("[" * 100_000, "line 2: nested too deeply"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_line_is_refused_with_its_number(tmp_path: Path, what: str) -> None:
    written, reason = BAD_LINES[what]
    path = tmp_path / "responses.jsonl"
    path.write_text(line("B") + written.rstrip("\n") + "\n" + line("B"))
    with pytest.raises(UserError, match=reason):
        score_responses(path, "official")


def test_files_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    for content, reason in ((b"", "no responses"), (b"\n\n", "no responses"), (b"\n\xff{", "line 2: .*codec can't")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            score_responses(path, "official")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        score_responses(tmp_path / "nowhere", "official")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        score_responses(tmp_path, "official")
    with pytest.raises(UserError, match="expected one of official, strict, lenient"):
        score_responses(path, "standard")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*QUESTION, "x"]), inner, max_size=4),
    max_leaves=8,
)


@given(values, values, st.sampled_from(PROTOCOL_NAMES), st.sampled_from(["regression", "numerical", "OCR", None]))
@fuzzed(200)
def test_any_json_scores_or_is_refused(tmp_path: Path, question: Any, output: Any, protocol: str, kind: Any) -> None:
    question = {**question, "problem_type": kind} if isinstance(question, dict) and kind else question
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps({"question": question, "model_output": output}))
    try:
        found = score_responses(path, protocol)
    except UserError as error:
        assert "line 1: " in str(error)
    else:
        assert found["num"] == 1 and 0 <= found["accuracy"] <= 1
