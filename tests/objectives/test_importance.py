"""Correction of the sampler's mismatch: by hand, in expectation over every possible sample, and in several layouts."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.batch.micro_batch import MicroBatch
from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.config.sections import ObjectiveSection
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import build_objective
from megatron_ktr.objectives.importance import ImportanceCorrection
from megatron_ktr.sums import Metrics
from megatron_ktr.types import BatchFacts, RolloutGroup, ScoredBatch, Selection, TokenScores, TokenStreams
from tests.support.groups import MEDIA, group_of, video
from tests.support.layouts import sizes_of
from tests.support.objectives import grpo, video_ktr
from tests.support.ranks import RankContext
from tests.support.steps import StepRecord, compare_steps, example_groups, run_steps
from tests.support.tiny import save_tiny_hf

# Worked by hand

RATIOS = [0.5, 4.0, 1.0, 3.0]
"""exp(d_t) of two responses of two tokens; their products are 2 and 3."""
RESPONSE_R = torch.tensor([0, 0, 1, 1])


def corrected(correction: ImportanceCorrection, *, behaviour: bool = False) -> TokenStreams:
    """Streams of advantage 1, -1, 1, -1 and weight 0.25."""
    trainer_R = torch.tensor([-2.0, -3.0, -1.0, -4.0])
    scores = TokenScores(
        policy_logprob_R=trainer_R - 1.5 if behaviour else trainer_R,
        behaviour_logprob_R=trainer_R if behaviour else None,
        sampler_logprob_R=trainer_R - torch.tensor(RATIOS).log(),
    )
    streams = TokenStreams(
        advantage_R=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        weight_R=torch.full((4,), 0.25),
        is_key_token_R=torch.ones(4, dtype=torch.bool),
    )
    return correction.correct(streams, scores, response_R=RESPONSE_R, num_responses=2)


@pytest.mark.parametrize("behaviour", [False, True], ids=["one update", "several updates: the old policy's ratio"])
@pytest.mark.parametrize(
    ("correction", "advantage", "weight", "ratio_mean", "ratio_max", "clipped"),
    [
        (ImportanceCorrection(), [1, -1, 1, -1], [1, 1, 1, 1], 8.5 / 4, 4, 0),
        (ImportanceCorrection("token", cap=2), [0.5, -2, 1, -2], [1, 1, 1, 1], 8.5 / 4, 4, 2 / 4),
        (ImportanceCorrection("sequence", cap=2.5), [2, -2, 2.5, -2.5], [1, 1, 1, 1], 2.5, 3, 2 / 4),
        (ImportanceCorrection(mask=(0.6, 3.5)), [1, -1, 1, -1], [0, 0, 1, 1], 8.5 / 4, 4, 2 / 4),
        (ImportanceCorrection("token", cap=2, mask=(0, 3.5)), [0.5, -2, 1, -2], [1, 0, 1, 1], 8.5 / 4, 4, 2 / 4),
        (ImportanceCorrection("sequence", cap=9, mask=(0.6, 9)), [2, -2, 3, -3], [0, 1, 1, 1], 2.5, 3, 1 / 4),
    ],
)
def test_weights_masks_and_metrics_worked_by_hand(
    correction: ImportanceCorrection, advantage, weight, ratio_mean, ratio_max, clipped, behaviour: bool
) -> None:
    streams = corrected(correction, behaviour=behaviour)
    # 1e-6: logarithms of the ratios in fp32.
    assert streams.advantage_R.tolist() == pytest.approx(advantage, abs=1e-6)
    assert streams.weight_R.tolist() == [0.25 * value for value in weight]
    assert streams.is_key_token_R.all(), "key tokens stay what they are: only the gradient is zero"
    gap = (math.log(2) + math.log(4) + math.log(3)) / 4
    expected = {
        "sampler_trainer_logprob_gap": gap,
        "importance_ratio_mean": ratio_mean,
        "importance_ratio_max": ratio_max,
        "clipped_fraction": clipped,
    }
    assert streams.metrics.means() == pytest.approx(expected, abs=1e-6)


def test_a_hopeless_ratio_is_cut_before_it_overflows() -> None:
    """A thousand tokens that the sampler found a nat less probable each: exp(1000) is no number."""
    num_tokens = 1000
    scores = TokenScores(
        policy_logprob_R=torch.full((2 * num_tokens,), -1.0),
        sampler_logprob_R=torch.cat([torch.full((num_tokens,), -2.0), torch.full((num_tokens,), 0.0)]),
    )
    ones_R = torch.ones(2 * num_tokens)
    streams = TokenStreams(advantage_R=ones_R, weight_R=ones_R, is_key_token_R=ones_R.bool())
    response_R = torch.arange(2).repeat_interleave(num_tokens)
    found = ImportanceCorrection("sequence").correct(streams, scores, response_R=response_R, num_responses=2)
    assert found.advantage_R[0] == 2.0 and found.advantage_R[-1] == 0.0
    assert math.isfinite(found.metrics.means()["importance_ratio_mean"])
    assert found.metrics.means()["importance_ratio_max"] == pytest.approx(math.exp(20))


def test_bad_settings_are_refused() -> None:
    for wrong in (dict(level="tokens"), dict(cap=0.0), dict(mask=(2.0, 1.0)), dict(mask=(1.0,))):
        with pytest.raises(ValueError, match="importance_"):
            ImportanceCorrection(**wrong)
    section = dataclasses.replace(ObjectiveSection(), importance_sampling="sequence", importance_mask=(0.5, 5.0))
    assert build_objective(section).importance == ImportanceCorrection("sequence", cap=2.0, mask=(0.5, 5.0))


# Through the objectives

GROUP = group_of(1, video(4), responses=[[3, 4, 5], [6, 7]])
GROUP = dataclasses.replace(
    GROUP,
    rollouts=tuple(
        dataclasses.replace(rollout, rewards={"accuracy": accuracy})
        for rollout, accuracy in zip(GROUP.rollouts, (1.0, 0.0), strict=True)
    ),
)
LOGPROB = [-1.0, -2.0, -3.0, -0.5, -1.5]
OBJECTIVES = {"grpo": grpo, "video_ktr": video_ktr}


def gradient(
    objective: str,
    correction: ImportanceCorrection,
    *,
    sampler: list[float] | None,
    behaviour: list[float] | None = None,
    kl_beta: float = 0.04,
) -> tuple[Tensor, Metrics, bool]:
    """d loss / d log-prob of ``GROUP``'s five tokens (Video-KTR: 0, 1 and 3 are key tokens), metrics, and whether the
    update says there is one."""
    policy_R = torch.tensor(LOGPROB, requires_grad=True)
    scores = TokenScores(
        policy_logprob_R=policy_R.detach(),
        reference_logprob_R=policy_R.detach() + 0.5 if kl_beta else None,
        behaviour_logprob_R=None if behaviour is None else torch.tensor(behaviour),
        sampler_logprob_R=None if sampler is None else torch.tensor(sampler),
    )
    selection = None
    if objective == "video_ktr":
        selection = Selection.union({"visual": torch.tensor([True, True, False, True, False])})
    built = OBJECTIVES[objective](importance=correction, kl_beta=kl_beta)
    batch = pack_groups([GROUP], view="intact", media=MEDIA)
    streams = built.token_streams(ScoredBatch(batch, scores, [GROUP]), BatchFacts(2), selection=selection)
    loss, metrics = built.loss(SimpleNamespace(logprob_R=policy_R), streams, scores)
    loss.backward()
    return policy_R.grad, metrics, built.any_gradient(streams, scores)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sampler_equal_to_the_trainer_changes_no_bit(objective: str, level: str) -> None:
    correction = ImportanceCorrection(level, mask=(0.5, 2.0))
    plain, before, _ = gradient(objective, ImportanceCorrection(), sampler=None)
    same, after, _ = gradient(objective, correction, sampler=LOGPROB)
    assert plain.any() and torch.equal(same, plain)
    added = {"sampler_trainer_logprob_gap": 0, "importance_ratio_mean": 1, "importance_ratio_max": 1}
    assert after.means() == before.means() | added | {"clipped_fraction": 0}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_weight_multiplies_the_policy_gradient_and_not_the_kl_term(objective: str) -> None:
    sampler = [value - math.log(1.6) for value in LOGPROB]
    without_kl, _, _ = gradient(objective, ImportanceCorrection(), sampler=None, kl_beta=0.0)
    with_kl, _, _ = gradient(objective, ImportanceCorrection(), sampler=None)
    weighted, _, _ = gradient(objective, ImportanceCorrection("token"), sampler=sampler)
    # 1e-6: fp32 rounding of numbers of order one.
    torch.testing.assert_close(weighted, 1.6 * without_kl + (with_kl - without_kl), atol=1e-6, rtol=0)


def test_several_updates_clip_the_ratio_to_the_old_policy_and_weigh_it_by_the_samplers() -> None:
    """Ratio 1.1 is inside its bounds, 1.5 outside for the token of positive advantage; old policy / sampler is 1.6."""
    behaviour = [LOGPROB[0] - math.log(1.5), *(value - math.log(1.1) for value in LOGPROB[1:])]
    sampler = [value - math.log(1.6) for value in behaviour]
    plain, _, _ = gradient("grpo", ImportanceCorrection(), sampler=sampler, behaviour=behaviour, kl_beta=0.0)
    weighted, metrics, _ = gradient(
        "grpo", ImportanceCorrection("token"), sampler=sampler, behaviour=behaviour, kl_beta=0.0
    )
    assert plain[0] == 0.0 and plain[1:].all()
    torch.testing.assert_close(weighted, 1.6 * plain, atol=1e-6, rtol=0)  # fp32 rounding
    assert metrics.means()["importance_ratio_mean"] == pytest.approx(1.6, abs=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masked_tokens_have_exactly_no_gradient_and_the_others_the_one_they_had(objective: str) -> None:
    """Policy gradient and KL term, with the denominators of all tokens."""
    sampler = list(LOGPROB)
    sampler[1] -= 2.0
    plain, before, _ = gradient(objective, ImportanceCorrection(), sampler=None)
    masked, after, has_gradient = gradient(objective, ImportanceCorrection(mask=(0.5, 2.0)), sampler=sampler)
    assert plain[1] != 0 and masked[1] == 0.0 and has_gradient
    plain[1] = 0.0
    assert torch.equal(masked, plain)
    assert after.means()["clipped_fraction"] == 1 / 5
    assert after.means()["key_token_ratio"] == before.means()["key_token_ratio"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_of_masked_tokens_alone_says_that_it_has_no_gradient(objective: str) -> None:
    """Adam would otherwise move the weights by momentum and weight decay, on no evidence."""
    far = [value - 5.0 for value in LOGPROB]
    found, _, has_gradient = gradient(objective, ImportanceCorrection("token", mask=(0.5, 2.0)), sampler=far)
    assert not found.any() and not has_gradient


def test_missing_sampler_logprobs_are_an_error_that_says_what_to_do() -> None:
    for correction in (ImportanceCorrection("token"), ImportanceCorrection(mask=(0.5, 2.0))):
        with pytest.raises(UserError, match="'logprobs'.*--importance-sampling none"):
            gradient("grpo", correction, sampler=None)


def test_micro_batch_hands_over_sampler_logprobs_only_if_every_response_has_them() -> None:
    first, second = (
        dataclasses.replace(rollout, sampler_logprobs=tuple(-1.0 for _ in rollout.token_ids))
        for rollout in GROUP.rollouts
    )
    statistics = SimpleNamespace(
        logprob_R=torch.zeros(5), entropy_R=torch.zeros(5), reference_logprob_R=None, reference_kl_R=None
    )
    for rollouts, is_complete in (((first, second), True), ((first, GROUP.rollouts[1]), False)):
        group = dataclasses.replace(GROUP, rollouts=rollouts)
        item = MicroBatch((group,), pack_groups([group], view="intact", media=MEDIA))
        found = item.scores(statistics).sampler_logprob_R
        assert (found is not None) == is_complete
        assert found is None or found.tolist() == [-1.0] * 5


# In expectation

NUM_ACTIONS = 3


class Policies:
    """Two policies over sequences of two tokens, fp64, and a return of each of the nine sequences."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size = NUM_ACTIONS + NUM_ACTIONS**2
        self.parameters = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        self.stale = self.parameters.detach() + 0.5 * torch.randn(size, generator=generator, dtype=torch.float64)
        self.advantage_S = torch.randn(NUM_ACTIONS**2, generator=generator, dtype=torch.float64)

    @staticmethod
    def logprobs(parameters: Tensor) -> Tensor:
        """[sequences, 2]: of the first token, and of the second given the first."""
        first = parameters[:NUM_ACTIONS].log_softmax(0)
        second = parameters[NUM_ACTIONS:].reshape(NUM_ACTIONS, NUM_ACTIONS).log_softmax(1)
        return torch.stack([first.repeat_interleave(NUM_ACTIONS), second.flatten()], dim=1)

    def on_policy(self, num_tokens: int) -> Tensor:
        """Gradient of the expected return, by differentiating the expectation itself. ``num_tokens`` 1: the return is
        of the first token, averaged over the second."""
        logprobs = self.logprobs(self.parameters)
        if num_tokens == 1:
            return self._gradient((logprobs[::NUM_ACTIONS, 0].exp() * self._first_advantage()).sum())
        return self._gradient((logprobs.sum(1).exp() * self.advantage_S).sum())

    def corrected(self, correction: ImportanceCorrection, num_tokens: int) -> Tensor:
        """The expectation, over everything the stale policy may sample, of the corrected policy gradient."""
        logprobs, stale = self.logprobs(self.parameters), self.logprobs(self.stale)
        advantage = self.advantage_S
        if num_tokens == 1:
            logprobs, stale, advantage = logprobs[::NUM_ACTIONS, :1], stale[::NUM_ACTIONS, :1], self._first_advantage()
        response_R = torch.arange(len(advantage)).repeat_interleave(num_tokens)
        policy_R = logprobs.flatten()
        streams = TokenStreams(
            advantage_R=advantage[response_R],
            weight_R=stale.sum(1).exp()[response_R],
            is_key_token_R=torch.ones_like(response_R, dtype=torch.bool),
        )
        scores = TokenScores(policy_logprob_R=policy_R.detach(), sampler_logprob_R=stale.flatten())
        streams = correction.correct(streams, scores, response_R=response_R, num_responses=len(advantage))
        return self._gradient((streams.weight_R * streams.advantage_R * policy_R).sum())

    def _first_advantage(self) -> Tensor:
        return self.advantage_S.reshape(NUM_ACTIONS, NUM_ACTIONS).mean(1)

    def _gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.parameters)[0]


