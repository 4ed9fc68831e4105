"""Ranks, combinations, soft weights, controls and shaping: numbers worked by hand, and what holds for any layout."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_ktr.attribution.batch_scope import choose_in_batch
from megatron_ktr.attribution.combine import ChoiceRules
from megatron_ktr.attribution.controls import random_tokens, uniform_by_token
from megatron_ktr.attribution.key_tokens import overlaps
from megatron_ktr.attribution.scopes import shares_of_rank
from megatron_ktr.attribution.selection import select_by_rank, select_top_share
from megatron_ktr.attribution.shaping import DependenceShaping, mean_by_response
from megatron_ktr.attribution.signals import build_signals
from megatron_ktr.attribution.soft_weights import soft_weights
from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.types import BatchFacts, ScoredBatch, TokenScores
from tests.support.groups import MEDIA, group_of, video
from tests.support.objectives import key_tokens_of
from tests.support.patience import PATIENCE_SECONDS

NAN, INF = float("nan"), float("inf")
SCORES = [0.1, 0.5, 0.3, 0.4, 0.2, 0.6]


def one_scope(scores):
    return torch.tensor(scores), torch.zeros(len(scores), dtype=torch.int64)


def by_rank(scores, scopes=None, **options):
    scope_R = torch.tensor(scopes if scopes is not None else [0] * len(scores))
    return select_by_rank(torch.tensor(scores), scope_R, num_scopes=int(scope_R.max()) + 1, **options).tolist()


# Rank selection


def test_rank_selection_takes_exactly_as_many_as_asked_and_of_equal_scores_the_first():
    assert by_rank([1.0, 5.0, 5.0, 5.0, 0.0], count=2) == [False, True, True, False, False]
    assert by_rank([1.0, 5.0, 5.0, 5.0, 0.0], ratio=0.2) == [False, True, False, False, False]
    assert by_rank([2.0, NAN, 1.0, INF], count=3) == [True, False, True, False], "only finite scores count"
    assert by_rank([3.0, 3.0], count=1) == [False, False], "equal scores say nothing"
    # Two scopes, their tokens mixed: the two highest of 5, 1, 7 and of 9, 8.
    assert by_rank([5.0, 9.0, 1.0, 8.0, 7.0], [0, 1, 0, 1, 0], count=2) == [True, True, False, True, True]


def test_a_share_by_rank_is_rounded_up_and_products_are_not_rounded_twice():
    for ratio, number, expected in ((0.4, 3, 2), (0.4, 5, 2), (0.7, 10, 7), (0.2, 15, 3), (0.01, 4, 1)):
        assert sum(by_rank([float(value) for value in range(number)], ratio=ratio)) == expected, (ratio, number)


def test_entropy_thresholds_of_prompt_and_batch_worked_by_hand():
    """The thresholds are .42 and 1.32 by prompt, and 1.22 (rank 7.2 of 0 .. 9) over both."""
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 1.1, 1.2, 1.3, 1.4]
    score_R, scope_R = torch.tensor(scores), torch.tensor([0] * 5 + [1] * 5)
    kept = score_R[select_top_share(score_R, scope_R, ratio=0.2, num_scopes=2)].tolist()
    assert kept == pytest.approx([0.5, 1.4])
    kept = score_R[select_top_share(score_R, 0 * scope_R, ratio=0.2, num_scopes=1)].tolist()
    assert kept == pytest.approx([1.3, 1.4])


# Combinations


def test_shares_of_rank_are_even_steps_and_ties_share_their_mean():
    score_R, scope_R = one_scope([7.0, -1.0, 3.0, 3.0, NAN])
    assert shares_of_rank(score_R, scope_R, num_scopes=1)[:4].tolist() == [1.0, 0.0, 0.5, 0.5]
    assert shares_of_rank(score_R, scope_R, num_scopes=1)[4:].isnan().all()
    for scores in ([4.0], [4.0, 4.0, 4.0]):
        assert shares_of_rank(*one_scope(scores), num_scopes=1).tolist() == [0.5] * len(scores)


def test_intersection_and_weighted_sum_worked_by_hand():
    scores = {"a": torch.tensor([0.0, 1, 2, 3]), "b": torch.tensor([30.0, 10, 20, 0])}
    scope_R = torch.zeros(4, dtype=torch.int64)
    ratios = dict.fromkeys(scores, 0.5)
    found = ChoiceRules(ratio_of=ratios, combine="intersection").choose(scores, scope_R, num_scopes=1)
    assert found.is_selected_R.tolist() == [False, False, True, False]
    # Ranks of a: 0 1/3 2/3 1; of b: 1 1/3 2/3 0. With weights 1 and 3: 3, 4/3, 8/3, 1.
    rules = ChoiceRules(ratio_of=ratios, combine="weighted", signal_weights={"a": 1.0, "b": 3.0})
    found = rules.choose(scores, scope_R, num_scopes=1)
    assert found.is_selected_R.tolist() == [True, False, True, False]
    assert list(found.by_signal) == ["weighted"]


def test_in_a_weighted_sum_a_signal_that_says_nothing_counts_as_the_middle_rank():
    scores = {"a": torch.tensor([0.0, 1, 2, NAN]), "b": torch.tensor([NAN, NAN, NAN, NAN])}
    scope_R = torch.zeros(4, dtype=torch.int64)
    rules = ChoiceRules(ratio_of=dict.fromkeys(scores, 0.4), combine="weighted", rule="rank")
    assert rules.choose(scores, scope_R, num_scopes=1).is_selected_R.tolist() == [False, True, True, False]


def test_equal_sums_of_ranks_are_equal_in_any_order_of_the_signals():
    """Of ranks k, 2k and -3k modulo 11 the sum is 0, 11 or 22 tenths. In floating point 0.1 + 0.2 + 0.8 is not 1.1."""
    ranks = {"a": [k for k in range(11)], "b": [2 * k % 11 for k in range(11)], "c": [-3 * k % 11 for k in range(11)]}
    sums = [sum(of_token) for of_token in zip(*ranks.values(), strict=True)]
    assert sorted(sums) == [0] + [11] * 5 + [22] * 5
    scope_R = torch.zeros(11, dtype=torch.int64)
    rules = ChoiceRules(ratio_of=dict.fromkeys(ranks, 0.3), combine="weighted")
    soft = dataclasses.replace(rules, token_weights="rank")
    for names in itertools.permutations(ranks):
        scores = {name: torch.tensor(ranks[name], dtype=torch.float32) for name in names}
        found = rules.choose(scores, scope_R, num_scopes=1).is_selected_R.tolist()
        assert found == [total == 22 for total in sums], "tokens tied at the threshold are all selected"
        weight_R = soft.choose(scores, scope_R, num_scopes=1).weight_R
        # Places 0, 1 .. 5 and 6 .. 10 of 11; tied ones share the mean of 2 (place + 1) / 12.
        assert weight_R.tolist() == pytest.approx([{0: 1 / 6, 11: 4 / 6, 22: 9 / 6}[total] for total in sums])


# Soft weights


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("rank", [0.285714, 1.428571, 0.857143, 1.142857, 0.571429, 1.714286]),
        ("sigmoid", [0.250068, 1.746291, 0.428804, 1.571196, 0.253709, 1.749932]),  # the release's form
        ("softmax", [0.767560, 1.145065, 0.937500, 1.036098, 0.848285, 1.265492]),
    ],
)
def test_soft_weights_worked_by_hand(kind, expected):
    weight_R = soft_weights(*one_scope(SCORES), num_scopes=1, kind=kind)
    assert weight_R.tolist() == pytest.approx(expected, abs=2e-6)


def test_the_soft_mask_of_vppo_has_the_mean_of_its_mask():
    weight_R = soft_weights(
        *one_scope([0.196585, 0.004837, 0.0, 0.718282, 1.135335]), num_scopes=1, kind="soft_mask", ratio=0.4
    )
    assert weight_R.tolist() == pytest.approx([0.292376, 0.219674, 0.218019, 0.539933, 0.729999], abs=2e-6)
    assert float(weight_R.double().mean()) == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize("kind", ["rank", "sigmoid", "softmax", "soft_mask"])
def test_soft_weights_have_mean_one_in_every_scope_and_are_neutral_where_nothing_is_known(kind):
    generator = torch.Generator().manual_seed(0)
    scope_R = torch.arange(9).repeat_interleave(torch.arange(1, 10))[torch.randperm(45, generator=generator)]
    score_R = (torch.randn(45, generator=generator) * 3).round() / 3  # ties
    score_R[scope_R == 8] = 2.0
    score_R[torch.rand(45, generator=generator) < 0.2] = NAN
    weight_R = soft_weights(score_R, scope_R, num_scopes=9, kind=kind, ratio=0.3)
    mean = 0.3 if kind == "soft_mask" else 1.0
    for scope in range(9):
        assert float(weight_R[scope_R == scope].mean()) == pytest.approx(mean, abs=1e-5)
    neutral_R = score_R.isnan() | (scope_R == 8)
    assert weight_R[neutral_R].tolist() == pytest.approx([mean] * int(neutral_R.sum()), abs=1e-5)
    for one, other in ((0.0, 1.0), (1 / 3, 2 / 3)):
        mine = scope_R == 7
        low, high = (weight_R[mine & (score_R - value).abs().lt(1e-4)] for value in (one, other))
        assert len(low.unique()) <= 1 and (not len(low) or not len(high) or float(low[0]) < float(high[0]))


# Batch scope: any split into micro-batches and replicas


def random_groups(number=5):
    """Groups of several responses with unequal lengths, in the order of their draws."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for draw in range(number):
        lengths = torch.randint(1, 9, (3,), generator=generator).tolist()
        group = group_of(1, video(4), responses=[[7] * length for length in lengths], problem_id=f"p{draw}")
        groups.append(dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, draw_number=draw)))
    return groups


