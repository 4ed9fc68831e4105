"""Advantages: how much better each response is than those it is compared with. One file each.

An advantage is a function of the rewards by group, which hold bonuses already. It returns float64 [responses] on the
host, group after group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_ktr.types import BatchFacts

Advantage = Callable[[Sequence[Sequence[float]], BatchFacts], Tensor]


def needs_batch(advantage: Advantage) -> bool:
    """Whether the advantage compares responses over the whole rollout, so that ``BatchFacts`` must hold its rewards.
    Such an advantage has an attribute of this name that is True."""
    return getattr(advantage, "needs_batch", False)