UNCAPPED = 1e6


@pytest.mark.parametrize(("level", "num_tokens"), [("token", 1), ("sequence", 1), ("sequence", 2)])
def test_uncapped_weights_make_the_stale_expectation_the_on_policy_gradient(level: str, num_tokens: int) -> None:
    policies = Policies()
    expected = policies.on_policy(num_tokens)
    found = policies.corrected(ImportanceCorrection(level, cap=UNCAPPED), num_tokens)
    # fp64 rounding.
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)
    for biased in (ImportanceCorrection(), ImportanceCorrection(level, cap=1.0)):
        # Neither no weights nor truncated ones do that: the check above can fail.
        assert (policies.corrected(biased, num_tokens) - expected).norm() > 0.02 * expected.norm()


def test_token_weights_of_longer_responses_remove_part_of_the_bias() -> None:
    """They ignore how probable the prefix was, which only sequence weights know."""
    policies = Policies()
    expected = policies.on_policy(2)
    errors = [
        float((policies.corrected(correction, 2) - expected).norm() / expected.norm())
        for correction in (ImportanceCorrection("token", cap=UNCAPPED), ImportanceCorrection())
    ]
    assert 0.01 < errors[0] < errors[1]


# In layouts

GROUPS = ("mixed", "text", "long video", "even")
BASE = dict(length_bonus=0.0, kl_beta=0.04)
SETTINGS = {
    "token": dict(importance_sampling="token", importance_cap=1.5),
    "sequence, mask, token mean, two updates": dict(
        importance_sampling="sequence",
        importance_cap=1.5,
        importance_mask=(0.4, 2.5),
        loss_aggregation="token",
        updates_per_rollout=2,
    ),
}

