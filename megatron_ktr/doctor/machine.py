"""Checks of the machine: GPUs and driver, disk, shared memory, limits, environment."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.distributed.platform_probe import GpuFacts
from megatron_ktr.doctor.check import Check

GB = 10**9
LEAST_DRIVER = {13: 580, 12: 525}
"""Maps a major version of CUDA to the oldest driver series that supports it."""


def check_gpus(facts: GpuFacts) -> Check:
    """Checks that torch sees all GPUs that nvidia-smi lists, that they are of one kind, and that memory is free."""
    if facts.torch_error:
        return Check("gpus", False, facts.torch_error, "reinstall torch; make setup does it for CPU")
    if not facts.has_gpu:
        return Check("gpus", True, "none: a CPU machine")
    num_seen, num_listed = len(facts.seen), len(facts.listed)
    if not num_seen:
        build = f"torch {facts.torch_version}"
        if facts.toolkit is None:
            remedy = "install torch's CUDA build, from the index that PyTorch names for it"
            return Check("gpus", False, f"{num_listed} x {facts.listed[0]}, but {build} is a CPU build", remedy)
        remedy = "see the check driver; in a container start it with the GPUs (docker run --gpus all)"
        return Check("gpus", False, f"{num_listed} x {facts.listed[0]}, but {build} sees none", remedy)
    detail = f"{num_seen} x {facts.seen[0].name}, {facts.seen[0].total_bytes / GB:.0f} GB"
    if num_seen < num_listed and not facts.is_restricted:
        remedy = "nvidia-smi -q shows their state; a GPU that has fallen off the bus needs a restart of the machine"
        return Check("gpus", False, f"{detail}; nvidia-smi lists {num_listed}", remedy)
    if len({(gpu.name, gpu.total_bytes // GB) for gpu in facts.seen}) > 1:
        kinds = ", ".join(sorted({gpu.name for gpu in facts.seen}))
        remedy = "choose GPUs of one kind with CUDA_VISIBLE_DEVICES: every rank gets as much work as the others"
        return Check("gpus", False, f"of several kinds: {kinds}", remedy)
    taken = [(number, 1 - gpu.free_bytes / gpu.total_bytes) for number, gpu in enumerate(facts.seen)]
    busy = [f"GPU {number}: {share:.0%}" for number, share in taken if share > 0.1]
    if busy:
        remedy = "nvidia-smi names the processes that hold it; end those that are yours"
        return Check("gpus", False, f"{detail}; memory is taken already ({', '.join(busy)})", remedy)
    return Check("gpus", True, detail)


def check_driver(facts: GpuFacts) -> Check:
    """Checks that the driver is new enough for the CUDA version with which torch was built."""
    if not facts.has_gpu:
        return Check("driver", True, "none; not needed on a CPU machine")
    if facts.driver is None:
        return Check("driver", True, "unknown: nvidia-smi is not there (a container without it)")
    if facts.toolkit is None:
        return Check("driver", True, facts.driver)
    needed = LEAST_DRIVER.get(facts.toolkit[0], 0)
    dotted = ".".join(map(str, facts.toolkit))
    if int(facts.driver.split(".")[0]) < needed:
        remedy = f"install driver {needed} or newer, or a torch built for an older CUDA"
        return Check("driver", False, f"{facts.driver}, too old for torch's CUDA {dotted}", remedy)
    return Check("driver", True, f"{facts.driver}, CUDA {dotted}")


@dataclass(frozen=True)
class DiskFacts:
    directory: str
    bytes_per_second: float = 0.0
    free_bytes: int = 0
    error: str = ""


def read_disk(directory: Path, *, num_bytes: int = 256 * 10**6) -> DiskFacts:
    """Measures the disk: writes one file in ``directory``, or in its nearest parent that exists, synchronises it to the
    disk, and removes it."""
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(place).free
        with tempfile.TemporaryFile(dir=place) as file:
            # Random bytes, because some file systems compress zeros.
            block = os.urandom(4 * 10**6)
            started = time.perf_counter()
            for _ in range(max(1, num_bytes // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
            written = file.tell()
    except OSError as error:
        return DiskFacts(str(place), error=error.strerror or str(error))
    return DiskFacts(str(place), written / seconds, free)


def check_disk(facts: DiskFacts, *, has_gpu: bool) -> Check:
    """Checks speed and free space of the disk. On GPU machines a checkpoint of the 7B model of 100 GB is the measure:
    at 200 MB/s it is written, in the background, in 8 minutes."""
    if facts.error:
        remedy = "choose a directory that can be written, with --run-dir"
        return Check("disk", False, f"{facts.directory}: {facts.error}", remedy)
    speed, space = (200e6, 200 * GB) if has_gpu else (5e6, 1 * GB)
    detail = f"{facts.directory}: {facts.bytes_per_second / 1e6:.0f} MB/s, {facts.free_bytes / GB:.0f} GB free"
    if facts.free_bytes < space:
        remedy = f"free {space / GB:.0f} GB, or put --run-dir on a larger disk; --keep-checkpoints keeps fewer"
        return Check("disk", False, detail, remedy)
    if facts.bytes_per_second < speed:
        remedy = f"below {speed / 1e6:.0f} MB/s: put --run-dir on a faster file system"
        return Check("disk", False, detail, remedy)
    return Check("disk", True, detail)


def read_shared_memory(path: str = "/dev/shm") -> int | None:
    """The size of shared memory in bytes; None if the system has none, as on macOS."""
    return shutil.disk_usage(path).total if os.path.isdir(path) else None


def check_shared_memory(num_bytes: int | None, *, num_gpus: int) -> Check:
    """Checks the size of shared memory, through which NCCL and vLLM exchange data between a machine's processes."""
    if num_bytes is None:
        return Check("/dev/shm", num_gpus == 0, "not there", "" if num_gpus == 0 else "mount a tmpfs on /dev/shm")
    needed = num_gpus * GB if num_gpus else 60 * 10**6
    detail = f"{num_bytes / GB:.2f} GB"
    remedy = "docker run --ipc=host, or --shm-size=16g; in Kubernetes an emptyDir with medium: Memory on /dev/shm"
    return Check("/dev/shm", num_bytes >= needed, detail, "" if num_bytes >= needed else remedy)


