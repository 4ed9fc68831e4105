"""A pipe, a socket or a device in the place of a file that a user names costs one line, and is not waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ktr.config import load_config
from megatron_ktr.data.prepare.sources import iter_rows
from megatron_ktr.data.raw_records import iter_raw_entries, iter_raw_records
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.errors import UserError, one_line
from megatron_ktr.evaluation.asking.store import FILE as ANSWERS
from megatron_ktr.evaluation.asking.store import read_answers
from megatron_ktr.evaluation.benchmarks import question_file
from megatron_ktr.evaluation.commands.score_responses import score_responses
from megatron_ktr.files.bounded import open_file
from megatron_ktr.files.chat_template import read_chat_template
from megatron_ktr.files.checksums import MANIFEST, find_damage
from megatron_ktr.files.json_files import read_json
from megatron_ktr.report.run_data import read_lines
from megatron_ktr.run.status.wandb_writer import newest_options

Reader = Callable[[Path], object]
READERS: dict[str, tuple[str, Reader]] = {
    "run file": ("run.yaml", lambda path: load_config(["--config", str(path)])),
    "questions or rollouts": ("data.jsonl", lambda path: list(iter_raw_records(path))),
    "one object": ("data.json", lambda path: list(iter_raw_entries(path))),
    "prompt template": ("prompt.jinja", WordingTemplate),
    "chat template": ("chat.jinja", read_chat_template),
    "JSON": ("results.json", read_json),
    "published questions": ("rows.json", lambda path: list(iter_rows(path, split=None))),
    "published table": ("rows.csv", lambda path: list(iter_rows(path, split=None))),
    "published text": ("rows.txt", lambda path: list(iter_rows(path, split=None))),
    "published parquet": ("rows.parquet", lambda path: list(iter_rows(path, split=None))),
    "published arrow": ("rows.arrow", lambda path: list(iter_rows(path, split=None))),
    "questions of an evaluation": ("held_out.json", lambda path: question_file.read(path, name="held_out")),
    "responses to score": ("answers.jsonl", lambda path: score_responses(path, "strict")),
    "answers of an evaluation": (ANSWERS, lambda path: read_answers(path.parent)),
    "checksums": (MANIFEST, lambda path: find_damage(path.parent)),
    "records of a run": ("metrics.jsonl", lambda path: list(read_lines(path))),
}


@pytest.fixture
def writers() -> Iterator[Callable[[Path], None]]:
    """Makes a named pipe. Whoever opens it for reading finds that its writer has gone, so that a reader that does open
    it makes its test fail rather than wait."""
    made: list[tuple[Path, threading.Thread]] = []

    def make(path: Path) -> None:
        os.mkfifo(path)
        thread = threading.Thread(target=lambda: os.close(os.open(path, os.O_WRONLY)))
        thread.start()
        made.append((path, thread))

    yield make
    for path, thread in made:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # lets the writer open it, if nobody has
        thread.join()
        os.close(descriptor)


@pytest.mark.parametrize("name", READERS)
def test_a_named_pipe_is_refused_in_one_line(name: str, tmp_path: Path, writers: Callable[[Path], None]) -> None:
    file, read = READERS[name]
    writers(tmp_path / file)
    with pytest.raises(UserError, match="a pipe, a socket or a device") as refused:
        read(tmp_path / file)
    assert file in one_line(refused.value)


def test_devices_and_what_a_shell_substitutes_are_refused_and_files_are_read(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    try:
        for path in ("/dev/zero", "/dev/null", f"/dev/fd/{reading}"):  # the last is what <(command) is
            with pytest.raises(UserError, match="write what it gives to a file first"):
                read_json(path)
    finally:
        os.close(reading)
    (tmp_path / "a.json").write_text("[1]")
    with open_file(tmp_path / "a.json") as file:  # as for a shell's <a.json
        assert read_json(f"/dev/fd/{file.fileno()}") == [1]
    with pytest.raises(UserError, match="is a directory"):
        read_json(tmp_path)


def test_options_shown_to_wandb_are_not_waited_for(tmp_path: Path, writers: Callable[[Path], None]) -> None:
    writers(tmp_path / "config.yaml")
    assert newest_options(tmp_path) == {}