def scores_of(groups, seed=2):
    """Scores with ties, the same for a group wherever it is."""
    found = []
    for group in groups:
        generator = torch.Generator().manual_seed(seed + 100 * group.prompt.draw_number)
        found.append((torch.randn(group.num_response_tokens, generator=generator) * 4).round() / 4)
    return torch.cat(found)


LAYOUTS = {
    "one replica, one micro-batch": [[[0, 1, 2, 3, 4]]],
    "one replica, shuffled micro-batches": [[[3], [1, 4], [2, 0]]],
    "two replicas of unequal size": [[[4, 1]], [[0], [2, 3]]],
    "four replicas": [[[3]], [[1, 0]], [[4]], [[2]]],
}


def on_every_replica(number, run):
    """The results of ``run(rank, gather)``, with a thread for every replica and a barrier in every gather."""
    barrier, slots = threading.Barrier(number), [None] * number

    def of_rank(rank):
        def gather(tensor):
            slots[rank] = tensor
            barrier.wait(timeout=PATIENCE_SECONDS)
            every = torch.cat(slots)
            barrier.wait(timeout=PATIENCE_SECONDS)
            return every

        return run(rank, gather)

    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(of_rank, range(number)))


def in_layout(layout, choose):
    """``choose(groups of each micro-batch, gather)`` on every replica; its tensors [R] in the order of draws."""
    groups = random_groups()
    found = {}

    def run(rank, gather):
        return choose([[groups[index] for index in part] for part in layout[rank]], gather)

    for parts, values in zip(layout, on_every_replica(len(layout), run), strict=True):
        for part, value_R in zip(parts, values, strict=True):
            lengths = [groups[index].num_response_tokens for index in part]
            found |= dict(zip(part, value_R.split(lengths), strict=True))
    return torch.cat([found[index] for index in range(len(groups))])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(rule="rank"),
        dict(count_of={"entropy": 11}),
        dict(combine="weighted", token_weights="sigmoid"),
        dict(token_weights="softmax"),
    ],
    ids=str,
)
def test_the_batch_scope_is_that_of_the_concatenation_in_any_layout(layout, options):
    rules = ChoiceRules(ratio_of={"entropy": 0.2}, **options)

    def choose(parts, gather):
        found = choose_in_batch(rules, [{"entropy": scores_of(part)} for part in parts], parts, gather=gather)
        return [choice.is_selected_R if choice.weight_R is None else choice.weight_R for choice in found]

    score_R = scores_of(random_groups())
    expected = rules.choose({"entropy": score_R}, torch.zeros(len(score_R), dtype=torch.int64), num_scopes=1)
    chosen_R = in_layout(layout, choose)
    assert torch.equal(chosen_R, expected.is_selected_R if expected.weight_R is None else expected.weight_R)
    if not options:
        assert torch.equal(chosen_R, score_R >= torch.quantile(score_R, 0.8))
    elif "count_of" in options:
        # There are ties at the eleventh place, and those of the earliest draws are taken.
        assert int(chosen_R.sum()) == 11
        last = score_R[chosen_R].min()
        ties = (score_R == last).nonzero()[:, 0]
        taken = chosen_R[ties].tolist()
        assert any(taken) and not all(taken) and taken == sorted(taken, reverse=True)


