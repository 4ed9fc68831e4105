"""Reads the benchmarks that a command names, and finds what is wrong with them before a model is loaded."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.data.media.files import MediaFiles
from megatron_ktr.data.media.request import media_sources
from megatron_ktr.data.template import question_turns
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.errors import TransientError, UserError
from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.reading.media_places import place_media
from megatron_ktr.evaluation.registry import BENCHMARKS, load_benchmark

_NUM_NAMED = 3
_FILE_SUFFIXES = ("", ".json", ".jsonl", ".parquet")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedBenchmark:
    """A benchmark as the command names it."""

    name: str
    path: Path


@dataclass(frozen=True)
class ReadBenchmark:
    """A benchmark whose questions are read."""

    benchmark: Benchmark
    path: Path
    media_root: Path
    wording: WordingTemplate
    items: tuple[Item, ...]
    """Those that were chosen, in the order of the file."""
    num_items: int
    """Of the whole benchmark."""

    @property
    def name(self) -> str:
        return self.benchmark.name


def named_benchmarks(written: Sequence[str], *, root: Path | None) -> list[NamedBenchmark]:
    """The benchmarks of ``--benchmark``: NAME, NAME=PATH or FILE, in lists with commas or one after the other. The
    files of NAME lie in ``root``/NAME.

    Raises:
        UserError: one is neither a name nor a file, two have one name, or it is not said where the files are.
    """
    found: dict[str, NamedBenchmark] = {}
    for part in [one for value in written for one in ([value] if Path(value).exists() else value.split(","))]:
        one = _named(part.strip(), root=root)
        if one.name in found:
            raise UserError(f"--benchmark: {one.name} is named twice")
        found[one.name] = one
    if not found:
        raise UserError("--benchmark: expected the name of a benchmark or a file of questions")
    return list(found.values())


def place_of(name: str, root: Path) -> Path | None:
    """The folder or file of a benchmark in ``root``; None if it is not there."""
    places = (root / f"{name}{suffix}" for suffix in _FILE_SUFFIXES)
    return next((place for place in places if place.exists()), None)


def _named(written: str, *, root: Path | None) -> NamedBenchmark:
    name, sign, path = written.partition("=")
    if sign and name in BENCHMARKS:
        if not Path(path).exists():
            raise UserError(f"--benchmark {written}: {path} does not exist")
        return NamedBenchmark(name, Path(path))
    if written in BENCHMARKS:
        if root is None:
            raise UserError(
                f"--benchmark {written}: say where its files are: {written}=PATH, or --benchmark-root DIR for "
                f"DIR/{written}"
            )
        if place := place_of(written, root):
            return NamedBenchmark(written, place)
        raise UserError(
            f"--benchmark {written}: --benchmark-root {root} has no folder or file {written}; name it: {written}=PATH"
        )
    if written and Path(written).is_file():
        return NamedBenchmark(Path(written).stem, Path(written))
    near = difflib.get_close_matches(name, BENCHMARKS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(
        f"--benchmark {written!r} is neither a file nor one of {', '.join(BENCHMARKS)} (NAME or NAME=PATH){hint}"
    )


def read_benchmark(
    named: NamedBenchmark, *, media_root: Path | None, wording: str | None, limit: int | None, seed: int
) -> ReadBenchmark:
    """Reads the questions, chooses ``limit`` of them, finds their videos, and words each once to see that it can be.

    Args:
        media_root: None means the folder of the files.
        wording: a built-in wording or a file; None means the benchmark's own choice.

    Raises:
        UserError: the files are none of this benchmark, the media root is missing, or a question cannot be worded.
    """
    benchmark = load_benchmark(named.name if named.name in BENCHMARKS else str(named.path))
    items = benchmark.read(named.path)
    root = media_root or (named.path if named.path.is_dir() else named.path.parent)
    if not root.is_dir():
        raise UserError(f"--media-root {root} is not a directory")
    chosen = place_media(choose(items, limit, seed=seed), benchmark.media_folders, media_root=root)
    template = WordingTemplate(benchmark.wording if wording is None else wording)
    for item in chosen:
        question_turns(item.record, wording=template)
    return ReadBenchmark(benchmark, named.path, root, template, tuple(chosen), len(items))


def choose(items: Sequence[Item], limit: int | None, *, seed: int) -> list[Item]:
    """``limit`` of the items at random, in their order; those of a lower limit are among those of a higher one."""
    if limit is None or limit >= len(items):
        return list(items)
    places = sorted(range(len(items)), key=lambda place: _rank(items[place], seed))
    return [items[place] for place in sorted(places[:limit])]


def _rank(item: Item, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{item.benchmark}\0{item.item_id}".encode(errors="replace")).digest()


def missing_media(read: ReadBenchmark) -> Iterator[tuple[Item, str]]:
    """The items with a medium that is not there, and what is wrong with it. Raises ``TransientError`` where that cannot
    be seen now: such an item would count as wrong."""
    files = MediaFiles(read.media_root)
    for item in read.items:
        for source in media_sources(item.record):
            try:
                for path in source.paths:
                    files.check(path)
            except TransientError:
                raise
            except (UnusableSample, UserError) as error:
                yield item, str(error)
                break


def check_media(benchmarks: Sequence[ReadBenchmark], *, max_share: float) -> None:
    """Counts the items whose media are missing, and names the first of them in a warning: they will count as wrong.

    Raises:
        UserError: they are more than ``max_share`` of a benchmark.
    """
    for read in benchmarks:
        missing = list(missing_media(read))
        if not missing:
            continue
        named = "; ".join(f"{item.item_id}: {reason}" for item, reason in missing[:_NUM_NAMED])
        told = (
            f"{read.name}: the media of {len(missing)} of {len(read.items)} questions cannot be found below "
            f"{read.media_root} ({named}{'; ...' if len(missing) > _NUM_NAMED else ''})"
        )
        if len(missing) > max_share * len(read.items):
            raise UserError(
                f"--media-root: {told}; they would count as wrong, and --max-missing-share {max_share:g} is the most "
                "that may; the same command with --check names all of them"
            )
        _log.warning("%s; they count as wrong (at most --max-missing-share %g); --check names all", told, max_share)


def by_name(written: Sequence[str], names: Sequence[str], *, option: str) -> Mapping[str, str]:
    """The value of an option for every benchmark: VALUE for all of them, or NAME=VALUE for one.

    Raises:
        UserError: a NAME is not among the benchmarks, or one has two values.
    """
    found: dict[str, str] = {}
    for_all: list[str] = []
    for one in written:
        name, sign, value = one.partition("=")
        if not sign or (name not in names and Path(one).exists()):
            for_all.append(one)
        elif name not in names:
            raise UserError(f"{option} {one}: {name} is not among the benchmarks ({', '.join(names)})")
        elif name in found:
            raise UserError(f"{option}: {name} has two values")
        else:
            found[name] = value
    if len(for_all) > 1:
        raise UserError(f"{option}: expected one value for all benchmarks, got {', '.join(for_all)}")
    return {name: found.get(name, *for_all) for name in names if name in found or for_all}
