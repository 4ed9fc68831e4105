"""``overlong``: DAPO's soft punishment of long responses (arXiv 2503.14476, Eq. 13), in [-1, 0].

    0                          |y| <= L - C
    (L - C - |y|) / C          L - C < |y| <= L
    -1                         |y| > L

|y| counts tokens, the end token among them. Example: L = 768, C = 128: 640 -> 0, 704 -> -0.5, 768 -> -1.
"""

from __future__ import annotations

from megatron_ktr.rewards.inputs import RewardInput
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.registry import RewardEntry, each, register


def value_of(given: RewardInput, options: RewardOptions) -> float:
    """The punishment of one response."""
    length, buffer = options.overlong
    return max(-1.0, min(0.0, (length - buffer - given.length) / buffer))


register(RewardEntry("overlong", each(value_of)))
