"""Passes without gradient: several random orders are averaged, groups a view does not apply to are left out, and lower
precision stays close."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.config.part_options import PolicyOptions, StepOptions
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.types import BatchFacts
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import compare_steps, example_groups, make_config, run_steps
from tests.support.tiny import save_tiny_hf


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scoring")
    save_tiny_hf(directory)
    return directory


def scored(context: RankContext, *, hf_dir: Path) -> dict[str, Any]:
    """Counterfactual scores of a micro-batch of a text group and two videos, and of each pass by itself."""
    from megatron_ktr.batch.micro_batch import MicroBatch
    from megatron_ktr.data.media.preprocess import PreprocessSettings
    from megatron_ktr.distributed.platform import current
    from megatron_ktr.objectives import build_objective
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.step.scoring import ScoringPasses
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec

    parallel = context.init(ParallelSizes())
    groups = tuple(example_groups("mixed", "text", "long video"))
    media = media_spec(Qwen2_5_VLConfig.from_hf(hf_dir), patchify=PreprocessSettings().patchify)

    def make(**values: Any) -> tuple[ScoringPasses, MicroBatch]:
        values = {"num_shuffles": 3, "kl_beta": 0.0, **values}
        config = make_config(hf_dir, values, num_prompts=3, sizes=parallel.sizes)
        policy = Policy(hf_dir, options=PolicyOptions.of(config), ranks=parallel, platform=current(), num_steps=1)
        objective = build_objective(config.objective, reward=config.reward)
        scoring = ScoringPasses(options=StepOptions.of(config), policy=policy, objective=objective, media=media)
        return scoring, MicroBatch(groups, scoring.pack(groups, "intact"))

    scoring, item = make()
    (together,) = scoring.with_counterfactuals([item], step=4)
    draws = []
    for draw in range(3):
        batch = scoring.pack(groups, "shuffled", step=4, draw=draw)
        draws.append(scoring.policy.score([batch])[0].logprob_R)
    hidden = scoring.policy.score([scoring.pack(groups, "hidden")])[0].logprob_R

    rows, item_for_kl = make(shift="kl")
    facts = BatchFacts(num_responses=9)
    result = rows.policy.backward(
        rows.with_counterfactuals([item_for_kl], step=4), objective=rows.objective, facts=facts
    )
    alone = []
    for draw in range(3):
        batch = rows.pack(groups, "shuffled", step=4, draw=draw)
        single = dataclasses.replace(
            item_for_kl,
            counterfactual_hidden_RD={
                "hidden": (rows.policy.hidden_rows([rows.pack(groups, "hidden")])[0],),
                "shuffled": (rows.policy.hidden_rows([batch])[0],),
            },
        )
        found = rows.policy.backward([single], objective=rows.objective, facts=facts)
        alone.append(found.scores[0].kl_of_view["shuffled"])

    lower, item = make(scoring_precision="bf16", num_shuffles=1)
    (rounded,) = lower.with_counterfactuals([item], step=4)
    return {
        "group": item.batch.group_R,
        "shuffled": together.counterfactual_logprob_R["shuffled"],
        "hidden": together.counterfactual_logprob_R["hidden"],
        "draws": torch.stack(draws),
        "hidden alone": hidden,
        "kl": result.scores[0].kl_of_view["shuffled"],
        "kl alone": torch.stack(alone),
        "rounded": rounded.counterfactual_logprob_R,
    }


@pytest.fixture(scope="module")
def found(ranks: RankPool, hf_dir: Path) -> dict[str, Any]:
    return ranks(scored, 1, hf_dir=hf_dir)[0]


def test_several_orders_are_averaged_and_differ(found: dict[str, Tensor]) -> None:
    applies_R = found["group"] != 1
    # 1e-5 nats: the text group is left out, so the packed sums are formed in another order.
    torch.testing.assert_close(found["shuffled"][applies_R], found["draws"].mean(dim=0)[applies_R], atol=1e-5, rtol=0)
    assert (found["draws"][0] - found["draws"][1])[applies_R].abs().max() > 1e-3
    torch.testing.assert_close(found["kl"][applies_R], found["kl alone"].mean(dim=0)[applies_R], atol=1e-5, rtol=0)


def test_groups_without_media_are_left_out_of_the_passes(found: dict[str, Tensor]) -> None:
    is_text_R = found["group"] == 1
    for view in ("shuffled", "hidden"):
        assert found[view][is_text_R].isnan().all() and found[view][~is_text_R].isfinite().all()
    torch.testing.assert_close(found["hidden"][~is_text_R], found["hidden alone"][~is_text_R], atol=1e-5, rtol=0)


def test_bf16_passes_are_close_but_not_the_same(found: dict[str, Any]) -> None:
    is_text_R = found["group"] == 1
    difference = (found["rounded"]["hidden"] - found["hidden"])[~is_text_R].abs()
    # bf16 keeps 8 bits: relative errors of 4e-3 per product, in log-probs of about 5 nats over four layers.
    assert 1e-5 < difference.max() < 0.1


def run_interleaved(context: RankContext, *, hf_dir: Path, sizes: ParallelSizes) -> Any:
    groups = example_groups("mixed", "text", "even", "text", problem_suffix="x")
    groups = [
        dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, problem_id=f"p{index}"))
        for index, group in enumerate(groups)
    ]
    return run_steps(context.init(sizes), hf_dir=hf_dir, rollout_groups=groups)


def test_one_group_with_media_among_interleaved_stages_fills_a_round(ranks: RankPool, hf_dir: Path) -> None:
    """The interleaved schedule takes multiples of the stages only; one shuffled micro-batch is not."""
    expected = ranks(run_interleaved, 1, hf_dir=hf_dir, sizes=ParallelSizes())[0]
    sizes = ParallelSizes(pipeline=2, virtual_pipeline=2)
    nothing = {name: torch.zeros_like(weight) for name, weight in expected[0].weights.items()}
    for records in ranks(run_interleaved, 2, hf_dir=hf_dir, sizes=sizes):
        difference = compare_steps(records, expected, initial=nothing)
        # As in the other layouts: fp32 sums in another order.
        assert difference.loss < 2e-6 and difference.score < 1e-5 and difference.gradient < 1e-4, difference
