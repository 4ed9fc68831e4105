"""Updates of VPPO, 80/20 and soft weights against independent formulas on Hugging Face's logits, in fp32.

As in ``test_ktr_update_against_hf.py``: ours goes through Trainer and Policy, the other side is
``reference_selection.py``. Both share the random inputs, which include the patches that the view blackens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.attribution.views.base import ViewDraw
from megatron_ktr.config.objective_registry import objective_entry
from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.config.view_registry import load_view
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.types import RolloutGroup, VisualInput
from models.qwen2_5_vl.media import media_spec
from tests.support.hf_updates import Models, gradients_of, score_responses, with_gradient
from tests.support.parity import max_relative_difference
from tests.support.reference_selection import (
    advantage_factors,
    dependence,
    entropies,
    masked_loss,
    top_share,
)
from tests.support.steps import StepRecord, example_groups, run_steps

NAMES = ("mixed", "text", "long video", "image")
BAND = 2e-5
"""Scores this near to one another may be ranked either way: log-probs agree to 1e-5."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 2e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.save(tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reference"))


def _ours(models: Models, ranks: ParallelGroups, **values: Any) -> StepRecord:
    (record,) = run_steps(
        ranks, hf_dir=models.policy_dir, rollout_groups=example_groups(*NAMES), values={"lr": 0.1, **values}
    )
    return record


def _preset(models: Models, ranks: ParallelGroups, objective: str, **values: Any) -> StepRecord:
    """An objective as its entry sets it (``run_steps`` has defaults of its own), in several micro-batches."""
    chosen = {**objective_entry(objective).defaults, **values, "max_tokens_per_microbatch": 60}
    return _ours(models, ranks, objective=objective, **chosen)


def _masks(record: StepRecord) -> list[list[Tensor]]:
    return [[torch.tensor(response) for response in record.key_tokens[name]] for name in NAMES]


@pytest.mark.parametrize(("kind", "view"), [("kl", "patches"), ("k3", "hidden")])
def test_vppo_equals_the_independent_one(models: Models, one_rank: ParallelGroups, kind: str, view: str) -> None:
    groups = example_groups(*NAMES)
    sizes = media_spec(models.config, patchify=PreprocessSettings().patchify)

    def media_of(group: RolloutGroup) -> tuple[VisualInput, ...]:
        draw = ViewDraw(ObjectiveSection(visual_view=view), sizes=sizes, seed=0, step=0)
        return load_view(view).shown(group.prompt, draw)

    ours = _preset(models, one_rank, "vppo", dependence=kind, visual_view=view)
    assert ours.updates[0].num_micro_batches > 1, "alpha is compared over micro-batches"
    responses = score_responses(models, groups, visual_view=media_of)
    scores = [[dependence(response, kind) for response in group] for group in responses]
    masks, num_clear = _masks(ours), 0
    for of_group, own in zip(scores, masks, strict=True):
        for values, mask in zip(of_group, own, strict=True):
            expected, gap = top_share(values, 0.4, len(mask))
            num_clear += gap > BAND
            assert gap <= BAND or mask.tolist() == expected
    assert num_clear >= 9, "of twelve responses"
    assert not any(mask.any() for mask in masks[NAMES.index("text")]), "there is nothing to see"

    factors = advantage_factors(scores)
    assert max(map(max, factors)) > 1.01 and min(map(min, factors)) == pytest.approx(0.9)
    assert ours.values["advantage_factor_max"] == pytest.approx(max(map(max, factors)), abs=1e-4)
    known = [value for group in scores for values in group if values is not None for value in values]
    assert ours.values["dependence"] == pytest.approx(sum(known) / len(known), abs=1e-5)
    fresh = with_gradient(models.policy, models.config, groups, responses)
    loss = masked_loss(fresh, masks, factors=factors, sampled_entropy=0.06)
    _assert_update(models, ours, loss)


def test_80_20_equals_the_independent_one(models: Models, one_rank: ParallelGroups) -> None:
    groups = example_groups(*NAMES)
    ours = _preset(models, one_rank, "entropy_80_20")
    assert ours.updates[0].num_micro_batches > 1
    responses = score_responses(models, groups)
    found = torch.cat([entropies(response) for group in responses for response in group])
    threshold = torch.quantile(found, 0.8)
    is_clear = (found - threshold).abs() > BAND
    masks = _masks(ours)
    chosen = torch.cat([mask for group in masks for mask in group])
    assert torch.equal(chosen[is_clear], (found >= threshold)[is_clear]) and is_clear.float().mean() > 0.8
    shares = [torch.cat(group).float().mean() for group in masks]
    assert max(shares) - min(shares) > 0.05, "the threshold is that of the batch, not of each prompt"
    loss = masked_loss(with_gradient(models.policy, models.config, groups, responses), masks)
    _assert_update(models, ours, loss)


def test_soft_weights_equal_the_independent_ones(models: Models, one_rank: ParallelGroups) -> None:
    """n times the softmax of the entropies of each prompt, at a low temperature so that weights differ much."""
    groups = example_groups(*NAMES)
    values = dict(signals=("entropy",), token_weights="softmax", weight_temperature=0.05, kl_beta=0.0)
    ours = _ours(models, one_rank, loss_aggregation="token", **values)
    responses = score_responses(models, groups)
    weights = []
    for group in responses:
        scores = [entropies(response) / 0.05 for response in group]
        softmax = torch.cat(scores).softmax(0) * len(torch.cat(scores))
        weights.append(list(softmax.split([len(own) for own in scores])))
    assert all(mask.all() for group in _masks(ours) for mask in group)
    fresh = with_gradient(models.policy, models.config, groups, responses)
    loss = masked_loss(fresh, _masks(ours), weights=weights)
    assert abs(float(loss) - float(masked_loss(fresh, _masks(ours)))) > 1e-3, "weights act"
    _assert_update(models, ours, loss)


def _assert_update(models: Models, ours: StepRecord, loss: Tensor) -> None:
    (update,) = ours.updates
    assert update.loss == pytest.approx(float(loss.detach()), abs=LOSS_TOLERANCE)
    assert max_relative_difference(update.gradients, gradients_of(models.policy, loss)) <= GRADIENT_TOLERANCE
