"""Checks between the ranks of a torchrun: the speed of all-reduce, their clocks, and a directory that all see."""

from __future__ import annotations

import os
import socket
import statistics
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ktr.distributed.platform_probe import join_world, measure_all_reduce, torch_sees_gpu
from megatron_ktr.doctor.check import Check

MOST_SKEW_SECONDS = 1.0
"""The largest tolerable difference of clocks. With more, times in logs and of files on shared storage mislead."""
CLOCK_ROUNDS = 7


@dataclass(frozen=True)
class WorldFacts:
    """The facts that the ranks found out together. They are the same on every rank."""

    size: int
    num_nodes: int
    num_bytes: int = 0
    seconds: float = 0.0
    is_sum_right: bool = True
    on_gpu: bool = False
    offsets: tuple[float, ...] = ()
    """Seconds by which each rank's clock is ahead of rank 0's."""
    hosts: tuple[str, ...] = ()
    sees_directory: tuple[bool, ...] = ()

    @property
    def bus_gb_per_second(self) -> float:
        """The bytes that each rank sent, divided by the time, in GB/s. All-reduce sends 2 (n - 1) / n of the tensor."""
        return 2 * (self.size - 1) / self.size * self.num_bytes / max(self.seconds, 1e-9) / 1e9


def read_world(*, directory: Path, timeout_minutes: float = 5.0) -> WorldFacts:
    """Reads the facts. The call is collective over all ranks of a torchrun, and the process group stays open for
    ``gather``.

    Raises RuntimeError or ValueError if the ranks cannot connect to each other.
    """
    import torch

    has_gpu = torch_sees_gpu()
    join_world(has_gpu=has_gpu, timeout_minutes=timeout_minutes)
    size = torch.distributed.get_world_size()
    hosts = gather(socket.gethostname())
    # Nodes are counted by their local rank 0, because the hosts of two containers may have the same name.
    num_nodes = sum(gather(os.environ.get("LOCAL_RANK", "0") == "0"))
    num_bytes = 512 * 2**20 if has_gpu else 4 * 2**20
    seconds, is_right = measure_all_reduce(has_gpu=has_gpu, num_bytes=num_bytes)
    return WorldFacts(
        size=size,
        num_nodes=num_nodes,
        num_bytes=num_bytes,
        seconds=max(gather(seconds)),
        is_sum_right=all(gather(is_right)),
        on_gpu=has_gpu,
        offsets=_clock_offsets(),
        hosts=tuple(hosts),
        sees_directory=_sees_directory(directory),
    )


def gather(value: Any) -> list[Any]:
    """The ``value`` of every rank, in the order of ranks, on every rank."""
    import torch

    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def by_node(own: Sequence[Check]) -> dict[str, Sequence[Check]]:
    """The checks of each node by its name, on every rank. One process of a node makes them; others pass none."""
    found: dict[str, Sequence[Check]] = {}
    for host, checks in gather((socket.gethostname(), own)):
        if checks:
            found[host if host not in found else f"{host} ({len(found)})"] = checks
    return found


def _clock_offsets() -> tuple[float, ...]:
    """The offset of each rank's clock from rank 0's, in seconds. Clocks are read just after a barrier; the median over
    several rounds discards rounds in which a rank was delayed."""
    import torch

    rounds = []
    for _ in range(CLOCK_ROUNDS):
        torch.distributed.barrier()
        read = gather(time.time())
        rounds.append([value - read[0] for value in read])
    return tuple(statistics.median(values) for values in zip(*rounds, strict=True))


def _sees_directory(directory: Path) -> tuple[bool, ...]:
    """Whether each rank sees a file that rank 0 has just written in the directory that is to hold the run."""
    import torch

    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    name = gather(f".doctor-{uuid.uuid4().hex}")[0]
    is_first = torch.distributed.get_rank() == 0
    try:
        if is_first:
            (place / name).touch()
    except OSError:  # the check of the disk reports this
        pass
    torch.distributed.barrier()
    # All ranks look below rank 0's absolute path, because this is the path they would get on their command line.
    seen = gather((Path(gather(str(place.absolute()))[0]) / name).exists())
    if is_first:
        (place / name).unlink(missing_ok=True)
    return tuple(seen)


