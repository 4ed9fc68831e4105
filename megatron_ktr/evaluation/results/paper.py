"""Published figures beside ours. Each row of ``paper_rows.json`` names its source, frames and harness.

Only figures that stand in a paper, a README or a published log are there; none is read off a plot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ktr.evaluation.registry import load_benchmark
from megatron_ktr.evaluation.results.statistics import rounded
from megatron_ktr.files.json_files import read_json_object

FILE = Path(__file__).with_name("paper_rows.json")
PAPER_PROTOCOL = "official"
"""The protocol of ours that follows the harness behind the published figures."""


def published_rows() -> list[dict[str, Any]]:
    """The rows: model, frames (None if the source does not say), source, harness, and by benchmark notes and figures in
    percent."""
    return read_json_object(FILE)["rows"]


def beside_paper(results: Mapping[str, Any], *, protocol: str = PAPER_PROTOCOL) -> list[dict[str, Any]]:
    """The published rows that share a benchmark with ``results``, each figure with ours, in %.

    Ours is the intact condition of a single answer with the row's number of frames. If there is none, it is the one
    with the most frames, and ``differs`` says so, as it says everything else that is known to differ.

    Returns:
        Rows with ``figures``: {benchmark: {"paper", "ours", "difference", "condition", "differs": [...]}}.
    """
    found = []
    for row in published_rows():
        figures = {
            name: _figure(row, name, results["benchmarks"][name], protocol)
            for name in row["figures"]
            if name in results["benchmarks"]
        }
        if figures:
            found.append({**row, "figures": figures})
    return found


def _figure(row: Mapping[str, Any], name: str, benchmark: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    published = row["figures"][name]
    plain = [c for c in benchmark["conditions"] if c["control"] == "intact" and c["scaling"] == "single"]
    plain.sort(key=lambda condition: (condition["frames"] == row["frames"], condition["frames"]))
    if not plain or protocol not in plain[-1]["protocols"]:
        return {"paper": published, "ours": None, "difference": None, "condition": None, "differs": []}
    condition = plain[-1]
    accuracy = condition["protocols"][protocol]["accuracy"]
    differs = [row["notes"][name]] if name in row["notes"] else []
    if row["frames"] is None:
        differs.append(f"ours has {condition['frames']} frames, the source does not say")
    elif row["frames"] != condition["frames"]:
        differs.append(f"ours has {condition['frames']} frames, the source {row['frames']}")
    if protocol != PAPER_PROTOCOL:
        differs.append(f"ours is {protocol}, the source follows a harness of its own")
    number = load_benchmark(name).num_questions
    if number is not None and number != benchmark["num_items"]:
        differs.append(f"ours is about {benchmark['num_items']:,} items, the source about {number:,}")
    if not condition["complete"]:
        differs.append(f"ours has {condition['num_answered']:,} of {condition['num_items']:,} items so far")
    return {
        "paper": published,
        "ours": None if accuracy is None else rounded(100 * accuracy, 2),
        "difference": None if accuracy is None else rounded(100 * accuracy - published, 2),
        "condition": condition["name"],
        "differs": differs,
    }
