"""Every objective trains on the synthetic videos, sampling included, by a change of one line; a replay repeats it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.config.objective_registry import available_objectives, objective_entry
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.train import train

STEPS = 1
SAMPLED = [name for name in available_objectives() if not objective_entry(name).is_supervised]
SUPERVISED = [name for name in available_objectives() if objective_entry(name).is_supervised]

ACTS: dict[str, dict[str, tuple[float, float]]] = {
    "video_ktr": {"key_token_ratio": (0.2, 0.9), "key_token_ratio/temporal": (0.05, 0.5)},
    "grpo": {"key_token_ratio": (1.0, 1.0), "kl": (1e-4, 10.0)},
    "t_grpo": {"shuffled/prompts": (4, 4), "shuffled/tokens": (8, 64), "reward/temporal_bonus": (0.01, 0.3)},
    "tw_grpo": {"token_weight": (1.01, 1.69)},
    "dapo": {"filter/rejected": (1, 20), "filter/kept": (4, 4)},
    "gspo": {"clip_ratio": (0.05, 0.95)},
    "entropy_80_20": {"key_token_ratio": (0.18, 0.25)},
    "vppo": {"dependence": (1e-8, 10.0), "advantage_factor_max": (1.0001, 10.0), "key_token_ratio": (0.2, 0.5)},
}
"""What of each objective is seen to act in the last step, as a range of a metric."""


def accuracy(response: str, record: dict) -> float:
    """An untrained model earns nothing. This gives its responses something to differ by, but for those of every fourth
    record, which are all worth the same."""
    number = int(record["problem_id"].rpartition("-")[2])
    return len(response) % 5 / 4 if number % 4 else 0.5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    save_tiny_model(folder / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    make_dataset(folder / "data", num_train=16, num_eval=1, tasks=("order",))  # every video moves
    return folder


def common(inputs: Path, run_dir: Path) -> dict[str, Any]:
    """What all runs share. No option is named that some objective sets."""
    return {
        "model": str(inputs / "model"),
        "prompt_template": str(inputs / "model" / "prompt_template.txt"),
        "video_num_frames": 8,
        "video_max_pixels": 3136,
        "optimizer": "sgd",
        "use_distributed_optimizer": False,
        "lr": 0.2,
        "lr_decay_style": "constant",
        "train_steps": STEPS,
        "prompts_per_step": 4,
        "run_dir": str(run_dir),
    }


def sampled(inputs: Path, run_dir: Path, objective: str) -> dict[str, Any]:
    return {
        **common(inputs, run_dir),
        "objective": objective,
        "engine": "hf",
        "data_path": str(inputs / "data" / "train.json"),
        "num_generations": 4,
        "max_response_length": 8,
        "mini_batches": 2,
        "length_bonus": 0.0,
        "reward_functions": (f"{__name__}:accuracy",),
        "reward_workers": 0,
        "rollout_log_interval": 1,
    }


def replayed(inputs: Path, run_dir: Path, objective: str, *, recorded: Path) -> dict[str, Any]:
    values = {**sampled(inputs, run_dir, objective), "engine": "replay", "replay_path": str(recorded)}
    values |= {"data_path": None, "media_root": str(inputs / "data"), "reward_functions": (), "shuffle_data": False}
    return values


def train_with(context: Any, *, values: dict[str, Any]) -> None:
    train(config_from_values(values))


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rollouts(run_dir: Path, step: int) -> list[dict[str, Any]]:
    lines = (run_dir / "rollouts" / f"step_{step:08d}.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda line: line["draw_number"])


def tokens_by_draw(run_dir: Path, step: int) -> dict[int, list[list[int]]]:
    return {
        line["draw_number"]: [response["token_ids"] for response in line["responses"]]
        for line in rollouts(run_dir, step)
    }


@pytest.fixture(scope="module")
def run_of(ranks: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains with an objective where that has not happened yet, and gives the run's directory."""
    folder = tmp_path_factory.mktemp("runs")

    def train_once(objective: str, selection: str | None = None) -> Path:
        run_dir = folder / f"{objective} {selection or ''}"
        if not run_dir.exists():
            ranks(train_with, world_size=1, values={**sampled(inputs, run_dir, objective), "selection": selection})
        return run_dir

    return train_once


