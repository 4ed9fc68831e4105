"""What trainer and checkpoints ask of a source of responses; ``ReplicaSource`` answers both, ``FixedSource`` the
trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from megatron_ktr.types import RolloutGroup


class StepSource(Protocol):
    """Hands each replica its groups of responses, step by step: ``begin``, then ``finish``, on every rank."""

    needs_weights: bool
    """Whether an engine samples from the policy's weights, which it is sent after every update."""
    gather_weights_to: Literal["all", "source"]
    """The ranks that an engine takes them on: all, or each replica's reading rank."""
    needs_vision_weights: bool
    """Whether its engine runs the vision encoder."""
    lag: int
    """1 where the next step's responses are sampled while a step trains, else 0."""

    @property
    def pending_step(self) -> int | None:
        """The step that has begun and is not finished; None where there is none."""

    @property
    def num_skipped(self) -> int:
        """Prompts skipped so far on this rank."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """What data and engine met so far on this rank, by metric name."""
        ...

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Takes the policy's exported weights and exhausts the iterator, which is collective."""

    def begin(self, num_prompts: int, *, step: int) -> None:
        """Draws the step's ``num_prompts`` prompts of this replica."""

    def finish(self) -> list[RolloutGroup]:
        """The groups of the step that has begun, with rewarded responses."""
        ...

    def close(self) -> None:
        """Frees what the source holds; it is not used afterwards."""


class ResumableSource(Protocol):
    """A source whose place in the data is part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, as JSON takes it; the same on every rank of a replica."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from that place."""
