"""Where the program runs: CPU with gloo, or CUDA with NCCL, behind one contract. No other file names either.

On CUDA the contract is a thin layer over ``torch.cuda``. On CPU megatron-core has to be helped: it asks for
``cuda`` devices, streams and random states by name. ``start`` then installs three things, once per process:

1. a torch-function mode (one per thread, see ``_CudaToCpu``) that reads ``cuda`` as ``cpu`` in tensor calls;
2. replacements in ``torch.cuda`` for functions that would raise without a GPU (``_redirect_torch_cuda``);
3. repairs of a few megatron-core names (``_repair_megatron``).

What is left alone: ``torch.cuda.is_available()`` stays False, ``device_count()`` 0, ``is_initialized()`` False
and ``Tensor.is_cuda`` False, so that other libraries in the process (transformers, vLLM) keep choosing CPU.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_ktr.errors import UserError


class Platform:
    """One kind of machine. Made by ``start``; the base class holds what both kinds share."""

    name: str
    device: torch.device
    backend: str
    """torch.distributed backend of every process group."""

    def seed(self, seed: int) -> None:
        """Seeds Python, numpy and torch (host and device). Megatron's tracked states: ``init_parallel``."""
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def synchronize(self) -> None:
        """Waits for the device."""

    def empty_cache(self) -> None:
        """Gives cached device memory back."""

    def peak_memory_bytes(self) -> int:
        """CUDA: peak of allocated tensors since the last reset. CPU: peak resident set of the whole process."""
        raise NotImplementedError

    def reset_peak_memory(self) -> None:
        raise NotImplementedError

    def rng_state(self) -> dict[str, Any]:
        """Every random state of this rank, to be pickled: Python, numpy, torch, device, Megatron's tracker."""
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        return {
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            # On CPU the device generator is the host generator: the entry repeats "torch" and costs 5 kB.
            "device": torch.cuda.get_rng_state().cpu(),
            "tracker": {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()},
        }

    def set_rng_state(self, state: dict[str, Any]) -> None:
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        random.setstate(state["python"])
        numpy.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state(state["device"])
        get_cuda_rng_tracker().set_states(dict(state["tracker"]))


class _CudaPlatform(Platform):
    name = "cuda"
    backend = "nccl"

    def __init__(self) -> None:
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()


class _CpuPlatform(Platform):
    name = "cpu"
    backend = "gloo"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        _redirect_torch_cuda()
        _redirect_distributed()
        _repair_megatron()

    def peak_memory_bytes(self) -> int:
        status = Path("/proc/self/status")
        if status.exists():
            # Not getrusage first: its value survives exec, so a child starts with its parent's peak.
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def reset_peak_memory(self) -> None:
        # "5" resets the resident-set peak (Linux); where that is not allowed the peak stays the process's.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


_platform: Platform | None = None


def start(name: str = "auto") -> Platform:
    """Chooses and prepares the platform; idempotent. Call before any Megatron object is built.

    ``name`` is "auto" (CUDA if there is one), "cpu" or "cuda". On CPU, every *thread* that builds or runs
    Megatron modules calls it once: torch-function modes are thread local. Raises ``UserError`` for an unknown
    name, for "cuda" without a GPU, and for a second platform in one process.
    """
    global _platform
    if name not in ("auto", "cpu", "cuda"):
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
        _CudaToCpu.push_once()
    return _platform


def current() -> Platform:
    """The started platform; starts "auto" where nobody did."""
    return start("auto")


# --- CPU, part 1: tensor calls -----------------------------------------------------------------------------


def _cpu_if_cuda(device: Any) -> Any:
    """Reads "cuda", "cuda:3", torch.device("cuda") and integer ordinals as the CPU; all else unchanged."""
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cpu")
    return device