# Controls


def test_random_takes_as_many_tokens_of_every_group_in_every_layout_and_others_with_another_seed():
    def randomly(seed, step=3):
        def choose(parts, gather):
            found = []
            for part in parts:
                mask_R = scores_of(part) > 0.5
                lengths = torch.tensor([group.num_response_tokens for group in part])
                group_R = torch.arange(len(part)).repeat_interleave(lengths)
                options = dict(scope_R=group_R, num_scopes=len(part), seed=seed, step=step)
                found.append(random_tokens(mask_R, part, **options))
                assert torch.equal(
                    torch.zeros(len(part)).index_add_(0, group_R, mask_R.float()),
                    torch.zeros(len(part)).index_add_(0, group_R, found[-1].float()),
                )
            return found

        return choose

    first, *others = (in_layout(layout, randomly(0)) for layout in LAYOUTS.values())
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, in_layout(LAYOUTS["four replicas"], randomly(1)))
    assert not torch.equal(first, in_layout(LAYOUTS["four replicas"], randomly(0, step=4)))


def test_random_numbers_are_uniform_and_differ_between_responses_and_draws():
    group = group_of(1, video(4), responses=[[7] * 4000, [7] * 4000])
    uniform_R = uniform_by_token([group], seed=0, step=0)
    # The mean of 8000 uniform numbers has standard deviation 1 / sqrt(12 * 8000) = .0032.
    assert abs(float(uniform_R.mean()) - 0.5) < 0.02 and uniform_R.unique().numel() == 8000
    again = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, draw_number=1))
    assert not (uniform_R == uniform_by_token([again], seed=0, step=0)).any()


