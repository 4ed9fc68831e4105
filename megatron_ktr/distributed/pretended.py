"""One rank of a large world, alone in its process: process groups that have the sizes and ranks of real ones and send
nothing. A model built in them has the shapes that it would have on that rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes, destroy_parallel, init_parallel
from megatron_ktr.distributed.platform import Platform


@contextlib.contextmanager
def pretended_ranks(sizes: ParallelSizes, *, rank: int, platform: Platform) -> Iterator[ParallelGroups]:
    """The groups of ``rank`` in a world of one replica (tensor x context x pipeline ranks).

    Raises:
        RuntimeError: this process has joined a world already.
    """
    # torch's own tests and its launchers' dry runs use this backend; it is imported here because only dry runs need it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RuntimeError("this process has joined a world already: it cannot pretend to be in another")
    torch.distributed.init_process_group("fake", rank=rank, world_size=sizes.model, store=FakeStore())
    try:
        yield init_parallel(sizes, platform=platform)
    finally:
        destroy_parallel()
