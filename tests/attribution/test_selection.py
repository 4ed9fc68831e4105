"""Counterfactual orders, signals and the choice of key tokens."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ktr.attribution.combine import ChoiceRules
from megatron_ktr.attribution.counterfactuals import can_hide, can_shuffle, draw_permutation, draw_permutations
from megatron_ktr.attribution.selection import select_top_share, thresholds
from megatron_ktr.attribution.signals import build_signals, scored_as_zero, signal_applies, signal_scores
from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.errors import UserError
from megatron_ktr.types import BatchFacts, ScoredBatch, TokenScores
from tests.support.groups import MEDIA, group_of, image, video
from tests.support.objectives import key_tokens_of

NAN = float("nan")


def select(scores, groups=None, ratio=0.2, dtype=torch.float32, **options):
    score_R = torch.tensor(scores, dtype=dtype)
    group_R = torch.tensor(groups if groups is not None else [0] * len(scores))
    return select_top_share(score_R, group_R, ratio=ratio, num_scopes=int(group_R.max()) + 1, **options).tolist()


def test_top_share_worked_by_hand():
    # Quantile 0.8 of 0 .. 10 is 8 exactly; of 1, 2, 3, 4 it is 3 + 0.4 * (4 - 3).
    assert select(list(range(11))) == [False] * 8 + [True] * 3
    assert select([2.0, 4.0, 1.0, 3.0]) == [False, True, False, False]
    assert select([2.0, 4.0, 1.0, 3.0], ratio=1.0) == [True] * 4


def test_all_ties_at_the_threshold_are_kept():
    assert select([1.0, 5.0, 5.0, 5.0, 0.0]) == [False, True, True, True, False]
    assert select([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], ratio=0.4) == [True] * 6


@pytest.mark.parametrize("scores", [[3.0, 3.0, 3.0], [NAN, NAN], [1.0], [NAN, 2.0, NAN], [float("inf"), 1.0]])
def test_degenerate_scores_select_nothing(scores):
    assert not any(select(scores))


def test_non_finite_scores_are_left_out_of_the_quantile():
    scores = [0.0, NAN, 1.0, float("inf"), 2.0, float("-inf"), 3.0, 4.0]
    assert select(scores, ratio=0.25) == [False, False, False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3.0, 3.0, 3.0], [True] * 3),
        ([1.0], [True]),
        ([NAN, 2.0, NAN], [False, True, False]),
        ([float("inf"), 1.0], [True, True]),
        ([float("-inf"), 1.0], [False, True]),
        ([NAN, NAN], [False, False]),
        # The finite ones are 0 .. 4, their quantile at 0.8 is 3.2.
        ([0.0, NAN, 1.0, float("inf"), 2.0, float("-inf"), 3.0, 4.0], [False, False, False, True, *[False] * 3, True]),
    ],
)
def test_like_the_release_equal_scores_and_infinity_are_selected(scores, expected):
    assert select(scores, like_release=True) == expected
    assert select([*scores, 5.0, 6.0], [0] * len(scores) + [1, 1], like_release=True) == [*expected, False, True]


def test_like_the_release_the_threshold_is_rounded_to_the_scores_dtype():
    # 1.0078125 is the bf16 after 1. The quantile at 0.8 is 1 + 0.2 * 0.0078125 = 1.0015625, as a bf16 again 1.
    scores = [0.0, 1.0, 0.0, 1.0078125, 0.0]
    assert select(scores, like_release=True) == [False, False, False, True, False]
    assert select(scores, like_release=True, dtype=torch.bfloat16) == [False, True, False, True, False]
    # At 0.5 between 1 and 1.0078125 of four: 1.00390625, a tie of rounding, which goes to the even one, 1.
    assert (
        select([0.0, 1.0, 1.0078125, 2.0], ratio=0.5, like_release=True, dtype=torch.bfloat16) == [False] + [True] * 3
    )


def test_groups_in_any_token_order_do_not_see_each_other():
    scores = [0.0, 100.0, 1.0, 300.0, 2.0, 200.0]
    assert select(scores, [0, 1, 0, 1, 0, 1]) == [False, False, False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [None, 4])
def test_thresholds_equal_torch_quantile_bit_for_bit(dtype, levels):
    generator = torch.Generator().manual_seed(0)
    # 67 groups: vectorised and scalar tails of the interpolation kernel both run; coarse levels make ties.
    for ratio in (0.2, 0.1, 0.37, 1.0, 0.013):
        num_groups = 67
        lengths = torch.randint(1, 90, (num_groups,), generator=generator)
        group_R = torch.arange(num_groups).repeat_interleave(lengths)
        shuffle = torch.randperm(len(group_R), generator=generator)
        group_R = group_R[shuffle]
        score_R = torch.randn(len(group_R), generator=generator, dtype=dtype)
        if levels:
            score_R = (score_R * levels).round() / levels
        score_R[torch.rand(len(score_R), generator=generator) < 0.1] = NAN
        threshold_P, _ = thresholds(score_R, group_R, score_R.isfinite(), quantile=1 - ratio, num_scopes=num_groups)
        is_selected_R = select_top_share(score_R, group_R, ratio=ratio, num_scopes=num_groups)
        for group in range(num_groups):
            own = score_R[group_R == group]
            finite = own[own.isfinite()]
            if len(finite) == 0:
                assert not is_selected_R[group_R == group].any()
                continue
            threshold = torch.quantile(finite, 1 - ratio)
            assert torch.equal(threshold_P[group], threshold)
            expected = (own >= threshold) & bool((finite != finite[0]).any())
            assert torch.equal(is_selected_R[group_R == group], expected)


def test_key_tokens_are_the_union_of_the_signals():
    found = ChoiceRules(ratio_of={"entropy": 0.2, "visual": 0.5}).choose(
        {"entropy": torch.tensor([0.0, 1, 2, 3, 9]), "visual": torch.tensor([9.0, 1, 2, 3, 0])},
        torch.zeros(5, dtype=torch.int64),
        num_scopes=1,
    )
    assert found.by_signal["entropy"].tolist() == [False, False, False, False, True]
    assert found.by_signal["visual"].tolist() == [True, False, True, True, False]
    assert found.is_selected_R.tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="selection_ratio"):
        select([1.0, 2.0], ratio=ratio)


def signals_of(*names, **options):
    return build_signals(ObjectiveSection(signals=names, **options))


def batch_of_all_kinds():
    groups = [
        group_of(1, video(4), responses=[[10, 11], [12]], problem_id="video"),
        group_of(2, image(), responses=[[13]], problem_id="image"),
        group_of(3, video(2), responses=[[14]], problem_id="one temporal patch"),
        group_of(4, responses=[[15, 16]], problem_id="text"),
    ]
    return groups, pack_groups(groups, view="intact", media=MEDIA)


def test_signals_are_nan_where_they_do_not_apply():
    groups, batch = batch_of_all_kinds()
    scores = TokenScores(
        policy_logprob_R=torch.full((7,), -1.0),
        entropy_R=torch.arange(7.0),
        logprob_of_view={
            "hidden": torch.tensor([-3.0, -0.5, -1, -2, -2, -1 - 1e-7, -1]),
            "shuffled": torch.tensor([-1.5, -1, 0, -9, -9, -9, -9]),
        },
    )
    signals = signals_of("entropy", "visual", "temporal")
    applies = signal_applies(signals, batch, groups)
    found = signal_scores(signals, scores, applies_R=applies)
    assert found["entropy"].tolist() == list(range(7))
    expected = {"visual": [2.0, -0.5, 0, 1, 1, NAN, NAN], "temporal": [0.5, 0, -1, NAN, NAN, NAN, NAN]}
    for signal, values in expected.items():
        torch.testing.assert_close(found[signal], torch.tensor(values), rtol=0, atol=0, equal_nan=True)
    absolute = signal_scores(signals_of(*applies, shift="absolute"), scores, applies_R=applies)
    assert absolute["visual"][:2].tolist() == [2.0, 0.5]
    assert absolute["entropy"].tolist() == list(range(7))


def test_bf16_scores_are_differences_of_rounded_logprobs():
    """Hand-worked: between 1 and 2 bf16 has steps of 1/128, between 2 and 4 of 1/64, between 1/4 and 1/2 of 1/512."""
    group = group_of(1, video(4), responses=[[10, 11, 12]])
    batch = pack_groups([group], view="intact", media=MEDIA)
    scores = TokenScores(
        policy_logprob_R=torch.tensor([-1.003, -1.006, -0.3]),  # -1, -1.0078125, -0.30078125
        entropy_R=torch.tensor([2.007, 2.009, 0.3]),  # 2, 2.015625, 0.30078125
        logprob_of_view={"hidden": torch.tensor([-3.001, -3.007, -3.0])},  # -3, -3, -3
    )
    signals = signals_of("entropy", "visual")
    applies = signal_applies(signals, batch, [group])
    found = signal_scores(signals, scores, applies_R=applies, dtype=torch.bfloat16)
    assert {score_R.dtype for score_R in found.values()} == {torch.bfloat16}
    assert found["entropy"].tolist() == [2.0, 2.015625, 0.30078125]
    # 3 - 1.0078125 = 1.9921875; 3 - 0.30078125 = 2.69921875, of which 2.703125 is the nearest.
    assert found["visual"].tolist() == [2.0, 1.9921875, 2.703125]


def test_the_release_scores_unchanged_inputs_with_zero_and_selects_them_all():
    groups, batch = batch_of_all_kinds()
    zero = scored_as_zero(signals_of("entropy", "visual", "temporal"), batch, groups)
    # By token: two responses to a video, then an image, one temporal patch, and two tokens of text.
    assert zero["entropy"].tolist() == [False] * 7
    assert zero["visual"].tolist() == [False] * 5 + [True] * 2
    assert zero["temporal"].tolist() == [False] * 4 + [True] + [False] * 2
    noise = 1e-6 * torch.randn(7)
    scores = TokenScores(
        policy_logprob_R=torch.tensor([-1.0, -2, -3, -4, -5, -6, -7]),
        entropy_R=torch.arange(7.0),
        logprob_of_view={
            "hidden": torch.tensor([-9.0, -8, -7, -9, -9, -6, -7]) + noise,
            "shuffled": torch.tensor([-1.5, -9, -3, -4, -5, -6, -7]) + noise,
        },
    )
    item = ScoredBatch(batch, scores, groups)
    found = {
        compat: key_tokens_of(original_compat=compat).select([item], BatchFacts(5))[0].by_signal
        for compat in (False, True)
    }
    for compat in (False, True):  # one token of three, or the larger of two; a group of one token is degenerate
        entropy = [False, False, True, compat, compat, False, True]
        assert found[compat]["entropy"].tolist() == entropy
        assert found[compat]["visual"].tolist() == [True, False, False, compat, compat, compat, compat]
        assert found[compat]["temporal"].tolist() == [False, True, False, False, compat, False, False]


def test_kl_shift_reads_the_kl_and_is_refused_without_it():
    groups, batch = batch_of_all_kinds()
    signals = signals_of("visual", shift="kl")
    applies = signal_applies(signals, batch, groups)
    scores = TokenScores(policy_logprob_R=torch.zeros(7), logprob_of_view={"hidden": torch.zeros(7)})
    with pytest.raises(UserError, match="shift: kl"):
        signal_scores(signals, scores, applies_R=applies)
    scores = TokenScores(policy_logprob_R=torch.zeros(7), kl_of_view={"hidden": torch.arange(7.0)})
    assert signal_scores(signals, scores, applies_R=applies)["visual"][:5].tolist() == [0, 1, 2, 3, 4]


def test_missing_scores_are_refused_rather_than_taken_as_nothing_to_select():
    groups, batch = batch_of_all_kinds()
    for signal, missing in (("entropy", "entropy"), ("visual", "hidden"), ("temporal", "shuffled")):
        with pytest.raises(ValueError, match=missing):
            signals = signals_of(signal)
            applies_R = signal_applies(signals, batch, groups)
            signal_scores(signals, TokenScores(policy_logprob_R=torch.zeros(7)), applies_R=applies_R)


def test_a_video_of_one_repeated_frame_has_no_order_to_lose():
    """Its temporal score would be the rounding between two passes, a fifth of which would be selected."""
    moving = video(6)
    still = dataclasses.replace(moving, frames_FCHW=moving.frames_FCHW[:1].expand(6, -1, -1, -1))
    late = dataclasses.replace(moving, frames_FCHW=torch.cat([still.frames_FCHW[:5], moving.frames_FCHW[5:]]))
    found = {}
    for name, medium in (("moving", moving), ("still", still), ("late", late)):
        group = group_of(1, medium, 2, responses=[[7, 8]])
        batch = pack_groups([group], view="intact", media=MEDIA)
        applies = signal_applies(signals_of("visual", "temporal"), batch, [group])
        found[name] = applies["temporal"].tolist()
        assert applies["visual"].all()
        assert (draw_permutations(group.prompt, seed=0, step=0) == (None,)) == (name == "still")
    assert found == {"moving": [True, True], "still": [False, False], "late": [True, True]}


def test_what_can_be_hidden_and_shuffled():
    groups, _ = batch_of_all_kinds()
    prompts = [group.prompt for group in groups]
    assert [can_hide(prompt) for prompt in prompts] == [True, True, True, False]
    assert [can_shuffle(prompt) for prompt in prompts] == [True, False, False, False]
    for unit in ("frame", "temporal_patch"):
        orders = [draw_permutations(prompt, unit=unit, seed=0, step=0) for prompt in prompts]
        assert [[order is not None for order in of_prompt] for of_prompt in orders] == [[True], [False], [False], []]


def test_orders_are_permutations_other_than_the_identity():
    assert draw_permutation(1, seed=0, step=0, identity="a") is None
    # Half of all orders of two units are the identity; 40 draws would show one.
    for step in range(40):
        assert draw_permutation(2, seed=0, step=step, identity="a").tolist() == [1, 0]
    seen = {tuple(draw_permutation(3, seed=0, step=step, identity="a").tolist()) for step in range(200)}
    assert len(seen) == 5 and (0, 1, 2) not in seen


def test_order_depends_on_seed_step_identity_medium_and_draw():
    base = dict(seed=0, step=0, identity="a", medium=0, draw=0)
    orders = [draw_permutation(30, **base)]
    for change in (dict(seed=1), dict(step=1), dict(identity="b"), dict(medium=1), dict(draw=1)):
        orders.append(draw_permutation(30, **{**base, **change}))
    # Thirty units have 2.7e32 orders: equal ones would mean an ignored argument.
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    prompt = group_of(1, video(30), video(30), responses=[[9]]).prompt
    first, second = draw_permutations(prompt, seed=0, step=0)
    assert not torch.equal(first, second)
    again = draw_permutations(dataclasses.replace(prompt, draw_number=1), seed=0, step=0)
    assert not torch.equal(first, again[0]), "the same record, drawn again in the same step"


def test_order_is_the_same_in_another_process():
    code = (
        "from megatron_ktr.attribution.counterfactuals import draw_permutation;"
        "print(draw_permutation(9, seed=3, step=4, identity='é/1').tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(draw_permutation(9, seed=3, step=4, identity="é/1").tolist())


def test_unknown_unit_and_signal_are_refused():
    groups, batch = batch_of_all_kinds()
    with pytest.raises(ValueError, match="shuffle_unit"):
        draw_permutations(groups[0].prompt, unit="second", seed=0, step=0)
    with pytest.raises(UserError, match="unknown signal 'visul'.*did you mean visual"):
        signals_of("visul")
    with pytest.raises(ValueError, match="shift"):
        signals_of("visual", shift="squared")


class _NoHostReads(TorchDispatchMode):
    """Fails where a value leaves the device: ``item``, ``bool(tensor)``, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class _NoHostCopies(TorchFunctionMode):
    """Fails on methods that copy to the host without passing the dispatcher on CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__"):
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shift", ["signed", "absolute", "kl"])
def test_scores_become_key_tokens_without_a_host_round_trip(shift):
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(7, generator=generator)

    groups, batch = batch_of_all_kinds()
    scores = TokenScores(
        policy_logprob_R=normal(),
        entropy_R=normal(),
        logprob_of_view={"hidden": normal(), "shuffled": normal()},
        kl_of_view={"hidden": normal(), "shuffled": normal()},
    )
    signals = signals_of("entropy", "visual", "temporal", shift=shift)
    # What applies to a prompt is known on the host and copied to the device once.
    applies = signal_applies(signals, batch, groups)
    rules = [
        ChoiceRules(ratio_of=dict.fromkeys(applies, 0.4), **options)
        for options in (
            {},
            dict(rule="rank", combine="intersection"),
            dict(combine="weighted", token_weights="sigmoid"),
            dict(combine="weighted", token_weights="soft_mask"),
        )
    ]
    with _NoHostReads(), _NoHostCopies():
        found = signal_scores(signals, scores, applies_R=applies)
        chosen = [each.choose(found, batch.group_R, num_scopes=4) for each in rules]
    assert chosen[0].by_signal["entropy"].any() and chosen[0].by_signal["visual"].any()


def test_host_reads_are_noticed():
    values = torch.arange(3.0)
    for read in (lambda: values[0].item(), lambda: bool(values[1]), values.tolist, lambda: values[values > 1]):
        with pytest.raises(AssertionError, match="waits for the device"), _NoHostReads(), _NoHostCopies():
            read()
