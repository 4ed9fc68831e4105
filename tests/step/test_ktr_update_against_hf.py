"""Whole Video-KTR updates against an independent implementation on Hugging Face's logits.

Ours goes through Trainer and Policy: packed groups, three views, one vocabulary pass, megatron-core's backward. The
other side runs every response of every view as a sequence of its own through transformers and applies the formulas
naively (``reference_ktr.py``): full logits, Python loops. What both share are the random inputs, M-RoPE positions
(proven in ``test_mrope.py``) and the drawn frame orders.

Scores are compared with tolerances, masks outside a band around the threshold, loss and gradients with our masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.types import Rollout
from tests.support.hf_updates import Models, gradients_of, published_name, score_responses, with_gradient
from tests.support.parity import max_relative_difference
from tests.support.reference_ktr import ReferenceResponse, ReferenceUpdate, reference_update, token_logprobs
from tests.support.steps import StepRecord, example_groups, run_steps

SCORE_TOLERANCE = 2e-5
"""Log-probs agree to 1e-5 (``test_hf_parity.py``); a shift is a difference of two."""
BAND = 2e-5
"""Scores this near the threshold may fall on either side of it."""
LOSS_TOLERANCE = 1e-5
"""A mean of terms whose log-probs agree to 1e-5. Seen: 3e-8, because ratios are 1 and only the KL term is rounded."""
GRADIENT_TOLERANCE = 1e-4
"""Relative per tensor, as for plain log-probs. Seen: 2e-6."""

NAMES = ("mixed", "text", "long video", "image", "even")
LR = 0.1
FIELDS = {"entropy": "entropy_R", "visual": "logprob/hidden", "temporal": "logprob/shuffled"}
KL_FIELDS = {"visual": "kl/hidden", "temporal": "kl/shuffled"}
ALL = ("entropy", "visual", "temporal")


@dataclass(frozen=True)
class Variant:
    """Our options, and the same in the words of ``reference_update``."""

    values: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)


_BONUS = dict(length_bonus=0.4, length_bonus_min=2, length_bonus_max=4)
VARIANTS = {
    "sequence mean, KL to another reference": Variant(),
    "no KL": Variant(dict(kl_beta=0.0), dict(kl_beta=0.0)),
    "temperature": Variant(dict(temperature=0.7), dict(temperature=0.7)),
    "visual and temporal, own ratios, absolute": Variant(
        dict(signals=("visual", "temporal"), selection_ratio=(0.5, 0.2), shift="absolute"),
        dict(signals=("visual", "temporal"), ratios={"visual": 0.5, "temporal": 0.2}, shift="absolute"),
    ),
    "KL shift": Variant(dict(shift="kl"), dict(shift="kl")),
    "KL shift, visual alone, token mean, temperature": Variant(
        dict(shift="kl", signals=("visual",), loss_aggregation="token", temperature=0.8),
        dict(shift="kl", signals=("visual",), aggregation="token", temperature=0.8),
    ),
    "KL shift, original": Variant(
        dict(shift="kl", original_compat=True, selection_ratio=(0.7,)),
        dict(shift="kl", original_compat=True, ratios=0.7),
    ),
    "shuffled temporal patches": Variant(dict(shuffle_unit="temporal_patch")),
    "length bonus": Variant(_BONUS, dict(length_bonus=(0.4, 2, 4))),
    "token mean": Variant(dict(loss_aggregation="token"), dict(aggregation="token")),
    "token mean, length bonus, temperature": Variant(
        dict(loss_aggregation="token", temperature=1.3, **_BONUS),
        dict(aggregation="token", temperature=1.3, length_bonus=(0.4, 2, 4)),
    ),
    "grpo": Variant(dict(objective="grpo"), dict(signals=())),
    "grpo, token mean": Variant(
        dict(objective="grpo", loss_aggregation="token"), dict(signals=(), aggregation="token")
    ),
    "original: equal scores select all, bonus on key tokens": Variant(
        dict(original_compat=True, selection_ratio=(0.4,), **_BONUS),
        dict(original_compat=True, ratios=0.4, length_bonus=(0.4, 2, 4)),
    ),
    "original: a response without key tokens": Variant(
        dict(original_compat=True, signals=("entropy",), selection_ratio=(0.1,)),
        dict(original_compat=True, signals=("entropy",), ratios=0.1),
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.save(tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reference"))


# The comparison


def _masks(record: StepRecord) -> list[list[Tensor]]:
    return [[torch.tensor(response) for response in record.key_tokens[name]] for name in NAMES]


def _ours(models: Models, ranks: ParallelGroups, values: Mapping[str, Any]) -> StepRecord:
    return run_steps(
        ranks,
        hf_dir=models.policy_dir,
        reference_dir=models.reference_dir,
        rollout_groups=example_groups(*NAMES),
        values={"lr": LR, **values},
    )[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_update_equals_the_independent_one(models: Models, one_rank: ParallelGroups, name: str) -> None:
    variant = VARIANTS[name]
    groups = example_groups(*NAMES)
    options = {"ratios": 0.3, **variant.reference}
    ours = _ours(models, one_rank, variant.values)
    responses = score_responses(models, groups, unit=variant.values.get("shuffle_unit", "frame"))
    scored = reference_update(responses, **options)
    if options.get("signals", ALL):
        _assert_scores(
            ours,
            scored,
            temperature=options.get("temperature", 1.0),
            responses=responses,
            is_kl=options.get("shift") == "kl",
        )
        _assert_masks(ours, scored, ratios=options["ratios"], is_original=options.get("original_compat", False))
    masks = _masks(ours)
    expected = reference_update(with_gradient(models.policy, models.config, groups, responses), masks=masks, **options)
    (update,) = ours.updates
    if "without key tokens" in name:
        assert any(not mask.any() for group in masks for mask in group)
        assert torch.isnan(expected.loss) and update.loss != update.loss
        assert not update.has_stepped, "every weight would be NaN"
        return
    assert update.loss == pytest.approx(float(expected.loss), abs=LOSS_TOLERANCE)
    if options.get("kl_beta", 0.04):
        assert ours.values["kl"] == pytest.approx(expected.kl_mean, abs=LOSS_TOLERANCE)
    tokens = torch.cat([mask for group in masks for mask in group])
    assert ours.values["key_token_ratio"] == pytest.approx(float(tokens.float().mean()), abs=1e-6)
    gradients = gradients_of(models.policy, expected.loss)
    assert max_relative_difference(update.gradients, gradients) <= GRADIENT_TOLERANCE


def _assert_scores(
    ours: StepRecord,
    scored: ReferenceUpdate,
    *,
    temperature: float,
    responses: list[list[ReferenceResponse]],
    is_kl: bool,
) -> None:
    for group_name, group, by_signal in zip(NAMES, responses, scored.scores, strict=True):
        mine = ours.scores[group_name]
        logprobs = [token_logprobs(r.intact, r.token_ids, temperature=temperature) for r in group]
        assert torch.allclose(mine["policy_logprob_R"], torch.cat(logprobs), rtol=0, atol=SCORE_TOLERANCE)
        for signal, values in by_signal.items():
            if values[0] is None:
                continue
            score_R = mine[KL_FIELDS[signal] if is_kl and signal != "entropy" else FIELDS[signal]]
            if signal != "entropy" and not is_kl:
                score_R = mine["policy_logprob_R"] - score_R
                theirs = torch.cat(values)
                # Signed and absolute shifts are compared by magnitude here, by selection below.
                score_R = score_R.abs() if (theirs >= 0).all() else score_R
            assert torch.allclose(score_R, torch.cat(values), rtol=0, atol=SCORE_TOLERANCE), (group_name, signal)


def _assert_masks(
    ours: StepRecord, scored: ReferenceUpdate, *, ratios: float | Mapping[str, float], is_original: bool
) -> None:
    for group_name, by_signal, selected in zip(NAMES, scored.scores, scored.selected, strict=True):
        for signal, values in by_signal.items():
            mine_R, theirs_R = ours.chosen[group_name][signal], torch.cat(selected[signal])
            if values[0] is None:
                assert mine_R.all() if is_original and signal == "visual" else not mine_R.any()
                continue
            pooled = torch.cat(values)
            ratio = ratios if isinstance(ratios, float) else ratios[signal]
            is_clear = (pooled - torch.quantile(pooled, 1 - ratio)).abs() > BAND
            assert torch.equal(mine_R[is_clear], theirs_R[is_clear]), (group_name, signal)
            # The responses' first tokens share one predicting row, so up to three equal entropies lie in the band.
            assert is_clear.float().mean() > 0.6, "too many scores are in the band"


def test_an_update_of_t_grpo_equals_the_independent_one_and_shuffled_responses_do_not_move_it(
    models: Models, one_rank: ParallelGroups
) -> None:
    """By hand, with margin 0.9: "mixed" has p = 1/3 against 0 and pays its correct response 0.3; "long video" has p =
    2.5/3 against 1 and pays nobody; the others were not asked twice."""
    accuracies = {"mixed": (0.0, 0.0), "long video": (1.0,)}
    groups = [
        dataclasses.replace(
            group, shuffled=tuple(Rollout((5, 6), rewards={"accuracy": a}) for a in accuracies.get(name, ()))
        )
        for name, group in zip(NAMES, example_groups(*NAMES), strict=True)
    ]
    values = dict(objective="t_grpo", temporal_margin=0.9, lr=LR)
    places = dict(hf_dir=models.policy_dir, reference_dir=models.reference_dir)
    (ours,) = run_steps(one_rank, rollout_groups=groups, values=values, **places)
    responses = score_responses(models, groups)
    responses = with_gradient(models.policy, models.config, groups, responses)
    responses[0][0] = dataclasses.replace(responses[0][0], reward=responses[0][0].reward + 0.3)
    masks = [[torch.ones(len(response.token_ids), dtype=torch.bool) for response in group] for group in responses]
    expected = reference_update(responses, ratios=0.3, signals=(), masks=masks)
    (update,) = ours.updates
    assert update.loss == pytest.approx(float(expected.loss), abs=LOSS_TOLERANCE)
    assert max_relative_difference(update.gradients, gradients_of(models.policy, expected.loss)) <= GRADIENT_TOLERANCE
    found = {name: ours.values[name] for name in ours.values if name.startswith(("shuffled/", "temporal_rule"))}
    wanted = {"prompts": 2, "tokens": 6, "response_length": 2, "accuracy": 1 / 3, "token_share": 6 / 68}
    wanted = {f"shuffled/{name}": value for name, value in wanted.items()}
    assert found == pytest.approx({**wanted, "shuffled/seconds_alone": 0.0, "temporal_rule": 0.5})
    assert ours.values["reward/temporal_bonus"] == pytest.approx(0.3 / 15)


def test_key_token_lengths_of_the_original_change_the_numbers(models: Models, one_rank: ParallelGroups) -> None:
    """Otherwise the variants above would agree whether they are served or ignored."""
    original = VARIANTS["original: equal scores select all, bonus on key tokens"].values
    ours = _ours(models, one_rank, {**original, "original_compat": False})
    theirs = _ours(models, one_rank, original)
    assert ours.values["reward/length_bonus"] != theirs.values["reward/length_bonus"]
    assert ours.values["response_length"] != theirs.values["response_length"]


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_second_update_on_the_same_rollouts_is_clipped_and_keeps_the_selection(
    models: Models, one_rank: ParallelGroups, aggregation: str
) -> None:
    """The first update moves the weights by SGD; the second takes ratios to the first policy, clipped unevenly."""
    rate, clip = 0.3, (0.05, 0.1)
    values = dict(updates_per_rollout=2, lr=rate, clip_low=clip[0], clip_high=clip[1], loss_aggregation=aggregation)
    ours = _ours(models, one_rank, values)
    groups, masks = example_groups(*NAMES), _masks(ours)
    responses = score_responses(models, groups)
    options = dict(ratios=0.3, clip=clip, aggregation=aggregation, masks=masks)

    first = reference_update(with_gradient(models.policy, models.config, groups, responses, old=True), **options)
    gradients = gradients_of(models.policy, first.loss)
    moved = HFModel(models.policy.config).eval()
    moved.load_state_dict(models.policy.state_dict())
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter -= rate * gradients[published_name(name)]
    again = with_gradient(moved, models.config, groups, responses, old=True)
    second = reference_update(again, **options)

    assert len(ours.updates) == 2
    for update, expected, model in zip(ours.updates, (first, second), (models.policy, moved), strict=True):
        assert update.loss == pytest.approx(float(expected.loss), abs=LOSS_TOLERANCE)
        found = gradients if model is models.policy else gradients_of(moved, expected.loss)
        assert max_relative_difference(update.gradients, found) <= GRADIENT_TOLERANCE
    ratios, clipped = _clipped(again, masks, first.advantages, clip)
    assert 0.1 < clipped < 0.9, "both clipped and free tokens are needed"
    assert ours.values["clip_ratio"] == pytest.approx(clipped, abs=1e-6)
    for bound in (1 - clip[0], 1 + clip[1]):
        assert float((ratios - bound).abs().min()) > 1e-5, "a ratio at the bound could fall on either side"


def _clipped(
    responses: list[list[ReferenceResponse]], masks: list[list[Tensor]], advantages: list[list[float]], clip: tuple
) -> tuple[Tensor, float]:
    """Ratios of the key tokens, and the share of them whose gain is cut."""
    ratios, cut = [], []
    for group, keys, weights in zip(responses, masks, advantages, strict=True):
        for response, is_key, advantage in zip(group, keys, weights, strict=True):
            new, old = (token_logprobs(x, response.token_ids).detach() for x in (response.intact, response.old_policy))
            for ratio in (new - old).exp()[is_key]:
                ratios.append(ratio)
                cut.append(advantage > 0 and ratio > 1 + clip[1] or advantage < 0 and ratio < 1 - clip[0])
    return torch.stack(ratios), sum(map(bool, cut)) / len(cut)
