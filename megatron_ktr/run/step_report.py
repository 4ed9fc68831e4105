"""What one training step has to tell, for logs, reports and whatever watches a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from megatron_ktr.policy.gradient_norms import TensorGradient
from megatron_ktr.step.score_records import ResponseScores
from megatron_ktr.types import ResponseSelection, RolloutGroup


@dataclass(frozen=True)
class StepReport:
    """The results of one training step, for logs and reports."""

    step: int
    values: dict[str, float]
    groups: tuple[RolloutGroup, ...]
    """The groups this replica trained on, in the order of its micro-batches. Every group of the step is trained on
    exactly one replica."""
    gather_selections: Callable[[], tuple[tuple[ResponseSelection, ...], ...]]

    gather_scores: Callable[[], tuple[tuple[ResponseScores, ...], ...]] = tuple
    """The scores of every response token, by group and by response; empty like ``selections``. Collective over the
    replica, and not kept: few steps are looked at so closely."""
    gather_gradients: Callable[[], dict[str, TensorGradient]] = dict
    """The gradient of every tensor in numbers, of the first update that was skipped for a fault, or else of the last
    (which clips it where it takes its step). Collective over the world; to be asked before the next step begins."""
    noise_floor: Mapping[str, float] = field(default_factory=dict)
    """By signal: the noise that the step selected by (``step/noise.py``)."""

    @cached_property
    def selections(self) -> tuple[tuple[ResponseSelection, ...], ...]:
        """The selected tokens, by group and by response.

        It is empty when the step took no optimizer step because there was nothing to learn: no group had unequal
        rewards and there is no KL term.

        The first access gathers the selections and is collective: every rank of the replica must make it. Gathering
        is lazy so that a step that nobody logs need not copy its marks for every token and signal from the device.
        """
        return self.gather_selections()
