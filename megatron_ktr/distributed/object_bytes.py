"""Converts Python objects to one tensor of bytes. Tensors inside them are copied as raw memory; the rest is pickled.

    [length of the pickle, int64 | pickle | padding | tensor 0 | padding | tensor 1 | ..]

torch would pickle a tensor by writing its storage to a file in memory, the whole storage even if the tensor is a view
of a part, and would copy that several times. Most of the data that ranks send each other are frames, so this format
copies every tensor only once.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16
_HEAD_BYTES = 8


def pack_object(value: Any) -> Tensor:
    """``value`` as uint8 [n] in host memory. A tensor that occurs several times is stored once."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    pickled = file.getbuffer()
    parts = [tensor.reshape(-1).view(torch.uint8) for tensor in pickler.tensors]
    starts, end = [], _aligned(_HEAD_BYTES + len(pickled))
    for part in parts:
        starts.append(end)
        end = _aligned(end + len(part))
    payload = torch.empty(end, dtype=torch.uint8)
    payload[:_HEAD_BYTES] = torch.tensor([len(pickled)], dtype=torch.int64).view(torch.uint8)
    payload[_HEAD_BYTES : _HEAD_BYTES + len(pickled)] = torch.frombuffer(pickled, dtype=torch.uint8)
    for start, part in zip(starts, parts, strict=True):
        payload[start : start + len(part)] = part
    return payload


def unpack_object(payload: Tensor) -> Any:
    """The object that ``pack_object`` packed. Its tensors are views of ``payload``, on the host. ``payload`` must come
    from a rank of this run, because unpickling runs code."""
    length = int(payload[:_HEAD_BYTES].view(torch.int64))
    pickled = payload[_HEAD_BYTES : _HEAD_BYTES + length].numpy().tobytes()
    return _Unpickler(io.BytesIO(pickled), payload, start=_aligned(_HEAD_BYTES + length)).load()


def _aligned(number: int) -> int:
    return -(-number // _ALIGNMENT) * _ALIGNMENT


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._known: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.layout is not torch.strided:
            return None
        if id(obj) not in self._known:  # the object is kept with its number, so that no other object can get its id
            self._known[id(obj)] = len(self.tensors), obj
            self.tensors.append(obj.detach().cpu().contiguous())
        return self._known[id(obj)][0], obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, payload: Tensor, *, start: int) -> None:
        super().__init__(file)
        self._payload = payload
        self._end = start
        self._tensors: list[Tensor] = []

    def persistent_load(self, pid: Any) -> Tensor:
        number, dtype, shape = pid
        if number == len(self._tensors):  # tensors are numbered in the order in which they were met
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            part = self._payload[self._end : self._end + num_bytes]
            self._tensors.append(part.view(dtype).view(shape))
            self._end = _aligned(self._end + num_bytes)
        return self._tensors[number]
