"""The store of records gives what reading the whole file gives, is shared, noticed when damaged, and checked once."""

from __future__ import annotations

import errno
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.data.record_check import check_questions
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.data.records import describe_repeated_ids, digest_of_records, read_records
from megatron_ktr.data.reward_checks import reward_checks
from megatron_ktr.data.store import check as store_check
from megatron_ktr.data.store import check_job, check_process, record_store, sealed
from megatron_ktr.data.store.check import Clips, check_store
from megatron_ktr.data.store.record_store import RecordRules, RecordStore, open_store
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.questions import prompt_loader
from tests.support.fuzzing import fuzzed
from tests.support.paths import REPOSITORY
from tests.support.tokenizer import save_tiny_tokenizer, tiny_tokenizer

RULES = RecordRules()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    save_tiny_tokenizer(folder)
    (folder / "a.mp4").write_bytes(b"")
    (folder / "b.mp4").write_bytes(b"")
    (folder / "inside").mkdir()
    (folder / "link.mp4").symlink_to("/etc")
    return folder


def question(number: int, **changes: Any) -> dict[str, Any]:
    record = {"problem_id": number, "problem": f"Question {number}?", "problem_type": "numerical", "solution": "1"}
    return {**record, "path": "a.mp4", **changes}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def loader_of(folder: Path, path: Path) -> Any:
    from megatron_ktr.config import config_from_values

    config = config_from_values({"model": str(folder), "engine": "hf", "data_path": str(path)})
    tokenizer: Any = tiny_tokenizer()
    return prompt_loader(config, tokenizer=tokenizer)


# --- any record, against reading the whole file ---------------------------------------------------------------

SCALARS = st.sampled_from(
    [None, True, 0, 1, -3, 1.5, float("nan"), float("inf"), 10**400, "", " ", "A", "x\ud800", "\0"]
)
PATHS = st.sampled_from(
    ["a.mp4", "./b.mp4", "/a.mp4", "/etc/passwd", "../a.mp4", "x/../../a.mp4", "link.mp4/passwd", "inside", "gone.mp4"]
)
FIELDS = {
    "problem_id": st.one_of(SCALARS, st.integers(0, 3)),
    "problem": st.one_of(st.just("Which?"), SCALARS, st.just("x" * 50_000), st.just("<|im_end|>")),
    "problem_type": st.one_of(st.sampled_from(["numerical", "OCR", "essay"]), SCALARS),
    "solution": st.one_of(st.just("1"), SCALARS),
    "options": st.one_of(st.just(["A. x", "B. y"]), SCALARS, st.lists(SCALARS, max_size=2)),
    "path": st.one_of(PATHS, SCALARS, st.lists(PATHS, max_size=2)),
    "video": st.one_of(PATHS, st.lists(st.sampled_from(["p.png", "a.mp4"]), max_size=2)),
    "data_type": st.one_of(st.sampled_from(["video", "image", "text"]), SCALARS),
    "start": st.one_of(st.sampled_from([0, 1.5]), SCALARS),
    "messages": st.one_of(st.just([{"role": "user", "content": "Q?"}]), SCALARS, st.lists(SCALARS, max_size=2)),
    "media": SCALARS,
}


RECORDS = st.one_of(
    st.fixed_dictionaries({}, optional=FIELDS),
    st.builds(lambda changes: question(1, **changes), st.fixed_dictionaries({}, optional=FIELDS)),
    st.builds(question, st.integers(0, 5)),
    SCALARS,
)


def _is_untyped(raw: Any) -> bool:
    return isinstance(raw, dict) and not raw.get("problem_type")


@fuzzed(80)
@given(records=st.lists(RECORDS, max_size=6), types=st.sampled_from([(), ("numerical",), ("OCR", "essay")]))
def test_any_record_gives_what_reading_the_whole_file_gives(folder: Path, records: list[Any], types: Any) -> None:
    """Records, digest, problems, message and clips, or the same refusal of the whole file."""
    path = write(folder / "fuzzed.jsonl", records)
    loader, problems = loader_of(folder, path), RecordProblems("data_path", path)
    try:
        expected = read_records(path, problem_types=types, problems=problems)
    except UserError as error:
        with pytest.raises(UserError) as caught:
            open_store(path, RecordRules(problem_types=types))
        assert str(caught.value) == str(error) or "ud800" in str(error)
        return
    if types and any(_is_untyped(records[record["record_number"] - 1]) for record in expected):
        return  # unusable ones: the store goes by their type, "", which is not wanted, and does not name them
    store = open_store(path, RecordRules(problem_types=types))
    assert store.records_digest == digest_of_records(expected) and len(store) == len(expected)
    check_questions(expected, problems=problems, loader=loader, checks=reward_checks(("accuracy",)))
    found = RecordProblems("data_path", path)
    clips = check_store(store, problems=found, loader=loader, rewards=("accuracy",))
    assert found.places == problems.places
    for place, record in enumerate(expected):
        if record["media"] or place not in problems.places:
            assert repr(store[place]) == repr(record)
    assert clips.num_records == store_check.clips_of(expected).num_records
    assert found.settle(100, max_share=0.5) == found.places


