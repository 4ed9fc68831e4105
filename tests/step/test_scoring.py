"""Passes without gradient: several random orders are averaged, groups a view does not apply to are left out, lower
precision stays close, and the noise of scores is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_ktr.config.part_options import PolicyOptions, StepOptions
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.types import BatchFacts, ScoredBatch
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

    noise = {"fp32": floors_of(*make()), "bf16": floors_of(*make(params_dtype="bf16"))}
    noise["bf16, kl"] = floors_of(*make(params_dtype="bf16", shift="kl", num_shuffles=1))
    noise["nearly still"] = nearly_still(*make(params_dtype="bf16", num_shuffles=1, min_shift="auto"))

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
        "noise": noise,
    }


def floors_of(scoring: Any, item: Any) -> dict[str, dict[str, float]]:
    """The floors by signal, and those where the second pass has the pack of the first; and the metrics."""
    import megatron_ktr.step.noise as noise
    from megatron_ktr.batch.micro_batch import MicroBatch

    options = dataclasses.replace(
        scoring.options, objective=dataclasses.replace(scoring.options.objective, noise_every=3)
    )
    (item,) = scoring.with_counterfactuals([item], step=4)
    found = {}
    for name, shift in (("other pack", noise.POSITION_SHIFT), ("same pack", 0)):
        # One group in a micro-batch: without the shift of positions nothing is left of the other pack.
        parts = [(scoring.pack([group], "intact"), group) for group in item.groups] if shift == 0 else []
        items = scoring.with_counterfactuals([MicroBatch((group,), batch) for batch, group in parts], step=4) or [item]
        meter = noise.NoiseMeter(
            options=options, policy=scoring.policy, objective=scoring.objective, media=scoring.media
        )
        with mock.patch.object(noise, "POSITION_SHIFT", shift):
            meter.measure(items, step=4)
            found[name] = dict(meter.floors)
            found[f"{name}, metrics"] = meter.take_values()
            meter.measure(items, step=5)
            assert meter.take_values() == {}, "it is due again at step 7 only"
    return found


def nearly_still(scoring: Any, item: Any) -> dict[str, Any]:
    """How many tokens the temporal signal selects in a video whose frames differ by a level in some pixels, with and
    without the measured noise as the least score."""
    from megatron_ktr.batch.micro_batch import MicroBatch
    from megatron_ktr.step.noise import NoiseMeter

    (group,) = example_groups("long video")
    (medium,) = group.prompt.media
    generator = torch.Generator().manual_seed(0)
    change = torch.randint(0, 8, medium.frames_FCHW.shape, generator=generator, dtype=torch.uint8) == 0
    still = medium.frames_FCHW[:1].clamp(max=254) + change
    media = (dataclasses.replace(medium, frames_FCHW=still),)
    group = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, media=media))
    # Beside it are videos that move: the floor is that of all tokens of the step.
    items = scoring.with_counterfactuals([MicroBatch((group,), scoring.pack([group], "intact")), item], step=4)
    options = dataclasses.replace(
        scoring.options, objective=dataclasses.replace(scoring.options.objective, noise_every=1)
    )
    meter = NoiseMeter(options=options, policy=scoring.policy, objective=scoring.objective, media=scoring.media)
    meter.measure(items, step=4)
    ((scored, scores), _) = scoring.policy.score_intact(items, objective=scoring.objective)
    batch = ScoredBatch(scored.batch, scores, scored.groups)
    found = {}
    for name, floor in (("paper", dict.fromkeys(meter.floors, -100.0)), ("auto", meter.floors)):
        (selection,) = scoring.objective.select([batch], BatchFacts(num_responses=3, noise_floor=floor))
        found[name] = {signal: int(mask_R.sum()) for signal, mask_R in selection.by_signal.items()}
    return {**found, "largest": (scores.policy_logprob_R - scores.logprob_of_view["shuffled"]).max(), **meter.floors}


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


def test_noise_is_that_of_two_intact_passes(found: dict[str, Any]) -> None:
    noise = found["noise"]
    assert set(noise["fp32"]["same pack"].values()) == {0.0}, "the same pack in fp32 has the same bits"
    assert noise["fp32"]["other pack"].keys() == noise["bf16"]["other pack"].keys() == {"entropy", "visual", "temporal"}
    assert 0 < max(noise["fp32"]["other pack"].values()) < 1e-4
    for precision in ("bf16", "bf16, kl"):
        floors, metrics = noise[precision]["other pack"], noise[precision]["other pack, metrics"]
        # bf16 keeps 8 bits; the KL of two distributions goes with the square of their difference.
        assert all((1e-6 if "kl" in precision else 1e-4) < floor < 0.3 for floor in floors.values())
        assert metrics["noise_floor/visual"] == floors["visual"] and metrics["signal_to_noise/visual"] > 2
    assert noise["bf16, kl"]["other pack"]["visual"] < noise["bf16"]["other pack"]["visual"]
    assert "signal_to_noise/visual" not in noise["fp32"]["same pack, metrics"], "without noise there is no ratio"


def test_a_video_that_hardly_moves_selects_nothing_above_its_noise(found: dict[str, Any]) -> None:
    still = found["noise"]["nearly still"]
    assert 0 < still["largest"] < still["temporal"]
    assert still["paper"]["temporal"] > 0 and still["auto"]["temporal"] == 0
    assert still["auto"]["visual"] > 0 and still["auto"]["entropy"] == still["paper"]["entropy"]


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
    # Views of new pixels, and the noise, go through the same stages.
    values = {"visual_view": "patches", "temporal_view": "reversed", "noise_every": 1, "min_shift": 1e-3}
    return run_steps(context.init(sizes), hf_dir=hf_dir, rollout_groups=groups, values=values)


def test_one_group_with_media_among_interleaved_stages_fills_a_round(ranks: RankPool, hf_dir: Path) -> None:
    """The interleaved schedule takes multiples of the stages only; one shuffled micro-batch is not."""
    expected = ranks(run_interleaved, 1, hf_dir=hf_dir, sizes=ParallelSizes())[0]
    sizes = ParallelSizes(pipeline=2, virtual_pipeline=2)
    nothing = {name: torch.zeros_like(weight) for name, weight in expected[0].weights.items()}
    for records in ranks(run_interleaved, 2, hf_dir=hf_dir, sizes=sizes):
        difference = compare_steps(records, expected, initial=nothing)
        # As in the other layouts: fp32 sums in another order.
        assert difference.loss < 2e-6 and difference.score < 1e-5 and difference.gradient < 1e-4, difference
        assert 0 < records[0].values["noise_floor/visual"] < 1e-4, "every stage knows what the last one measured"
