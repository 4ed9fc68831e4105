"""The interface of rollout engines: they answer prompts with groups of responses and receive the policy's weights."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

from torch import Tensor

from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.types import Prompt, RolloutGroup


def counts_of(prompts: Sequence[Prompt], *, counts: Sequence[int] | None, sampling: SamplingSettings) -> list[int]:
    """The number of responses of each prompt, for the arguments of ``RolloutEngine.stream``.

    Raises:
        ValueError: ``counts`` does not have one number, at least 1, for each prompt.
    """
    if counts is None:
        return [sampling.num_generations] * len(prompts)
    if len(counts) != len(prompts) or any(count < 1 for count in counts):
        raise ValueError(f"expected {len(prompts)} counts of at least 1, got {list(counts)}")
    return list(counts)


class RolloutEngine(ABC):
    """Samples G responses per prompt. The same seed, step, weights and prompts give the same responses.

    By default only one rank of each replica, its *reading rank*, holds an engine, calls it and receives the weights. A
    *collective* engine (``is_collective``) has a part on every rank of the world. All ranks then call every method in
    the same order, with the prompts of their replica, and the groups of a replica are yielded to its reading rank.
    """

    is_collective = False
    takes_more = False
    """Whether ``stream`` may be called from another thread while a call is still answering."""
    runs_vision_encoder = True
    """If False, the media of prompts carry the features that the trainer computed, and ``load_weights`` receives no
    tensors of the vision encoder."""

    @property
    def keeps_weights(self) -> bool:
        """Whether ``stream`` can be called again without ``load_weights`` in between."""
        return True

    @abstractmethod
    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int = 0,
        sampling: SamplingSettings | None = None,
        counts: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """Yields (index of the prompt, its group) as soon as all responses of a group are complete, in any order.

        Rewards are empty unless the engine already knows them. ``sampling`` replaces the engine's own settings.
        ``counts`` has the number of responses of each prompt; None means ``num_generations`` for all. A prompt may be
        there twice, as itself and as a variant with an identity of its own (``Prompt.variant``).
        """

    def generate(
        self, prompts: Sequence[Prompt], *, step: int = 0, sampling: SamplingSettings | None = None
    ) -> list[RolloutGroup]:
        """One group per prompt, in order."""
        groups = dict(self.stream(prompts, step=step, sampling=sampling))
        return [groups[index] for index in sorted(groups)]

    def awake(self) -> AbstractContextManager[None]:
        """Within it ``stream`` may be called several times after one ``load_weights``, also by an engine that otherwise
        gives its memory back after every call. Ranks of a collective engine enter it together."""
        return contextlib.nullcontext()

    @abstractmethod
    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Takes new weights as a stream of tensors under Hugging Face's names; later calls of ``stream`` use them."""

    @property
    def gather_weights_to(self) -> Literal["all", "source"]:
        """The ranks on which an export of weights must yield the full tensors: all ranks, or the reading ranks."""
        return "all" if self.is_collective else "source"

    @property
    def counts(self) -> Mapping[str, int]:
        """Counts of events since the engine started, such as retries, by metric name. They are summed over replicas."""
        return {}

    def close(self) -> None:  # noqa: B027 - most engines hold nothing that outlives them
        """Frees devices and processes. The engine must not be used afterwards."""
