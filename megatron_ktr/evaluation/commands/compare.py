"""``tools/evaluate.py compare``: two evaluations, paired by item."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking.outcomes import read_evaluation
from megatron_ktr.evaluation.protocols import PROTOCOL_NAMES
from megatron_ktr.evaluation.results.compare import compare, comparison_markdown
from megatron_ktr.evaluation.results.publish import headings_of
from megatron_ktr.files.json_files import to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="output directory of an evaluation")
    parser.add_argument("b", type=Path, metavar="B", help="another; differences are B - A")
    parser.add_argument(
        "--conditions",
        nargs=2,
        metavar=("OF_A", "OF_B"),
        help='one column of each, such as 16 "32 shuffled" (default: all columns that both have)',
    )
    parser.add_argument("--protocol", choices=PROTOCOL_NAMES, default="official", help="whose tables (official)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object instead")


def run(options: argparse.Namespace) -> int:
    if options.a.resolve() == options.b.resolve() and options.conditions is None:
        raise UserError("compare: A and B are one directory; --conditions compares two of its columns")
    a, b = read_evaluation(options.a), read_evaluation(options.b)
    conditions = None if options.conditions is None else (options.conditions[0], options.conditions[1])
    headings = {**headings_of(b), **headings_of(a)}
    names = (str(options.a), str(options.b))
    comparison = compare(a, b, headings, names=names, conditions=conditions)
    print(to_json(comparison) if options.json else comparison_markdown(comparison, protocol=options.protocol), end="")
    if options.json:
        print()
    return 0
