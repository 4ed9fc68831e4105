"""Which ranks form which colocated engine, and which engine answers which response. Pure numbers, no vLLM.

vLLM makes engines of ``engine_size`` consecutive ranks. Ours are ordered tensor, context, data, pipeline (fastest
first), so an engine lies within one pipeline stage and covers part of a replica's ranks there, all of them, or those
of several replicas. A *share group* is the smallest set of whole replicas that whole engines cover; its engines, of
all pipeline stages, share the prompts of its replicas.

Worked example, 8 ranks, tensor 2, pipeline 2 (replica 0 has ranks 0 1 4 5, replica 1 ranks 2 3 6 7):

    engine_size 1    two share groups of 4 engines each, one per rank
    engine_size 2    two share groups of 2 engines: (0 1) (4 5), and (2 3) (6 7)
    engine_size 4    one share group of 2 engines: (0 1 2 3), (4 5 6 7)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError


@dataclass(frozen=True)
class ShareGroup:
    """Replicas and engines on the same ranks."""

    ranks: tuple[int, ...]
    """World ranks, ascending: the engines one after the other."""
    reading_ranks: tuple[int, ...]
    """Of each replica, the rank that reads its prompts and is yielded its groups."""
    engine_size: int

    @property
    def num_engines(self) -> int:
        return len(self.ranks) // self.engine_size

    def engine_of(self, rank: int) -> int:
        """Index of the engine that ``rank`` is part of."""
        return self.ranks.index(rank) // self.engine_size

    def is_first_of_engine(self, rank: int) -> bool:
        """Whether ``rank`` speaks for its engine; all its ranks hold the same responses."""
        return self.ranks.index(rank) % self.engine_size == 0


def share_groups(sizes: ParallelSizes, *, world_size: int, engine_size: int) -> list[ShareGroup]:
    """Every share group of the world. Raises ``UserError`` where engines and replicas do not fit into each other."""
    inner = sizes.tensor * sizes.context
    stage = world_size // sizes.pipeline
    replicas = stage // inner
    width = max(inner, engine_size)
    if width % inner or width % engine_size or stage % width:
        raise UserError(
            f"--rollout-tensor-parallel-size {engine_size} must divide --tensor-model-parallel-size {sizes.tensor} x "
            f"--context-parallel-size {sizes.context} = {inner}, or be a multiple of it that divides the {stage} ranks "
            f"of a pipeline stage"
        )
    per_group = width // inner
    return [
        ShareGroup(
            ranks=tuple(
                number * stage + first * inner + offset for number in range(sizes.pipeline) for offset in range(width)
            ),
            reading_ranks=tuple(replica * inner for replica in range(first, first + per_group)),
            engine_size=engine_size,
        )
        for first in range(0, replicas, per_group)
    ]


@dataclass(frozen=True)
class Share:
    """Consecutive samples of one prompt, answered by one engine."""

    prompt: int
    samples: range


def split_work(
    prompt_lengths: Sequence[int], *, num_samples: int, num_engines: int, max_response_length: int
) -> list[list[Share]]:
    """What each engine answers: whole groups, so that a prompt is computed once, unless there are fewer prompts than
    engines. Largest first to the engine with the least tokens; deterministic; in order of prompts."""
    if not prompt_lengths:
        return [[] for _ in range(num_engines)]
    parts = min(num_samples, max(1, num_engines // len(prompt_lengths)))
    bounds = [num_samples * part // parts for part in range(parts + 1)]
    shares = [
        Share(prompt, range(bounds[part], bounds[part + 1]))
        for prompt in range(len(prompt_lengths))
        for part in range(parts)
    ]

    def num_tokens(share: Share) -> int:
        return prompt_lengths[share.prompt] + len(share.samples) * max_response_length

    work: list[list[Share]] = [[] for _ in range(num_engines)]
    loads = [0] * num_engines
    for share in sorted(shares, key=num_tokens, reverse=True):  # stable: equal ones stay in order
        engine = loads.index(min(loads))
        work[engine].append(share)
        loads[engine] += num_tokens(share)
    return [sorted(part, key=lambda share: (share.prompt, share.samples.start)) for part in work]
