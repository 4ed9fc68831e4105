"""``repetition``: minus the share of repeated n-grams, in (-1, 0].

    -(1 - number of different n-grams / number of n-grams)       over the response's tokens, n = ``repetition_ngram``

Example, n = 2: (5, 5, 5, 5, 5) -> -0.75, (1, 2, 3, 4) -> 0. A response shorter than n has 0. As TRL's
``get_repetition_penalty_reward`` with a largest punishment of -1; the weight of the part scales it.
"""

from __future__ import annotations

from megatron_ktr.rewards.inputs import RewardInput
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.registry import RewardEntry, each, register


def value_of(given: RewardInput, options: RewardOptions) -> float:
    """The punishment of one response."""
    size = options.section.repetition_ngram
    num_grams = len(given.token_ids) - size + 1
    if num_grams <= 0:
        return 0.0
    different = {given.token_ids[start : start + size] for start in range(num_grams)}
    return len(different) / num_grams - 1.0


register(RewardEntry("repetition", each(value_of)))