def scored_items(*parts, seed=2):
    items = []
    for part in parts:
        batch = pack_groups(part, view="intact", media=MEDIA)
        logprob_R = scores_of(part, seed=seed)
        other = {"hidden": scores_of(part, seed + 1), "shuffled": scores_of(part, seed + 2)}
        scores = TokenScores(
            policy_logprob_R=logprob_R, entropy_R=scores_of(part, seed + 3), logprob_of_view=other, kl_of_view=other
        )
        items.append(ScoredBatch(batch, scores, part))
    return items


def test_controls_are_made_of_what_the_signals_select():
    (item,) = scored_items(random_groups())
    facts = BatchFacts(15, seed=5, step=1)
    found = {
        mode: key_tokens_of(selection=mode).select([item], facts)[0] for mode in ("signals", "random", "complement")
    }
    union_R = found["signals"].is_key_R
    assert 0.2 < float(union_R.float().mean()) < 0.8
    assert torch.equal(found["complement"].is_key_R, ~union_R)
    counts = {
        mode: torch.zeros(item.num_groups).index_add_(0, item.group_R, selection.is_key_R.float()).tolist()
        for mode, selection in found.items()
    }
    assert counts["random"] == counts["signals"] and not torch.equal(found["random"].is_key_R, union_R)
    assert {mode: list(selection.by_signal) for mode, selection in found.items()} == {
        "signals": ["entropy", "visual", "temporal"],
        "random": ["random"],
        "complement": ["complement"],
    }
    # By response, where scores are compared by response. Scores that are all equal select nothing.
    options = dict(selection_scope="response", signals=("entropy",), selection_rule="rank", selection_ratio=(0.4,))
    lengths = [len(rollout.token_ids) for group in item.groups for rollout in group.rollouts]
    entropies = item.scores.entropy_R.split(lengths)
    expected = [math.ceil(0.4 * len(own)) if len(own.unique()) > 1 else 0 for own in entropies]
    assert sum(count > 0 for count in expected) > 8
    for mode in ("signals", "random"):
        (selection,) = key_tokens_of(selection=mode, **options).select([item], facts)
        assert torch.zeros(15).index_add_(0, item.response_R, selection.is_key_R.float()).tolist() == expected


