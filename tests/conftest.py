"""Fixtures shared by all tests: one process on CPU, and several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_ktr.hf_model import make_torchvision_importable
from tests.support.ranks import RankPool

# In the vllm environment transformers' models import torchvision, which does not load by itself beside a CPU torch.
# Here, because test modules import those models when they are collected.
make_torchvision_importable()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Runs a function on up to four gloo ranks; see ``tests/support/ranks.py``."""
    pool = RankPool(max_world_size=4)
    yield pool
    pool.close()


@pytest.fixture
def one_rank() -> Iterator[object]:
    """``ParallelGroups`` of a lone process, torn down after the test."""
    from megatron_ktr.distributed.platform import start

    platform = start("cpu")
    from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel

    platform.seed(0)
    yield init_parallel(ParallelSizes(), platform=platform)
    destroy_parallel()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors: more threads only fight each other for cores."""
    torch.set_num_threads(1)
