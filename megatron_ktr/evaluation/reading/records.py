"""Reads published question files into items, through the layouts that ``prepare_dataset convert`` knows as well.

    file or folder --question_files--> files --layout.split, layout.convert--> records --describe--> items

A record that cannot be read is left out and named in a warning, if such records are rare; else the file is refused. Two
items with the same id are an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_ktr.data.media.request import media_sources, unread_instructions
from megatron_ktr.data.prepare.fields import short
from megatron_ktr.data.prepare.layout import Keyed, Layout, Options, Unreadable
from megatron_ktr.data.prepare.layouts import load_layouts
from megatron_ktr.data.prepare.sources import OPTION as _SOURCES_OPTION
from megatron_ktr.data.prepare.sources import SUFFIXES, iter_rows
from megatron_ktr.data.records import Record, check_record, check_writable
from megatron_ktr.data.reward_checks import check_answer_is_an_option
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.item import Item
from megatron_ktr.files.listing import paths_in

OPTION = "--benchmark"
MOST_UNREADABLE = 0.01
"""The share of records that may be left out. A published file may have a few damaged ones; many mean another file."""
_NUM_NAMED = 3
_OTHERS = ("videoholmes", "videommmu", "mmvu", "tempcompass", "videomme", "mvbench", "vsibench")
"""Names of benchmarks without "-" and "_", as folders have them."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What a benchmark says about one of its records."""

    video: str
    """The path of its video, relative to the media root."""
    categories: Mapping[str, str] = field(default_factory=dict)
    item_id: str = ""
    """The benchmark's own identity of the question; "" stands for the record's ``problem_id``."""


@dataclass(frozen=True)
class QuestionFile:
    """A file with questions, and what its name or folder says about them."""

    path: Path
    facts: Mapping[str, str] = field(default_factory=dict)
    """Fields that all its records get."""
    add_prefix: str = ""
    """The folder of its videos, relative to the media root, if its records say no folder."""


def read_items(
    files: Sequence[QuestionFile],
    *,
    benchmark: str,
    layouts: Sequence[str],
    describe: Callable[[Record], Question | None],
) -> list[Item]:
    """The items of all files, in their order.

    Args:
        layouts: names of layouts, of which the first that recognises a row reads it.
        describe: what the benchmark says about a record; None leaves it out, as no question of this benchmark.

    Raises:
        UserError: a file cannot be read or is of none of the layouts, or two items have the same id.
    """
    known = load_layouts()
    items: dict[str, tuple[Item, str]] = {}
    problems: list[str] = []
    num_read = 0
    for file in files:
        for number, part in _parts(file, layouts=[known[name] for name in layouts], benchmark=benchmark):
            num_read += 1
            place = f"{file.path}, record {number}"
            try:
                item = _item(part, file, number=number, benchmark=benchmark, describe=describe)
            except ValueError as error:
                problems.append(f"{place}: {error}")
                continue
            if item is None:
                continue
            if item.item_id in items:
                raise UserError(
                    f"{OPTION} {benchmark}: {place} has the id {item.item_id!r} of {items[item.item_id][1]}"
                )
            items[item.item_id] = item, place
    _settle(problems, num_read=num_read, benchmark=benchmark)
    if not items:
        raise UserError(f"{OPTION} {benchmark}: no questions in {', '.join(str(file.path) for file in files)}")
    return [item for item, _ in items.values()]


@dataclass(frozen=True)
class _Part:
    """One question of a row, and the layout that reads it; without one, why it cannot be read."""

    value: Any
    layout: Layout | None
    problem: str = ""


def _parts(file: QuestionFile, *, layouts: Sequence[Layout], benchmark: str) -> Iterator[tuple[int, _Part]]:
    for number, row in _rows(file.path, benchmark=benchmark):
        layout = next((layout for layout in layouts if layout.recognises(row)), None)
        if layout is None:
            yield number, _Part(row, None, _describe_unknown(row, layouts))
            continue
        if isinstance(row, dict) and (unread := unread_instructions(row, read=layout.reads)):
            yield number, _Part(row, None, f"the field '{unread[0]}' would be lost")
            continue
        try:
            parts = list(layout.split(row))
        except ValueError as error:
            yield number, _Part(row, None, str(error))
            continue
        for part in parts:
            yield number, _Part({**file.facts, **part} if isinstance(part, dict) else part, layout)


def _rows(path: Path, *, benchmark: str) -> Iterator[tuple[int, Any]]:
    try:
        yield from iter_rows(path, split=None)
    except UserError as error:
        # The reader of files speaks for the command that it was written for.
        raise UserError(f"{OPTION} {benchmark}: {str(error).removeprefix(f'{_SOURCES_OPTION}: ')}") from error