class _CudaToCpu(TorchFunctionMode):
    """Maps ``cuda`` to ``cpu`` in ``device=``, ``.to``, ``.cuda`` and drops memory pinning.

    ``Tensor.type()`` answers ``torch.cuda.FloatTensor`` and the like, but only to callers in ``megatron``:
    its optimizers sort parameters by these names and refuse any other.
    """

    _threads = threading.local()

    @classmethod
    def push_once(cls) -> None:
        """Installs the mode for the calling thread, for good."""
        if not getattr(cls._threads, "is_pushed", False):
            cls._threads.is_pushed = True
            cls().__enter__()

    @classmethod
    def is_on_stack(cls) -> bool:
        stack = range(torch._C._len_torch_function_stack())
        return any(isinstance(torch._C._get_function_stack_at(i), cls) for i in stack)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if func is Tensor.cuda or func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else name
        if func is Tensor.to and len(args) > 1:
            args = (args[0], _cpu_if_cuda(args[1]), *args[2:])
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_if_cuda(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _keep_mode_in_backward() -> None:
    """Keeps the mode alive inside backward.

    ``loss.backward()`` is itself a torch function, and torch runs the body of a torch function with the mode
    switched off; a recomputed forward inside backward would then ask for real ``cuda`` devices. Both
    ``backward`` and ``autograd.grad`` end in this one function (CPU backward runs in the calling thread).
    """
    run = torch.autograd._engine_run_backward

    def run_with_mode(*args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if _CudaToCpu.is_on_stack() else _CudaToCpu():
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_with_mode


# --- CPU, part 2: torch.cuda and torch.distributed ----------------------------------------------------------


class _Stream:
    """A stream that does nothing: CPU work is already in order when the next line runs."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record(self)
        return event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: Any) -> None: ...


class _Event:
    """An event whose ``elapsed_time`` (milliseconds) comes from the host clock, so that timers still work."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return (end._seconds - self._seconds) * 1000.0


def _redirect_torch_cuda() -> None:
    """Replaces what megatron-core calls in ``torch.cuda`` and what would raise without a GPU."""
    stream = _Stream()

    def nothing() -> Callable[..., None]:
        # A new function each time: torch._dynamo refuses one object under two names of torch.cuda.
        return lambda *args, **kwargs: None

    def get_rng_state(device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    replacements = {
        # A device, not the ordinal 0: it stays right where no mode is active (other threads).
        "current_device": lambda: torch.device("cpu"),
        "set_device": nothing(),
        "synchronize": nothing(),
        # Streams and events around overlapped communication and p2p.
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": nothing(),
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        # The one CPU generator plays the device generator: dropout on CPU draws from it.
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)) and None,
        # Memory reports: nothing is on a device.
        "empty_cache": nothing(),
        "memory_stats": lambda device=None: {},
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": nothing(),
        "mem_get_info": lambda device=None: (0, 0),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, replacements[name])
    torch.cuda.nvtx.range_push = lambda message: 0
    torch.cuda.nvtx.range_pop = lambda: 0
    _keep_mode_in_backward()


def _redirect_distributed() -> None:
    """``barrier(device_ids=...)`` raises on gloo; megatron-core passes it in parallel_state."""
    barrier = torch.distributed.barrier

    def barrier_without_devices(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group=group, async_op=async_op)

    torch.distributed.barrier = barrier_without_devices


# --- CPU, part 3: megatron-core -----------------------------------------------------------------------------


def _repair_megatron() -> None:
    """Names that megatron-core leaves undefined, or binds too early to be redirected, without CUDA and TE."""
    is_imported = "megatron.core" in sys.modules
    compile_function = torch.compile
    if not is_imported:
        # megatron-core decorates its fused activations with torch.compile: seconds per rank, and a C++ compiler.
        torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda function: function)
    try:
        with warnings.catch_warnings():
            # Four notices that Transformer Engine and apex are absent: on CPU they cannot be there.
            warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
            import megatron.core.tensor_parallel.random as tracker
            from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compile_function
    disable_jit_fuser()
    if is_imported:
        # Already decorated: run compiled functions of this process eagerly.
        torch.compiler.set_stance("force_eager")

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    def set_state(new_state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    # The originals queue the change until CUDA starts, that is for ever.
    tracker._get_cuda_rng_state = get_state
    tracker._set_cuda_rng_state = set_state
    if not tracker.HAVE_TE:
        # Recomputing layer norms asks Transformer Engine whether FP8 is on, without checking that it is there.
        class _NoFP8:
            is_fp8_enabled = staticmethod(lambda: False)
            get_fp8_recipe = staticmethod(lambda: None)

        tracker.FP8GlobalStateManager = _NoFP8
        tracker.activation_recompute_forward = lambda **kwargs: contextlib.nullcontext()
        tracker.fp8_autocast = lambda **kwargs: contextlib.nullcontext()
