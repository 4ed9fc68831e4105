"""Nothing that was stored is lost or counted twice, whatever happens to the file or the disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking.store import AnswerStore, DirectoryLock, answers_in, read_answers
from megatron_ktr.evaluation.item import Answer
from tests.support.fuzzing import fuzzed
from tests.support.patience import PATIENCE_SECONDS

FACTS = {"benchmark": "own", "item_id": "1"}
ANSWERS = {f"key {number}": Answer(f"text {number}\n\u2028é", num_tokens=number) for number in range(4)}


def fill(directory: Path) -> bytes:
    store = AnswerStore(directory)
    for key, answer in ANSWERS.items():
        store.add(key, answer, FACTS)
    store.close()
    return store.path.read_bytes()


def test_a_line_that_is_torn_at_any_byte_is_cut_and_the_others_stay(tmp_path):
    content = fill(tmp_path)
    last_line = content[:-1].rindex(b"\n") + 1
    for size in range(last_line, len(content)):
        (tmp_path / "answers.jsonl").write_bytes(content[:size])
        assert len(read_answers(tmp_path)) == len(ANSWERS) - 1
        store = AnswerStore(tmp_path)
        assert len(store) == len(ANSWERS) - 1 and store.path.stat().st_size == last_line
        store.add("key 3", ANSWERS["key 3"], FACTS)
        store.close()
        assert store.path.read_bytes() == content


def test_the_first_of_several_answers_with_one_key_counts(tmp_path):
    first = fill(tmp_path)
    store = AnswerStore(tmp_path)
    store.add("key 1", Answer("another"), FACTS)
    store.close()
    assert store.path.read_bytes() == first
    changed = first.replace(b"text", b"other")
    assert answers_in(first + changed, path=Path("x")) == ANSWERS


@fuzzed(100)
@given(damage=st.binary(max_size=40), place=st.integers(0, 3))
def test_lines_that_are_no_answers_are_passed_over(tmp_path_factory, damage, place):
    lines = fill(tmp_path_factory.mktemp("store")).splitlines(keepends=True)
    lines.insert(place, damage.replace(b"\n", b"") + b"\n")
    assert answers_in(b"".join(lines), path=Path("x")) == ANSWERS


def test_half_a_character_is_stored_as_it_will_be_read(tmp_path):
    store = AnswerStore(tmp_path)
    store.add("key", Answer("a\ud800b"), FACTS)
    assert store.get("key") == Answer("a?b") == read_answers(tmp_path)["key"]


def test_what_could_not_be_read_again_is_not_stored(tmp_path):
    store = AnswerStore(tmp_path)
    with pytest.raises(ValueError, match="seconds"):
        store.add("key", Answer("a", seconds=float("nan")), FACTS)
    assert store.path.read_bytes() == b""


def test_a_full_disk_is_one_sentence_and_leaves_whole_answers(tmp_path):
    content = fill(tmp_path)
    store = AnswerStore(tmp_path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 100, unlimited[1]))
    try:
        with pytest.raises(UserError, match=f"--out: .*{os.strerror(errno.ENOSPC)}.*4 answers are safe"):
            store.add("more", Answer("x" * 1000), FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert store.path.read_bytes() == content
    store.add("more", Answer("x"), FACTS)
    store.close()
    assert read_answers(tmp_path) == {**ANSWERS, "more": Answer("x")}


def test_answers_are_forgotten_and_asked_again(tmp_path):
    fill(tmp_path)
    store = AnswerStore(tmp_path)
    store.add("bad", Answer("", problem="no such file"), FACTS)
    assert store.forget(lambda answer: bool(answer.problem)) == 1
    assert "bad" not in store and read_answers(tmp_path) == ANSWERS
    store.add("bad", Answer("now"), FACTS)
    store.close()
    assert read_answers(tmp_path) == {**ANSWERS, "bad": Answer("now")}


def hold_lock(directory: Path, is_held: object, may_end: object) -> None:
    DirectoryLock(directory)
    is_held.set()
    may_end.wait(PATIENCE_SECONDS)
    os._exit(0)


def test_two_processes_do_not_write_to_one_directory(tmp_path):
    context = multiprocessing.get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    child = context.Process(target=hold_lock, args=(tmp_path, is_held, may_end))
    child.start()
    assert is_held.wait(PATIENCE_SECONDS)
    with pytest.raises(UserError, match=f"another evaluation is writing to it .process {child.pid} on"):
        DirectoryLock(tmp_path)
    child.kill()
    child.join()
    lock = DirectoryLock(tmp_path)
    with pytest.raises(UserError, match="this process is evaluating into it already"):
        DirectoryLock(tmp_path)
    lock.release()
    DirectoryLock(tmp_path).release()
