"""The command: what it refuses before a model is loaded, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ktr.errors import EXIT_INTERRUPTED, EXIT_SAVED, EXIT_USER, UserError
from megatron_ktr.evaluation.commands import evaluate as command
from megatron_ktr.evaluation.engines.base import EngineFailed, Question
from tests.support.evaluations import FakeEngine, write_questions
from tools.evaluate import main

SERVER = ["--server-url", "http://127.0.0.1:9", "--served-model", "fake", "--data-workers", "0"]


@pytest.fixture
def engine(monkeypatch) -> FakeEngine:
    """The engine that the command builds, whatever it is asked for."""
    engine = FakeEngine()
    monkeypatch.setattr(command, "build_engine", lambda options: engine)
    return engine


@pytest.fixture
def file(tmp_path) -> Path:
    return write_questions(tmp_path / "own.json", number=6)


def evaluate(file: Path, out: Path, *flags: str) -> int:
    return main([*SERVER, "--benchmark", str(file), "--out", str(out), *flags])


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_one_command_writes_results_tables_and_page(file, tmp_path, engine, capsys):
    out = tmp_path / "out"
    assert evaluate(file, out, "--frames", "16,32", "--control", "intact,hidden", "--json", "--protocol", "strict") == 0
    found = last_json(capsys)
    assert found["complete"] and found["num_answered"] == 24 and found["protocol"] == "strict"
    assert list(found["accuracy"]["own"]) == ["16", "16 hidden", "32", "32 hidden"]
    results = json.loads((out / "results.json").read_text())
    strict = results["benchmarks"]["own"]["conditions"][0]["protocols"]["strict"]["accuracy"]
    assert found["accuracy"]["own"]["16"] == strict
    table = (out / "results.md").read_text()
    assert table.index("strict protocol") < table.index("official protocol") and "our own words" in table
    assert "What is number 3?" in (out / "report.html").read_text()
    before = (out / "results.json").read_bytes()
    (out / "results.json").unlink()
    assert main(["report", str(out), "--protocol", "strict"]) == 0
    assert (out / "results.json").read_bytes() == before


def test_the_same_out_grows_by_votes_and_compares_with_another(file, tmp_path, engine, capsys):
    evaluate(file, tmp_path / "a", "--limit", "3")
    evaluate(file, tmp_path / "a", "--votes", "3")
    assert "What voting gains" in (tmp_path / "a" / "results.md").read_text()
    evaluate(file, tmp_path / "b", "--seed", "1")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    (found,) = last_json(capsys)["benchmarks"]["own"]["comparisons"]
    assert found["num_items"] == 3
    with pytest.raises(UserError, match="one directory"):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "a")])


def test_a_part_of_a_benchmark_is_called_so(file, tmp_path, engine):
    evaluate(file, tmp_path / "out", "--limit", "4")
    assert "own (4 of 6 items)" in (tmp_path / "out" / "results.md").read_text()


REFUSED = {
    "an odd number of frames": (["--frames", "16,17"], "--frames: .*even"),
    "an unknown control": (["--control", "upside_down"], "--control 'upside_down'"),
    "two kinds of voting": (["--votes", "3", "--test-time-scaling", "sparse_to_dense"], "exclude each other"),
    "settings of votes without votes": (["--vote-top-p", "0.5"], "--votes, which is not given"),
    "a temperature that votes would not follow": (["--votes", "3", "--temperature", "1"], "--vote-temperature"),
    "a rate for a fixed number": (["--frame-sampling", "fixed", "--fps", "1"], "--fps has no meaning"),
    "a wording that is not there": (["--prompt-template", "nowhere.jinja"], "prompt_template: nowhere.jinja"),
    "a wording of another benchmark": (["--prompt-template", "mmvu=x.jinja"], "mmvu is not among the benchmarks"),
    "a media root that is not there": (["--media-root", "/nowhere"], "--media-root /nowhere is not a directory"),
    "frames of less than a token": (["--max-pixels", "100"], "video_max_pixels"),
    "too few tokens": (["--max-tokens", "0"], "--max-tokens"),
    "an option of another engine": (["--tensor-parallel-size", "2"], "--tensor-parallel-size does not concern"),
    "an abbreviated flag": (["--frame", "16"], "unrecognized arguments"),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED.keys())
def test_is_refused_before_the_engine_and_the_directory(file, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(command, "build_engine", lambda options: pytest.fail("the engine was built"))
    with pytest.raises(UserError, match=message):
        evaluate(file, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


BENCHMARKS = {
    "no name and no file": (["mmvuu"], "did you mean mmvu"),
    "a name without its files": (["mmvu"], "mmvu=PATH, or --benchmark-root"),
    "a path that is not there": (["mmvu=/nowhere"], "/nowhere does not exist"),
    "one name twice": (["mmvu=.", "mmvu=."], "mmvu is named twice"),
    "nothing": ([","], "expected the name of a benchmark|neither a file"),
}


@pytest.mark.parametrize("named, message", BENCHMARKS.values(), ids=BENCHMARKS.keys())
def test_a_benchmark_that_cannot_be_found_is_refused(tmp_path, monkeypatch, named, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(["--benchmark", *named, "--check"])


def test_no_argument_gives_a_hint():
    with pytest.raises(UserError, match="say what to evaluate: --model .* --help has examples"):
        main([])


def test_missing_media_are_named_refused_above_a_share_and_asked_again_when_they_are_there(tmp_path, engine, capsys):
    file = write_questions(tmp_path / "own.json", number=10, image="there.png")
    flags = ("--json", "--max-missing-share")
    assert main(["--benchmark", str(file), "--check", "--json"]) == EXIT_USER
    assert "no such file" in last_json(capsys)["missing_media"]["own"]["q0"]
    with pytest.raises(UserError, match="media of 1 of 10 questions .*q0: .*--check names all"):
        evaluate(file, tmp_path / "out")
    assert evaluate(file, tmp_path / "out", *flags, "0.1") == 0
    assert last_json(capsys)["complete"] and len(engine.asked) == 9
    (problem,) = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["own"]["conditions"][0][
        "problems"
    ]
    assert problem["item_id"] == "q0"
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(tmp_path / "there.png")
    assert main(["--benchmark", str(file), "--check"]) == 0
    assert evaluate(file, tmp_path / "out") == 0 and len(engine.asked) == 9
    assert evaluate(file, tmp_path / "out", "--retry-problems") == 0
    assert [one.record["problem_id"] for one in engine.asked[9:]] == ["own/q0"]
    assert len(list((tmp_path / "out" / "frames").iterdir())) == 1


def test_missing_answers_end_the_command_with_their_number(file, tmp_path, engine, capsys):
    def before_answer(question: Question) -> None:
        if question.record["problem_id"] == "own/q2":
            raise EngineFailed("out of memory")

    engine.before_answer = before_answer
    with pytest.raises(
        UserError, match="1 answers are missing, .*incomplete: 1 x out of memory; give the same command"
    ):
        evaluate(file, tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "results.json").read_text())["complete"]


def test_an_engine_that_gives_up_leaves_what_it_answered_in_the_results(file, tmp_path, engine):
    def before_answer(question: Question) -> None:
        if len(engine.asked) == 6:
            raise UserError("the server refuses the key")

    engine.before_answer, engine.capacity = before_answer, 2
    with pytest.raises(UserError, match="refuses the key"):
        evaluate(file, tmp_path / "out")
    assert 0 < json.loads((tmp_path / "out" / "results.json").read_text())["num_answered"] < 6


@pytest.mark.parametrize("number, code", [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_SAVED)])
def test_a_signal_ends_the_command_with_a_sentence_and_its_code(file, tmp_path, engine, capsys, number, code):
    engine.before_answer, engine.capacity = lambda question: os.kill(os.getpid(), number), 2
    assert evaluate(file, tmp_path / "out") == code
    assert f"ended by {number.name}: 0 of 6 items" in capsys.readouterr().err
    engine.before_answer = lambda question: None
    assert evaluate(file, tmp_path / "out") == 0


def test_stored_responses_are_scored_without_a_model(tmp_path, capsys):
    path = tmp_path / "responses.jsonl"
    question = {"problem_type": "multiple choice", "solution": "<answer>B</answer>", "options": ["A. x", "B. y"]}
    outputs = ["<think>1</think><answer>B</answer>", "<answer>B.</answer>"]
    path.write_text("".join(json.dumps({"question": question, "model_output": text}) + "\n" for text in outputs))
    assert main(["--score-responses", str(path), "--protocol", "lenient", "--json"]) == 0
    assert last_json(capsys) == {"num": 2, "accuracy": 1.0, "format": 0.5}
    with pytest.raises(UserError, match="unrecognized arguments: --out x"):
        main(["--score-responses", str(path), "--out", "x"])