def test_a_record_nested_too_deeply_to_be_written_is_left_out(folder: Path) -> None:
    path = write(folder / "deep.jsonl", [question(1), {**question(2), "more": json.loads("[" * 600 + "]" * 600)}])
    problems, expected = (RecordProblems("data_path", path) for _ in range(2))
    read_records(path, problems=expected)
    check_store(open_store(path, RULES), problems=problems, loader=loader_of(folder, path))
    assert problems.places == expected.places == {1}


def test_repeated_ids_are_told_as_before(tmp_path: Path) -> None:
    ids = ["x", 7, "y", "7", "x", None, 6]
    records = [question(0, problem_id=name) for name in ids]
    del records[5]["problem_id"]  # record 6 is called after its number
    path = write(tmp_path / "q.jsonl", records)
    assert open_store(path, RULES).describe_repeated_ids() == describe_repeated_ids(read_records(path))
    path = write(tmp_path / "q.jsonl", records[:3])
    assert open_store(path, RULES).describe_repeated_ids() is None


# --- on disk --------------------------------------------------------------------------------------------------


def test_small_files_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "q.jsonl", [question(1)])
    assert open_store(path, RULES).file is None and not (tmp_path / "cache").exists()
    monkeypatch.setattr(record_store, "IN_MEMORY_BYTES", 1)
    store = open_store(path, RULES)
    assert store.file is not None and store.file.path.is_relative_to(tmp_path / "cache" / "megatron_ktr" / "records")


OPEN = """
import sys
from pathlib import Path
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.data.store.check import check_store
from megatron_ktr.data.store.record_store import RecordRules, open_store
from tests.data.test_store import loader_of
path, folder = Path(sys.argv[1]), Path(sys.argv[2])
store, problems = open_store(path, RecordRules(), directory=sys.argv[3]), RecordProblems("data_path", path)
check_store(store, problems=problems, loader=loader_of(folder, path), rewards=("accuracy",))
print(store.records_digest, store[len(store) - 1]["problem_id"], problems.places)
"""


def test_processes_that_start_together_share_one_store_and_one_check(tmp_path: Path, folder: Path) -> None:
    """Different hash seeds, as any two processes have: whatever names the files must not depend on them."""
    path = write(folder / "shared.jsonl", [question(number) for number in range(9000)])
    command = [sys.executable, "-c", OPEN, str(path), str(folder), str(tmp_path / "store")]
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": str(seed)},
        )
        for seed in (1, 3)
    ]
    told = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert told == {f"{digest_of_records(read_records(path))} 8999 set()\n"}
    names = sorted(path.name.split("-")[1] for path in (tmp_path / "store").glob("*.arrow"))
    assert names == ["check", "v1.arrow"], "one store and one result"


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_store_is_noticed_and_made_anew(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "q.jsonl", [question(number) for number in range(100)])
    file = open_store(path, RULES, directory=str(tmp_path / "store")).file
    assert file is not None
    intact = file.path.read_bytes()
    middle = len(intact) // 2
    flipped = intact[:middle] + bytes([intact[middle] ^ 4]) + intact[middle + 1 :]
    file.path.write_bytes({"cut": intact[:middle], "flipped": flipped, "emptied": b""}[damage])
    store = open_store(path, RULES, directory=str(tmp_path / "store"))
    assert [record["problem_id"] for record in store] == [str(number) for number in range(100)]
    assert file.path.read_bytes() == intact


def test_another_content_has_another_store(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [question(1)])
    before = open_store(path, RULES, directory=str(tmp_path / "store"))
    write(path, [question(2)])
    after = open_store(path, RULES, directory=str(tmp_path / "store"))
    assert (before[0]["problem_id"], after[0]["problem_id"]) == ("1", "2")


