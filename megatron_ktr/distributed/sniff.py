"""Times matrix products and messages of every GPU, with megatron-core's own test (0.19, ``gpu_sniff_test``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch.distributed import ProcessGroup

from megatron_ktr.distributed import rendezvous
from megatron_ktr.distributed.groups import world_group
from megatron_ktr.errors import UserError
from megatron_ktr.stack import require_core_0_19


def load_sniff_test() -> ModuleType:
    """Loads megatron-core's test module from its file. Importing it by name would import the whole training program,
    which needs packages that nothing here needs.

    Raises:
        UserError: this megatron-core has no such module.
    """
    require_core_0_19("--sniff")
    try:
        package = importlib.util.find_spec("megatron.training")
    except ModuleNotFoundError:
        package = None
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0], "gpu_sniff_test.py") if folders else None
    if path is None or not path.is_file():
        raise UserError("--sniff needs megatron/training/gpu_sniff_test.py, which this megatron-core came without")
    spec = importlib.util.spec_from_file_location("megatron_gpu_sniff_test", path)
    assert spec is not None and spec.loader is not None, "a file whose name ends in .py has both"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(test: ModuleType) -> list[tuple[str, float]]:
    """Runs the test and returns (name and unit, this rank's value) for each measurement. The names are the same on
    every rank; the value is NaN if this rank took no part. Collective over the joined world. Messages of experts are
    left out, because this model has no experts."""
    world = world_group()
    found = [*test.bench_gemms(), *test.bench_all_reduce(world)]
    found += test.bench_reduce_scatter(_group_of_node(world))
    return [*found, *test.bench_sendrecv(world)]


def _group_of_node(world: ProcessGroup) -> ProcessGroup | None:
    """The ranks of this node, over which tensor parallelism runs; None if nodes have unequal numbers of ranks."""
    size = rendezvous.read_number("LOCAL_WORLD_SIZE", low=1, high=2**10, default=1)
    if size == world.size():
        return world
    # Every rank must decide alike, because making a group is collective.
    sizes: list[int] = [0] * world.size()
    torch.distributed.all_gather_object(sizes, size)
    if len(set(sizes)) > 1 or world.size() % size:
        return None
    own, _ = torch.distributed.new_subgroups(group_size=size)
    assert not isinstance(own, int), "subgroups of all ranks: every rank is in one"
    return own
