"""The files of an output directory that were damaged, or edited by hand, are refused in words or not used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking.directory import OutputDirectory
from megatron_ktr.evaluation.asking.outcomes import read_evaluation
from megatron_ktr.evaluation.asking.settings import digest_of
from megatron_ktr.evaluation.asking.store import answers_in
from megatron_ktr.evaluation.item import Answer, Condition
from megatron_ktr.evaluation.registry import load_benchmark
from megatron_ktr.evaluation.results.publish import headings_of
from tests.support.evaluations import FakeEngine, run_evaluation, write_questions


@pytest.fixture
def out(tmp_path: Path) -> Path:
    run_evaluation(write_questions(tmp_path / "own.json", number=4), tmp_path / "out", FakeEngine())
    return tmp_path / "out"


EDITS = [
    ("asked", []),
    ("asked", [["other", {"frames": 16}]]),
    ("asked", [["own", {"frames": "16"}]]),
    ("asked", [["own", {"frames": 16, "scaling": "votes:x"}]]),
    ("seed", None),
    ("preprocess", []),
    ("voting", {"temperature": [0.7]}),
    ("model", {"name": 1, "identity": {}}),
]


@pytest.mark.parametrize(("field", "value"), EDITS)
def test_settings_of_other_types_are_refused(out: Path, field: str, value: object) -> None:
    path = out / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match=r"settings\.json is not the settings file of an evaluation"):
        read_evaluation(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": None}, "record is None"),
        ({"item_id": ["q0"]}, "item_id is"),
        ({"categories": {"task": 1}}, "task|categories"),
        ({"record": {"problem": "?", "options": 3}}, "options"),
        ({"item_id": "q1"}, "1 questions twice"),
    ],
)
def test_items_that_are_none_or_stand_there_twice_are_refused(out: Path, change: dict, message: str) -> None:
    path = out / "items.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]) + "\n")
    with pytest.raises(UserError, match=message):
        read_evaluation(out)


def test_a_missing_item_is_not_left_out_of_the_denominator(out: Path) -> None:
    path = out / "items.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(UserError, match="has 3 of the 4 questions of own"):
        read_evaluation(out)


@pytest.mark.parametrize("value", [10**400, -1, float("nan"), True, "5"])
@pytest.mark.parametrize("field", ["num_tokens", "seconds"])
def test_an_answer_with_a_number_that_is_none_is_not_used(field: str, value: object) -> None:
    line = {"key": "k", "answer": {**dataclasses.asdict(Answer("B")), field: value}}
    assert answers_in(json.dumps(line).encode() + b"\n", path=Path("x")) == {}


def test_an_evaluation_that_was_killed_between_its_first_two_files_goes_on(out: Path, tmp_path: Path) -> None:
    for found in out.iterdir():
        if found.name != "items.jsonl" and found.is_file():
            found.unlink()
    run_evaluation(tmp_path / "own.json", out, FakeEngine())
    assert len(read_evaluation(out).outcomes) == 8
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "items.jsonl").write_text('{"name": "of someone else"}\n')
    with pytest.raises(UserError, match="not the output of an evaluation"):
        OutputDirectory(foreign)


def test_another_video_of_the_same_name_is_another_question(out: Path) -> None:
    item = read_evaluation(out).items[0]
    one = dataclasses.replace(item, video_id="videos/Art/0.mp4")
    assert digest_of(one) != digest_of(dataclasses.replace(item, video_id="videos/Law/0.mp4"))
    assert digest_of(one) == digest_of(dataclasses.replace(item, video_id="videos/Art/0.mkv"))


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "\udcff.json"
    with pytest.raises(UserError, match="no UTF-8"):
        run_evaluation(write_questions(file, number=1), tmp_path / "out", FakeEngine())


def test_half_a_download_is_not_called_the_benchmark(out: Path) -> None:
    evaluation = read_evaluation(out)
    asked = evaluation.settings["benchmarks"]["own"]
    settings = {**evaluation.settings, "benchmarks": {"mmvu": asked, "own": asked}}
    found = headings_of(dataclasses.replace(evaluation, settings=settings))
    assert found["mmvu"].title == "MMVU (multiple choice) (4 of 625 items)" and found["own"].title == "own"


def test_what_votes_were_sampled_with_is_said(tmp_path: Path) -> None:
    file, out = write_questions(tmp_path / "own.json", number=2), tmp_path / "voted"
    run_evaluation(file, out, FakeEngine(), conditions=(Condition(16, scaling="votes:3"),))
    assert "Votes: temperature 0.7, top-p 1 instead." in (out / "results.md").read_text()


@pytest.mark.parametrize("name", ["videomme", "tempcompass", "video_holmes"])
def test_the_file_of_another_benchmark_is_refused(tmp_path: Path, name: str) -> None:
    record = {
        "problem_id": 1,
        "problem": "What?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. left", "B. right"],
        "solution": "<answer>B</answer>",
        "path": "./Evaluation/MMVU/videos/Art/0.mp4",
    }
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([record]))
    assert len(load_benchmark("mmvu").read(file)) == 1
    with pytest.raises(UserError, match="belongs to another benchmark"):
        load_benchmark(name).read(file)