def no_connection(error: Exception) -> Check:
    """The check that replaces all checks between ranks if they cannot connect."""
    remedy = "look at the addresses and interfaces first: docs/launching.md, When it hangs; NCCL_DEBUG=INFO shows them"
    return Check("all-reduce", False, f"the ranks cannot talk: {' '.join(str(error).split())[:300]}", remedy)


def check_all_reduce(facts: WorldFacts | None) -> Check:
    """Checks the result and speed of all-reduce. On GPUs the lowest speed is that of PCIe inside a node, and of an RDMA
    network between nodes. On CPU any speed will do."""
    if facts is None:
        return Check("all-reduce", True, "one process; start the doctor with torchrun to measure it")
    megabytes = facts.num_bytes / 2**20
    detail = (
        f"{facts.bus_gb_per_second:.2f} GB/s a rank ({megabytes:.0f} MiB, {facts.size} ranks, {facts.num_nodes} nodes)"
    )
    if not facts.is_sum_right:
        remedy = "the sum is wrong: run NVIDIA's tests of NCCL, take nodes out one by one until it is right"
        return Check("all-reduce", False, detail, remedy)
    least = (10.0 if facts.num_nodes == 1 else 5.0) if facts.on_gpu else 0.0
    if facts.bus_gb_per_second < least:
        remedy = "see which transport NCCL took: NCCL_DEBUG=INFO, look for NET/IB or NET/Socket, P2P or SHM"
        remedy += "; then NCCL_SOCKET_IFNAME and NCCL_IB_HCA (docs/launching.md)"
        return Check("all-reduce", False, f"{detail}, expected {least:g} or more", remedy)
    return Check("all-reduce", True, detail)


def check_clocks(facts: WorldFacts | None) -> Check:
    if facts is None:
        return Check("clock skew", True, "one process: nothing to compare")
    ahead = max(facts.offsets) - min(facts.offsets)
    detail = f"{ahead * 1000:.0f} ms between {facts.size} ranks"
    if ahead <= MOST_SKEW_SECONDS:
        return Check("clock skew", True, detail)
    middle = statistics.median(facts.offsets)
    rank = max(range(facts.size), key=lambda index: abs(facts.offsets[index] - middle))
    remedy = f"start chrony or ntpd on {facts.hosts[rank]}, whose clock is the furthest off"
    return Check("clock skew", False, f"{ahead:.1f} s between {facts.size} ranks", remedy)


def check_shared_directory(facts: WorldFacts | None, *, directory: str) -> Check:
    name = "shared directory"
    if facts is None or facts.num_nodes == 1:
        return Check(name, True, "one node: any disk will do")
    blind = list(dict.fromkeys(h for h, sees in zip(facts.hosts, facts.sees_directory, strict=True) if not sees))
    if blind:
        remedy = "put --run-dir on a file system that every node has mounted at the same path (docs/launching.md)"
        return Check(name, False, f"{', '.join(blind[:8])} does not see what rank 0 writes in {directory}", remedy)
    return Check(name, True, f"all {facts.num_nodes} nodes see {directory}")


def commands_that_work(checks: Sequence[Check], *, has_gpu: bool) -> Check:
    """Says which of the repository's commands work on this machine; on a CPU machine some do not."""
    if has_gpu:
        return Check("commands", True, "training and all commands of the README")
    needed = {"python", "disk", "pyav"}
    blocking = [check.name for check in checks if check.name in needed and not check.ok]
    commands = "make quickstart, make replay, make test"
    if blocking:
        remedy = f"mend {', '.join(blocking)} first"
        return Check("commands", False, f"on a CPU machine {commands} would work, but not here", remedy)
    # Each command makes its own environment, so the versions in this one do not matter.
    detail = f"no GPU: {commands} work (they make their own environment); published sizes and FP8 need GPUs"
    return Check("commands", True, detail)
