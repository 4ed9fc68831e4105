"""A run whose gradients turn NaN skips, dumps and stops; its dump alone is enough to run the step again."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_ktr.config import config_from_values
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import EXIT_ALARM, UserError
from megatron_ktr.objectives import build_objective
from megatron_ktr.run.dumps import replay_obstacle
from megatron_ktr.train import train
from tests.run.test_online_training import settings
from tests.support.ranks import RankContext, RankPool
from tools.replay_step import parse_arguments, read_facts, replay, table

POISONED = "linear_proj.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay step")
    save_tiny_model(folder / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    make_dataset(folder / "data", num_train=8, num_eval=1)
    return folder


def train_to_the_stop(
    context: RankContext, *, inputs: Path, run_dir: Path, most: int | None = None, **options: Any
) -> tuple[int, str]:
    """From step 3 on one element of a gradient is NaN, on the rank that has it in its shard; of at most ``most``
    updates. Returns the exit code and the error stream."""
    from megatron_ktr.policy.policy import Policy
    from models.qwen2_5_vl.conversion import named_model_parameters

    original = Policy.backward
    spoils = itertools.count()

    def spoiled(policy: Any, *args: Any, facts: Any, **kwargs: Any) -> Any:
        result = original(policy, *args, facts=facts, **kwargs)
        if facts.step >= 3 and (most is None or next(spoils) < most):
            named = dict(named_model_parameters(policy.bare_chunks))
            parameter: Any = next(p for name, p in named.items() if name.endswith(POISONED) and "language" in name)
            parameter.main_grad.view(-1)[-1] = math.nan
        return result

    Policy.backward = spoiled  # type: ignore[method-assign]
    said = io.StringIO()
    changes: dict[str, Any] = dict(train_steps=6, save_interval=1, keep_checkpoints=0, max_skipped_in_a_row=1)
    changes.update(prompts_per_step=2, noise_every=2)
    changes.update(options)
    sharded = dict(optimizer="adam", use_distributed_optimizer=True, lr=1e-3)
    try:
        with contextlib.redirect_stderr(said):
            return train(settings(inputs, run_dir, **changes, **sharded)), said.getvalue()
    finally:
        Policy.backward = original  # type: ignore[method-assign]


def replays(context: RankContext, *, arguments: Sequence[Sequence[str]]) -> list[tuple[dict[str, Any], str]]:
    """For each command line: the report, and the table that people see."""
    found = [replay(parse_arguments(list(line))) for line in arguments]
    return [(report, table(report)) for report in found]


@pytest.fixture(scope="module")
def stopped(inputs: Path, ranks: RankPool) -> tuple[Path, list[tuple[int, str]]]:
    run_dir = inputs / "run"
    return run_dir, ranks(train_to_the_stop, 2, inputs=inputs, run_dir=run_dir)


def test_a_run_survives_one_update_and_stops_at_more_than_it_may_skip(
    stopped: tuple[Path, list[tuple[int, str]]],
) -> None:
    run_dir, found = stopped
    assert [code for code, _ in found] == [EXIT_ALARM] * 2
    said = [line for line in found[0][1].splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "step 4: 2 updates in a row were skipped, because the gradient is not finite" in said[0]
    assert "--max-skipped-in-a-row 1" in said[0] and "not saved after step 4" in said[0]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["has_stepped"] for record in records] == [1.0, 1.0, 0.0, 0.0]
    assert [record.get("skipped_in_a_row") for record in records] == [None, None, 1.0, 2.0]
    assert records[3]["grad_norm"] is None and records[3]["skipped_updates/gradient"] == 1.0
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert saved == ["step_00000001", "step_00000002", "step_00000003"]
    # A run that resumes goes on counting where it was.
    states = [json.loads((run_dir / "checkpoints" / name / "training.json").read_text())["sources"] for name in saved]
    assert [[state.get("skipped_in_a_row") for state in of_step] for of_step in states] == [[None] * 2] * 2 + [[1] * 2]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    skipped = [event for event in events if event["kind"] == "skipped_update"]
    assert [(event["step"], event["in_a_row"], event["reason"]) for event in skipped] == [
        (3, 1, ["gradient"]),
        (4, 2, ["gradient"]),
    ]
    assert all(event["text"].endswith("runs it again") for event in skipped)
    facts = read_facts(run_dir / "dumps" / "step_00000004")
    assert facts["last_change"] == 2, "the weights of step 4 are those after step 2"
    damaged = {name: one["num_not_finite"] for name, one in facts["gradients"].items() if one["num_not_finite"]}
    assert list(damaged.values()) == [1] and next(iter(damaged)).endswith(POISONED)
    lines = [json.loads(line) for path in sorted(run_dir.glob("dumps/step_00000004/*.jsonl")) for line in path.open()]
    response = lines[1]["responses"][2]
    assert len(lines) == 2 and {"policy_logprob", "entropy", "logprob/hidden"} <= response["scores"].keys()
    assert len(response["scores"]["entropy"]) == len(response["token_ids"]) == len(response["logprobs"])


def test_the_dump_alone_is_enough_to_run_the_step_again(
    stopped: tuple[Path, list[tuple[int, str]]], inputs: Path, ranks: RankPool, tmp_path: Path
) -> None:
    """In one process, from the checkpoint: the loss of two replicas to 1e-6 (fp32). With weights that overflow, the
    first module and the first token are named."""
    run_dir, _ = stopped
    dump = str(run_dir / "dumps" / "step_00000003")
    shutil.copytree(inputs / "model", tmp_path / "model")
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight") and "visual" not in name)
    tensors[name][:] = 3e38
    save_file(tensors, weights, metadata={"format": "pt"})
    lines = [[dump], [dump, "--model", str(tmp_path / "model")]]
    (good, good_table), (bad, bad_table) = ranks(replays, 1, arguments=lines)[0]
    assert good["has_exact_weights"] and good["checkpoint"].endswith("checkpoints/step_00000002")
    assert good["loss_difference"] < 1e-6 and abs(good["loss"]) > 1e-4
    # Here nobody spoils the gradient: the step is taken, and the norms of all tensors make the whole norm.
    norms = [one["norm"] for one in good["gradients"].values()]
    assert math.hypot(*norms) == pytest.approx(good["grad_norm"], rel=1e-5)
    assert (
        good["has_stepped"] and good["first_tensor"] is None and "every number of this replay is finite" in good_table
    )
    facts = read_facts(run_dir / "dumps" / "step_00000003")
    for tensor, found in facts["gradients"].items():
        if not found["num_not_finite"]:
            assert found["norm"] == pytest.approx(good["gradients"][tensor]["norm"], rel=1e-3, abs=1e-7), tensor
    assert not bad["has_stepped"] and bad["skipped"] == ["log_prob"] and not bad["has_exact_weights"]
    assert bad["first_tensor"]["kind"] == "output of module" and bad["first_tensor"]["had_finite_input"]
    assert "layers.1.mlp" in bad["first_tensor"]["name"]
    assert bad["first_token"]["response"] == bad["first_token"]["token"] == 1
    assert "first not finite" in bad_table and "not known to be those of the step" in bad_table


def test_the_dump_shows_the_gradient_of_the_mini_batch_that_was_skipped(
    inputs: Path, ranks: RankPool, tmp_path: Path
) -> None:
    """The mini-batch after it takes its step, and leaves other gradients behind, which are finite and clipped."""
    run_dir = tmp_path / "run"
    options: dict[str, Any] = dict(inputs=inputs, run_dir=run_dir, most=1, mini_batches=2, train_steps=3)
    assert ranks(train_to_the_stop, 1, **options, clip_grad=1e-3)[0][0] == 0
    facts = read_facts(run_dir / "dumps" / "step_00000003")
    assert facts["values"]["has_stepped"] == facts["values"]["skipped_updates/gradient"] == 1.0
    assert sum(one["num_not_finite"] for one in facts["gradients"].values()) == 1
    assert math.hypot(*(one["norm"] for one in facts["gradients"].values())) > 0.01
    ((good, _),) = ranks(replays, 1, arguments=[[str(run_dir / "dumps" / "step_00000003")]])[0]
    assert good["has_stepped"] and math.hypot(*(one["norm"] for one in good["gradients"].values())) > 0.01


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"objective": "video_ktr"}, None),
        ({"objective": "sft"}, "--objective sft"),
        ({"objective": "t_grpo"}, "--temporal-bonus"),
        ({"objective": "video_ktr", "visual_view": "other_video"}, "media of other questions"),
    ],
)
def test_no_run_advises_a_replay_that_the_tool_refuses(values: dict[str, Any], words: str | None) -> None:
    config = config_from_values({"model": "m", **values})
    objective = build_objective(config.objective, reward=config.reward, rollout=config.rollout)
    found = replay_obstacle(objective, options=StepOptions.of(config))
    assert (found is None) == (words is None) and (words or "") in (found or "")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("facts.json", None, "facts.json"),
        ("facts.json", "[1]", "expected one JSON object"),
        ("facts.json", '{"version": 9}', "expected version 1 of a dump, got 9"),
        ("facts.json", '{"version": 1, "step": "x"}', "expected the field step as int, got 'x'"),
    ],
)
def test_what_is_no_dump_is_refused_in_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="(?s)^[^\n]*$") as refusal:
        read_facts(tmp_path)
    assert message in str(refusal.value)
