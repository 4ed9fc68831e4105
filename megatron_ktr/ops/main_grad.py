"""Weight gradients that are summed in Megatron's fp32 ``main_grad`` instead of in one of autograd's."""

from __future__ import annotations

import torch
from torch import Tensor


def has_precise_main_grad(weight_VD: Tensor) -> bool:
    """Whether the parameter has a ``main_grad`` that a sum may be formed in."""
    main_grad = getattr(weight_VD, "main_grad", None)
    # In 16 bits the sum over micro-batches would lose digits that the sum beside it keeps until it is rounded once.
    return main_grad is not None and main_grad.dtype in (torch.float32, torch.float64)


def main_gradient(parameter: Tensor) -> Tensor:
    """``parameter.main_grad``: where megatron-core adds up gradients. torch knows no such attribute, so only here."""
    return getattr(parameter, "main_grad")  # noqa: B009


def gradient_in_main_grad(parameter: Tensor) -> Tensor:
    """What backward returns for a parameter whose gradient it adds to ``main_grad``; sets ``grad_added_to_main_grad``.

    Autograd must pass something of the parameter's shape and dtype on: megatron-core's hook, which runs then, wants to
    see one. It adds it to ``main_grad`` where ``zero_out_wgrad`` says so (an embedding that is the output weight too,
    whose lookup sends a gradient as well): zeros there. Elsewhere it drops it unread, and so it is ``main_grad``'s own
    memory under the parameter's dtype: 1.1 GB of a 7B model's head that nobody allocates or fills.
    """
    setattr(parameter, "grad_added_to_main_grad", True)  # noqa: B010  # an attribute of core's, unknown to type checkers
    main_grad = main_gradient(parameter)
    if getattr(parameter, "zero_out_wgrad", False) or not main_grad.is_contiguous():
        return torch.zeros_like(parameter)
    return main_grad.detach().view(-1).view(parameter.dtype)[: parameter.numel()].view(parameter.shape)
