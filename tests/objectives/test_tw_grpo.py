"""TW-GRPO: its weights by hand, its loss on vocabulary shards against full logits, whole updates against Hugging Face's
logits and in several layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.config.sections import ObjectiveSection
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import build_objective
from megatron_ktr.objectives.tw_grpo import position_weights
from megatron_ktr.types import BatchFacts, RolloutGroup, ScoredBatch, TokenScores
from tests.support.groups import MEDIA, group_of
from tests.support.hf_updates import Models, gradients_of, score_responses, with_gradient
from tests.support.layouts import OVERLAPPED, SMALL, sizes_of
from tests.support.objectives import grpo, tw_grpo
from tests.support.parity import max_relative_difference
from tests.support.ranks import RankContext, RankPool
from tests.support.reference_ktr import ReferenceResponse
from tests.support.reference_tw_grpo import ReferenceTWUpdate, reference_tw_update
from tests.support.steps import StepRecord, compare_steps, example_groups, run_steps
from tests.support.token_statistics import divergence_with, error_of, statistics_with

# Weights


def test_weights_worked_by_hand() -> None:
    # Group 0: 1, 3, 2 stand at 0, 1 and 1/2 of the way. Group 1: all positions alike. Group 2: a single token.
    divergence_R = torch.tensor([1.0, 3.0, 2.0, 1.0, 5.0, 5.0, 7.0], dtype=torch.float64)
    group_R = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    weight_R = position_weights(divergence_R, group_R, num_groups=3, alpha=1.5)
    assert weight_R.tolist() == pytest.approx([1.0, 1.5, 1.25, 1.0, 1.0, 1.0, 1.0], abs=1e-8)  # the floor of 1e-8


def test_settings_that_are_not_the_papers_are_refused() -> None:
    section = dataclasses.replace(ObjectiveSection(), objective="tw_grpo", loss_aggregation="token", kl_beta=0.0)
    assert build_objective(section) == tw_grpo(kl_beta=0.0)
    with pytest.raises(UserError, match="loss_aggregation must be 'token'"):
        build_objective(dataclasses.replace(section, loss_aggregation="sequence"))
    with pytest.raises(UserError, match="tw_alpha"):
        build_objective(dataclasses.replace(section, tw_alpha=0.9))
    assert tw_grpo().needs_divergence and tw_grpo().needs_reference and not grpo().needs_divergence


def test_scores_without_a_divergence_are_refused() -> None:
    group = group_of(1, responses=[[3], [4]])
    batch = pack_groups([group], view="intact", media=MEDIA)
    with pytest.raises(ValueError, match="divergence_R"):
        scores = TokenScores(policy_logprob_R=torch.zeros(2))
        tw_grpo().token_streams(ScoredBatch(batch, scores, [group]), BatchFacts(2, num_tokens=2))


# The loss on random hidden states, sharded


HIDDEN_SIZE, VOCAB_SIZE, PADDED_SIZE = 12, 37, 40
RESPONSE_LENGTHS = ((4, 2, 1, 7), (1, 5), (3, 3, 2))
KL_BETA = 0.3


class Problem:
    """Random hidden rows and weights, with logits of a standard deviation of about 2; alike on every rank."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.num_rows = sum(map(sum, RESPONSE_LENGTHS))
        self.hidden_RD = normal(self.num_rows, HIDDEN_SIZE)
        self.reference_RD = self.hidden_RD + 0.3 * normal(self.num_rows, HIDDEN_SIZE)
        self.weight_VD = normal(PADDED_SIZE, HIDDEN_SIZE) * 0.6
        self.groups: list[RolloutGroup] = []
        for index, lengths in enumerate(RESPONSE_LENGTHS):
            tokens = [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
            group = group_of(5, responses=tokens, problem_id=str(index))
            rollouts = tuple(
                dataclasses.replace(rollout, rewards={"accuracy": float(torch.rand((), generator=generator))})
                for rollout in group.rollouts
            )
            self.groups.append(dataclasses.replace(group, rollouts=rollouts))


def _ours(context: RankContext, *, dtype: torch.dtype, temperature: float, weight_gradient: bool) -> dict[str, Tensor]:
    """Loss, weights and gradients of one rank that holds its shard of the vocabulary; all groups in one batch."""
    groups = context.init(ParallelSizes(tensor=context.world_size))
    problem = Problem(dtype)
    batch = pack_groups(problem.groups, view="intact", media=MEDIA)
    hidden_RD = problem.hidden_RD.requires_grad_()
    weight_VD = problem.weight_VD.chunk(context.world_size)[groups.tensor_rank].clone().requires_grad_()
    options: dict[str, Any] = dict(group=groups.tensor, vocab_size=VOCAB_SIZE, temperature=temperature)
    reference = statistics_with(problem.reference_RD, weight_VD.detach(), batch.target_ids_R, **options)
    statistics = statistics_with(hidden_RD, weight_VD, batch.target_ids_R, **options)
    options |= dict(layout=batch.layout, with_gradient=weight_gradient)
    divergence_R = divergence_with(hidden_RD, weight_VD, statistics.log_normalizer_R, **options)
    scores = TokenScores(
        policy_logprob_R=statistics.logprob_R.detach(),
        reference_logprob_R=reference.logprob_R,
        divergence_R=divergence_R,
    )
    objective = tw_grpo(kl_beta=KL_BETA, alpha=2.5, has_weight_gradient=weight_gradient)
    item = ScoredBatch(batch, scores, problem.groups)
    streams = objective.token_streams(item, BatchFacts(9, num_tokens=problem.num_rows))
    loss, _ = objective.loss(statistics, streams, scores)
    loss.backward()
    weights_R = streams.weight_R.detach() * problem.num_rows
    return dict(loss=loss.detach(), weights=weights_R, hidden_grad=hidden_RD.grad, weight_grad=weight_VD.grad)


def _truth(*, dtype: torch.dtype, temperature: float, weight_gradient: bool) -> dict[str, Tensor]:
    """The same in fp64 from full logits; the inputs are those of ``dtype``."""
    problem = Problem(dtype)
    hidden_RD, weight_VD = (t.double().requires_grad_() for t in (problem.hidden_RD, problem.weight_VD))
    logits_RV, reference_RV = (
        rows_RD @ weight_VD[:VOCAB_SIZE].t() for rows_RD in (hidden_RD, problem.reference_RD.double())
    )
    start, groups = 0, []
    for group in problem.groups:
        responses = []
        for rollout in group.rollouts:
            rows = slice(start, start + len(rollout.token_ids))
            start = rows.stop
            responses.append(
                ReferenceResponse(
                    rollout.token_ids, logits_RV[rows], reference=reference_RV[rows].detach(), reward=rollout.reward
                )
            )
        groups.append(responses)
    options = dict(alpha=2.5, kl_beta=KL_BETA, temperature=temperature, weight_gradient=weight_gradient)
    expected = reference_tw_update(groups, **options)
    expected.loss.backward()
    return dict(
        loss=expected.loss.detach(),
        weights=torch.tensor(_by_token(expected, groups), dtype=torch.float64),
        hidden_grad=hidden_RD.grad,
        weight_grad=weight_VD.grad,
    )


def _by_token(update: ReferenceTWUpdate, groups: list[list[ReferenceResponse]]) -> list[float]:
    return [
        weight
        for group, weights in zip(groups, update.weights, strict=True)
        for response in group
        for weight in weights[: len(response.token_ids)]
    ]


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("weight_gradient", [False, True], ids=["constant weights", "through weights"])
def test_loss_and_gradients_on_shards_are_those_of_full_logits(
    ranks: RankPool, weight_gradient: bool, dtype: torch.dtype, temperature: float, tensor: int
) -> None:
    options = dict(dtype=dtype, temperature=temperature, weight_gradient=weight_gradient)
    by_rank = ranks(_ours, world_size=tensor, **options)
    truth = _truth(**options)
    # Streams are fp32 whatever the hidden states are: advantages and weights are known to 6e-8, a sum of 28 signed
    # terms to some units more.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-7
    whole_weight_grad = torch.cat([found["weight_grad"] for found in by_rank])
    assert error_of(whole_weight_grad, truth["weight_grad"]) < tolerance
    other = _truth(**{**options, "weight_gradient": not weight_gradient})
    assert error_of(other["hidden_grad"], truth["hidden_grad"]) > 0.01, "the weights' gradient must matter"
    assert truth["weights"].max() > 2.4 and truth["weights"].min() == 1, "the weights must matter"
    for found in by_rank:
        for name in ("loss", "weights", "hidden_grad"):
            assert torch.equal(found[name], by_rank[0][name]), "ranks of a group must not drift apart"
            assert error_of(found[name], truth[name]) < tolerance, name


# Whole updates


NAMES = ("mixed", "text", "long video", "image", "even")
LOSS_TOLERANCE = 1e-5
"""A mean of terms whose log-probs agree to 1e-5 (``test_ktr_update_against_hf.py``), of weights up to 3."""
GRADIENT_TOLERANCE = 1e-4
"""Relative per tensor, as for Video-KTR."""
VALUES: dict[str, Any] = dict(objective="tw_grpo", loss_aggregation="token", lr=0.1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.save(tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reference"))


def _run(models: Models, ranks: ParallelGroups, **values: Any) -> StepRecord:
    (record,) = run_steps(
        ranks,
        hf_dir=models.policy_dir,
        reference_dir=models.reference_dir,
        rollout_groups=example_groups(*NAMES),
        values={**VALUES, **values},
    )
    return record


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, {}),
        (dict(tw_alpha=3.0, temperature=0.7), dict(alpha=3.0, temperature=0.7)),
        (dict(kl_beta=0.0, micro_batch_groups=5), dict(kl_beta=0.0)),
        (dict(tw_weight_gradient=True), dict(weight_gradient=True)),
        (
            dict(tw_weight_gradient=True, kl_beta=0.0, temperature=0.7, micro_batch_groups=5),
            dict(weight_gradient=True, kl_beta=0.0, temperature=0.7),
        ),
        # A selection of every token, in a pass without gradient before the update.
        (
            dict(tw_weight_gradient=True, selection="signals", signals=("entropy",), selection_ratio=(1.0,)),
            dict(weight_gradient=True),
        ),
    ],
    ids=[
        "published",
        "own alpha, temperature",
        "no KL, all groups in one micro-batch",
        "through weights",
        "through weights, no KL, temperature, one micro-batch",
        "through weights, after a pass without gradient",
    ],
)
def test_update_equals_the_independent_one(
    models: Models, one_rank: ParallelGroups, values: dict[str, Any], options: dict[str, Any]
) -> None:
    groups = example_groups(*NAMES)
    ours = _run(models, one_rank, **values)
    responses = with_gradient(models.policy, models.config, groups, score_responses(models, groups))
    expected = reference_tw_update(responses, **options)
    weights = _by_token(expected, responses)
    (update,) = ours.updates
    assert update.loss == pytest.approx(float(expected.loss), abs=LOSS_TOLERANCE)
    assert ours.values["token_weight"] == pytest.approx(sum(weights) / len(weights), abs=1e-4)
    gradients = gradients_of(models.policy, expected.loss)
    assert max_relative_difference(update.gradients, gradients) <= GRADIENT_TOLERANCE


