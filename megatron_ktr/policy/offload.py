"""Tensors that live in host memory and are on the device only while they are used: frozen weights and the moments of
an optimizer.

The opposite case, tensors that leave the device while an engine generates, is in ``policy/rollout_offload.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ktr.distributed.platform import Platform

Move = Callable[[Tensor], Tensor]
MOMENTS = frozenset({"exp_avg", "exp_avg_sq"})


class HostWeights:
    """Keeps the parameters of frozen modules in host memory; they are on the device within ``on_device()`` only.

    All modules move at once. A pass without gradient needs all weights and little else, so they fit then; the memory is
    freed for the update, which needs it for activations. Nothing is copied back to the host, because the weights do not
    change. Host memory is pinned, so that copies run at the bus's speed and are ordered before the kernels that need
    them.
    """

    def __init__(self, modules: Sequence[nn.Module], *, to_host: Move, to_device: Move) -> None:
        """
        Raises:
            ValueError: a parameter is trained; its optimizer would not find it after it was replaced.
        """
        self._to_device = to_device
        self._places = [(owner, name) for module in modules for owner in module.modules() for name in owner._parameters]
        self._at_home: list[nn.Parameter | None] = []
        for owner, name in self._places:
            parameter = owner._parameters[name]
            if parameter is not None and parameter.requires_grad:
                raise ValueError(f"only frozen weights can be kept on the host, {name} is trained")
            self._at_home.append(_moved(parameter, to_host))
        self._put(self._at_home)

    @classmethod
    def on(cls, modules: Sequence[nn.Module], *, platform: Platform) -> HostWeights:
        """Weights that move between the host and ``platform``'s device; on CPU nothing moves."""
        return cls(modules, **moves(platform))

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Puts every weight on the device while the context is open; the copies there are freed afterwards."""
        self._put([_moved(parameter, self._to_device) for parameter in self._at_home])
        try:
            yield
        finally:
            self._put(self._at_home)

    def _put(self, parameters: Sequence[nn.Parameter | None]) -> None:
        # Parameter objects are replaced. Assigning to ``.data`` would not do: torch allows a change of device there
        # only between some kinds of devices.
        for (owner, name), parameter in zip(self._places, parameters, strict=True):
            owner._parameters[name] = parameter


def moves(platform: Platform) -> dict[str, Move]:
    """``to_host`` and ``to_device`` of a platform; on CPU both return what they are given."""
    return {
        "to_host": partial(_kept_or_pinned, is_host=platform.name == "cpu"),
        "to_device": lambda tensor: tensor.to(platform.device, non_blocking=True),
    }


@contextlib.contextmanager
def moments_on_device(optimizer: Any, *, to_host: Move, to_device: Move) -> Iterator[None]:
    """Puts Adam's moments on the device while the context is open, and back on the host afterwards.

    ``optimizer`` is megatron-core's. Only an optimizer step needs the moments, and no activations exist at that time.
    Moments take 8 of the 12 bytes per parameter that main weights and moments take together. Every return makes new
    copies on the host, because a checkpoint that is written in the background may still be reading the previous ones.
    Before its first step an optimizer has no moments; it then creates them on the device.
    """
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    states = [one.state for one in inner if one is not None]
    _move_moments(states, to_device)
    try:
        yield
    finally:
        _move_moments(states, to_host)


def _move_moments(states: Sequence[Mapping[Any, dict[str, Any]]], move: Move) -> None:
    for state in states:
        for entry in state.values():
            for name in MOMENTS & entry.keys():
                entry[name] = move(entry[name])


def pinned_copy(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory. It runs after all kernels launched before it and is complete on return, so that the
    device's tensor may be freed at once."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def _kept_or_pinned(tensor: Tensor, *, is_host: bool) -> Tensor:
    return tensor if is_host else pinned_copy(tensor)


def _moved(parameter: nn.Parameter | None, move: Move) -> nn.Parameter | None:
    if parameter is None:
        return None
    with torch.no_grad():
        moved = nn.Parameter(move(parameter.detach()), requires_grad=False)
    # The attributes by which tensor and sequence parallelism mark parameters move, too.
    vars(moved).update(vars(parameter))
    return moved
