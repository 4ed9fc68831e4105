"""Weights that live in host memory and visit the device while they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from megatron_ktr.distributed.platform import Platform

Move = Callable[[Tensor], Tensor]


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
        is_host = platform.name == "cpu"
        return cls(
            modules,
            to_host=lambda tensor: tensor if is_host else tensor.cpu().pin_memory(),
            to_device=lambda tensor: tensor.to(platform.device, non_blocking=True),
        )

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


def _moved(parameter: nn.Parameter | None, move: Move) -> nn.Parameter | None:
    if parameter is None:
        return None
    with torch.no_grad():
        moved = nn.Parameter(move(parameter.detach()), requires_grad=False)
    # Marks of tensor and sequence parallelism.
    moved.__dict__.update(parameter.__dict__)
    return moved