def test_without_weights_it_is_grpo_and_with_them_it_is_not(models: Models, one_rank: ParallelGroups) -> None:
    """Otherwise the comparison above could agree on weights that nobody uses."""
    plain = _run(models, one_rank, objective="grpo")
    even, weighted = (_run(models, one_rank, tw_alpha=alpha) for alpha in (1.0, 1.7))
    assert even.values["token_weight"] == 1 and "token_weight" not in plain.values
    difference = max_relative_difference(even.updates[0].gradients, plain.updates[0].gradients)
    assert difference < 1e-6  # the same sums
    difference = max_relative_difference(weighted.updates[0].gradients, plain.updates[0].gradients)
    assert difference > 100 * GRADIENT_TOLERANCE


def test_objectives_that_do_not_ask_pay_for_no_divergence(
    models: Models, one_rank: ParallelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.qwen2_5_vl.model import Qwen2_5_VLModel

    monkeypatch.delattr(Qwen2_5_VLModel, "group_divergence")
    assert _run(models, one_rank, objective="grpo").updates[0].has_stepped
    with pytest.raises(AttributeError, match="group_divergence"):
        _run(models, one_rank)


def test_several_updates_keep_the_weights_of_the_first(models: Models, one_rank: ParallelGroups) -> None:
    """The report is the last update's. Without frozen weights it would tell of the moved policy."""
    options = dict(lr=0.5)
    once = _run(models, one_rank, **options)
    twice = _run(models, one_rank, **options, updates_per_rollout=2)
    assert len(twice.updates) == 2
    moved = max_relative_difference(twice.weights, once.weights)
    assert moved > 1e-3, "the second update must find another policy"
    for name in ("token_weight", "group_divergence"):
        assert twice.values[name] == pytest.approx(once.values[name], rel=1e-6), name


NO_FUSION = dict(gradient_accumulation_fusion=False)


def _in_layout(context: RankContext, *, sizes: ParallelSizes, models: Models, **options: Any) -> list[StepRecord]:
    return run_steps(
        context.init(sizes),
        hf_dir=models.policy_dir,
        reference_dir=models.reference_dir,
        rollout_groups=example_groups("mixed", "text", "long video", "even"),
        num_steps=2,
        **options,
    )


@pytest.mark.slow
def test_steps_are_the_same_in_every_layout(ranks: RankPool, models: Models) -> None:
    paths = dataclasses.replace(models, policy=None, reference=None)  # what ranks read is on disk
    options = dict(models=paths, values=VALUES)
    (expected,) = ranks(_in_layout, 1, sizes=ParallelSizes(), **options)
    initial = dict(models.policy.state_dict())
    layouts: list[tuple[int, str, ParallelSizes, dict[str, Any]]] = [
        (1, "all groups in one micro-batch", ParallelSizes(), dict(micro_batch_groups=4)),
        (2, "dp2", ParallelSizes(), {}),
        (2, "tp2", sizes_of(2), {}),
        (2, "pp2, two groups per micro-batch", sizes_of(1, 2), dict(micro_batch_groups=2)),
        (4, "tp2 pp2 sp", sizes_of(2, 2, sp=True), {}),
        (4, "tp2 dp2 sp overlapped", sizes_of(2, sp=True), OVERLAPPED),
    ]
    for world_size, name, sizes, values in layouts:
        bucket_size = SMALL if values is OVERLAPPED else None
        layout = {**options, "values": {**VALUES, **values}, "bucket_size": bucket_size}
        for ours in ranks(_in_layout, world_size, sizes=sizes, **layout):
            found = compare_steps(ours, expected, initial=_published(initial))
            # As for Video-KTR (``test_training_step.py``): fp32 sums in another order, after a step too.
            assert found.loss < 2e-6, name
            assert found.value < 1e-4, (name, found.worst_value)
            assert found.gradient < 1e-4 and found.update < 1e-4, name


@pytest.mark.slow
def test_the_gradient_through_the_weights_is_the_same_in_every_layout(ranks: RankPool, models: Models) -> None:
    paths = dataclasses.replace(models, policy=None, reference=None)
    options = dict(models=paths, values={**VALUES, "tw_weight_gradient": True})
    (expected,) = ranks(_in_layout, 1, sizes=ParallelSizes(), **options)
    (constant,) = ranks(_in_layout, 1, sizes=ParallelSizes(), models=paths, values=VALUES)
    assert max_relative_difference(expected[0].updates[0].gradients, constant[0].updates[0].gradients) > 1e-2
    initial = dict(models.policy.state_dict())
    layouts: list[tuple[int, str, ParallelSizes, dict[str, Any]]] = [
        (2, "cp2", sizes_of(cp=2), {}),
        (4, "tp2 pp2 sp", sizes_of(2, 2, sp=True), {}),
        (4, "tp2 cp2 sp, autograd's weight gradients", sizes_of(2, cp=2, sp=True), {**NO_FUSION}),
        (4, "pp2 cp2, two groups per micro-batch", sizes_of(1, 2, cp=2), dict(micro_batch_groups=2)),
        (4, "tp2 dp2 sp overlapped", sizes_of(2, sp=True), OVERLAPPED),
    ]
    for world_size, name, sizes, values in layouts:
        layout = {**options, "values": {**options["values"], **values}}
        layout["bucket_size"] = SMALL if values is OVERLAPPED else None
        for ours in ranks(_in_layout, world_size, sizes=sizes, **layout):
            found = compare_steps(ours, expected, initial=_published(initial))
            # As above: fp32 sums in another order, after a step too.
            assert found.loss < 2e-6, name
            assert found.value < 1e-4, (name, found.worst_value)
            assert found.gradient < 1e-4 and found.update < 1e-4, name


def _published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    from tests.support.hf_updates import published_name

    return {published_name(name): tensor for name, tensor in weights.items()}
