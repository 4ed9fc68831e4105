"""``docs/scaling.md`` against the committed numbers, and these against the formulas."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks.scaling import run as scaling
from megatron_ktr.accounting.layout import Layout
from megatron_ktr.accounting.planner import GB, judge


def test_page_and_figure_are_those_of_the_committed_numbers():
    report = json.loads(scaling.RESULT.read_text())
    page = scaling.PAGE.read_text()
    assert scaling.with_tables(page, report) == page, "run: python benchmarks/scaling/run.py --redraw"
    assert scaling.FIGURE.read_text() == scaling.draw(report)
    assert [(e["model"], e["gpus"], e["frames"]) for e in report["entries"]] == [
        (size, num_gpus, frames) for size, num_gpus, _ in scaling.MODELS for frames in scaling.FRAMES
    ]


def test_committed_numbers_are_those_of_the_formulas():
    """Layouts are not planned anew, which takes minutes: each is judged as it stands."""
    for entry in json.loads(scaling.RESULT.read_text())["entries"]:
        if entry["layout"] is None:
            continue
        layout = Layout(**entry["layout"])
        request = scaling.request_of(
            *(entry[name] for name in ("model", "gpus", "prompts", "frames")), vision_parallel=layout.vision_parallel
        )
        plan = judge(request, layout)
        assert plan.memory_gb <= 80 and layout.num_ranks == entry["gpus"]
        assert entry["memory_gb"] == pytest.approx(
            {name: value / GB for name, value in dataclasses.asdict(plan.memory).items()}, abs=0.01
        )
        assert entry["seconds"] == pytest.approx(dataclasses.asdict(plan.time), abs=1e-3)
        assert entry["mfu"] == pytest.approx(plan.mfu, abs=1e-4)
        for part, links in scaling.sent_gb(request, plan).items():
            assert entry["sent_gb"][part] == pytest.approx(links, abs=1e-3)
        assert min(entry["gains"].values()) > 0.9, "a limit that falls makes nothing slower"
