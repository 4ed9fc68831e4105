"""What a rollout engine is: prompts in, groups of responses out, weights in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_ktr.types import Prompt, RolloutGroup


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples G responses per prompt. The same seed, step, weights and prompts give the same responses."""

    def generate(self, prompts: Sequence[Prompt], *, step: int) -> list[RolloutGroup]:
        """One group per prompt, in order. Rewards are empty unless the engine already knows them."""
        ...

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Takes HF-named tensors, streamed; later calls of ``generate`` sample from them."""
        ...

    def close(self) -> None:
        """Frees devices and processes; the engine is not used afterwards."""
        ...
