"""The rules by which a run is found to be going wrong, one small class each. They read the metrics of steps, in order.

In the formulas x_t is a metric at step t, as metrics.jsonl holds it (8 digits); a step whose value is missing or not
finite is passed over, for a gradient norm also one of 0. "The last n values" are those of the n latest steps that had
one, W is ``alarm_window``, and a rule says nothing before it has seen as many values as it needs.

================  =======================================================================  =======================
alarm             is on at step t if                                                       needs
================  =======================================================================  =======================
grad_norm         x_t > c median(the last W values before t)                               W / 2 values before t
reward            m_t < (1 - c) max over s <= t of m_s, where m_s is the mean of the       2 W values
                  last W values at step s and the maximum is above 0
entropy           median(the last min(5, W) values, x_t among them) < c                    min(5, W) values
length            x_t > c median(the last W values before t)                               W / 2 values before t
kl                median(the last min(5, W) values, x_t among them) > c                    min(5, W) values
vision            the last 3 steps, this one among them, all showed the same fault of      3 steps
                  ``policy/vision_watch.py``
================  =======================================================================  =======================

The numbers c are ``alarm_grad_norm``, ``alarm_reward_drop``, ``alarm_entropy``, ``alarm_length`` and ``alarm_kl``; the
alarm ``vision`` has none and is always there. A rule has no other memory than the values it has read, so a run that
resumes reads them from metrics.jsonl.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean, median

from megatron_ktr.config.sections import ResilienceSection
from megatron_ktr.policy.vision_watch import VISION_FAULTS

LEVEL_STEPS = 5
"""Values whose median is compared with a level; the value of a single step would be too noisy."""


class AlarmRule(ABC):
    """A rule over the metrics of steps."""

    name: str
    metrics: tuple[str, ...]
    """The names of what it reads; of a rule over one metric, the names under which that may stand, in this order."""
    is_repeated = False
    """Whether the alarm is raised again and again as long as it is on."""

    @abstractmethod
    def read(self, values: Mapping[str, float | None]) -> str | None:
        """Takes the values of the next step. Returns one line that says why the alarm is on; None if it is off."""


class OneMetric(AlarmRule):
    """A rule over the values of one metric."""

    def read(self, values: Mapping[str, float | None]) -> str | None:
        value = next((values[name] for name in self.metrics if name in values), None)
        if value is None or not math.isfinite(value):
            return None
        return self.next(value)

    @abstractmethod
    def next(self, value: float) -> str | None:
        """Takes the next finite value of the metric."""


class Spike(OneMetric):
    """On if a value is above ``times`` the median of the window before it."""

    def __init__(self, name: str, metric: str, *, what: str, times: float, window: int) -> None:
        self.name, self.metrics = name, (metric,)
        self._what, self._times = what, times
        self._needed = math.ceil(window / 2)
        self._before: deque[float] = deque(maxlen=window)

    def next(self, value: float) -> str | None:
        if value <= 0.0:
            return None  # a step that had nothing to learn
        usual = median(self._before) if len(self._before) >= self._needed else math.inf
        num_before = len(self._before)
        self._before.append(value)
        if value <= self._times * usual:
            return None
        return (
            f"the {self._what} is {value:.4g}, {value / usual:.1f} times the median {usual:.4g} of the {num_before} "
            "steps before"
        )


class Fall(OneMetric):
    """On if the mean over a window has fallen by ``share`` of the largest such mean of the run."""

    def __init__(self, name: str, metric: str, *, what: str, share: float, window: int) -> None:
        self.name, self.metrics = name, (metric,)
        self._what, self._share = what, share
        self._last: deque[float] = deque(maxlen=window)
        self._num_read = 0
        self._best = -math.inf

    def next(self, value: float) -> str | None:
        self._last.append(value)
        self._num_read += 1
        window = self._last.maxlen or 1
        if len(self._last) < window:
            return None
        mean = fmean(self._last)
        self._best = max(self._best, mean)
        if self._num_read < 2 * window or self._best <= 0 or mean >= (1 - self._share) * self._best:
            return None
        return (
            f"the {self._what} over {window} steps is {mean:.4g}, {1 - mean / self._best:.0%} less than the run's best "
            f"{self._best:.4g}"
        )


class Level(OneMetric):
    """On if the median of the last few values is beyond a level."""

    def __init__(
        self, name: str, metrics: Sequence[str], *, what: str, level: float, is_upper: bool, window: int
    ) -> None:
        self.name, self.metrics = name, tuple(metrics)
        self._what, self._level, self._is_upper = what, level, is_upper
        self._last: deque[float] = deque(maxlen=min(LEVEL_STEPS, window))

    def next(self, value: float) -> str | None:
        self._last.append(value)
        if len(self._last) < (self._last.maxlen or 1):
            return None
        usual = median(self._last)
        if usual <= self._level if self._is_upper else usual >= self._level:
            return None
        side = "above" if self._is_upper else "below"
        return f"the {self._what} is {usual:.4g} (median of {len(self._last)} steps), {side} {self._level:g}"


class Unseen(AlarmRule):
    """On if each of the last ``STEPS`` steps showed the same fault of vision. A step without media shows none."""

    name = "vision"
    metrics = VISION_FAULTS
    is_repeated = True
    STEPS = 3

    def __init__(self) -> None:
        self._in_a_row = dict.fromkeys(VISION_FAULTS, 0)

    def read(self, values: Mapping[str, float | None]) -> str | None:
        for fault in VISION_FAULTS:
            self._in_a_row[fault] = self._in_a_row[fault] + 1 if values.get(fault) else 0
        found = [_UNSEEN[fault] for fault, number in self._in_a_row.items() if number >= self.STEPS]
        if not found:
            return None
        return f"vision does not reach the loss: in the last {self.STEPS} steps {', and '.join(found)}"


_UNSEEN = {
    "vision/tokens_alike": "all visual tokens had the same features",
    "vision/videos_alike": "different videos had the same features",
    "vision/no_gradient": "no gradient came back to the features, although the encoder is trained",
    "vision/no_shift": "responses were as probable without their video as with it",
}


def build_rules(options: ResilienceSection) -> list[AlarmRule]:
    """The rules that the options ask for."""
    window = options.alarm_window
    rules: list[AlarmRule] = [Unseen()]
    if (times := options.alarm_grad_norm) is not None:
        rules.append(Spike("grad_norm", "grad_norm", what="gradient norm", times=times, window=window))
    if (share := options.alarm_reward_drop) is not None:
        rules.append(Fall("reward", "reward_mean", what="mean reward", share=share, window=window))
    if (level := options.alarm_entropy) is not None:
        rules.append(Level("entropy", ["entropy"], what="policy's entropy", level=level, is_upper=False, window=window))
    if (times := options.alarm_length) is not None:
        rules.append(Spike("length", "response_length", what="responses' length", times=times, window=window))
    if (level := options.alarm_kl) is not None:
        what = "KL divergence to the reference model"
        rules.append(Level("kl", ["kl_full", "kl"], what=what, level=level, is_upper=True, window=window))
    return rules