def test_overlap_of_signals_is_counted():
    selected = {"a": [True, True, False, False], "b": [False, True, True, False], "c": [False] * 4}
    found = overlaps({name: torch.tensor(mask) for name, mask in selected.items()}).means()
    expected = {"a+b": 1 / 3, "a+c": 0.0, "b+c": 0.0}
    assert found == {f"selection_overlap/{name}": pytest.approx(value) for name, value in expected.items()}


# Dependence and shaping


def test_dependence_by_k3_worked_by_hand():
    """The release of VPPO: k3 of the sampled token, clamped to [0, 10]."""
    (signal,) = build_signals(ObjectiveSection(signals=("dependence",), dependence="k3"))
    intact = torch.tensor([-0.2, -1.0, -0.05, -2.0, -0.7, -9.0, -0.5])
    masked = torch.tensor([-0.9, -1.1, -0.05, -1.0, -2.7, -0.1, -30.0])
    found = signal.score(TokenScores(intact, logprob_of_view={"hidden": masked}), torch.float32)
    # The last two: e^8.9 is clamped to 10, and d is clamped to -20: 19 + e^-20, clamped to 10.
    assert found.tolist() == pytest.approx([0.196585, 0.004837, 0, 0.718282, 1.135335, 10, 10], abs=1e-6)
    assert by_rank(found[:5].tolist(), ratio=0.4) == [False, False, False, True, True]
    (exact,) = build_signals(ObjectiveSection(signals=("dependence",)))
    assert exact.needs_kl and exact.view == "hidden"
    assert exact.score(TokenScores(intact, kl_of_view={"hidden": masked}), torch.float32) is masked


def test_shaping_worked_by_hand():
    dependence = torch.tensor([0.2, 0.5, 0.3, 0.6], dtype=torch.float64)
    assert DependenceShaping().factors(dependence).tolist() == pytest.approx([0.9, 1.05, 0.95, 1.1])
    # The release's dependence on the micro-batch: its alpha of the first two alone would be .9 and 1.1.
    assert DependenceShaping().factors(dependence[:2]).tolist() == pytest.approx([0.9, 1.1])
    assert DependenceShaping(0.5, 1.3).factors(dependence).tolist() == pytest.approx([0.5, 1.1, 0.7, 1.3])
    with_unknown = torch.cat([torch.tensor([NAN], dtype=torch.float64), dependence])
    assert DependenceShaping().factors(with_unknown).tolist() == pytest.approx([1.0, 0.9, 1.05, 0.95, 1.1])
    for equal in ([0.3, 0.3 + 1e-7], [NAN, NAN], [0.4], []):
        assert DependenceShaping().factors(torch.tensor(equal, dtype=torch.float64)).tolist() == [1.0] * len(equal)
    means = mean_by_response(torch.tensor([0.1, 0.3, NAN, 1.0, 5.0]), torch.tensor([0, 0, 1, 1, 3]), num_responses=4)
    assert means.tolist()[::3] == pytest.approx([0.2, 5.0]) and means[1:3].isnan().all()


@pytest.mark.parametrize("dependence", ["kl", "k3"])
def test_shaping_and_mask_do_not_depend_on_the_layout(dependence):
    options = dict(
        selection="signals",
        signals=("dependence",),
        selection_ratio=(0.4,),
        selection_rule="rank",
        selection_scope="response",
        advantage_shaping="dependence",
        dependence=dependence,
    )
    selection = key_tokens_of(**options)
    assert selection.needs_batch and selection.needs_kl == (dependence == "kl") and selection.views == {"hidden"}

    def choose(parts, gather):
        found = selection.select(scored_items(*parts), BatchFacts(15), gather=gather)
        return [torch.stack([each.is_key_R.float(), each.advantage_factor_R], dim=1) for each in found]

    first, *others = (in_layout(layout, choose) for layout in LAYOUTS.values())
    assert all(torch.equal(first, other) for other in others)
    lengths = [len(rollout.token_ids) for group in random_groups() for rollout in group.rollouts]
    factors = torch.stack([part[0, 1] for part in first.split(lengths)])
    assert float(factors.mean()) == pytest.approx(1.0, abs=1e-6) and float(factors.min()) == pytest.approx(0.9)
