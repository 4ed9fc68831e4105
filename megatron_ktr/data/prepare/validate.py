"""``validate``: checks every record of a question file and the media it shows, and says what cannot be used and why.

The exit code is 0 if every record can be used and 1 if some cannot.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO, get_args

from megatron_ktr.data.prepare.ledger import Finding
from megatron_ktr.data.prepare.media_looks import add_process_options, read_process_options
from megatron_ktr.data.prepare.media_probe import Look
from megatron_ktr.data.prepare.options import add_reading_options, read_reading_options
from megatron_ktr.data.prepare.reasons import DECODING_CRASHES, DECODING_HANGS, DOES_NOT_DECODE, PROMPT_TOO_LONG
from megatron_ktr.data.prepare.validation import Decode, MediaOptions, Validation, validate
from megatron_ktr.data.raw_records import iter_raw_records
from megatron_ktr.errors import UserError, number, printable, whole
from megatron_ktr.files.atomic import written_whole

EXIT_SOME_UNUSABLE = 1
_NUM_EXAMPLES = 3
_MET_WHEN_DRAWN = (DOES_NOT_DECODE, DECODING_HANGS, DECODING_CRASHES, PROMPT_TOO_LONG)
"""Kinds that training meets only when it draws the record."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit code: 0 if every record can be used, 1 if some cannot, 2 for a wrong option or file."
    add_reading_options(parser)
    parser.add_argument(
        "--decode",
        choices=get_args(Decode),
        default="sample",
        help="none: look at no medium; sample (the default): open all, and decode a share of each folder and codec; "
        "all: decode each once",
    )
    default = MediaOptions()
    parser.add_argument(
        "--sample-share",
        type=number(above=0, high=1),
        metavar="X",
        help=f"the share to decode with --decode sample ({default.share:g}, and at least {default.fewest})",
    )
    parser.add_argument("--seed", type=whole(low=0), default=0, metavar="N", help="which media are the sample (0)")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="remembers finished media; the same file continues a check that ended",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="write the records that can be used into this new file, as JSONL"
    )
    add_process_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(options: argparse.Namespace) -> int:
    reading = read_reading_options(options)
    if options.sample_share is not None and options.decode != "sample":
        raise UserError(f"--sample-share is not read with --decode {options.decode}")
    if options.state is not None and options.decode == "none":
        raise UserError("--state is not read with --decode none, which looks at no medium")
    if options.keep is not None and (options.keep.exists() or not options.keep.parent.is_dir()):
        why = "is there already" if options.keep.exists() else "lies in no directory"
        raise UserError(f"--keep {options.keep} {why}: name a new file")
    media = MediaOptions(
        decode=options.decode,
        share=options.sample_share or MediaOptions.share,
        seed=options.seed,
        state=options.state,
        limits=read_process_options(options),
    )
    try:
        return _report(validate(reading, media), keep=options.keep, is_json=options.json)
    except sqlite3.Error as error:
        raise UserError(
            f"what was found cannot be kept in a temporary file: {error}; SQLITE_TMPDIR names its directory"
        ) from error


def _report(result: Validation, *, keep: Path | None, is_json: bool) -> int:
    """Prints the result, writes the records to keep, and returns the exit code."""
    try:
        if keep is not None:
            write_usable(result, keep)
        if is_json:
            write_json(result, sys.stdout)
        else:
            for line in lines_for_people(result):
                print(printable(line))
            if keep is not None:
                print(f"{result.num_usable:,} records are in {keep}, to be used with the same --media-root.")
        return EXIT_SOME_UNUSABLE if result.num_usable < result.num_records else 0
    finally:
        result.ledger.close()


def write_usable(result: Validation, path: Path) -> None:
    """Writes the records that can be used, unchanged and in their order, one JSON object a line.

    Raises:
        UserError: there is none, the file was changed since it was checked, or the disk is full.
    """
    file = result.reading.file
    if not result.num_usable:
        raise UserError(f"--keep: no record of {file} can be used")
    numbers = result.ledger.numbers()
    wanted = next(numbers)
    try:
        with written_whole(path) as out:
            for number, raw in iter_raw_records(file, option="FILE"):
                if number == wanted:
                    out.write(json.dumps(raw, ensure_ascii=False).encode() + b"\n")
                    wanted = next(numbers, None)
            if wanted is not None:
                raise UserError(f"FILE: {file} was changed while it was checked: record {wanted} is gone")
    except OSError as error:
        raise UserError(f"--keep {path} cannot be written: {error.strerror or error}") from error