LAYOUTS = {"token": [(4, sizes_of(2, 2, sp=True)), (2, sizes_of())], list(SETTINGS)[1]: [(4, sizes_of(1, 2))]}
"""Tensor, pipeline and sequence parallel; replicas; both: (number of ranks, how they are split)."""


def run_in_layout(context: RankContext, *, sizes: ParallelSizes, **options: Any) -> list[StepRecord]:
    return run_steps(context.init(sizes), **options)


def sampled_from_another_policy(groups: list[RolloutGroup], record: StepRecord) -> list[RolloutGroup]:
    """``groups`` with sampler log-probs some tenths of a nat from the trainer's."""
    found = []
    for number, group in enumerate(groups):
        generator = torch.Generator().manual_seed(number)
        policy_R = record.scores[group.prompt.problem_id]["policy_logprob_R"]
        sampler = iter((policy_R + 0.5 * torch.randn(len(policy_R), generator=generator)).tolist())
        rollouts = [
            dataclasses.replace(rollout, sampler_logprobs=tuple(next(sampler) for _ in rollout.token_ids))
            for rollout in group.rollouts
        ]
        found.append(dataclasses.replace(group, rollouts=tuple(rollouts)))
    return found


@pytest.mark.slow
def test_corrected_steps_and_their_metrics_are_the_same_in_every_layout(ranks, tmp_path) -> None:
    initial = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): parameter.detach().clone()
        for name, parameter in save_tiny_hf(tmp_path).named_parameters()
    }
    options: dict[str, Any] = dict(hf_dir=tmp_path, rollout_groups=example_groups(*GROUPS), values=BASE)
    (plain,) = ranks(run_in_layout, 1, sizes=ParallelSizes(), **options)[0]
    options["rollout_groups"] = sampled_from_another_policy(options["rollout_groups"], plain)
    for name, settings in SETTINGS.items():
        options |= dict(values=BASE | settings, num_steps=2, masks=None)
        expected = ranks(run_in_layout, 1, sizes=ParallelSizes(), **options)[0]
        _check_metrics(expected[0], options["rollout_groups"], settings)
        assert abs(expected[0].updates[0].loss - plain.updates[0].loss) > 1e-3, "the correction acts"
        options["masks"] = [record.chosen for record in expected]
        for world_size, sizes in LAYOUTS[name]:
            for records in ranks(run_in_layout, world_size, sizes=sizes, **options):
                difference = compare_steps(records, expected, initial=initial)
                # As in test_training_step.py; ratios carry the log-probs' fp32 rounding (1e-5) over seven tokens.
                assert difference.loss <= 2e-6 and difference.score <= 1e-5, (name, sizes, difference)
                assert difference.value <= 2e-4 and difference.gradient <= 2e-4, (name, sizes, difference)


def _check_metrics(record: StepRecord, groups: list[RolloutGroup], settings: dict[str, Any]) -> None:
    """From the first step's scores, response by response."""
    ratios, responses, gaps = [], [], []
    for group in groups:
        policy = iter(record.scores[group.prompt.problem_id]["policy_logprob_R"].double().tolist())
        for rollout in group.rollouts:
            differences = [next(policy) - value for value in rollout.sampler_logprobs]
            ratios += [math.exp(value) for value in differences]
            responses += [math.exp(sum(differences))] * len(differences)
            gaps += [abs(value) for value in differences]
    low, high = settings.get("importance_mask", (0, math.inf))
    truncated = responses if settings["importance_sampling"] == "sequence" else ratios
    changed = [r > 1.5 or not low <= t <= high for r, t in zip(truncated, ratios, strict=True)]
    values = record.values
    # 1e-4: fp32 log-probs of another pass of the same model.
    assert values["sampler_trainer_logprob_gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
    assert values["importance_ratio_max"] == pytest.approx(max(truncated), rel=1e-4)
    assert values["clipped_fraction"] == pytest.approx(sum(changed) / len(changed))
    assert 0 < values["clipped_fraction"] < 1
