"""Objectives from scores to loss: against an independent implementation on full logits, and in corner cases."""

from __future__ import annotations

import dataclasses
import math
import types

import pytest
import torch

from megatron_ktr.batch.packing import pack_groups, plan_micro_batches
from megatron_ktr.config.sections import ObjectiveSection, RewardSection
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import build_objective
from megatron_ktr.objectives.bonuses.length import LengthBonus
from megatron_ktr.sums import Metrics
from megatron_ktr.types import BatchFacts, Rollout, ScoredBatch, Selection, TokenScores
from tests.support.groups import MEDIA, group_of, image, video
from tests.support.objectives import grpo, video_ktr
from tests.support.reference_ktr import ReferenceResponse, reference_update

VOCAB_SIZE = 12


class Case:
    """Random groups with random logits, as the packed batch sees them and as the reference does."""

    def __init__(self, seed, *, clipped=False):
        generator = torch.Generator().manual_seed(seed)

        def logits(length):
            return torch.randn(length, VOCAB_SIZE, generator=generator)

        media = [[video(8)], [image()], [], [video(4), image()], [video(2)]]
        self.groups, self.reference = [], []
        for index, of_group in enumerate(media):
            rollouts, responses = [], []
            for _ in range(4):
                length = int(torch.randint(1, 12, (), generator=generator))
                tokens = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
                accuracy = float(torch.rand((), generator=generator) < 0.6)
                format_reward = float(torch.rand((), generator=generator))
                rollouts.append(
                    Rollout(token_ids=tuple(tokens), rewards={"accuracy": accuracy, "format": format_reward})
                )
                intact = logits(length)
                responses.append(
                    ReferenceResponse(
                        token_ids=tokens,
                        intact=intact.requires_grad_(),
                        hidden=logits(length) if of_group else None,
                        shuffled=logits(length) if index in (0, 3) else None,
                        reference=intact.detach() + 0.3 * logits(length),
                        old_policy=intact.detach() + 0.3 * logits(length) if clipped else None,
                        reward=accuracy + format_reward,
                        accuracy=accuracy,
                    )
                )
            group = group_of(5, *of_group, responses=[r.token_ids for r in rollouts], problem_id=str(index))
            self.groups.append(dataclasses.replace(group, rollouts=tuple(rollouts)))
            self.reference.append(responses)

    @property
    def num_responses(self):
        return sum(len(group) for group in self.reference)

    def loss(self, objective, *, groups_per_micro_batch=5, selected=None):
        """Sum over micro-batches, as the policy would run them; also streams and metrics."""
        metrics, total, all_streams = Metrics(), torch.zeros(()), []
        parts = plan_micro_batches(range(len(self.groups)), groups_per_micro_batch=groups_per_micro_batch)
        prepared = [self._prepare([self.groups[i] for i in part], [self.reference[i] for i in part]) for part in parts]
        items = [ScoredBatch(batch, scores, groups) for batch, scores, groups, _ in prepared]
        facts = BatchFacts(num_responses=self.num_responses)
        selections = objective.select(items, facts)
        num_tokens = sum(objective.num_loss_tokens(i.batch, s) for i, s in zip(items, selections, strict=True))
        facts = dataclasses.replace(facts, num_tokens=num_tokens)
        for item, (_, scores, _, logprob_R) in zip(items, prepared, strict=True):
            streams = objective.token_streams(item, facts, selection=selected and Selection.union(selected))
            loss, found = objective.loss(types.SimpleNamespace(logprob_R=logprob_R), streams, scores)
            total = total + loss
            metrics.merge(found)
            all_streams.append(streams)
        return total, all_streams, metrics

    def gradient(self, loss):
        return torch.cat(torch.autograd.grad(loss, [response.intact for group in self.reference for response in group]))

    @staticmethod
    def _prepare(groups, reference):
        batch = pack_groups(groups, view="intact", media=MEDIA)
        responses = [response for group in reference for response in group]

        def logprob(name):
            rows = torch.cat(
                [r.intact if getattr(r, name) is None else getattr(r, name) for r in responses]
            ).log_softmax(-1)
            return rows.gather(1, batch.target_ids_R[:, None])[:, 0]

        rows = torch.cat([response.intact for response in responses]).log_softmax(-1).detach()
        logprob_R = logprob("intact")
        scores = TokenScores(
            policy_logprob_R=logprob_R.detach(),
            entropy_R=-(rows.exp() * rows).sum(-1),
            # Where nothing can be hidden or shuffled the other views see the same input, up to rounding.
            logprob_of_view={
                view: logprob(view).detach() + 1e-6 * torch.randn(len(logprob_R)) for view in ("hidden", "shuffled")
            },
            reference_logprob_R=logprob("reference"),
            behaviour_logprob_R=logprob("old_policy").detach() if responses[0].old_policy is not None else None,
        )
        return batch, scores, groups, logprob_R


