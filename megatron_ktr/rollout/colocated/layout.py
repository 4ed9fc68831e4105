"""Computes which ranks form which colocated engine, and which engine answers which response. Needs no vLLM.

vLLM makes engines of ``engine_size`` consecutive ranks. The trainer's ranks are ordered tensor, context, data, pipeline
(fastest first). So an engine lies within one pipeline stage, and covers there a part of one replica's ranks, all of
them, or those of several replicas. A *share group* is the smallest set of whole replicas that a set of whole engines
covers. Its engines, in all pipeline stages, share the prompts of its replicas.

Worked example, 8 ranks, tensor 2, pipeline 2 (replica 0 has ranks 0 1 4 5, replica 1 ranks 2 3 6 7):

    engine_size 1    two share groups of 4 engines each, one per rank
    engine_size 2    two share groups of 2 engines: (0 1) (4 5), and (2 3) (6 7)
    engine_size 4    one share group of 2 engines: (0 1 2 3), (4 5 6 7)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError


@dataclass(frozen=True)
class ShareGroup:
    """A set of ranks that is made up of whole replicas and also of whole engines."""

    ranks: tuple[int, ...]
    """World ranks in ascending order, that is, the ranks of one engine after those of the other."""
    reading_ranks: tuple[int, ...]
    """For each replica, the rank that reads its prompts and to which its groups are yielded."""
    engine_size: int

    @property
    def num_engines(self) -> int:
        return len(self.ranks) // self.engine_size

    def engine_of(self, rank: int) -> int:
        """Index of the engine that ``rank`` is part of."""
        return self.ranks.index(rank) // self.engine_size

    def is_first_of_engine(self, rank: int) -> bool:
        """Whether ``rank`` reports its engine's responses. All ranks of an engine hold the same ones."""
        return self.ranks.index(rank) % self.engine_size == 0


def require_vllm() -> None:
    """Raises ``UserError`` if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm_colocated needs vLLM: pip install '.[vllm]', or make setup-vllm on CPU")


def share_groups(sizes: ParallelSizes, *, world_size: int, engine_size: int) -> list[ShareGroup]:
    """All share groups of the world. Raises ``UserError`` if neither engines divide into replicas nor the reverse."""
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
    prompt_lengths: Sequence[int], *, num_samples: Sequence[int], num_engines: int, max_response_length: int
) -> list[list[Share]]:
    """The shares that each engine answers, in the order of prompts. ``num_samples`` has the responses of each prompt.

    A share is a whole group, so that a prompt is computed only once; groups are divided only if there are fewer prompts
    than engines. The shares are assigned in order of size, the largest first, each to the engine with the fewest tokens
    so far. The result is deterministic, so that all ranks compute the same one.
    """
    if not prompt_lengths:
        return [[] for _ in range(num_engines)]
    shares = []
    for prompt, number in enumerate(num_samples):
        parts = min(number, max(1, num_engines // len(prompt_lengths)))
        bounds = [number * part // parts for part in range(parts + 1)]
        shares += [Share(prompt, range(bounds[part], bounds[part + 1])) for part in range(parts)]

    def num_tokens(share: Share) -> int:
        return prompt_lengths[share.prompt] + len(share.samples) * max_response_length

    work: list[list[Share]] = [[] for _ in range(num_engines)]
    loads = [0] * num_engines
    for share in sorted(shares, key=num_tokens, reverse=True):  # stable: equal ones stay in order
        engine = loads.index(min(loads))
        work[engine].append(share)
        loads[engine] += num_tokens(share)
    return [sorted(part, key=lambda share: (share.prompt, share.samples.start)) for part in work]
