"""Finds out which GPUs a machine has and how fast its ranks communicate, for ``tools/doctor.py``. It changes nothing
and builds no model.

Unlike ``platform.py`` it redirects nothing. It also works on machines where much of what training needs is broken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class GpuFacts:
    """What nvidia-smi and torch report. Either may see GPUs that the other does not."""

    listed: tuple[str, ...] = ()
    """The names of the GPUs that nvidia-smi lists."""
    driver: str | None = None
    torch_version: str | None = None
    toolkit: tuple[int, int] | None = None
    """The version of CUDA that torch was built with; None for a CPU build."""
    seen: tuple[Gpu, ...] = ()
    torch_error: str = ""
    """The reason why torch could not be asked; empty if it could."""
    is_restricted: bool = False
    """Whether CUDA_VISIBLE_DEVICES is set, which may hide some GPUs on purpose."""

    @property
    def has_gpu(self) -> bool:
        """Whether this machine has a GPU, working or not."""
        return bool(self.listed or self.seen)


def read_gpus() -> GpuFacts:
    """Reads the facts. To read free memory, it opens a context on each visible GPU."""
    listed, driver = _nvidia_smi()
    restricted = "CUDA_VISIBLE_DEVICES" in os.environ
    try:
        import torch

        toolkit = torch.version.cuda
        seen = []
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            free, total = torch.cuda.mem_get_info(index)
            name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            seen.append(Gpu(name, capability, total, free))
    except Exception as error:  # whatever a broken installation raises is reported
        return GpuFacts(listed, driver, torch_error=f"{type(error).__name__}: {error}", is_restricted=restricted)
    major_minor = tuple(int(part) for part in toolkit.split(".")[:2]) if toolkit else None
    return GpuFacts(listed, driver, torch.__version__, major_minor, tuple(seen), is_restricted=restricted)  # type: ignore[arg-type]


def machine_has_gpu() -> bool:
    """``GpuFacts.has_gpu`` without opening contexts: eight ranks with a context on each GPU would fill its memory."""
    return bool(_nvidia_smi()[0]) or torch_sees_gpu()


def torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def first_device() -> Any:
    """The first GPU that torch sees, else the host."""
    import torch

    return torch.device("cuda", 0) if torch_sees_gpu() else torch.device("cpu")


def _nvidia_smi() -> tuple[tuple[str, ...], str | None]:
    if shutil.which("nvidia-smi") is None:
        return (), None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return (), None
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line] if done.returncode == 0 else []
    return tuple(name.strip() for name, _ in rows), rows[0][1].strip() if rows else None


def join_world(*, has_gpu: bool, timeout_minutes: float) -> None:
    """Joins the process group of a torchrun, with the backend that training would use on such a machine."""
    import torch

    from megatron_ktr.distributed import rendezvous

    device = None
    if has_gpu:
        device = torch.device("cuda", rendezvous.read_number("LOCAL_RANK", low=0, high=2**10, default=0))
        torch.cuda.set_device(device)
    rendezvous.join_world(
        "nccl" if has_gpu else "gloo",
        device=device,
        timeout_minutes=timeout_minutes,
        rendezvous_minutes=timeout_minutes,
    )


def measure_all_reduce(*, has_gpu: bool, num_bytes: int, repeats: int = 5) -> tuple[float, bool]:
    """Measures an fp32 all-reduce over the joined world. Returns (median seconds, whether the sum was right)."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    seconds = []
    values = torch.empty(num_bytes // 4, device=device)
    for _ in range(repeats + 2):  # the first two set up connections and are not counted
        values.fill_(rank + 1)
        torch.distributed.barrier()
        if has_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.distributed.all_reduce(values)
        if has_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    is_right = bool((values == size * (size + 1) / 2).all())
    return sorted(seconds[2:])[repeats // 2], is_right
