"""Rules of group filtering and of retirement: every option that would not be honoured is refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ktr.config import load_config
from megatron_ktr.config.filter_rules import draws_together, metric_of
from megatron_ktr.errors import UserError

REPLAY = ["--model", "m", "--replay-path", "r.jsonl"]
SAMPLED = ["--model", "m", "--data-path", "q.json", "--engine", "hf", "--length-bonus", "0"]
EQUAL, RANGE = ["--filter-groups", "equal"], ["--filter-groups", "range"]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([*SAMPLED, "--objective", "sft", *EQUAL], "--filter-groups is not read by --objective sft"),
        ([*SAMPLED, "--objective", "sft", "--retire-above", "0.9"], "--retire-above is not read by --objective sft"),
        ([*SAMPLED, "--filter-max-rounds", "5"], "--filter-max-rounds needs --filter-groups"),
        ([*SAMPLED, "--min-reward-spread", "0.1"], "--min-reward-spread needs --filter-groups"),
        ([*SAMPLED, "--filter-metric", "accuracy"], "--filter-metric needs --filter-groups"),
        ([*SAMPLED, *EQUAL, "--filter-low", "0.1"], "--filter-low needs --filter-groups range"),
        ([*SAMPLED, *RANGE, "--filter-low", "0.9", "--filter-high", "0.9"], "must be below --filter-high 0.9"),
        (
            [*SAMPLED, *EQUAL, "--filter-metric", "accurracy"],
            "add it to --reward-functions, which are accuracy, format",
        ),
        ([*SAMPLED, *RANGE, "--reward-functions", "format"], "--filter-groups range compares accuracy: add it to"),
        ([*SAMPLED, "--retire-above", "0.9", "--reward-functions", "format"], "--retire-above goes by accuracy: add"),
        ([*SAMPLED, "--retire-above", "1"], "no accuracy is above 1"),
        ([*SAMPLED, "--retire-for", "2"], "--retire-for needs --retire-above"),
        ([*SAMPLED, "--retire-above", "0.9", "--retire-decay", "1"], "--retire-decay 1 must be below 1"),
        ([*SAMPLED, *EQUAL, "--filter-max-rounds", "-1"], "filter_max_rounds"),
        ([*REPLAY, *EQUAL, "--retire-above", "nan"], "retire_above"),
        ([*SAMPLED, *RANGE, "--filter-high", "nan"], "filter_high"),
    ],
)
def test_what_cannot_work_is_refused(argv: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(argv)
    assert part in str(caught.value)


def test_a_file_with_rewards_of_its_own_must_have_the_metric(tmp_path: Path) -> None:
    files = [{"path": "a.json", "weight": 1.0}, {"path": "b.json", "weight": 1.0, "reward_functions": ["format"]}]
    (tmp_path / "run.yaml").write_text(json.dumps({"data": {"data_path": files}}))
    argv = ["--config", str(tmp_path / "run.yaml"), "--model", "m", "--engine", "hf", "--length-bonus", "0"]
    load_config([*argv, *EQUAL])
    with pytest.raises(UserError, match="add it to the reward_functions of b"):
        load_config([*argv, *RANGE])


def test_what_is_compared_by_default() -> None:
    for argv, metric in ((EQUAL, "reward"), (RANGE, "accuracy"), ([*RANGE, "--filter-metric", "reward"], "reward")):
        rollout = load_config([*REPLAY, *argv]).rollout
        assert metric_of(rollout) == metric and draws_together(rollout)
    assert not draws_together(load_config(REPLAY).rollout)
    assert draws_together(load_config([*REPLAY, "--retire-above", "0.9"]).rollout)
