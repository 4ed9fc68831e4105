"""The answers of an evaluation on disk: one line each, written when it is there, and never twice.

    {"key": "…", "benchmark": "mmvu", "item_id": "validation_3", "condition": "32", "round": 0, "vote": 0,
     "answer": {"text": "…", "num_tokens": 83, …}}

``key`` says what was asked of whom (``settings.py``); the names beside it are for people who read the file. A line is
written by a single call of the system, so a process that is killed loses no answer that it has added. The disk is
waited for about once a second; what a machine loses in a crash is asked again. A line that was torn is cut off when the
file is opened, and of several lines with one key the first counts.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking.stored import made_of
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.files.atomic import written_whole
from megatron_ktr.files.bounded import open_file
from megatron_ktr.files.json_files import parse_json, to_json

FILE = "answers.jsonl"
LOCK_FILE = ".lock"
_SYNC_SECONDS = 1.0
_log = logging.getLogger(__name__)
_locked_here: set[Path] = set()
"""Directories that this process has locked: the system's locks do not hold against their own process."""


class DirectoryLock:
    """Keeps other evaluations out of an output directory until ``release``, or until this process ends in any way.

    The lock belongs to the process, not to those that it has forked, so that a worker that outlives a killed evaluation
    does not keep the next one out. Nothing else may open the file: closing it anywhere in the process would unlock it.
    """

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            UserError: another evaluation has the directory, or it cannot be written to or locked.
        """
        self._directory = directory.resolve()
        if self._directory in _locked_here:
            raise UserError(f"--out {directory}: this process is evaluating into it already")
        path = self._directory / LOCK_FILE
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"--out {directory} cannot be written to: {error.strerror}") from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._file, 200).decode(errors="replace").strip()
            os.close(self._file)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"--out {directory} cannot be locked: {error.strerror}") from error
            raise UserError(
                f"--out {directory}: another evaluation is writing to it ({holder or 'unknown process'}); wait for it, "
                "or choose another directory"
            ) from None
        _locked_here.add(self._directory)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        if self._directory in _locked_here:
            _locked_here.discard(self._directory)
            os.close(self._file)


class AnswerStore:
    """The answers of an output directory by key. The directory must be locked by this process (``DirectoryLock``)."""

    def __init__(self, directory: Path) -> None:
        """Opens the file, which is made if it is not there. A torn last line is cut off.

        Raises:
            UserError: the file cannot be read or written.
        """
        self.path = directory / FILE
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            content = _read_all(self._file)
            self._size = content.rfind(b"\n") + 1
            if self._size < len(content):
                os.ftruncate(self._file, self._size)
        except OSError as error:
            raise UserError(f"--out: {self.path} cannot be used: {error.strerror}") from error
        self._answers = answers_in(content[: self._size], path=self.path)
        self._synced = time.monotonic()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def add(self, key: str, answer: Answer, facts: Mapping[str, Any]) -> None:
        """Writes one answer. ``facts`` stand between key and answer. An answer whose key is there is dropped.

        Raises:
            UserError: the line cannot be written (a full disk). The answers before it are whole.
        """
        if key in self._answers:
            return
        line = _line(key, answer, facts)
        # What is in memory is what a later run will read.
        _, answer = _parse(line)
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise UserError(
                f"--out: {self.path} cannot be written: {error.strerror}; its {len(self)} answers are safe, so mend "
                "that and give the same command again"
            ) from error
        self._size += len(line)
        self._answers[key] = answer
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Waits until the disk has everything."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def forget(self, is_forgotten: Callable[[Answer], bool]) -> int:
        """Removes answers, so that they are asked for again; returns how many. The file is replaced as a whole.

        Raises:
            UserError: the file cannot be written; it is then as before.
        """
        kept = {key: answer for key, answer in self._answers.items() if not is_forgotten(answer)}
        number = len(self._answers) - len(kept)
        if not number:
            return 0
        try:
            with written_whole(self.path) as file:
                for line, key, _ in _lines(_read_all(self._file), path=self.path):
                    if key in kept:
                        file.write(line + b"\n")
            os.close(self._file)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"--out: {self.path} cannot be written: {error.strerror}") from error
        self._size = os.fstat(self._file).st_size
        self._answers = kept
        return number

    def close(self) -> None:
        self.sync()
        os.close(self._file)


def read_answers(directory: Path) -> dict[str, Answer]:
    """The answers of an output directory, which an evaluation may be writing to; empty if there are none.

    Raises:
        UserError: the file cannot be read.
    """
    path = directory / FILE
    try:
        content = _content_of(path) if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return answers_in(content[: content.rfind(b"\n") + 1], path=path)


def _content_of(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()


def answers_in(content: bytes, *, path: Path) -> dict[str, Answer]:
    """Answers by key of the lines of a file; of several with one key the first. Lines that are none are counted in a
    warning: what they were is asked again."""
    answers: dict[str, Answer] = {}
    for _, key, answer in _lines(content, path=path):
        answers.setdefault(key, answer)
    return answers


def _lines(content: bytes, *, path: Path) -> Iterator[tuple[bytes, str, Answer]]:
    """Each line that holds an answer, with its key."""
    num_unreadable = 0
    for line in content.split(b"\n")[:-1]:
        try:
            key, answer = _parse(line)
        except (ValueError, TypeError, KeyError):
            num_unreadable += 1
            continue
        yield line, key, answer
    if num_unreadable:
        _log.warning("%s: %d lines are no answers and are not used (a crash of the machine?)", path, num_unreadable)


def _parse(line: bytes) -> tuple[str, Answer]:
    """(key, answer) of a line. Raises ValueError, TypeError or KeyError for any other. Fields of the answer that are
    not there have their defaults."""
    value = parse_json(line.decode())
    answer = made_of(Answer, value["answer"])
    if min(answer.num_tokens, answer.num_prompt_tokens, answer.num_frames, answer.seconds) < 0:
        raise ValueError("expected no number below 0")
    if not isinstance(value["key"], str):
        raise ValueError("no key")
    return value["key"], answer


def _line(key: str, answer: Answer, facts: Mapping[str, Any]) -> bytes:
    value = {"key": key, **facts, "answer": dataclasses.asdict(answer)}
    # Half a character (a lone surrogate), which a server may send, has no UTF-8.
    return to_json(value, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"


def _read_all(file: int) -> bytes:
    size, parts, offset = os.fstat(file).st_size, [], 0
    while offset < size:
        part = os.pread(file, min(size - offset, 1 << 30), offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