def write_json(result: Validation, out: TextIO) -> None:
    """Writes the result as one line of JSON, piece by piece, so that its length does not matter.

    ``usable`` + len(``unusable``) is the number of records of the wanted types; ``by_reason`` counts the ``reason`` of
    ``unusable``. Warnings are about records that are used.
    """
    ledger = result.ledger
    out.write(f'{{"usable": {result.num_usable}, "unusable": ')
    _write_findings(ledger.findings(), out)
    out.write(f', "by_reason": {json.dumps(ledger.counts())}, "warnings": ')
    _write_findings(ledger.findings(warnings=True), out)
    rest = {
        "warnings_by_reason": ledger.counts(warnings=True),
        "num_records": result.num_records,
        "num_other_types": result.num_other_types,
        "num_media": ledger.num_media(),
        "num_opened": ledger.num_media(at_least=Look.HEADER),
        "num_decoded": ledger.num_media(at_least=Look.FRAMES),
        "not_checked": not_checked(result),
    }
    out.write(f", {json.dumps(rest)[1:]}\n")


def _write_findings(findings: Iterable[Finding], out: TextIO) -> None:
    separator = "["
    for finding in findings:
        values = {"path": finding.path, "record": finding.number, "reason": finding.kind, "detail": finding.detail}
        out.write(separator + json.dumps(values))
        separator = ", "
    out.write("[]" if separator == "[" else "]")


def not_checked(result: Validation) -> list[str]:
    """What was not checked, in words."""
    found = []
    if result.reading.model is None:
        found.append("special tokens that only the model's tokenizer has, and the lengths of prompts (--model DIR)")
    elif result.num_lengths_unknown:
        found.append(
            f"the lengths of {result.num_lengths_unknown} prompts, whose media were not decoded (--decode all)"
        )
    if result.media.decode == "none" and result.ledger.num_media():
        found.append("whether media can be decoded (--decode sample or all)")
    if left := result.ledger.num_only_opened():
        found.append(f"whether {left} media, which were only opened, can be decoded (--decode all)")
    if result.reading.purpose == "replay":
        found.append("the recorded responses, which training checks before it builds the model")
    return found


def lines_for_people(result: Validation) -> Iterator[str]:
    """The result in words: counts by kind, each with its first examples."""
    ledger, num_bad = result.ledger, result.num_records - result.num_usable
    others = f" ({result.num_other_types} of other problem types are passed over)" if result.num_other_types else ""
    yield (
        f"{result.reading.file}: {result.num_records:,} records{others}, "
        f"{result.num_usable:,} can be used, {num_bad:,} cannot."
    )
    yield from _kinds(result, warnings=False)
    if warnings := ledger.counts(warnings=True):
        yield f"Warnings, which make no record unusable ({sum(warnings.values()):,}):"
        yield from _kinds(result, warnings=True)
    opened, decoded = ledger.num_media(at_least=Look.HEADER), ledger.num_media(at_least=Look.FRAMES)
    yield f"Of {ledger.num_media():,} media of the other records {opened:,} were opened and {decoded:,} decoded."
    if num_bad:
        late = sum(count for kind, count in ledger.counts().items() if kind in _MET_WHEN_DRAWN)
        yield (
            f"Training leaves out {num_bad - late:,} records before it builds the model and skips {late:,} when it "
            "draws them; --max-skip-share says how many it bears."
        )
    for what in not_checked(result):
        yield f"Not checked: {what}."


def _kinds(result: Validation, *, warnings: bool) -> Iterator[str]:
    for kind, count in result.ledger.counts(warnings=warnings).items():
        yield f"  {count:,} x {kind}"
        for finding in result.ledger.findings(warnings=warnings, kind=kind, most=_NUM_EXAMPLES):
            medium = "" if finding.path == str(result.reading.file) or finding.path in finding.detail else finding.path
            yield f"      record {finding.number}: {medium and f'{medium}: '}{finding.detail}"
        if count > _NUM_EXAMPLES:
            yield f"      and {count - _NUM_EXAMPLES:,} more"
