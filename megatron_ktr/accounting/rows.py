"""The number of rows of a micro-batch on one rank, under context parallelism and sequence parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_ktr.accounting.layout import Layout
from megatron_ktr.accounting.work import GroupWork
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class Rows:
    """The numbers of rows of one micro-batch on one context rank."""

    on_context_rank: int
    """T, padding included."""
    on_tensor_rank: int
    """The rows of norms and residuals on a tensor rank: T / tp under sequence parallelism, else T."""
    predicted: int
    """The number of response tokens whose predicting rows lie on this context rank."""
    most_predicted: int
    """The largest ``predicted`` of all context ranks."""


def share_rows(config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], layout: Layout, *, context_rank: int = 0) -> Rows:
    """Counts rows as ``megatron_ktr/ops/context_shard.py`` distributes them over the context ranks.

    A prompt is cut into 2 cp chunks, of which rank r keeps r and 2 cp - 1 - r. A response is not cut; the longest
    first, each goes to the rank with the fewest response rows so far (of several such ranks to the last). A prompt's
    last row, which predicts the first token of each response, lies on rank 0.
    """
    multiple = layout.tensor if layout.sequence_parallel else 1
    prompts = tuple(group.prompt_length(config) for group in groups)
    # The planner asks thousands of times for one group, whose responses may be thousands.
    lengths = (
        groups[0].response_lengths if len(groups) == 1 else tuple(n for one in groups for n in one.response_lengths)
    )
    rows, predicted = _shares(prompts, lengths, layout.context)
    padded = max(1, -(-max(rows) // multiple)) * multiple
    return Rows(padded, padded // multiple, predicted[context_rank], max(predicted))


@lru_cache(maxsize=1024)
def _shares(prompts: tuple[int, ...], lengths: tuple[int, ...], size: int) -> tuple[list[int], list[int]]:
    loads, predicted = [0] * size, [0] * size
    for length in sorted(lengths, reverse=True):
        owner = min(range(size), key=lambda r: (loads[r], -r))
        loads[owner] += length
        predicted[owner] += length - 1
    predicted[0] += len(lengths)
    for prompt in prompts:
        bounds = [chunk * prompt // (2 * size) for chunk in range(2 * size + 1)]
        for rank in range(size):
            mirrored = 2 * size - 1 - rank
            loads[rank] += bounds[rank + 1] - bounds[rank] + bounds[mirrored + 1] - bounds[mirrored]
    return loads, predicted
