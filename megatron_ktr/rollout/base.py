"""What a rollout engine is: prompts in, groups of responses out, weights in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor

from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.types import Prompt, RolloutGroup


class RolloutEngine(ABC):
    """Samples G responses per prompt. The same seed, step, weights and prompts give the same responses.

    Where an engine lives is its own matter. By default one rank of each replica holds it, calls it and is given the
    weights; the ranks around it know nothing of it. A *collective* engine (``is_collective``) has a part on every rank
    of the world: all of them call every method in the same order, with the prompts of their replica, and each reading
    rank is yielded its replica's groups.
    """

    is_collective = False
    runs_vision_encoder = True
    """False: the prompts' media come with features, and ``load_weights`` without the vision encoder's tensors."""

    @abstractmethod
    def stream(
        self, prompts: Sequence[Prompt], *, step: int = 0, sampling: SamplingSettings | None = None
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """(index of the prompt, its group) as soon as all its responses are there, in any order.

        Rewards are empty unless the engine already knows them. ``sampling`` replaces the engine's own settings.
        """

    def generate(
        self, prompts: Sequence[Prompt], *, step: int = 0, sampling: SamplingSettings | None = None
    ) -> list[RolloutGroup]:
        """One group per prompt, in order."""
        groups = dict(self.stream(prompts, step=step, sampling=sampling))
        return [groups[index] for index in sorted(groups)]

    @abstractmethod
    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Takes HF-named tensors, streamed; later calls of ``stream`` sample from them."""

    @property
    def gather_weights_to(self) -> Literal["all", "source"]:
        """Which ranks must be yielded the full tensors of an export."""
        return "all" if self.is_collective else "source"

    @property
    def counts(self) -> Mapping[str, int]:
        """What the engine met since it started, by metric name; summed over replicas."""
        return {}

    def close(self) -> None:  # noqa: B027 - most engines hold nothing that outlives them
        """Frees devices and processes; the engine is not used afterwards."""