@pytest.mark.parametrize("objective", SAMPLED)
def test_one_line_changes_the_objective_of_a_run_and_a_replay_repeats_it(
    ranks: Any, inputs: Path, run_of: Callable[..., Path], tmp_path: Path, objective: str
) -> None:
    plain, run_dir = run_of("grpo"), run_of(objective)
    steps = metrics(run_dir)
    assert [step["has_stepped"] for step in steps] == [1.0] * STEPS
    for name, (low, high) in ACTS.get(objective, {}).items():
        assert low <= steps[-1][name] <= high, name
    # The same weights, prompts and seeds gave the same responses: what differs is the algorithm's doing.
    expected, found = tokens_by_draw(plain, 1), tokens_by_draw(run_dir, 1)
    both = expected.keys() & found.keys()
    assert len(both) == 4 or ("filter/kept" in steps[0] and both)
    assert all(found[draw] == expected[draw] for draw in both)
    if objective != "grpo":
        assert steps[-1]["loss"] != metrics(plain)[-1]["loss"]

    recorded = tmp_path / "rollouts.jsonl"
    lines = [line for step in range(1, STEPS + 1) for line in rollouts(run_dir, step)]
    recorded.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ranks(train_with, world_size=1, values=replayed(inputs, tmp_path / "replay", objective, recorded=recorded))
    again = metrics(tmp_path / "replay")
    assert len(again) == STEPS
    for wanted, got in zip(steps, again, strict=True):
        for name in ("loss", "grad_norm", "reward_mean", "key_token_ratio", "entropy"):
            assert got[name] == pytest.approx(wanted[name], abs=1e-6), name  # the same sums in fp32


def test_the_bonus_of_t_grpo_is_what_its_rule_pays_by_hand(run_of: Callable[..., Path]) -> None:
    paid = []
    for line in rollouts(run_of("t_grpo"), 1):
        ordered, shuffled = (
            [response["rewards"]["accuracy"] for response in line[name]] for name in ("responses", "shuffled_responses")
        )
        assert (len(ordered), len(shuffled)) == (4, 2), "G and G // 2"
        holds = sum(ordered) / 4 >= 0.8 * sum(shuffled) / 2
        paid += [0.3 if holds and value > 0.1 else 0.0 for value in ordered]
    assert 0 < sum(paid) < 0.3 * len(paid)
    assert metrics(run_of("t_grpo"))[0]["reward/temporal_bonus"] == pytest.approx(sum(paid) / len(paid))


def test_the_random_control_takes_exactly_as_many_tokens_of_every_group(run_of: Callable[..., Path]) -> None:
    """Of the same responses, as the signals take there; and other ones."""
    chosen, drawn = (
        [
            [response["is_key_token"] for response in line["responses"]]
            for line in rollouts(run_of("video_ktr", name), 1)
        ]
        for name in (None, "random")
    )
    counts = [[sum(map(sum, of_group)) for of_group in run] for run in (chosen, drawn)]
    assert counts[0] == counts[1] and all(0 < count < 32 for count in counts[0])
    assert chosen != drawn
    ratios = [metrics(run_of("video_ktr", name))[0]["key_token_ratio"] for name in (None, "random")]
    assert ratios[0] == ratios[1]


@pytest.mark.parametrize("objective", SUPERVISED)
def test_supervised_objectives_train_on_given_responses(
    ranks: Any, inputs: Path, tmp_path: Path, objective: str
) -> None:
    values = {
        **common(inputs, tmp_path / "run"),
        "objective": objective,
        "data_path": str(inputs / "data" / "sft.json"),
        "train_steps": 2,
    }
    ranks(train_with, world_size=1, values=values)
    steps = metrics(tmp_path / "run")
    assert [step["has_stepped"] for step in steps] == [1.0, 1.0]
    assert steps[1]["loss"] < steps[0]["loss"]
