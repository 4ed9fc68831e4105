"""An evaluation that ends at any moment is continued by the same command, and its results are those of one that never
ended."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking.outcomes import read_evaluation
from megatron_ktr.evaluation.asking.run import Left, leaving_on_signals
from megatron_ktr.evaluation.engines.base import EngineFailed, Question
from megatron_ktr.evaluation.item import Condition
from tests.support.evaluations import PLAIN, FakeEngine, run_evaluation, write_questions

CONDITIONS = (*PLAIN, Condition(64, scaling="sparse_to_dense"))
NUM_KILLS = 20


class Killer:
    """Kills its process at the n-th call that the files of the evaluation make, of Python's functions or C's."""

    def __init__(self, after: int | None = None) -> None:
        self.num_calls = 0
        self._after = after

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if f"{os.sep}evaluation{os.sep}" not in frame.f_code.co_filename:
            return
        self.num_calls += 1
        if self.num_calls == self._after:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], object]) -> int:
    """The status of a forked child that does the work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads, none of which the child needs
        pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def answered_lines(out: Path) -> list[str]:
    return (out / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]


def results(out: Path) -> tuple[bytes, bytes]:
    return (out / "results.json").read_bytes(), (out / "results.md").read_bytes()


def test_twenty_kills_change_no_byte_of_the_results(tmp_path):
    file, whole, killed = write_questions(tmp_path / "own.json", number=40), tmp_path / "whole", tmp_path / "killed"
    assert run_evaluation(file, whole, FakeEngine(), conditions=CONDITIONS) == {}
    counter = Killer()
    sys.setprofile(counter)
    try:
        run_evaluation(file, tmp_path / "counted", FakeEngine(), conditions=CONDITIONS)
    finally:
        sys.setprofile(None)

    def killed_after(num_calls: int) -> Callable[[], None]:
        def work() -> None:
            sys.setprofile(Killer(num_calls))
            run_evaluation(file, killed, FakeEngine(), conditions=CONDITIONS)

        return work

    draw = random.Random(0)
    sizes = []
    for _ in range(NUM_KILLS):
        status = in_child(killed_after(draw.randrange(counter.num_calls // 4)))
        assert os.WIFSIGNALED(status) or status == 0
        path = killed / "answers.jsonl"
        sizes.append(len(answered_lines(killed)) if path.exists() else 0)
    in_the_middle = {size for size in sizes if 0 < size < len(answered_lines(whole))}
    assert len(in_the_middle) >= 3, f"the kills must hit the work, not only what is around it: {sizes}"
    assert run_evaluation(file, killed, FakeEngine(), conditions=CONDITIONS) == {}
    assert results(killed) == results(whole)
    lines = answered_lines(killed)
    assert sorted(lines) == sorted(answered_lines(whole))
    assert len({json.loads(line)["key"] for line in lines}) == len(lines)


def test_a_complete_evaluation_asks_nothing_and_changes_nothing(tmp_path):
    file, out = write_questions(tmp_path / "own.json", number=5), tmp_path / "out"
    run_evaluation(file, out, FakeEngine())
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    engine = FakeEngine()
    run_evaluation(file, out, engine)
    assert engine.asked == []
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == before


def test_a_directory_grows_by_conditions_and_items_without_asking_again(tmp_path):
    file, out = write_questions(tmp_path / "own.json", number=12), tmp_path / "out"
    few, more = FakeEngine(), FakeEngine()
    run_evaluation(file, out, few, conditions=PLAIN[:1], limit=4)
    votes = Condition(16, scaling="votes:2")
    run_evaluation(file, out, more, conditions=[PLAIN[0], votes], limit=12)
    assert len(few.asked) == 4 and len(more.asked) == 8 + 2 * 12
    assert not {one.key for one in few.asked} & {one.key for one in more.asked}
    evaluation = read_evaluation(out)
    assert evaluation.num_wanted == len(evaluation.outcomes) == 24
    more_votes = FakeEngine()
    run_evaluation(file, out, more_votes, conditions=[Condition(16, scaling="votes:5")])
    assert len(more_votes.asked) == 3 * 12, "the first two votes are there"
    with pytest.raises(UserError, match="--limit: .* holds 12 questions of own, and this command wants 4"):
        run_evaluation(file, out, FakeEngine(), limit=4)


def test_only_a_question_that_changed_is_asked_again(tmp_path):
    file, out = write_questions(tmp_path / "own.json", number=6), tmp_path / "out"
    run_evaluation(file, out, FakeEngine())
    for change in ({"problem": "What is it now?"}, {"solution": "<answer>D</answer>"}, {"options": ["A. x", "B. y"]}):
        if "options" in change:
            change |= {"solution": "<answer>A</answer>"}
        write_questions(file, number=6, **change)
        engine = FakeEngine()
        run_evaluation(file, out, engine)
        assert {one.record["problem_id"] for one in engine.asked} == {"own/q0"} and len(engine.asked) == 2
        assert len(read_evaluation(out).outcomes) == 12


def test_other_settings_are_refused_by_the_name_of_the_option_and_both_values(tmp_path):
    file, out = write_questions(tmp_path / "own.json", number=3), tmp_path / "out"
    run_evaluation(file, out, FakeEngine())
    with pytest.raises(UserError, match="^--seed: .* with seed 0, and this one has 7"):
        run_evaluation(file, out, FakeEngine(), seed=7)
    with pytest.raises(UserError, match="^--model: .* engine fake, and this one has engine another"):
        run_evaluation(file, out, FakeEngine(identity="another"))
    other = write_questions(tmp_path / "other" / "own.json", number=3, problem_id="new")
    with pytest.raises(UserError, match="^--benchmark: 1 questions of .* such as q0 of own, are not among"):
        run_evaluation(other, out, FakeEngine())
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds 'thesis.tex' and no settings.json"):
        run_evaluation(file, tmp_path / "else", FakeEngine())


def fails(*ids: str, times: int) -> Callable[[Question], None]:
    counts: dict[str, int] = {}

    def before_answer(question: Question) -> None:
        name = question.record["problem_id"].removeprefix("own/")
        counts[name] = counts.get(name, 0) + 1
        if name in ids and counts[name] <= times:
            raise EngineFailed("the server is away")

    return before_answer


def test_a_failure_is_tried_again_once_and_then_named(tmp_path):
    file, out, whole = write_questions(tmp_path / "own.json", number=8), tmp_path / "out", tmp_path / "whole"
    run_evaluation(file, whole, FakeEngine(), conditions=PLAIN[:1])
    once, always = FakeEngine(), FakeEngine()
    once.before_answer = fails("q3", times=1)
    assert run_evaluation(file, out, once, conditions=PLAIN[:1]) == {}
    assert results(out) == results(whole)
    always.before_answer = fails("q1", "q2", times=9)
    missing = run_evaluation(file, tmp_path / "part", always, conditions=PLAIN[:1])
    assert list(missing.values()) == ["the server is away"] * 2
    part = json.loads((tmp_path / "part" / "results.json").read_text())
    assert not part["complete"] and part["num_answered"] == 6
    assert run_evaluation(file, tmp_path / "part", FakeEngine(), conditions=PLAIN[:1]) == {}
    assert results(tmp_path / "part") == results(whole)


def test_an_engine_that_is_gone_is_not_asked_everything(tmp_path):
    file = write_questions(tmp_path / "own.json", number=200)
    engine = FakeEngine()
    engine.before_answer = fails(*(f"q{number}" for number in range(10, 200)), times=9)
    missing = run_evaluation(file, tmp_path / "out", engine, conditions=PLAIN[:1])
    assert 190 <= len(missing) <= 190 + engine.capacity and len(engine.asked) < 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_evaluation_and_the_answers_stay(tmp_path, number):
    file, out = write_questions(tmp_path / "own.json", number=20), tmp_path / "out"
    engine = FakeEngine()

    def before_answer(question: Question) -> None:
        if len(engine.asked) == 12:
            os.kill(os.getpid(), number)

    engine.before_answer = before_answer
    before = signal.getsignal(number)
    with leaving_on_signals(), pytest.raises(Left) as left:
        run_evaluation(file, out, engine, conditions=PLAIN[:1])
    assert left.value.number == number and signal.getsignal(number) is before
    num_stored = len(answered_lines(out))
    assert 0 < num_stored < 20
    again = FakeEngine()
    assert run_evaluation(file, out, again, conditions=PLAIN[:1]) == {}
    assert len(again.asked) == 20 - num_stored
