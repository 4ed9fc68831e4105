"""Figures of a set of items: the overall one and one a category, each with its confidence interval.

    scores {"official": [1, 0, 1, ...]} -> {"official": Figures(overall, by_category={"subtask": {"TCI": Figure}})}

The scores may also be differences of scores, of two models or of a model with and without a control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ktr.evaluation.benchmark import Benchmark
from megatron_ktr.evaluation.item import Item, Outcome
from megatron_ktr.evaluation.results.statistics import (
    DEFAULT_RESAMPLING,
    Resampling,
    bootstrap_p_value,
    group_means,
    percentile_interval,
    resample_group_means,
    rounded,
    rounded_p,
)

UNKNOWN = "(unknown)"
"""The category of an item that has none on an axis."""
PROTOCOLS = ("official", "strict", "lenient")
"""Those that every benchmark has, in the order of tables."""


@dataclass(frozen=True)
class Headings:
    """What the file of a benchmark says about its tables."""

    title: str
    axes: tuple[str, ...] = ()
    """Axes of categories in the order of the tables; if empty, all axes that the items have."""
    macro_axis: str | None = None
    """If set, the overall figure is the mean over this axis' categories, else the mean over items."""
    inner_axis: str | None = None
    """If set, the figure of a category of ``macro_axis`` is itself the mean over this axis' categories in it."""

    @classmethod
    def of(cls, benchmark: Benchmark) -> Headings:
        return cls(benchmark.title, tuple(benchmark.axes), benchmark.macro_axis, benchmark.inner_axis)

    @classmethod
    def known(cls, name: str, headings: Mapping[str, Headings]) -> Headings:
        """Those of a benchmark; a file of one's own has its name as title."""
        return headings.get(name) or cls(name)

    def axes_of(self, items: Sequence[Item]) -> tuple[str, ...]:
        return self.axes or tuple(sorted({axis for item in items for axis in item.categories}))

    def shown_axes(self, items: Sequence[Item]) -> tuple[str, ...]:
        """The axes on which at least one of all items has a category."""
        return tuple(axis for axis in self.axes_of(items) if any(item.categories.get(axis) for item in items))


@dataclass(frozen=True)
class Figure:
    """A mean score, or a mean difference of scores."""

    value: float
    num_items: int
    interval: tuple[float, float] | None = None
    """None if nothing can be resampled: all items belong to one video, or all have the same score."""
    p_value: float | None = None
    """Of a difference: two-sided, that it is none. None if all items belong to one video."""

    def as_accuracy(self) -> dict[str, Any]:
        return {"accuracy": rounded(self.value), "interval": self._interval(), "num_items": self.num_items}

    def as_difference(self) -> dict[str, Any]:
        return {
            "difference": rounded(self.value),
            "interval": self._interval(),
            "p_value": rounded_p(self.p_value),
            "num_items": self.num_items,
        }

    def _interval(self) -> list[float | None] | None:
        return None if self.interval is None else [rounded(bound) for bound in self.interval]


@dataclass(frozen=True)
class Figures:
    """Of all items, and by axis and category."""

    overall: Figure
    by_category: dict[str, dict[str, Figure]] = field(default_factory=dict)

    def as_accuracies(self) -> dict[str, Any]:
        return {
            **self.overall.as_accuracy(),
            "by_category": {
                axis: {name: figure.as_accuracy() for name, figure in found.items()}
                for axis, found in self.by_category.items()
            },
        }

    def as_differences(self) -> dict[str, Any]:
        return {
            **self.overall.as_difference(),
            "by_category": {
                axis: {name: figure.as_difference() for name, figure in found.items()}
                for axis, found in self.by_category.items()
            },
        }


