"""One interface for the two kinds of machines the program runs on: CPU with gloo, or CUDA with NCCL. No other file
names either.

On CUDA it is a thin layer over ``torch.cuda``. On CPU, megatron-core needs help, because it asks for ``cuda`` devices,
streams and random states by name: see ``platform_cpu.py``.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_ktr.config.words import PLATFORM_NAMES
from megatron_ktr.distributed.platform_cpu import CudaToCpu, redirect_cuda_to_cpu
from megatron_ktr.errors import UserError


class Platform(ABC):
    """One kind of machine; ``start`` makes it. The base class holds what both kinds share."""

    name: str
    device: torch.device
    backend: str
    """The torch.distributed backend of every process group."""
    compute_capability: tuple[int, int] | None = None
    """The compute capability of the GPU; None on CPU."""
    toolkit_version: tuple[int, int] | None = None
    """The version of CUDA that torch was built with; None on CPU."""

    def seed(self, seed: int) -> None:
        """Seeds Python, numpy and torch (host and device). ``init_parallel`` seeds Megatron's tracked states."""
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for the device."""

    @abstractmethod
    def stream(self) -> Any:
        """The stream that work is queued on; None on CPU, where nothing is queued."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Returns cached device memory to the driver."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """On CUDA, the peak of allocated tensors since the last reset; on CPU, the peak resident set of the process."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Starts counting the peak anew. If the system does not allow that on CPU, the peak of the process remains."""

    def rng_state(self) -> dict[str, Any]:
        """Every random state of this rank, to be pickled: Python, numpy, torch, device, Megatron's tracker."""
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        tracker: Any = get_cuda_rng_tracker()  # core declares None, and makes it at the first call
        return {
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            # On CPU the device generator is the host generator: the entry repeats "torch" and costs 5 kB.
            "device": torch.cuda.get_rng_state().cpu(),
            "tracker": {name: state.clone() for name, state in tracker.get_states().items()},
        }

    def set_rng_state(self, state: dict[str, Any]) -> None:
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        random.setstate(state["python"])
        numpy.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state(state["device"])
        tracker: Any = get_cuda_rng_tracker()  # as above
        tracker.set_states(dict(state["tracker"]))


class _CudaPlatform(Platform):
    name = "cuda"
    backend = "nccl"

    def __init__(self) -> None:
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(self.device)
        self.compute_capability = torch.cuda.get_device_capability(self.device)
        if torch.version.cuda:
            major, minor, *_ = torch.version.cuda.split(".")
            self.toolkit_version = (int(major), int(minor))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def stream(self) -> Any:
        return torch.cuda.current_stream()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def peak_memory_bytes(self) -> int:
        # By name: another thread than the main one has another current device.
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()


class _CpuPlatform(Platform):
    name = "cpu"
    backend = "gloo"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        redirect_cuda_to_cpu()

    def synchronize(self) -> None:
        """Does nothing: no work runs asynchronously on CPU."""

    def stream(self) -> Any:
        return None

    def empty_cache(self) -> None:
        """Does nothing: the host's allocator manages its own cache."""

    def peak_memory_bytes(self) -> int:
        return host_peak_bytes()

    def reset_peak_memory(self) -> None:
        reset_host_peak()


def host_peak_bytes() -> int:
    """The peak resident set of this process, in bytes, since ``reset_host_peak``."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage is only the fallback: its value survives exec, so a child starts with its parent's peak.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_host_peak() -> None:
    """Sets the peak to what is resident now. If the system does not allow that, the peak of the process remains."""
    # "5" is the resident-set peak (Linux).
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


_platform: Platform | None = None


def start(name: str = "auto") -> Platform:
    """Chooses and prepares the platform; idempotent. Call it before any Megatron object is built.

    ``name`` is "auto" (CUDA if there is a GPU), "cpu" or "cuda". On CPU, every *thread* that builds or runs Megatron
    modules must call it once, because torch-function modes are thread local. Raises ``UserError`` for an unknown name,
    for "cuda" without a GPU, and for a second platform in one process.
    """
    global _platform
    if name not in PLATFORM_NAMES:
        raise UserError(f"--platform must be auto, cpu or cuda, got {name!r}")
    if _platform is None:
        has_cuda = torch.cuda.is_available()
        if name == "cuda" and not has_cuda:
            raise UserError(
                "--platform cuda needs a CUDA device and a CUDA build of torch; none found, use cpu or auto"
            )
        _platform = _CudaPlatform() if has_cuda and name != "cpu" else _CpuPlatform()
    elif name not in ("auto", _platform.name):
        raise UserError(f"--platform {name}: this process already runs on {_platform.name}; start a new process")
    if _platform.name == "cpu":
        CudaToCpu.push_once()
    return _platform


def current() -> Platform:
    """The started platform. If none was started, it starts "auto"."""
    return start("auto")
