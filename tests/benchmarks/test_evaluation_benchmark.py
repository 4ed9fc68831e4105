"""``benchmarks/evaluation.py`` runs at a small size, and its committed results hold what docs and notes say of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

RESULTS = REPOSITORY / "benchmarks" / "results" / "evaluation_cpu.json"


@pytest.mark.slow
def test_evaluation_benchmark_gives_equal_answers_many_and_one_at_a_time(tmp_path: Path) -> None:
    sizes = "--few 1 --many 5 --concurrency 3 --max-tokens 6 --repeats 1 --frames 4 --size 56".split()
    command = [sys.executable, "benchmarks/evaluation.py", "--engines", "hf", "--json", *sizes]
    command += ["--out", str(tmp_path / "a.json")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "a.json").read_text())
    (found,) = report["results"]
    assert found["num_answers"] == 5 and found["num_equal_answers"] == [5]


def test_committed_results_hold_the_claims() -> None:
    report = json.loads(RESULTS.read_text())
    engines = {found["engine"]: found for found in report["results"]}
    assert engines["vllm"]["concurrency"] == 32
    assert engines["vllm"]["speedup"] > 2
