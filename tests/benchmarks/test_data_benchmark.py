"""``benchmarks/data.py`` runs at a small size, and its committed results hold what docs and notes say of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

RESULTS = REPOSITORY / "benchmarks" / "results" / "data_cpu.json"


@pytest.mark.slow
def test_data_benchmark_measures_all_parts(tmp_path: Path) -> None:
    sizes = ["--records", "200", "--list-records", "50", "--repeats", "1", "--steps", "2"]
    command = [sys.executable, "benchmarks/data.py", "--json", *sizes, "--out", str(tmp_path / "a.json")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "a.json").read_text())
    assert [row["records"] for row in report["records"]] == [200, 200, 50]
    assert all(seconds > 0 for seconds in report["decode"]["seconds_per_video"].values())
    assert set(report["wait"]["data_wait_fraction"]) == {"0 workers", "1 workers", "2 workers"}


def test_committed_results_hold_the_claims() -> None:
    report = json.loads(RESULTS.read_text())
    rows = {row["reader"]: row for row in report["records"]}
    assert rows["store, second start"]["records"] == 1_000_000
    for name in ("store, first start", "store, second start"):
        assert rows[name]["private_bytes"] + rows[name]["shared_bytes"] < 200e6
    assert report["wait"]["data_wait_fraction"]["2 workers"]["mean"] < 0.02
    assert "qwen-vl-utils" in report["decode"]["seconds_per_video"]