@dataclass(frozen=True)
class LimitFacts:
    """Soft limits of this process. -1 means unlimited."""

    open_files: int
    locked_bytes: int
    has_infiniband: bool


def read_limits() -> LimitFacts:
    def soft(kind: int) -> int:
        limit = resource.getrlimit(kind)[0]
        return -1 if limit == resource.RLIM_INFINITY else limit

    infiniband = Path("/sys/class/infiniband")
    return LimitFacts(
        soft(resource.RLIMIT_NOFILE), soft(resource.RLIMIT_MEMLOCK), infiniband.is_dir() and any(infiniband.iterdir())
    )


def check_limits(facts: LimitFacts) -> Check:
    """Checks the limit of open files, which a rank needs for connections and files, and that of locked memory, which
    InfiniBand needs."""
    detail = f"{'unlimited' if facts.open_files < 0 else facts.open_files} open files"
    if 0 <= facts.open_files < 1024:
        return Check("ulimit", False, detail, "ulimit -n 65536")
    if facts.has_infiniband and 0 <= facts.locked_bytes < 16 * GB:
        detail += f", {facts.locked_bytes / GB:.2f} GB of locked memory, with InfiniBand"
        remedy = "ulimit -l unlimited; docker run --ulimit memlock=-1; capability IPC_LOCK in Kubernetes"
        return Check("ulimit", False, detail, remedy)
    return Check("ulimit", True, detail)


def check_threads(environment: Mapping[str, str], *, num_cores: int) -> Check:
    """Checks that the threads of all ranks of this machine together do not exceed its cores. Every rank starts
    ``OMP_NUM_THREADS`` threads."""
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    text = environment.get("OMP_NUM_THREADS")
    if text is None:
        remedy = "" if ranks == 1 else f"export OMP_NUM_THREADS={max(1, num_cores // ranks)}"
        return Check("OMP_NUM_THREADS", ranks == 1, f"not set: {num_cores} threads a rank", remedy)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= 1):
        return Check("OMP_NUM_THREADS", False, f"{text!r} is no number of threads", "export OMP_NUM_THREADS=1")
    detail = f"{text} x {ranks} ranks on {num_cores} cores"
    # There may be more ranks than cores (to test a layout), but then with one thread each.
    is_fine = int(text) == 1 or int(text) * ranks <= num_cores
    remedy = "" if is_fine else f"export OMP_NUM_THREADS={max(1, num_cores // ranks)}"
    return Check("OMP_NUM_THREADS", is_fine, detail, remedy)


def check_connections(environment: Mapping[str, str], *, facts: GpuFacts) -> Check:
    """Checks ``CUDA_DEVICE_MAX_CONNECTIONS``. On GPUs up to Hopper, kernels run in the order in which they were issued
    only with a single connection."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    value = environment.get(name)
    if not facts.seen:
        return Check(name, True, "not used on a CPU machine" if not facts.has_gpu else "no GPU is seen")
    if facts.seen[0].capability >= (10, 0):
        return Check(name, True, f"{value or 'not set'}; from Blackwell on any value will do")
    if value == "1" or "LOCAL_RANK" not in environment:
        return Check(name, True, value or "not set; examples/launch/torchrun.sh sets it to 1")
    remedy = "export CUDA_DEVICE_MAX_CONNECTIONS=1, or communication of tensor parallelism is not hidden"
    return Check(name, False, value or "not set", remedy)
