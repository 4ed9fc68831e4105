"""NaN and infinity of weights and samplers end a run with one line on every rank; what is not finite is null in JSON.

Those of the trainer skip an update (``test_skipped_updates.py``)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.files.json_files import to_json
from megatron_ktr.report.run_data import read_run
from megatron_ktr.rollout.replay import write_rollouts
from megatron_ktr.types import ResponseSelection
from tests.support.layouts import sizes_of
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import example_groups, make_config, run_steps
from tests.support.tiny import save_tiny_hf

DAMAGED = "model.layers.3.mlp.down_proj.weight"
"""In the last layer: on the second of two pipeline stages."""


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finite")
    save_tiny_hf(directory)
    return directory


def refusals(context: RankContext, *, damaged_dir: Path, sizes: ParallelSizes) -> str:
    """What each rank says of a model that is damaged on disk."""
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.policy.policy import Policy

    groups = context.init(sizes)
    config = make_config(damaged_dir, {}, num_prompts=2, sizes=sizes)
    with pytest.raises(UserError) as refusal:
        Policy(damaged_dir, options=PolicyOptions.of(config), ranks=groups, platform=current(), num_steps=1)
    assert refusal.value.is_on_every_rank and "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("sizes", [ParallelSizes(), sizes_of(1, 2), sizes_of(2, sp=True)], ids=["1", "pp2", "tp2 sp"])
def test_weights_that_are_not_finite_are_refused_by_every_rank(
    ranks: RankPool, tmp_path: Path, sizes: ParallelSizes
) -> None:
    save_tiny_hf(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    (name,) = [name for name in tensors if name.endswith(DAMAGED.removeprefix("model."))]
    tensors[name][3, 5] = -math.inf
    save_file(tensors, path, metadata={"format": "pt"})
    for found in ranks(refusals, sizes.model, damaged_dir=tmp_path, sizes=sizes):
        assert f"{DAMAGED} holds NaN or infinity" in found


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_sampler_logprobs_that_are_not_finite_stop_the_step(hf_dir: Path, one_rank: Any, value: float) -> None:
    first, *others = example_groups("mixed", "text")
    rollout = first.rollouts[1]
    logprobs = (*([-0.5] * (len(rollout.token_ids) - 1)), value)
    damaged = dataclasses.replace(rollout, sampler_logprobs=logprobs)
    groups = [dataclasses.replace(first, rollouts=(first.rollouts[0], damaged, *first.rollouts[2:])), *others]
    with pytest.raises(UserError, match="step 0: the sampler's log-probs of 1 responses are not finite"):
        run_steps(one_rank, hf_dir=hf_dir, rollout_groups=groups)


def test_json_has_null_for_what_is_not_finite() -> None:
    values = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": True, "d": None, "e": "NaN", "f": 3}
    text = to_json(values)
    assert json.loads(text) == {"a": [1.5, None, [None, {"b": None}]], "c": True, "d": None, "e": "NaN", "f": 3}
    assert "NaN" not in text.replace('"NaN"', "") and "Infinity" not in text


def test_rollouts_with_numbers_that_are_not_finite_are_written_and_read_back(tmp_path: Path) -> None:
    """A record may hold NaN (Python's json reads it), and under ``original_compat`` a run goes on with NaN scores."""
    (group,) = example_groups("text")
    record = {"problem": "?", "problem_type": "free-form", "solution": "x", "weight": math.nan}
    group = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, record=record))
    selections = [
        ResponseSelection(
            is_key_token=(True,) * len(rollout.token_ids),
            policy_logprobs=(math.nan,) * len(rollout.token_ids),
            is_selected={},
        )
        for rollout in group.rollouts
    ]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    write_rollouts(tmp_path / "rollouts" / "step_00000001.jsonl", [group], selections=[selections])
    line = (tmp_path / "rollouts" / "step_00000001.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["weight"] is None
    (read,) = read_run(tmp_path).groups_of(1)
    assert all(math.isnan(value) for response in read.responses for value in response.policy_logprobs)
