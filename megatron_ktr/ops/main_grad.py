"""Sums weight gradients in Megatron's fp32 buffer ``main_grad`` instead of in a gradient of autograd's."""

from __future__ import annotations

import torch
from torch import Tensor


def has_precise_main_grad(weight_VD: Tensor) -> bool:
    """Whether the parameter has a ``main_grad`` precise enough to form a sum in."""
    main_grad = getattr(weight_VD, "main_grad", None)
    # A 16-bit ``main_grad`` would round at every addition. A separate sum in higher precision is rounded only once.
    return main_grad is not None and main_grad.dtype in (torch.float32, torch.float64)


def main_gradient(parameter: Tensor) -> Tensor:
    """``parameter.main_grad``, where megatron-core adds up gradients; torch does not declare this attribute."""
    return getattr(parameter, "main_grad")  # noqa: B009


def gradient_in_main_grad(parameter: Tensor) -> Tensor:
    """What backward returns for a parameter whose gradient it adds to ``main_grad``; sets ``grad_added_to_main_grad``.

    Backward must still return a tensor of the parameter's shape and dtype, because only then does megatron-core's hook
    run. If ``zero_out_wgrad`` is set, the hook adds that tensor to ``main_grad``, so it must be zeros. This is the case
    for an embedding that is also the output weight, because its lookup sends a gradient as well. Otherwise the hook
    drops the tensor unread, so we return a view of ``main_grad``'s own memory in the parameter's dtype. For the head
    of a 7B model that saves allocating and filling 1.1 GB.
    """
    setattr(parameter, "grad_added_to_main_grad", True)  # noqa: B010  # an attribute of core's, unknown to type checkers
    main_grad = main_gradient(parameter)
    if getattr(parameter, "zero_out_wgrad", False) or not main_grad.is_contiguous():
        return torch.zeros_like(parameter)
    return main_grad.detach().view(-1).view(parameter.dtype)[: parameter.numel()].view(parameter.shape)
