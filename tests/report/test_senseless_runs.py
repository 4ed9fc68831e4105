"""Reports of run directories whose files are whole JSON and YAML, and hold values that nothing can be computed with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ktr.errors import UserError
from megatron_ktr.report.html import write_report
from tests.report.test_report import write_run

HUGE = str(10**400)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", f'{{"step": 1, "loss": {HUGE}}}\n', "metrics.jsonl, line 1: expected a whole 'step'"),
        ("metrics.jsonl", f'{{"step": {HUGE}, "loss": 1}}\n', "metrics.jsonl, line 1: expected a whole 'step'"),
        ("config.yaml", "data: {video_max_frames: {}}\n", "config.yaml: expected numbers in data"),
        ("config.yaml", "data: {video_num_frames: []}\n", "config.yaml: expected numbers in data"),
    ],
)
def test_a_value_that_nothing_can_be_computed_with_is_one_error(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report([(None, run)], out=tmp_path / "r.html")


def test_huge_rewards_of_a_response_are_one_error(tmp_path: Path) -> None:
    response = {"text": "a", "token_ids": [1], "rewards": {"accuracy": 10**400}}
    group = {"problem": "q", "problem_id": "1", "problem_type": "free-form", "responses": [response]}
    run = write_run(tmp_path / "run", rollouts={1: [group]})
    with pytest.raises(UserError, match="line 1: expected rewards to be an object of numbers"):
        write_report([(None, run)], out=tmp_path / "r.html")
