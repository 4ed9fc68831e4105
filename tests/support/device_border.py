"""A border between host and device memory on a machine without a device: mistakes that only a GPU would show, raised on
CPU.

Inside ``device_border()`` the platform's device is called ``cuda:0``. Every tensor still lies in ordinary memory, but
its storage is marked: what was made with ``device=`` or moved by ``.to``, ``.cuda``, ``.cpu`` is where it was sent, and
results are where their inputs are. Then raised are, as on a GPU:

- an operation on tensors of both sides (numbers on the host may join in, as scalars; so may host indices);
- a collective of the training groups on a host tensor (NCCL has none);
- ``numpy()`` of a device tensor, and a host generator drawing into one.

Moving always copies, so that both sides never share memory. ``Tensor.device`` answers with the marked side;
``is_cuda`` stays False, so that what chooses a kernel chooses the one that runs here.

What makes the host wait for a GPU is counted in ``traffic``, by the function of ours (or of megatron-core) that asked:

    read    a number or a shape comes back: ``item``, ``tolist``, ``bool``, ``.cpu()``, ``nonzero``, a boolean index
    block   a copy to the device that returns when it is done: no ``non_blocking``, or from memory that is not pinned
    send    a copy from pinned memory with ``non_blocking``: nobody waits
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ktr.distributed.platform_cpu import CudaToCpu

DEVICE = torch.device("cuda", 0)
MAY_CROSS = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_")
TAKES_HOST_INDEX = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")
TAKES_NO_SCALAR = ("aten::cat", "aten::stack")
READS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
    "aten::equal",
    "aten::repeat_interleave",
)
"""Operations that answer the host, with a number or with the size of their result."""
MAKES_OF_VALUES = (torch.tensor, torch.as_tensor, Tensor.new_tensor, torch.from_numpy)
CODE_FOLDER = Path(__file__).parents[2]
"""The repository as the paths in stack frames spell it: links are not followed, unlike in ``tests.support.paths``."""


class BorderError(RuntimeError):
    """What a GPU would have refused."""


class _Sides:
    """Which storages lie on the device. Unknown ones lie on the host; NEUTRAL ones C++ made, where nobody could say."""

    NEUTRAL, ON_DEVICE = 1, 2

    def __init__(self) -> None:
        # Beside the side a weak reference, which keeps the address from being used again for another storage.
        self._known: dict[int, tuple[int, StorageWeakRef]] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self.num_crossings = 0
        self.traffic: Counter[tuple[str, str]] = Counter()
        """Number of (kind, file and function) since the border was drawn; kinds: see the module."""

    def of(self, tensor: Tensor) -> int:
        return self._known.get(tensor.untyped_storage()._cdata, (0, None))[0] if _has_storage(tensor) else 0

    def put(self, tensor: Tensor, side: int) -> None:
        storage = tensor.untyped_storage()
        if side:
            self._known[storage._cdata] = (side, StorageWeakRef(storage))
            if len(self._known) % 4096 == 0:
                self._known = {key: value for key, value in self._known.items() if not value[1].expired()}
        else:
            self._known.pop(storage._cdata, None)

    def pin(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def waits(self) -> dict[str, int]:
        """How often the host waits, by file and function."""
        found: Counter[str] = Counter()
        for (kind, place), number in self.traffic.items():
            found[place] += number if kind != "send" else 0
        return dict(+found)

    def note(self, kind: str) -> None:
        self.traffic[kind, _place()] += 1

    def note_copy(self, source: Tensor, *, is_non_blocking: bool) -> None:
        self.note("send" if is_non_blocking and self.is_pinned(source) else "block")


def _place() -> str:
    """The innermost function of this repository or of megatron-core on the stack, this file left out."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not path.endswith("platform_cpu.py"):
            if "/megatron/" in path:
                return f"{path[path.rindex('/megatron/') + 1 :]}:{frame.f_code.co_name}"
            if path.startswith(str(CODE_FOLDER)) and "/.venv" not in path:
                return f"{Path(path).relative_to(CODE_FOLDER)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _is_inside_gloo() -> bool:
    """Its reduce-scatter copies the result out of a buffer of its own, on the host; NCCL's has none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name.startswith("reduce_scatter"):
            return True
        frame = frame.f_back
    return False


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if _has_storage(leaf) and leaf.layout is torch.strided]


def _has_storage(value: Any) -> bool:
    """A tensor, and not one of the descriptions of many that checkpoints are made of."""
    return isinstance(value, Tensor) and not hasattr(type(value), "local_shards")


def _is_device(device: Any) -> bool | None:
    """None: no device is named."""
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device.type == "cuda" if isinstance(device, torch.device) else None


class _Operations(TorchDispatchMode):
    """Sees every operation, also those of C++ and of backward: carries the side on, and refuses to mix sides."""

    def __init__(self, sides: _Sides) -> None:
        super().__init__()
        self.sides = sides
        self.num_calls_open = 0
        """Python calls of torch functions under way; 0: autograd's engine made the call."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors(args, kwargs)
        name = func._schema.name
        self._check(name, args, inputs)
        self._note(name, args, kwargs, inputs)
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        found = {self.sides.of(tensor) for tensor in inputs}
        side = max(found, default=0 if self.num_calls_open else _Sides.NEUTRAL)
        if found >= {0, _Sides.NEUTRAL}:
            side = max(found - {_Sides.NEUTRAL})
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in known:
                self.sides.put(tensor, side)
        return result

    def _note(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor]) -> None:
        of = self.sides.of
        if name == "aten::copy_" and _is_inside_gloo():
            return
        if name == "aten::copy_" and of(args[0]) != of(args[1]) and _Sides.NEUTRAL not in (of(args[0]), of(args[1])):
            if of(args[0]) == _Sides.ON_DEVICE:
                self.sides.note_copy(args[1], is_non_blocking=len(args) > 2 and bool(args[2]))
            else:
                self.sides.note("read")
        elif name in READS and any(of(tensor) == _Sides.ON_DEVICE for tensor in inputs):
            # Given the size of its result, this one need not ask.
            if name != "aten::repeat_interleave" or kwargs.get("output_size") is None:
                self.sides.note("read")
        elif name in TAKES_HOST_INDEX and of(args[0]) == _Sides.ON_DEVICE:
            indices = _tensors(args[1])
            # A number put where a mask is True is filled in, without a count.
            fills = name.startswith("aten::index_put") and args[2].numel() == 1
            if not fills and any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.sides.note("read")
            for index in indices:
                if of(index) == 0:
                    self.sides.note("block")

    def _check(self, name: str, args: Any, inputs: list[Tensor]) -> None:
        if name in MAY_CROSS:
            return
        if name.startswith("c10d::"):
            if any(self.sides.of(tensor) == 0 for tensor in inputs):
                raise BorderError(f"{name}: a collective on a host tensor {[list(t.shape) for t in inputs]}")
            return
        if name in TAKES_HOST_INDEX and self.sides.of(args[0]):
            inputs = _tensors(args[0], args[2:])
        counted = [t for t in inputs if t.dim() or name in TAKES_NO_SCALAR or self.sides.of(t)]
        if {self.sides.of(tensor) for tensor in counted} >= {0, _Sides.ON_DEVICE}:
            where = ["device" if self.sides.of(t) == _Sides.ON_DEVICE else "host" for t in counted]
            shapes = ", ".join(f"{side} {list(t.shape)}" for side, t in zip(where, counted, strict=True))
            raise BorderError(f"{name}: tensors on both sides: {shapes}")


