"""Every GPU's products and messages, timed by megatron-core's own test of them (0.19, ``gpu_sniff_test``)."""

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
    """megatron-core's module, from its file: imported by its name it would bring the whole training program along,
    which wants packages that nothing here needs.

    Raises:
        UserError: a megatron-core that has none.
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
    """(what and in which unit, this rank's value, NaN where it took no part), the same list on every rank; collective
    over a world that was joined. Messages of experts, which this model has none of, are left out."""
    world = world_group()
    found = [*test.bench_gemms(), *test.bench_all_reduce(world)]
    found += test.bench_reduce_scatter(_group_of_node(world))
    return [*found, *test.bench_sendrecv(world)]


def _group_of_node(world: ProcessGroup) -> ProcessGroup | None:
    """Where tensor parallelism lives; none where nodes have unequal numbers of ranks."""
    size = rendezvous.read_number("LOCAL_WORLD_SIZE", low=1, high=2**10, default=1)
    if size == world.size():
        return world
    # The same decision on every rank: making a group is collective.
    sizes: list[int] = [0] * world.size()
    torch.distributed.all_gather_object(sizes, size)
    if len(set(sizes)) > 1 or world.size() % size:
        return None
    own, _ = torch.distributed.new_subgroups(group_size=size)
    assert not isinstance(own, int), "subgroups of all ranks: every rank is in one"
    return own
