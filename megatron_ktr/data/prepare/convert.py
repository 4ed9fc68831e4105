"""``convert``: published files become question files.

convert --from video_r1 Video-R1-260k.json --out data       data/Video-R1-260k.jsonl and a report beside it
convert --from nextqa train.csv --video-map map_vid_vidorID.json --out data
convert --from auto snapshot_dir --split train --out data   a table of the Hugging Face hub
convert --from plain qa.csv --columns video=clip,question=q,answer=a --out data
convert --list                                              the layouts
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ktr.data.prepare.conversion import Conversion, Rows, recognise
from megatron_ktr.data.prepare.embedded import EmbeddedMedia
from megatron_ktr.data.prepare.layout import Layout, Options
from megatron_ktr.data.prepare.layouts import NAMES, load_layouts
from megatron_ktr.data.prepare.layouts.plain import COLUMNS
from megatron_ktr.data.prepare.sources import iter_rows
from megatron_ktr.data.prepare.suggestion import report_of, text_of
from megatron_ktr.data.prepare.tally import Tally
from megatron_ktr.data.prepare.unique_ids import UniqueIds
from megatron_ktr.errors import UserError, number
from megatron_ktr.files.atomic import write_atomically, written_whole
from megatron_ktr.files.json_files import read_json_object, to_json

AUTO = "auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="IN", help="published files, or folders of Hugging Face data sets")
    add("--from", dest="layout", choices=(AUTO, *NAMES), metavar="LAYOUT", help="layout, or auto; --list shows them")
    add("--out", type=Path, metavar="DIR", help="folder for NAME.jsonl and NAME.report.json, by the inputs' names")
    add("--merge", metavar="NAME", help="write one file of this name from all inputs instead of one for each")
    add("--split", metavar="NAME", help="split of a Hugging Face data set that has several")
    add("--columns", metavar="F=C,..", help=f"plain: columns of the fields {', '.join(COLUMNS)}; a+b joins options")
    add("--video-map", type=Path, metavar="FILE", help="JSON object from video ids to paths without suffix")
    add("--video-suffix", metavar="S", help="suffix of videos that are named by id (default .mp4)")
    add("--strip-prefix", default="", metavar="TEXT", help="remove this beginning of media paths")
    add("--add-prefix", default="", metavar="FOLDER", help="put this folder before media paths")
    add("--ignore-fields", default="", metavar="F,..", help="fields that are only data, such as start_time")
    add("--media-limit-gb", type=number(above=0.0), default=50.0, help="most media to unpack from tables (default 50)")
    add(
        "--max-skip-share",
        type=number(high=1.0),
        default=0.1,
        metavar="SHARE",
        help="share of the records that may be skipped; more is an error, and nothing is written (default 0.1)",
    )
    add("--force", action="store_true", help="overwrite question files that are there")
    add("--list", action="store_true", help="show the layouts and end")
    add("--json", action="store_true", help="one JSON object on the last line of output, no text")


def run(options: argparse.Namespace) -> int:
    if options.list:
        print(_listing(as_json=options.json), flush=True)
        return 0
    _check(options)
    jobs = _jobs(options)
    read = _read_options(options)
    reports = [_write(job, options=options, read=read) for job in jobs]
    if options.json:
        print(to_json({"files": reports}), flush=True)
    else:
        print("\n\n".join(map(text_of, reports)), flush=True)
    return 0


def _listing(*, as_json: bool) -> str:
    layouts = load_layouts().values()
    if as_json:
        return to_json(
            {"layouts": [{"name": one.name, "title": one.title, "media_root": one.media_root} for one in layouts]}
        )
    return "\n".join(f"{one.name:<21} {one.title}\n{'':<21} media root: {one.media_root}" for one in layouts)


def _check(options: argparse.Namespace) -> None:
    if not options.inputs or options.layout is None or options.out is None:
        raise UserError("convert needs --from LAYOUT, at least one IN and --out DIR (or --list)")
    for path in options.inputs:
        if not path.exists():
            raise UserError(f"convert: {path}: no such file or folder")
        if path.is_dir() and path.resolve() == options.out.resolve():
            raise UserError(f"--out {options.out} is the data set to convert: name another folder")
    if options.layout == AUTO:
        return  # which options the layouts read is known when they are
    _check_read(load_layouts()[options.layout], options)


def _check_read(layout: Layout, options: argparse.Namespace) -> None:
    """Refuses options that the layout would ignore."""
    for name in ("columns", "video_map", "video_suffix"):
        if getattr(options, name) is not None and name not in layout.options:
            raise UserError(f"--{name.replace('_', '-')} is not read by the layout {layout.name}")


@dataclass(frozen=True)
class _Job:
    """One question file: where it goes and what it is made from."""

    out: Path
    inputs: Sequence[Path]

    @property
    def report(self) -> Path:
        return self.out.with_suffix(".report.json")


def _jobs(options: argparse.Namespace) -> list[_Job]:
    names = [options.merge] if options.merge is not None else [_name(path) for path in options.inputs]
    for name in names:
        if not name or Path(name).name != name or name.startswith(".") or name.endswith(".jsonl"):
            raise UserError(f"--merge: expected the name of a file without folder and suffix, got {name[:80]!r}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"several inputs are called {', '.join(twice)}: convert them one by one, or --merge NAME")
    inputs = [options.inputs] if options.merge is not None else [[path] for path in options.inputs]
    jobs = [_Job(options.out / f"{name}.jsonl", paths) for name, paths in zip(names, inputs, strict=True)]
    sources = {path.resolve() for path in options.inputs}
    for job in jobs:
        for path in (job.out, job.report):
            if path.resolve() in sources:
                raise UserError(f"--out {options.out}: {path} is an input; name another folder")
            if path.is_dir() or (path.exists() and not options.force):
                raise UserError(f"--out {options.out}: {path} exists (--force overwrites files)")
    return jobs


def _name(path: Path) -> str:
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def _read_options(options: argparse.Namespace) -> Options:
    columns = {}
    for item in options.columns.split(",") if options.columns is not None else ():
        field, sign, column = item.partition("=")
        if not sign or field.strip() not in COLUMNS or not column.strip():
            raise UserError(f"--columns: expected FIELD=COLUMN with FIELD of {', '.join(COLUMNS)}, got {item[:80]!r}")
        columns[field.strip()] = column.strip()
    video_map = {}
    if options.video_map is not None:
        video_map = read_json_object(options.video_map, option="--video-map")
        if not video_map or not all(isinstance(value, str) for value in video_map.values()):
            raise UserError(f"--video-map {options.video_map}: expected a JSON object from video ids to paths")
    suffix = ".mp4" if options.video_suffix is None else options.video_suffix
    if not suffix.startswith(".") or not suffix[1:].isalnum():
        raise UserError(f"--video-suffix: expected a suffix such as .mp4, got {suffix[:80]!r}")
    if ".." in options.add_prefix.split("/") or "\0" in options.add_prefix:
        raise UserError(f"--add-prefix: expected a folder below the media root, got {options.add_prefix[:80]!r}")
    ignored = tuple(name.strip() for name in options.ignore_fields.split(","))
    return Options(columns, video_map, suffix, options.strip_prefix, options.add_prefix, ignored)


def _write(job: _Job, *, options: argparse.Namespace, read: Options) -> dict[str, Any]:
    """Converts the inputs of a job and returns its report."""
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file")
    options.out.mkdir(parents=True, exist_ok=True)
    tally, ids = Tally(), UniqueIds()
    media = EmbeddedMedia(options.out, limit_bytes=options.media_limit_gb * 1e9, prefix=options.add_prefix)
    layouts: list[Layout] = []
    with written_whole(job.out) as file:
        for path in job.inputs:
            rows = _with_progress(iter_rows(path, split=options.split), path=path)
            if options.layout == AUTO:
                layout, rows = recognise(rows, path=path)
            else:
                layout = load_layouts()[options.layout]
            _check_read(layout, options)
            layouts.append(layout)
            if len({layout.is_supervised for layout in layouts}) > 1:
                raise UserError(f"--merge: {path} is {layout.name}, for fine-tuning; the inputs before it are not")
            Conversion(layout, read, media, ids).convert(rows, file, tally=tally)
        _settle(job, tally, max_share=options.max_skip_share)
    report = report_of(out=job.out, inputs=job.inputs, layouts=layouts, tally=tally, ids=ids, media=media)
    write_atomically(job.report, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _with_progress(rows: Rows, *, path: Path) -> Iterator[tuple[int, Any]]:
    return iter(tqdm(rows, desc=path.name, unit=" rows", disable=not sys.stderr.isatty(), file=sys.stderr))


def _settle(job: _Job, tally: Tally, *, max_share: float) -> None:
    names = ", ".join(map(str, job.inputs))
    if not tally.num_read:
        raise UserError(f"convert: {names} has no records at all")
    num_skipped = tally.skipped.num
    if num_skipped > max_share * tally.num_read or not tally.num_written:
        raise UserError(
            f"convert: {names}: {num_skipped} of {tally.num_read} records cannot be converted "
            f"(--max-skip-share {max_share:g}): {'; '.join(tally.skipped.lines())}"
        )
