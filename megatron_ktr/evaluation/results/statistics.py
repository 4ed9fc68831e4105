"""Accuracy with its uncertainty: means over items, bootstrap over videos, exact McNemar, Holm.

Questions about one video are not independent of one another, so that videos are resampled, not questions. Two models,
or one model with and without a control, are compared on the same items, and the same resampled videos serve both sides.

Letters of shapes: N items, C columns of scores (one a protocol), K groups of items, V videos, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST_WEIGHTS = 2**22
"""The largest number of (resample, video) weights that are held at once, 32 MiB."""


@dataclass(frozen=True)
class Resampling:
    """How confidence intervals are found."""

    num_resamples: int = 10_000
    seed: int = 0
    level: float = 0.95


DEFAULT_RESAMPLING = Resampling()


def group_means(values_NC: np.ndarray, member_NK: np.ndarray) -> np.ndarray:
    """The mean score of each group of items, [C, K]; NaN for a group without items. ``member_NK`` is True where an item
    is in a group."""
    member_NK = member_NK.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (values_NC.T @ member_NK) / member_NK.sum(axis=0)


def resample_group_means(
    values_NC: np.ndarray, member_NK: np.ndarray, videos: Sequence[str], *, resampling: Resampling = DEFAULT_RESAMPLING
) -> np.ndarray:
    """``group_means`` of B bootstrap samples, [B, C, K].

    Each sample draws as many videos as there are, with replacement, and takes all items of each. The result depends on
    the seed, and not on the order of the items. A group has NaN in samples without any of its items.

    Args:
        videos: the video of each item.
    """
    place = {name: number for number, name in enumerate(sorted(set(videos)))}
    index_N = np.array([place[name] for name in videos], dtype=np.int64)
    num_videos, (num_columns, num_groups) = len(place), (values_NC.shape[1], member_NK.shape[1])
    members = member_NK.astype(np.float64)
    counts_VK = np.zeros((num_videos, num_groups))
    sums_VCK = np.zeros((num_videos, num_columns, num_groups))
    np.add.at(counts_VK, index_N, members)
    np.add.at(sums_VCK, index_N, values_NC[:, :, None] * members[:, None, :])
    sums_VX = sums_VCK.reshape(num_videos, num_columns * num_groups)

    generator = np.random.default_rng(resampling.seed)
    means_BCK = np.empty((resampling.num_resamples, num_columns, num_groups))
    size = max(_MOST_WEIGHTS // num_videos, 1)
    for start in range(0, resampling.num_resamples, size):
        num = min(size, resampling.num_resamples - start)
        drawn = generator.integers(0, num_videos, size=(num, num_videos)) + num_videos * np.arange(num)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=num * num_videos).reshape(num, num_videos).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means = (weights @ sums_VX).reshape(num, num_columns, num_groups) / (weights @ counts_VK)[:, None, :]
        means_BCK[start : start + num] = means
    return means_BCK


def percentile_interval(samples_B: np.ndarray, *, level: float = DEFAULT_RESAMPLING.level) -> tuple[float, float]:
    """The bootstrap's percentile interval: the middle ``level`` of the finite samples."""
    tail = (1 - level) / 2
    low, high = np.nanquantile(samples_B, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_p_value(differences_B: np.ndarray) -> float:
    """Two-sided p of a paired difference: 2 min((1 + #{d <= 0}) / (B + 1), (1 + #{d >= 0}) / (B + 1)), at most 1.

    >>> bootstrap_p_value(np.array([1.0] * 98 + [-1.0]))  # 2 (1 + 1) / 100
    0.04
    """
    finite = differences_B[np.isfinite(differences_B)]
    least = min(int((finite <= 0).sum()), int((finite >= 0).sum()))
    return min(2 * (1 + least) / (len(finite) + 1), 1.0)


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: min(1, 2 sum_{i <= min(b, c)} C(n, i) / 2^n) with n = b + c.

    Integers of any size keep it exact. Python's division of two integers is rounded correctly, however large they are.

    Args:
        only_a: b, the number of items that A alone has right.
        only_b: c, the number of items that B alone has right.

    >>> mcnemar_p_value(9, 3)
    0.14599609375
    """
    num = only_a + only_b
    term = tail = 1
    for i in range(min(only_a, only_b)):
        term = term * (num - i) // (i + 1)
        tail += term
    return min(2 * tail / 2**num, 1.0) if num else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: for the i-th smallest of m, the largest (m - j + 1) p_(j), j <= i.

    >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]
    """
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min((len(p_values) - rank) * p_values[index], 1.0))
        adjusted[index] = highest
    return adjusted


def rounded(value: float | None, digits: int = 6) -> float | None:
    """A number as the results hold it: six decimals, and None where there is none (NaN)."""
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), digits) + 0.0  # no minus zero


def rounded_p(p_value: float | None) -> float | None:
    """A p-value as the results hold it: four significant digits, because the small ones differ by orders."""
    return None if p_value is None else float(f"{p_value:.4g}")