class _Calls(TorchFunctionMode):
    """Sees torch functions as Python calls them: reads the devices they name."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations = operations
        self.sides = operations.sides

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.device.__get__, Tensor.is_cpu.__get__, Tensor.type, Tensor.numpy) and len(args) == 1:
            return self._about(func, args[0], kwargs)
        if func is Tensor.pin_memory or kwargs.pop("pin_memory", False):
            result = args[0].clone() if func is Tensor.pin_memory else func(*args, **kwargs)
            self.sides.pin(result)
            return result
        if func is Tensor.tolist and self.sides.of(args[0]) == _Sides.ON_DEVICE:
            self.sides.note("read")
        target = self._target(func, args, kwargs)
        on_device = any(self.sides.of(tensor) == _Sides.ON_DEVICE for tensor in _tensors(args, kwargs))
        if kwargs.get("generator") is not None and (target if target is not None else on_device):
            raise BorderError(f"{func.__name__}: a host generator draws numbers on the device")
        if _is_device(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func in (Tensor.to, Tensor.cuda):
            args = (args[0], *("cpu" if _is_device(value) else value for value in args[1:]))
        self.operations.num_calls_open += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.operations.num_calls_open -= 1
        if target is None:
            return result
        return self._sent(result, args, target, func=func, is_non_blocking=bool(kwargs.get("non_blocking")))

    def _about(self, func: Any, tensor: Tensor, kwargs: dict) -> Any:
        on_device = self.sides.of(tensor) == _Sides.ON_DEVICE
        if func == Tensor.device.__get__:  # a new object each time: "is" would not do
            return DEVICE if on_device else func(tensor)
        if func == Tensor.is_cpu.__get__:
            return not on_device
        if func is Tensor.numpy:
            if on_device:
                raise BorderError("numpy() of a device tensor")
            return func(tensor, **kwargs)
        name = func(tensor, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if on_device and isinstance(name, str) else name

    def _target(self, func: Any, args: tuple, kwargs: dict) -> bool | None:
        """Whether the result belongs on the device; None: where its inputs are."""
        if func is Tensor.cuda:
            return True
        if func is Tensor.cpu:
            return False
        if func is Tensor.new_tensor and kwargs.get("device") is None:
            return self.sides.of(args[0]) == _Sides.ON_DEVICE
        if func is Tensor.to:
            other = args[1] if len(args) > 1 else kwargs.get("other")
            if isinstance(other, Tensor):
                return self.sides.of(other) == _Sides.ON_DEVICE
            named = _is_device(other)
            if named is not None:
                return named
        return _is_device(kwargs.get("device"))

    def _sent(self, result: Any, args: tuple, target: bool, *, func: Any, is_non_blocking: bool) -> Any:
        side = _Sides.ON_DEVICE if target else 0
        if not isinstance(result, Tensor) or self.sides.of(result) == side:
            return result
        self.sides.num_crossings += 1
        if not target and self.sides.of(args[0]) == _Sides.ON_DEVICE:
            self.sides.note("read")
        elif target and func in MAKES_OF_VALUES:
            self.sides.note("block")
        elif target and func in (Tensor.to, Tensor.cuda):
            self.sides.note_copy(args[0], is_non_blocking=is_non_blocking)
        shared = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
        if result.untyped_storage()._cdata in shared:
            result = result.clone()
        self.sides.put(result, side)
        return result


@contextlib.contextmanager
def device_border() -> Iterator[_Sides]:
    """Draws the border for this process's CPU platform, which is started and whose groups are joined."""
    from megatron_ktr.distributed.platform import current

    platform, sides = current(), _Sides()
    operations = _Operations(sides)
    c10d = torch.distributed.distributed_c10d
    run_backward = torch.autograd._engine_run_backward
    calls = _Calls(operations)

    def run(*args: Any, **kwargs: Any) -> Any:
        # ``backward`` is itself a torch function, inside which modes sleep. Ours must see calls before the platform's.
        is_open, operations.num_calls_open = operations.num_calls_open, 0
        try:
            with contextlib.nullcontext() if CudaToCpu.is_on_stack() else CudaToCpu(), calls:
                return run_backward(*args, **kwargs)
        finally:
            operations.num_calls_open = is_open

    replaced = [
        (platform, "device", DEVICE),
        (torch.cuda, "current_device", lambda: DEVICE),
        (c10d, "_get_object_coll_device", lambda group=None: "cuda"),
        (torch.autograd, "_engine_run_backward", run),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        with operations, calls:
            yield sides
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
