"""Published policy gradients, in two mini-batches, against their formulas on Hugging Face's logits.

Ours goes through Trainer and Policy: one rollout, a pass for the old policy, an optimizer step for each mini-batch. The
other side (``reference_algorithms.py``) makes both updates by hand: the first from the initial weights, where every
ratio is 1, then one step of SGD, then the second from the moved weights with ratios to the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from megatron_ktr.distributed.groups import ParallelGroups
from tests.support.hf_updates import Models, gradients_of, published_name, score_responses, with_gradient
from tests.support.parity import max_relative_difference
from tests.support.reference_algorithms import Algorithm, rollout_advantages, update_loss
from tests.support.reference_ktr import ReferenceResponse
from tests.support.steps import example_groups, run_steps

NAMES = ("mixed", "text", "long video", "even")
"""The rewards of "even" are equal: a batch advantage is not zero there."""
RATE = 0.3
LOSS_TOLERANCE = 1e-5
"""A mean of terms of order one whose log-probs agree to 1e-5."""
GRADIENT_TOLERANCE = 2e-4
"""Relative per tensor, as for plain log-probs; the second update's old log-probs are rounded as well."""


@dataclass(frozen=True)
class Variant:
    """Our options, and the same in the words of ``Algorithm``."""

    values: dict[str, Any]
    algorithm: Algorithm
    clips: bool = True
    """Whether the second update clips some ratios and leaves others."""


VARIANTS = {
    "gspo": Variant(
        dict(objective="gspo", clip_low=0.02, clip_high=0.02, kl_beta=0.0),
        Algorithm(ratio="sequence", clip=(0.02, 0.02)),
    ),
    "cispo": Variant(
        dict(objective="cispo", ratio_cap=1.02, kl_beta=0.0), Algorithm(ratio="cispo", cap=1.02, mean="token")
    ),
    "dapo": Variant(
        dict(objective="dapo", kl_beta=0.0, clip_low=0.02, clip_high=0.03), Algorithm(mean="token", clip=(0.02, 0.03))
    ),
    "reinforce_pp_baseline": Variant(
        dict(objective="reinforce_pp_baseline", kl_beta=0.1),
        Algorithm("batch_baseline", mean="token", beta=0.1, kl="k2"),
        clips=False,
    ),
    "rloo, full KL": Variant(
        dict(objective="rloo", kl_beta=0.05, kl_kind="full", max_response_length=9),
        Algorithm(advantage="leave_one_out", mean="constant", constant=9, beta=0.05, kl="full", kl_in_reward=True),
        clips=False,
    ),
    "reinforce_pp over tokens": Variant(
        dict(objective="reinforce_pp", kl_beta=0.1, advantage_over="tokens", clip_low=0.02, clip_high=0.03),
        Algorithm("batch", "tokens", mean="token", beta=0.1, kl="k1", kl_in_reward=True, clip=(0.02, 0.03)),
    ),
    "dr_grpo, full KL, dual clip": Variant(
        dict(objective="dr_grpo", loss_constant=20, kl_beta=0.1, kl_kind="full", dual_clip=1.02),
        Algorithm("group_mean", mean="constant", constant=20, beta=0.1, kl="full", dual=1.02),
    ),
    "key tokens, terms over all tokens": Variant(
        dict(
            objective="video_ktr",
            loss_aggregation="token",
            masked_denominator="all",
            kl_on="all",
            kl_kind="k3_plus",
            entropy_bonus=0.02,
            sampled_entropy_penalty=0.06,
        ),
        Algorithm(
            mean="token", counted="all", beta=0.04, kl="k3_plus", kl_on="all", entropy_bonus=0.02, sampled_entropy=0.06
        ),
        clips=False,
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.save(tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def responses(models: Models) -> list[list[ReferenceResponse]]:
    return score_responses(models, example_groups(*NAMES))


@pytest.mark.parametrize("name", VARIANTS)
def test_two_mini_batches_are_two_updates_made_by_hand(
    models: Models, responses: list[list[ReferenceResponse]], one_rank: ParallelGroups, name: str
) -> None:
    variant = VARIANTS[name]
    groups, a = example_groups(*NAMES), variant.algorithm
    (ours,) = run_steps(
        one_rank,
        hf_dir=models.policy_dir,
        reference_dir=models.reference_dir,
        rollout_groups=groups,
        values={"lr": RATE, "lr_decay_style": "linear", "min_lr": 0.0, "mini_batches": 2, **variant.values},
    )
    masks = [[torch.tensor(response) for response in ours.key_tokens[of]] for of in NAMES]
    advantages = rollout_advantages(responses, a)

    model = models.policy
    for index, update in enumerate(ours.updates):
        part = slice(2 * index, 2 * index + 2)
        known = with_gradient(model, models.config, groups[part], responses[part], old=True)
        loss = update_loss(known, advantages[part], masks[part], a)
        gradients = gradients_of(model, loss)
        assert update.loss == pytest.approx(float(loss.detach()), abs=LOSS_TOLERANCE)
        assert max_relative_difference(update.gradients, gradients) <= GRADIENT_TOLERANCE
        model = _moved(model, gradients)
    assert len(ours.updates) == 2
    # The schedule of ten updates has counted both. (Only the second one's gradient is compared, not what it moves.)
    assert ours.values["learning_rate"] == pytest.approx(RATE * (1 - 2 / 10))
    assert ours.values["loss"] == pytest.approx(sum(update.loss for update in ours.updates) / 2, rel=1e-6)
    if variant.clips:
        # The first update clips nothing.
        assert 0.05 < ours.values["clip_ratio"] < 0.5


def _moved(model: HFModel, gradients: dict[str, torch.Tensor]) -> HFModel:
    """The model after one step of SGD."""
    moved = HFModel(model.config).eval()
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter -= RATE * gradients[published_name(name)]
    return moved
