"""Writes what an evaluation has found so far: results.json, results.md and the page, each whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError, printable
from megatron_ktr.evaluation.asking.outcomes import stored_benchmark
from megatron_ktr.evaluation.asking.questions import frame_sampling
from megatron_ktr.evaluation.asking.scaling import SPARSE_TO_DENSE
from megatron_ktr.evaluation.benchmark import FrameRule
from megatron_ktr.evaluation.item import Evaluation
from megatron_ktr.evaluation.results.aggregate import results_of, results_text
from megatron_ktr.evaluation.results.figures import Headings
from megatron_ktr.evaluation.results.page import write_page_of
from megatron_ktr.evaluation.results.statistics import DEFAULT_RESAMPLING, Resampling
from megatron_ktr.evaluation.results.table import markdown, markdown_of, tables_of
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.report.strips import MediaPlace

RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"
PAGE_FILE = "report.html"
_ON_CONSOLE = ("Controls", "Test-time scaling", "Beside published figures")
"""Sections of the tables that stand on the console, behind the accuracies."""
PARTIAL_RESAMPLING = Resampling(num_resamples=1000)
"""While the evaluation runs: the last digits of an interval are not worth its time."""


def headings_of(evaluation: Evaluation) -> dict[str, Headings]:
    """What the tables say about each benchmark. A part of a benchmark is not called by its name alone."""
    found = {}
    for name, asked in evaluation.settings["benchmarks"].items():
        benchmark = stored_benchmark(name, asked["path"])
        number, published = asked["limit"] or asked["num_items"], benchmark.num_questions or asked["num_items"]
        title = benchmark.title + (f" ({number:,} of {published:,} items)" if number != published else "")
        found[name] = replace(Headings.of(benchmark), title=title)
    return found


def places_of(evaluation: Evaluation) -> dict[str, MediaPlace]:
    """By benchmark where its media lie, for pictures on the page. Those that are gone are only named."""
    frames: dict[str, int] = {}
    for name, condition in evaluation.asked:
        frames[name] = max(frames.get(name, 0), condition.frames)
    found = {}
    for name, asked in evaluation.settings["benchmarks"].items():
        root = Path(asked["media_root"])
        sampling = frame_sampling(FrameRule(**asked["frames"]), frames=frames[name])
        found[name] = MediaPlace(root if root.is_dir() else None, sampling)
    return found


def publish(
    directory: Path, evaluation: Evaluation, *, protocol: str, paper: bool = False, is_partial: bool = False
) -> dict[str, Any]:
    """Writes the results and returns them. The page is left out if ``is_partial``.

    Raises:
        UserError: they cannot be written.
    """
    resampling = PARTIAL_RESAMPLING if is_partial else DEFAULT_RESAMPLING
    headings = headings_of(evaluation)
    results = results_of(evaluation, headings, resampling=resampling)
    try:
        write_atomically(directory / RESULTS_FILE, results_text(results))
        write_atomically(directory / TABLE_FILE, table_of(results, protocol=protocol, paper=paper))
    except OSError as error:
        raise UserError(
            f"--out {directory}: results cannot be written: {error.strerror}; the answers are safe, and the command "
            "`report` makes results of them"
        ) from error
    if not is_partial:
        name = evaluation.settings["model"]["name"]
        write_page_of(
            directory / PAGE_FILE,
            {name: evaluation},
            {name: results},
            headings,
            protocol=protocol,
            tables=tables_of({name: results}, protocol=protocol, paper=paper),
            places=places_of(evaluation),
            notes=how_asked(evaluation.settings),
        )
    return results


def table_of(results: Mapping[str, Any], *, protocol: str, paper: bool) -> str:
    """The tables, and under them how the questions were asked."""
    name = results["settings"]["model"]["name"]
    tables = markdown({name: results}, protocol=protocol, paper=paper, title=f"Evaluation of {name}")
    return (
        f"{tables}\n## How the questions were asked\n\n"
        + "\n".join(f"- {line}" for line in how_asked(results["settings"]))
        + "\n"
    )


def headline_of(results: Mapping[str, Any], *, protocol: str, paper: bool) -> str:
    """What the console shows: the accuracies, and what controls and voting change."""
    models = {results["settings"]["model"]["name"]: results}
    tables = tables_of(models, protocol=protocol, paper=paper)
    return markdown_of([tables[0], *(table for table in tables if table.section in _ON_CONSOLE)], title="Evaluation")


def summary_of(results: Mapping[str, Any], *, protocol: str) -> dict[str, Any]:
    """The figures in short, for scripts."""
    return {
        **{name: results[name] for name in ("complete", "num_answered", "num_wanted")},
        "protocol": protocol,
        "accuracy": {
            name: {
                condition["name"]: condition["protocols"].get(protocol, {}).get("accuracy")
                for condition in benchmark["conditions"]
            }
            for name, benchmark in results["benchmarks"].items()
        },
    }


def how_asked(settings: Mapping[str, Any]) -> list[str]:
    """Lines about the model, the wording, the sampling and the frames."""
    identity = ", ".join(f"{name} {value}" for name, value in settings["model"]["identity"].items())
    lines = [f"Model: {identity}. Seed {settings['seed']}."]
    for name, asked in settings["benchmarks"].items():
        sampling, frames = asked["sampling"], asked["frames"]
        lines.append(
            f"{name}: wording {asked['wording']}; temperature {sampling['temperature']:g}, top-p "
            f"{sampling['top_p']:g}, at most {sampling['max_tokens']} tokens; frames by the rule {frames['rule']} (fps "
            f"{frames['fps']:g}), at most {frames['max_pixels']:,} pixels each."
        )
    scalings = {condition["scaling"] for _, condition in settings["asked"]}
    if any(scaling.startswith("votes:") for scaling in scalings):
        voting = settings["voting"]
        lines.append(f"Votes: temperature {voting['temperature']:g}, top-p {voting['top_p']:g} instead.")
    if SPARSE_TO_DENSE in scalings:
        lines.append("sparse_to_dense: its own temperatures (0.8 to 1.4) and top-p (0.7 to 0.9), frames evenly spaced.")
    return [printable(line) for line in lines]