SETTINGS = {
    "grpo": (grpo(), dict(signals=())),
    "grpo, token mean": (grpo(aggregation="token"), dict(signals=(), aggregation="token")),
    "grpo, no kl, length bonus": (
        grpo(kl_beta=0.0, length_bonus=LengthBonus(0.2, 3, 8)),
        dict(signals=(), kl_beta=0.0, length_bonus=(0.2, 3, 8)),
    ),
    "video_ktr": (video_ktr(), {}),
    "video_ktr, entropy only": (video_ktr(key_tokens=dict(signals=("entropy",))), dict(signals=("entropy",))),
    "video_ktr, temporal only": (video_ktr(key_tokens=dict(signals=("temporal",))), dict(signals=("temporal",))),
    "video_ktr, absolute, own ratios": (
        video_ktr(key_tokens=dict(signals=("visual", "temporal"), shift="absolute", selection_ratio=(0.5, 0.1))),
        dict(signals=("visual", "temporal"), shift="absolute", ratios={"visual": 0.5, "temporal": 0.1}),
    ),
    "video_ktr, token mean, length bonus": (
        video_ktr(aggregation="token", length_bonus=LengthBonus(0.2, 3, 8)),
        dict(aggregation="token", length_bonus=(0.2, 3, 8)),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("clipped", [False, True])
def test_update_equals_the_independent_implementation(name, clipped):
    objective, options = SETTINGS[name]
    case = Case(seed=len(name), clipped=clipped)
    expected = reference_update(case.reference, **options)
    loss, (streams,), metrics = case.loss(objective)
    keys = torch.cat([mask for group in expected.key_tokens for mask in group])
    assert torch.equal(streams.is_key_token_R, keys)
    assert 0 < keys.float().mean() and (name.startswith("grpo") or keys.float().mean() < 1)
    for signal in options.get("signals", ("entropy", "visual", "temporal")):
        mask = torch.cat([mask for group in expected.selected for mask in group[signal]])
        assert torch.equal(streams.is_selected_R[signal], mask), signal
    # fp32 sums of at most 150 terms of order one, in another order.
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(case.gradient(loss), case.gradient(expected.loss), rtol=1e-4, atol=1e-7)
    assert metrics.means()["key_token_ratio"] == pytest.approx(keys.float().mean().item())
    if options.get("kl_beta", 0.04):
        # fp32 again.
        assert metrics.means()["kl"] == pytest.approx(expected.kl_mean, rel=1e-4)


@pytest.mark.parametrize("name", ["grpo", "video_ktr", "video_ktr, token mean, length bonus"])
def test_loss_adds_up_over_any_split_into_micro_batches(name):
    objective, _ = SETTINGS[name]
    case = Case(seed=3)
    whole, _, whole_metrics = case.loss(objective)
    whole_gradient = case.gradient(whole)
    for size in (1, 2, 3):
        parts, _, metrics = case.loss(objective, groups_per_micro_batch=size)
        # fp32 sums in another order.
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(case.gradient(parts), whole_gradient, rtol=1e-4, atol=1e-7)
        assert metrics.means() == pytest.approx(whole_metrics.means(), rel=1e-5)


def test_injected_selection_is_used_as_it_is():
    case = Case(seed=5)
    num_tokens = sum(group.num_response_tokens for group in case.groups)
    masks = {"entropy": torch.arange(num_tokens) % 3 == 0, "visual": torch.arange(num_tokens) % 5 == 0}
    key_R = masks["entropy"] | masks["visual"]
    lengths = [[len(response.token_ids) for response in group] for group in case.reference]
    pieces = iter(key_R.split([length for group in lengths for length in group]))
    expected = reference_update(case.reference, masks=[[next(pieces) for _ in group] for group in lengths])
    loss, (streams,), _ = case.loss(video_ktr(), selected=masks)
    assert torch.equal(streams.is_key_token_R, key_R)
    # fp32 sums in another order.
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)


def two_responses(*, lengths=(2, 2), compat=False, bonus=None, selected=None, accuracies=(1.0, 1.0)):
    """Streams of a group of two responses with rewards 1 and 0 beside their accuracies, given the key tokens."""
    group = group_of(1, video(4), responses=[[3] * length for length in lengths])
    rollouts = tuple(
        dataclasses.replace(rollout, rewards={"accuracy": accuracy, "format": extra})
        for rollout, accuracy, extra in zip(group.rollouts, accuracies, (1.0, 0.0), strict=True)
    )
    group = dataclasses.replace(group, rollouts=rollouts)
    batch = pack_groups([group], view="intact", media=MEDIA)
    scores = TokenScores(policy_logprob_R=torch.zeros(sum(lengths)))
    objective = video_ktr(kl_beta=0.0, length_bonus=bonus, original_compat=compat)
    selection = Selection.union({"visual": torch.tensor(selected)})
    streams = objective.token_streams(ScoredBatch(batch, scores, [group]), BatchFacts(2), selection=selection)
    logprob_R = torch.full((sum(lengths),), -1.0, requires_grad=True)
    loss, metrics = objective.loss(types.SimpleNamespace(logprob_R=logprob_R), streams, scores)
    return streams, loss, metrics.means()


def test_response_without_key_token_adds_zero_but_counts_in_the_mean():
    streams, loss, _ = two_responses(selected=[True, False, False, False])
    assert streams.weight_R.tolist() == [0.5, 0, 0, 0]
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    # fp32 rounding.
    assert loss.item() == pytest.approx(-0.5 * advantage, abs=1e-6)


def test_original_compat_divides_by_zero_where_a_response_has_no_key_token():
    streams, loss, metrics = two_responses(compat=True, selected=[True, False, False, False])
    assert math.isnan(loss.item()) and metrics["responses_without_key_tokens"] == 0.5
    objective = video_ktr(original_compat=True)
    assert "1 responses have no key token" in objective.reason_to_skip(streams.metrics)
    streams, loss, _ = two_responses(compat=True, selected=[True, False, True, False])
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    assert objective.reason_to_skip(streams.metrics) is None, "another NaN must stop the run"


def test_original_compat_counts_key_tokens_in_length_and_length_bonus():
    selected = [True, False, False, True, True]
    bonus = LengthBonus(bonus=0.5, min_length=3, max_length=4)
    ours, _, metrics = two_responses(lengths=(3, 2), bonus=bonus, selected=selected)
    assert metrics["reward/length_bonus"] == pytest.approx(0.25) and metrics["response_length"] == 2.5
    theirs, _, metrics = two_responses(lengths=(3, 2), bonus=bonus, selected=selected, compat=True)
    assert metrics["reward/length_bonus"] == 0.0 and metrics["response_length"] == 1.5
    # Rewards (2.5, 1) against (2, 1).
    expected = [0.75 / (1.5 * math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)]
    # fp32 rounding.
    assert [ours.advantage_R[0].item(), theirs.advantage_R[0].item()] == pytest.approx(expected, abs=1e-6)


def test_length_bonus_without_accuracy_is_refused():
    group = group_of(1, responses=[[3], [4]])
    objective = grpo(length_bonus=LengthBonus())
    batch = pack_groups([group], view="intact", media=MEDIA)
    scores = TokenScores(policy_logprob_R=torch.zeros(2))
    with pytest.raises(UserError, match="length_bonus needs the reward part 'accuracy'"):
        objective.token_streams(ScoredBatch(batch, scores, [group]), BatchFacts(2))


def test_text_prompt_keeps_entropy_tokens_only():
    group = group_of(1, responses=[[3] * 5, [4] * 5])
    batch = pack_groups([group], view="intact", media=MEDIA)
    noise = 1e-6 * torch.randn(10)
    scores = TokenScores(
        policy_logprob_R=torch.zeros(10),
        entropy_R=torch.arange(10.0),
        logprob_of_view={"hidden": noise, "shuffled": noise},
    )
    (selected,) = video_ktr().select([ScoredBatch(batch, scores, [group])], BatchFacts(2))
    assert {signal: int(mask.sum()) for signal, mask in selected.by_signal.items()} == {
        "entropy": 2,
        "visual": 0,
        "temporal": 0,
    }


def test_objectives_say_what_they_need():
    assert video_ktr().views == {"hidden", "shuffled"} and video_ktr().needs_reference
    assert video_ktr(key_tokens=dict(signals=("visual",))).views == {"hidden"}
    assert video_ktr(key_tokens=dict(signals=("entropy",))).views == frozenset()
    assert grpo().views == frozenset() and not grpo(kl_beta=0.0).needs_reference
    by_token = grpo(aggregation="token")
    assert not by_token.needs_selection_first and video_ktr(aggregation="token").needs_selection_first
    assert video_ktr(aggregation="token").num_loss_tokens(None, None) == 0


def test_registry_builds_the_published_settings_by_default():
    objective = build_objective(ObjectiveSection(), reward=RewardSection())
    assert objective == video_ktr(length_bonus=LengthBonus())
    section = dataclasses.replace(ObjectiveSection(), objective="grpo", kl_beta=0.0)
    assert build_objective(section, reward=dataclasses.replace(RewardSection(), length_bonus=0)) == grpo(kl_beta=0.0)
    section = dataclasses.replace(ObjectiveSection(), signals=("temporal", "entropy"), selection_ratio=(0.3, 0.1))
    assert build_objective(section).selection.rules.ratio_of == {"temporal": 0.3, "entropy": 0.1}


def test_unknown_objective_and_bad_settings_are_user_errors():
    with pytest.raises(UserError, match="unknown objective 'vidio_ktr'.*did you mean video_ktr"):
        build_objective(dataclasses.replace(ObjectiveSection(), objective="vidio_ktr"))
    with pytest.raises(UserError, match="signals"):
        build_objective(dataclasses.replace(ObjectiveSection(), signals=()))
    with pytest.raises(UserError, match="selection_ratio"):
        build_objective(dataclasses.replace(ObjectiveSection(), selection_ratio=(1.5,)))
    with pytest.raises(UserError, match="length_bonus_min"):
        build_objective(
            ObjectiveSection(), reward=dataclasses.replace(RewardSection(), length_bonus_min=9, length_bonus_max=8)
        )