def _describe_unknown(row: Any, layouts: Sequence[Layout]) -> str:
    if isinstance(row, Unreadable):
        return row.reason
    kinds = " or ".join(layout.name for layout in layouts)
    if isinstance(row, Keyed):
        found = f"an object with the key {short(row.key)}"
    else:
        found = f"the fields {short(sorted(row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
    return f"expected a record in the layout {kinds}, got {found}"


def _item(
    part: _Part,
    file: QuestionFile,
    *,
    number: int,
    benchmark: str,
    describe: Callable[[Record], Question | None],
) -> Item | None:
    if part.layout is None:
        raise ValueError(part.problem)
    raw = part.layout.convert(part.value, Options(add_prefix=file.add_prefix))
    record = check_record({**raw, "problem_id": raw.get("problem_id") or str(number)}, number=number)
    for source in media_sources(record):
        _refuse_other_benchmark(str(source.written), benchmark=benchmark)
    question = describe(record)
    if question is None:
        return None
    check_writable(raw)
    check_answer_is_an_option(record)
    record = check_record({**record, "video": question.video}, number=number)
    item_id = question.item_id or record["problem_id"]
    categories = {axis: value for axis, value in question.categories.items() if value}
    return Item(benchmark, item_id, record, categories, video_id=question.video)


def _refuse_other_benchmark(path: str, *, benchmark: str) -> None:
    """Video-R1's files have one form for all benchmarks; the folders of their videos tell them apart."""
    for part in PurePosixPath(path).parts[:-1]:
        name = "".join(character for character in part.lower() if character.isalpha())
        if name in _OTHERS and name != benchmark.replace("_", ""):
            raise ValueError(f"the video {short(path)} belongs to another benchmark than {benchmark}")


def _settle(problems: Sequence[str], *, num_read: int, benchmark: str) -> None:
    if not problems:
        return
    named = "; ".join([*problems[:_NUM_NAMED], *(["..."] if len(problems) > _NUM_NAMED else [])])
    told = f"{OPTION} {benchmark}: {len(problems)} of {num_read} records cannot be used: {named}"
    if len(problems) > MOST_UNREADABLE * num_read:
        raise UserError(told)
    _log.warning("%s; they are left out", told)


def question_files(path: Path, *, benchmark: str, patterns: Sequence[str]) -> list[Path]:
    """The file that ``path`` is, or the files in a downloaded folder by the first pattern that has any.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        for pattern in patterns:
            folder, name = (path / pattern).parent, Path(pattern).name  # only names hold wildcards
            if found := [inner for inner in paths_in(folder, name) if inner.is_file()]:
                return found
        raise UserError(f"{OPTION} {benchmark}: looked in {path} for {' or '.join(patterns)}, and found none")
    if not path.exists():
        raise UserError(f"{OPTION} {benchmark}: {path}: no such file or folder")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{OPTION} {benchmark}: {path}: expected a folder or a file that ends in {', '.join(SUFFIXES)}")
    return [path]


def one_file(path: Path, *, benchmark: str, patterns: Sequence[str]) -> list[QuestionFile]:
    """The one file with all questions of a benchmark.

    Raises:
        UserError: there is none, or several match.
    """
    found = question_files(path, benchmark=benchmark, patterns=patterns)
    if len(found) > 1:
        raise UserError(f"{OPTION} {benchmark}: {path} has {', '.join(one.name for one in found)}: name the file")
    return [QuestionFile(found[0])]


def note_missing(path: Path, *, benchmark: str, wanted: Sequence[str], found: Collection[str], what: str) -> None:
    """Says which parts of a benchmark a downloaded folder lacks. A figure over the others is not the benchmark's."""
    if path.is_dir() and found and (missing := [name for name in wanted if name not in found]):
        _log.warning("%s %s: %s has no %s for %s", OPTION, benchmark, path, what, ", ".join(missing))


def written_video(record: Record) -> str:
    """The path of the record's video as its layout gives it.

    Raises:
        ValueError: it has not exactly one.
    """
    sources = media_sources(record)
    if len(sources) != 1 or not isinstance(sources[0].written, str):
        raise ValueError(f"expected one video, got {len(sources)} media")
    return sources[0].written


def last_parts(path: str, number: int = 1) -> str:
    """>>> last_parts("/MMVU/videos/Art/0.mp4", 2)
    'Art/0.mp4'
    """
    return "/".join(PurePosixPath(path).parts[-number:])


def stem(path: str) -> str:
    """>>> stem("videos/Ab3dE.mp4")
    'Ab3dE'
    """
    return PurePosixPath(path).stem


def extra(record: Record, *names: str) -> Iterable[str]:
    """The record's further fields of these names, as text; "" where it has none."""
    return (str(record.get(name) or "") for name in names)
