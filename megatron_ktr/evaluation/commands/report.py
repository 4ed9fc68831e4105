"""``tools/evaluate.py report``: the tables and the page of stored answers, without a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking.outcomes import read_evaluation
from megatron_ktr.evaluation.item import Evaluation
from megatron_ktr.evaluation.protocols import PROTOCOL_NAMES
from megatron_ktr.evaluation.results.aggregate import results_of
from megatron_ktr.evaluation.results.compare import compare, comparison_tables
from megatron_ktr.evaluation.results.page import write_page_of
from megatron_ktr.evaluation.results.publish import (
    PAGE_FILE,
    TABLE_FILE,
    headings_of,
    headline_of,
    how_asked,
    places_of,
    publish,
    summary_of,
)
from megatron_ktr.evaluation.results.table import tables_of
from megatron_ktr.files.json_files import to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, nargs="+", metavar="DIR", help="output directories of evaluations")
    parser.add_argument("--page", type=Path, metavar="FILE", help="one page about all of them; needed for several")
    parser.add_argument("--protocol", choices=PROTOCOL_NAMES, default="official", help="whose come first (official)")
    parser.add_argument("--paper", action="store_true", help="published figures beside ours")
    parser.add_argument("--json", action="store_true", help="print the figures in short as one JSON object")


def run(options: argparse.Namespace) -> int:
    directories = {str(path): path for path in options.out}
    if len({path.resolve() for path in options.out}) < len(options.out):
        raise UserError("report: a directory is named twice")
    evaluations = {name: read_evaluation(path) for name, path in directories.items()}
    if options.page is not None:
        return _write_page(options, evaluations)
    if len(evaluations) > 1:
        raise UserError("report: one page about several evaluations needs --page FILE")
    (evaluation,) = evaluations.values()
    results = publish(options.out[0], evaluation, protocol=options.protocol, paper=options.paper)
    if options.json:
        print(to_json({"out": str(options.out[0]), **summary_of(results, protocol=options.protocol)}))
        return 0
    print(headline_of(results, protocol=options.protocol, paper=options.paper))
    print(f"wrote {options.out[0] / TABLE_FILE} and {options.out[0] / PAGE_FILE}")
    return 0


def _write_page(options: argparse.Namespace, evaluations: dict[str, Evaluation]) -> int:
    """One page about several evaluations; of two, also their comparison."""
    headings = {name: found for evaluation in evaluations.values() for name, found in headings_of(evaluation).items()}
    models = {name: results_of(evaluation, headings_of(evaluation)) for name, evaluation in evaluations.items()}
    tables = tables_of(models, protocol=options.protocol, paper=options.paper)
    if len(evaluations) == 2:
        (name_a, a), (name_b, b) = evaluations.items()
        comparison = compare(a, b, headings, names=(name_a, name_b))
        tables = [*comparison_tables(comparison, protocol=options.protocol), *tables]
    places = {name: place for evaluation in evaluations.values() for name, place in places_of(evaluation).items()}
    notes = [f"{name}: {line}" for name, found in evaluations.items() for line in how_asked(found.settings)]
    num_bytes = write_page_of(
        options.page,
        evaluations,
        models,
        headings,
        protocol=options.protocol,
        tables=tables,
        places=places,
        notes=notes,
    )
    if options.json:
        summaries = {name: summary_of(results, protocol=options.protocol) for name, results in models.items()}
        print(to_json({"page": str(options.page), "evaluations": summaries}))
        return 0
    print(f"wrote {options.page} ({num_bytes / 1e6:.1f} MB)")
    return 0