def test_a_directory_that_cannot_be_written_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "q.jsonl", [question(1)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="record_store_dir: .*file/x cannot be written: .*--record-store-dir"):
        open_store(path, RULES, directory=str(tmp_path / "file" / "x"))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sealed._Sink, "write", full)
    with pytest.raises(UserError, match="record_store_dir: .*store cannot be written: No space left on device"):
        open_store(path, RULES, directory=str(tmp_path / "store"))
    assert not list((tmp_path / "store").glob("*arrow")), "nothing half-written is left"


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path, store = write(tmp_path / "q.jsonl", [question(1)]), tmp_path / "store"
    file = record_store.StoreFile(store, sealed.content_digest(path, option="data_path"))
    store.mkdir()
    left = store / f".{file.path.name}.{socket.gethostname()}.999999999"
    foreign = store / f".{file.path.name}.elsewhere.1"
    left.write_bytes(b"half")
    foreign.write_bytes(b"half")
    assert len(open_store(path, RULES, directory=str(store))) == 1
    assert not left.exists() and foreign.exists(), "another machine may be writing"


def test_pipes_and_devices_are_refused_and_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        for directory in (None, str(tmp_path / "store")):
            with pytest.raises(UserError, match="data_path: .* is a pipe or a device"):
                open_store(path, RULES, directory=directory)


def test_a_user_without_a_home_is_told_of_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1_234_567)
    with pytest.raises(UserError, match="record_store_dir: ~/.cache: .* --record-store-dir"):
        sealed.cache_directory(None)
    assert sealed.cache_directory("/x") == Path("/x")


# --- the check ------------------------------------------------------------------------------------------------


@pytest.fixture
def checked(folder: Path, tmp_path: Path) -> Iterator[Any]:
    """A store of 10,000 records, a few of them bad."""
    records = [question(number, path=f"{'ab'[number % 2]}.mp4") for number in range(10_000)]
    records[5000] |= {"problem": "x<|im_end|>"}
    records[7] |= {"problem_type": "essay"}
    records[8] |= {"start": 0, "end": 2}
    records[9999] |= {"solution": None}
    path = write(folder / "many.jsonl", records)
    yield open_store(path, RULES, directory=str(tmp_path / "store"))


def run_check(store: RecordStore, folder: Path) -> tuple[RecordProblems, Clips]:
    problems = RecordProblems("data_path", store.path, remedy="all of them: COMMAND")
    clips = check_store(store, problems=problems, loader=loader_of(folder, store.path), rewards=("accuracy",))
    return problems, clips


def test_several_processes_find_what_one_finds(
    checked: RecordStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, clips = run_check(open_store(checked.path, RULES), folder)
    assert alone.places == {7, 5000, 9999} and clips == Clips(1, 9)
    monkeypatch.setattr(store_check, "PARALLEL_FROM", 1)
    monkeypatch.setattr(store_check, "num_cores", lambda: 2)
    several, same_clips = run_check(checked, folder)
    assert (several.state_dict(), same_clips) == (alone.state_dict(), clips)
    with pytest.raises(UserError, match="3 of 10000 .*--max-skip-share 0 .* left out; all of them: COMMAND"):
        several.settle(10_000, max_share=0.0)


def test_the_next_start_reads_what_was_found_and_looks_for_the_files_again(
    checked: RecordStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, clips = run_check(checked, folder)
    with monkeypatch.context() as patch:
        patch.setattr(store_check, "_collect", lambda *_, **__: pytest.fail("it was checked before"))
        (folder / "b.mp4").unlink()
        try:
            after, same_clips = run_check(checked, folder)
        finally:
            (folder / "b.mp4").write_bytes(b"")
        assert same_clips == clips and len(after.places) == 5001 and before.places < after.places
        with pytest.raises(UserError, match=r"4998 x record 2 \(problem_id 1\): 'b.mp4': no such file"):
            after.settle(10_000, max_share=0.1)
        again, _ = run_check(checked, folder)
        assert again.places == before.places
    # Whatever can change the result has a result of its own.
    monkeypatch.setattr(check_job, "_code_digest", lambda: "another version")
    other, _ = run_check(checked, folder)
    assert other.places == before.places and len(list(checked.file.directory.glob("*check*.arrow"))) == 2  # type: ignore[union-attr]


def test_a_process_checks_with_the_wording_that_was_read_first(tmp_path: Path) -> None:
    """What it finds is kept under the text that was read first."""
    path = tmp_path / "wording.jinja"
    path.write_text("old {{ problem }}")
    wording = WordingTemplate(path)
    path.write_text("new {{ problem }}")
    sent = pickle.loads(pickle.dumps(wording))
    assert (sent.text, sent.render({"problem": "Q"}).user) == ("old {{ problem }}", "old Q")


def test_a_process_that_is_killed_ends_the_check_in_one_line(
    checked: RecordStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_check, "PARALLEL_FROM", 1)
    monkeypatch.setattr(check_process, "_send", lambda process, message: process.kill())
    with pytest.raises(UserError, match="a process that checks records was ended by signal 9"):
        run_check(checked, folder)
