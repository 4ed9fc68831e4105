"""What lives in host memory and visits the device while it is used: frozen weights, an optimizer's moments.

What leaves the device while an engine generates is in ``policy/rollout_offload.py``.
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
    """Frozen modules' parameters, on the host outside ``on_device()``.

    Whole modules move at once: a pass without gradient needs all weights and little else, and it is the update, with
    its activations, that needs the room. Nothing is copied back, the weights do not change. Host memory is pinned, so
    that copies run at the bus's speed, in order with the kernels that wait for them.
    """

    def __init__(self, modules: Sequence[nn.Module], *, to_host: Move, to_device: Move) -> None:
        """
        Raises:
            ValueError: a parameter that is trained: its optimizer would not find it.
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
        """Between the host and ``platform``'s device; on CPU nothing moves."""
        return cls(modules, **moves(platform))

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it every weight is on the device; afterwards the copies there are free."""
        self._put([_moved(parameter, self._to_device) for parameter in self._at_home])
        try:
            yield
        finally:
            self._put(self._at_home)

    def _put(self, parameters: Sequence[nn.Parameter | None]) -> None:
        # New Parameter objects, not ``.data``: torch lets that change device between some kinds of devices only.
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
    """The moments of an Adam behind megatron-core's optimizer are on the device within it, on the host afterwards.

    Only an optimizer step needs them, when no activations are there; they are 8 of the 12 bytes a parameter that main
    weights and moments take. Host copies are new ones each time: a checkpoint in the background may still be reading
    the last. What an optimizer has not made yet, before its first step, is made on the device.
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
    """On the host. In order with the kernels before it, and complete when it returns: the device's copy may go."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def _kept_or_pinned(tensor: Tensor, *, is_host: bool) -> Tensor:
    return tensor if is_host else pinned_copy(tensor)


def _moved(parameter: nn.Parameter | None, move: Move) -> nn.Parameter | None:
    if parameter is None:
        return None
    with torch.no_grad():
        moved = nn.Parameter(move(parameter.detach()), requires_grad=False)
    # Marks of tensor and sequence parallelism.
    vars(moved).update(vars(parameter))
    return moved
