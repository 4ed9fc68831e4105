"""Finds where a number first turns NaN or infinite: in the weights, in the output of a module, in a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.policy.gradient_norms import TensorGradient
from megatron_ktr.policy.policy import Policy
from models.qwen2_5_vl.conversion import named_model_parameters
from models.qwen2_5_vl.fp8 import plain_tensor


@dataclass
class FirstNotFinite:
    """What ``watching`` has seen; for a policy in a single process."""

    weight: str | None = None
    """The first parameter that is not finite before the step."""
    module: str | None = None
    """The first module whose output is not finite in any pass, in the order in which modules end."""
    num_elements: int = 0
    """Elements of that output that are not finite."""
    had_finite_input: bool = False
    """Whether the module's own input was finite, so that the module made the number."""

    def of_gradients(self, gradients: Mapping[str, TensorGradient]) -> list[str]:
        """The tensors whose gradient is not finite, in the order in which backward reaches them: the last layer is the
        first."""
        return [name for name, found in gradients.items() if found.num_not_finite][::-1]


@contextmanager
def watching(policy: Policy) -> Iterator[FirstNotFinite]:
    """Looks at the weights, and inside the context at the output of every module of the policy. Each look waits for the
    device, so this is for a replay and not for training."""
    found = FirstNotFinite()
    for name, parameter in named_model_parameters(policy.bare_chunks):
        if not _is_finite(plain_tensor(parameter)):
            found.weight = name
            break

    def look(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: Any, output: Any) -> None:
            if found.module is not None:
                return
            bad = [tensor for tensor in _tensors(output) if not _is_finite(tensor)]
            if bad:
                found.module, found.num_elements = name, sum(int((~tensor.isfinite()).sum()) for tensor in bad)
                found.had_finite_input = all(map(_is_finite, _tensors(inputs)))

        return hook

    handles = [
        module.register_forward_hook(look(name or "model"))
        for chunk in policy.bare_chunks
        for name, module in chunk.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in the inputs or the output of a module."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
