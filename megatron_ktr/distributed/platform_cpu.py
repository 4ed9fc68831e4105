"""Lets megatron-core, which asks for ``cuda`` by name, run on CPU. ``platform.start`` installs three things:

1. ``CudaToCpu``: a torch-function mode (one per thread) that reads ``cuda`` as ``cpu`` in tensor calls;
2. ``_redirect_torch_cuda``, ``_redirect_distributed``: replacements for functions that would raise without a GPU;
3. ``_repair_megatron``: replacements for a few names of megatron-core.

Some answers of torch are left alone, so that other libraries in the process (transformers, vLLM) keep choosing CPU:
``torch.cuda.is_available()`` stays False, ``device_count()`` 0, ``is_initialized()`` False, ``Tensor.is_cuda`` False.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_ktr.distributed.platform_import import is_compiled, nothing_compiled


def redirect_cuda_to_cpu() -> None:
    """Installs the replacements for the whole process; call it once. Each thread then calls ``CudaToCpu.push_once``."""
    _redirect_torch_cuda()
    _redirect_distributed()
    _repair_megatron()


def _cpu_if_cuda(device: Any) -> Any:
    """Maps "cuda", "cuda:3", torch.device("cuda") and integer ordinals to the CPU; everything else is unchanged."""
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cpu")
    return device


_MAY_NAME_A_DEVICE = frozenset({Tensor.cuda, Tensor.pin_memory, Tensor.type, Tensor.to})
"""Functions that are changed even without keywords."""


class CudaToCpu(TorchFunctionMode):
    """Maps ``cuda`` to ``cpu`` in ``device=``, ``.to`` and ``.cuda``, and drops memory pinning.

    ``Tensor.type()`` returns ``torch.cuda.FloatTensor`` and the like, but only to callers in ``megatron``, whose
    optimizers sort parameters by these names and refuse any other.
    """

    _threads = threading.local()

    @classmethod
    def push_once(cls) -> None:
        """Installs the mode for the calling thread, for the rest of its life."""
        if not getattr(cls._threads, "is_pushed", False):
            cls._threads.is_pushed = True
            cls().__enter__()

    @classmethod
    def is_on_stack(cls) -> bool:
        stack = range(torch._C._len_torch_function_stack())
        return any(isinstance(torch._C._get_function_stack_at(i), cls) for i in stack)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Every operator and every look at a shape comes here: what can name no device goes on at once.
        if not kwargs and func not in _MAY_NAME_A_DEVICE:
            return func(*args)
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
        with contextlib.nullcontext() if CudaToCpu.is_on_stack() else CudaToCpu():
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_with_mode


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
    """Replaces the functions of ``torch.cuda`` that megatron-core calls and that would raise without a GPU."""
    stream = _Stream()

    def nothing() -> Callable[..., None]:
        # A new function each time: torch._dynamo refuses one object under two names of torch.cuda.
        return lambda *args, **kwargs: None

    def get_rng_state(device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    replacements = {
        # This is a device and not the ordinal 0, so that it is right even in threads where no mode is active.
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
        # The CPU generator serves as the device generator, because dropout on CPU draws from it.
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
    """Makes ``barrier`` ignore ``device_ids``, which megatron-core's parallel_state passes and on which gloo raises."""
    barrier = torch.distributed.barrier

    def barrier_without_devices(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group=group, async_op=async_op)

    torch.distributed.barrier = barrier_without_devices


@torch.no_grad()
def _copy_storage(target: Tensor, source: Tensor) -> None:
    target.untyped_storage().resize_(source.untyped_storage().size())
    target.untyped_storage().copy_(source.untyped_storage())


def _repair_megatron() -> None:
    """Replaces names that megatron-core, without CUDA and TE, leaves undefined or binds too early to be redirected."""
    is_imported = "megatron.core" in sys.modules
    if not is_imported:
        # Transformer Engine may be installed if this is a GPU machine. megatron-core would then use its optimizers,
        # which are GPU kernels, and its import may need a driver. None in ``sys.modules`` makes it count as absent.
        sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    # megatron-core decorates its fused activations with torch.compile, which costs seconds per rank and needs a C++
    # compiler.
    with contextlib.nullcontext() if is_imported else nothing_compiled(), warnings.catch_warnings():
        # megatron-core warns four times that Transformer Engine and apex are absent, which is normal on CPU.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        import megatron.core.tensor_parallel.random as tracker
        from megatron.core import jit
    if is_compiled(jit.jit_fuser):
        # The functions are decorated already, so compiled functions of this process are run eagerly instead.
        torch.compiler.set_stance("force_eager")
    jit.disable_jit_fuser()

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    def set_state(new_state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    # megatron-core 0.19 hands recomputed storages over with C++ that it compiles at the first use: seconds, a compiler,
    # ninja. 0.16 copied, which is as right; it has no such name and never reads it.
    tracker._get_share_storage = lambda: _copy_storage  # pyright: ignore[reportAttributeAccessIssue]  # of 0.19 only
    # The originals queue the change until CUDA starts, that is for ever.
    tracker._get_cuda_rng_state = get_state
    tracker._set_cuda_rng_state = set_state
    # Every tracked region draws from the CPU generator on purpose; the warning about it would come at every fork.
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    if not tracker.HAVE_TE:
        # Recomputation of layer norms asks Transformer Engine whether FP8 is on, without checking that it is installed.
        class _NoFP8:
            is_fp8_enabled = staticmethod(lambda: False)
            get_fp8_recipe = staticmethod(lambda: None)

        tracker.FP8GlobalStateManager = _NoFP8
        tracker.activation_recompute_forward = lambda **kwargs: contextlib.nullcontext()
        tracker.fp8_autocast = lambda **kwargs: contextlib.nullcontext()
