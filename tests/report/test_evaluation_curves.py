"""The curves of evaluation during training: shares share a chart, and no two lines of a chart look alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_ktr.report.evaluation_curves import evaluation_charts
from megatron_ktr.report.run_data import read_run


def charts(run_dir: Path, **figures: float) -> dict[str, str]:
    """The charts of a run that is evaluated twice, by title."""
    records = [{"step": step, **{f"eval/{name}": value for name, value in figures.items()}} for step in (0, 5)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = [str(chart) for chart in evaluation_charts(read_run(run_dir))]
    return {re.findall(r"Evaluation[^<]*", chart)[0].strip(): chart for chart in found}


def test_lengths_have_a_chart_of_their_own_beside_that_of_shares(tmp_path: Path) -> None:
    figures = {"a/accuracy": 0.5, "a/strict": 0.25, "a/response_length": 321.0, "b/response_length": 123.0}
    found = charts(tmp_path, **figures)
    assert "321" not in found["Evaluation: a"] and "strict" in found["Evaluation: a"]
    length = found["Evaluation: response length"]
    assert "tokens, by set" in length and "321" in length and "123" in length


def test_twelve_categories_have_twelve_looks(tmp_path: Path) -> None:
    found = charts(tmp_path, **{f"a/task/category {number}": number / 12 for number in range(12)})
    drawn = re.findall(r'<polyline points="[^"]*" ([^>]*)/>', found["Evaluation: a by task"])
    assert len(drawn) == len(set(drawn)) == 12
