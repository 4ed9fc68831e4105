"""Fixtures shared by all tests: one process on CPU, and several."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.doctor.requirements import installed_version
from megatron_ktr.files.hf_model import make_torchvision_importable
from tests.support import ports
from tests.support.dear_files import place_of
from tests.support.ranks import RankPool

# In the vllm environment transformers' models import torchvision, which does not load by itself beside a CPU torch.
# Here, because test modules import those models when they are collected.
make_torchvision_importable()


def pytest_report_header() -> str:
    """Which of the two stacks is tested."""
    names = ("megatron-core", "torch", "transformers")
    return "stack: " + ", ".join(f"{name} {installed_version(name)}" for name in names)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``pytest -m gpu`` imports the files with such tests alone: GPU machines may lack what the others import."""
    if config.option.markexpr.strip() != "gpu" or collection_path.suffix != ".py":
        return None
    return True if "mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A stable order: the tests of a file stay together, as they are.
    items.sort(key=lambda item: place_of(item.path))
    if "nightly" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="runs at night: pytest -m nightly"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported by now stays. Garbage collections, of which some tests ask for many, need not look at it."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def free_port() -> int:
    """A port of this machine on which nobody listens."""
    return ports.free_port()


@pytest.fixture(autouse=True)
def _nothing_learnt() -> Iterator[None]:
    """Decoding goes on as in a fresh process: a process gives decord up for a codec of which it could not open a few
    files, and says once why. What the tests before have opened must not decide what this one decodes with."""
    video: Any = sys.modules.get("megatron_ktr.data.media.video")  # a machine for GPU tests may lack what it imports
    with pytest.MonkeyPatch.context() as patch:
        if video is not None:
            patch.setattr(video, "_FAILED_OPENINGS", Counter())
            patch.setattr(video, "_REASONS_SAID", set())
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors: more threads only fight each other for cores."""
    torch.set_num_threads(1)