@dataclass(frozen=True)
class _Groups:
    """Which items belong to which figure."""

    labels: tuple[tuple[str, str], ...]
    """(axis, category) of the first groups. Behind them come inner groups, and last all items."""
    member_NK: np.ndarray
    macro: tuple[int, ...]
    """Groups whose mean is the overall figure; empty if that is the mean over items."""
    inner: Mapping[int, tuple[int, ...]]
    """Group -> the groups whose mean is its figure; a group that is not here has the mean over its items."""

    @classmethod
    def of(cls, items: Sequence[Item], headings: Headings) -> _Groups:
        axes = headings.axes_of(items)
        if headings.macro_axis is not None and headings.macro_axis not in axes:
            axes = (*axes, headings.macro_axis)
        values = {axis: [item.categories.get(axis) or UNKNOWN for item in items] for axis in axes}
        labels = tuple((axis, name) for axis in axes for name in sorted(set(values[axis])))
        columns = [np.array([value == name for value in values[axis]]) for axis, name in labels]
        everything = np.ones(len(items), dtype=bool)
        macro = tuple(place for place, (axis, _) in enumerate(labels) if axis == headings.macro_axis)
        inner: dict[int, tuple[int, ...]] = {}
        if headings.inner_axis is not None:
            of_item = np.array([item.categories.get(headings.inner_axis) or UNKNOWN for item in items])
            for place in macro:
                names = sorted(set(of_item[columns[place]]))
                inner[place] = tuple(range(len(columns), len(columns) + len(names)))
                columns += [columns[place] & (of_item == name) for name in names]
        return cls(labels, np.stack([*columns, everything], axis=1), macro, inner)

    def with_macro(self, means_XK: np.ndarray) -> np.ndarray:
        """The figures that are means over groups put in the place of means over items, the overall one last. A resample
        without any item of a group takes the mean over the others."""
        if self.macro:
            means_XK = means_XK.copy()
            for place, inner in self.inner.items():
                means_XK[..., place] = _mean_over(means_XK, inner)
            means_XK[..., -1] = _mean_over(means_XK, self.macro)
        return means_XK


def _mean_over(means_XK: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """The mean over those of the groups that have one; NaN if none has."""
    found = means_XK[..., list(places)]
    has_mean = np.isfinite(found)
    with np.errstate(invalid="ignore"):
        return np.where(has_mean, found, 0.0).sum(axis=-1) / has_mean.sum(axis=-1)


def figures_of(
    items: Sequence[Item],
    scores: Mapping[str, Sequence[float]],
    headings: Headings,
    *,
    resampling: Resampling | None = DEFAULT_RESAMPLING,
) -> dict[str, Figures]:
    """The figures of each column of scores (each protocol). There must be at least one item.

    Items without a video are resampled by themselves. Without ``resampling`` there are no intervals and p-values.
    """
    groups = _Groups.of(items, headings)
    values_NC = np.array([scores[name] for name in scores], dtype=np.float64).T
    videos = [f"video {item.video_id}" if item.video_id else f"item {item.item_id}" for item in items]
    means_CK = groups.with_macro(group_means(values_NC, groups.member_NK))
    samples_BCK = (
        groups.with_macro(resample_group_means(values_NC, groups.member_NK, videos, resampling=resampling))
        if resampling is not None and len(set(videos)) > 1
        else None
    )
    found = {}
    for column, name in enumerate(scores):
        figures = []
        for group in (*range(len(groups.labels)), -1):
            members = groups.member_NK[:, group]
            values, value = values_NC[members, column], float(means_CK[column, group])
            interval, p_value = None, None
            num_videos = len({video for video, is_member in zip(videos, members, strict=True) if is_member})
            if resampling is not None and samples_BCK is not None and num_videos > 1:
                samples_B = samples_BCK[:, column, group]
                p_value = bootstrap_p_value(samples_B)
                # The interval of equal scores would have no width, which would look like certainty.
                if (values != values[0]).any():
                    interval = percentile_interval(samples_B, level=resampling.level)
            figures.append(Figure(value, int(members.sum()), interval, p_value))
        by_category: dict[str, dict[str, Figure]] = {}
        for (axis, category), figure in zip(groups.labels, figures[:-1], strict=True):
            by_category.setdefault(axis, {})[category] = figure
        found[name] = Figures(figures[-1], by_category)
    return found


def score_of(outcome: Outcome, protocol: str) -> float:
    """The score of an outcome under a protocol; 0 where the item could not be asked."""
    return 0.0 if outcome.problem else float(outcome.verdicts[protocol].score)


def protocols_of(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """The protocols of a benchmark's outcomes: official, strict, lenient, then its own by name.

    Raises:
        ValueError: outcomes that were judged differ in their protocols.
    """
    judged = [set(outcome.verdicts) for outcome in outcomes if not outcome.problem]
    if not judged:
        return PROTOCOLS
    if any(names != judged[0] for names in judged):
        raise ValueError("outcomes of one benchmark were judged under different protocols")
    others = sorted(judged[0] - set(PROTOCOLS))
    return (*(name for name in PROTOCOLS if name in judged[0]), *others)
