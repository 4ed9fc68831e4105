"""Statistics of an evaluation against numbers worked out by hand and known formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.evaluation.results.statistics import (
    Resampling,
    bootstrap_p_value,
    group_means,
    holm,
    mcnemar_p_value,
    percentile_interval,
    resample_group_means,
    rounded,
)
from tests.support.fuzzing import fuzzed


def wilson_interval(num_right: int, num: int, z: float = 1.959964) -> tuple[float, float]:
    share = num_right / num
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return middle - half, middle + half


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [
        (9, 3, 0.14599609375),  # statsmodels' mcnemar(exact=True)
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (0, 6, 2 / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_gives_the_numbers_of_the_formula(only_a, only_b, expected):
    assert mcnemar_p_value(only_a, only_b) == expected
    assert mcnemar_p_value(only_b, only_a) == expected


def test_mcnemar_of_a_whole_benchmark_agrees_with_the_normal_distribution():
    only_a, only_b = 1300, 1400  # n = 2,700: 2**2700 is beyond a float
    z = (abs(only_a - only_b) - 1) / math.sqrt(only_a + only_b)  # with continuity correction
    # The normal distribution with its correction differs from the binomial by less than a hundredth of p here.
    assert mcnemar_p_value(only_a, only_b) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    exact = 2 * Fraction(sum(math.comb(2700, i) for i in range(1301)), 2**2700)
    assert mcnemar_p_value(only_a, only_b) == float(exact)
    assert 0 < mcnemar_p_value(100, 900) < 1e-100


def test_holm_steps_down_and_never_decreases():
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@fuzzed(50)
def test_holm_lies_between_the_p_value_and_bonferroni(p_values):
    for p_value, adjusted in zip(p_values, holm(p_values), strict=True):
        assert p_value <= adjusted <= min(len(p_values) * p_value, 1)


def one_group(values, videos, **options):
    values_NC = np.array(values, dtype=float)[:, None]
    member_NK = np.ones((len(values), 1), dtype=bool)
    return resample_group_means(values_NC, member_NK, videos, resampling=Resampling(**options))[:, 0, 0]


def test_interval_of_independent_questions_is_near_wilsons():
    values = [1] * 120 + [0] * 80
    low, high = percentile_interval(one_group(values, [str(n) for n in range(200)]))
    expected = wilson_interval(120, 200)
    # Both have the same width to first order; they differ by the middle, of order 1/n, and by the steps of 1/200.
    assert (low, high) == pytest.approx(expected, abs=0.012)


def test_questions_of_one_video_widen_the_interval_as_theory_says():
    # 50 videos of four questions each with the same verdict: as much is known as from 50 questions.
    verdicts = [1] * 30 + [0] * 20
    videos = [f"v{number}" for number in range(50) for _ in range(4)]
    samples = one_group([verdict for verdict in verdicts for _ in range(4)], videos)
    # The standard error sqrt(0.6 0.4 / 50); that of a standard deviation from 10,000 samples is 0.7 %.
    assert samples.std() == pytest.approx(math.sqrt(0.24 / 50), rel=0.03)
    assert samples.mean() == pytest.approx(0.6, abs=0.003)


def test_groups_are_resampled_together_and_by_seed_alone():
    values_NC = np.array([[1, 0], [0, 1], [1, 1], [0, 0.5]])
    member_NK = np.array([[True, True], [True, False], [False, True], [False, True]])
    assert group_means(values_NC, member_NK) == pytest.approx(np.array([[0.5, 2 / 3], [0.5, 0.5]]))
    videos = ["a", "a", "b", "c"]
    options = Resampling(num_resamples=200, seed=3)
    first = resample_group_means(values_NC, member_NK, videos, resampling=options)
    order = [3, 1, 0, 2]
    again = resample_group_means(
        values_NC[order], member_NK[order], [videos[place] for place in order], resampling=options
    )
    np.testing.assert_array_equal(first, again)
    other = resample_group_means(values_NC, member_NK, videos, resampling=Resampling(num_resamples=200, seed=4))
    assert not np.array_equal(first, other, equal_nan=True)
    # The first group is video a alone: drawn or not, its mean is that of a. It misses in (2/3)^3 of the samples.
    finite = first[:, 0, 0][np.isfinite(first[:, 0, 0])]
    assert set(finite) == {0.5} and 0.15 < 1 - len(finite) / 200 < 0.45


def test_pieces_of_a_large_resampling_are_all_filled():
    # 3,000 videos need eight pieces of 1,398 resamples.
    samples = one_group([1, 0] * 1500, [str(number) for number in range(3000)])
    assert samples.shape == (10_000,)
    assert samples.mean() == pytest.approx(0.5, abs=0.001)  # standard error 0.0091 / 100


def test_bootstrap_p_value_counts_both_sides():
    assert bootstrap_p_value(np.zeros(99)) == 1.0
    assert bootstrap_p_value(np.ones(99)) == 2 / 100
    assert bootstrap_p_value(np.array([1.0] * 95 + [-1.0] * 4)) == 2 * 5 / 100
    assert bootstrap_p_value(np.array([1.0, np.nan, 1.0])) == 2 / 3


def test_numbers_of_the_results_have_no_nan_and_no_minus_zero():
    assert rounded(float("nan")) is None and rounded(None) is None
    assert str(rounded(-1e-9)) == "0.0"
