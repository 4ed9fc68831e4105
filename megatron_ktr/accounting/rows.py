"""Rows of a micro-batch on one rank: what context parallelism and sequence parallelism make of the packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_ktr.accounting.layout import Layout
from megatron_ktr.accounting.work import GroupWork
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class Rows:
    """Of one micro-batch on one context rank."""

    on_context_rank: int
    """T, padding included."""
    on_tensor_rank: int
    """Of norms and residuals: T / tp under sequence parallelism."""
    predicted: int
    """Response tokens whose predicting rows lie on this context rank."""
    most_predicted: int
    """On any."""


def share_rows(config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], layout: Layout, *, context_rank: int = 0) -> Rows:
    """As ``megatron_ktr/ops/context_shard.py`` shares them out: prompts in 2 cp chunks, of which rank r has r and
    2 cp - 1 - r, responses whole, longest first, to the rank with the fewest rows (ties: the last); a prompt's last
    row, which predicts the first token of each response, is rank 0's."""
    multiple = layout.tensor if layout.sequence_parallel else 1
    prompts = tuple(group.prompt_length(config) for group in groups)
    lengths = tuple(length for group in groups for length in group.response_lengths)
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
