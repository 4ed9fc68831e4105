"""The interfaces of a source of responses: ``StepSource`` for the trainer, ``ResumableSource`` for checkpoints.

``ReplicaSource`` implements both, ``FixedSource`` only the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from megatron_ktr.types import RolloutGroup


class StepSource(Protocol):
    """Gives each replica its groups of responses, step by step. Every rank calls ``begin`` and then ``finish``."""

    needs_weights: bool
    """Whether an engine samples the responses of steps from the policy's weights. If so, it needs them after every
    update."""
    gather_weights_to: Literal["all", "source"]
    """The ranks on which the engine takes the weights: all ranks, or the reading rank of each replica."""
    needs_vision_weights: bool
    """Whether the engine runs the vision encoder itself."""
    lag: int
    """1 if the responses of the next step are sampled while a step trains, else 0."""

    @property
    def pending_step(self) -> int | None:
        """The step that has begun and is not finished; None where there is none."""

    @property
    def num_skipped(self) -> int:
        """Prompts skipped so far on this rank."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """Counts of events in data and engine so far on this rank, by metric name."""
        ...

    @property
    def data_wait_seconds(self) -> float:
        """Seconds in which this replica waited for the data of the step that was finished last."""
        ...

    @property
    def step_values(self) -> Mapping[str, float]:
        """Metrics of the step that was finished last, the same on every rank of the world; of a run that filters groups
        or retires records."""
        ...

    @property
    def shuffled_seconds(self) -> float:
        """Seconds of the rollout of the step that was finished last in which only prompts with shuffled frames were
        still answered (``rollout/second_prompt.py``); 0 where nothing is asked twice."""
        ...

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Takes the policy's exported weights. The iterator is collective and must be exhausted."""

    def begin(self, num_prompts: int, *, step: int) -> None:
        """Draws the ``num_prompts`` prompts of this replica for the step."""

    def finish(self) -> list[RolloutGroup]:
        """The groups of the step that has begun, with rewarded responses."""
        ...

    def settle(self) -> None:
        """Waits until nothing is sampled in the background. What was sampled stays for ``finish``. Collective."""

    def close(self) -> None:
        """Frees what the source holds. It must not be used afterwards."""


class ResumableSource(Protocol):
    """A source whose place in the data is part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, as a dict that JSON can represent; the same on every rank of a replica."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the place in the data that ``state_dict`` returned."""
