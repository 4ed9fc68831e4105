"""Problems for ``linear_token_statistics`` and the triangle they are judged by: fp64 truth, naive, ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_ktr.ops.token_statistics_reference import token_statistics_reference

HIDDEN_SIZE = 24
VALUES = ("logprob", "entropy", "counterfactual_logprob", "kl")
GRADIENTS = ("hidden_grad", "weight_grad")
NAMES = VALUES + GRADIENTS


@dataclass(frozen=True)
class Case:
    """One problem; made from its seed alone, so that every rank makes the same one."""

    num_rows: int
    padded_size: int
    vocab_size: int
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    seed: int = 0

    def of(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden, weight, target, and the gradients that arrive at logprob and entropy. Padding rows are NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # Logits with a standard deviation of about 2: entropies well between 0 and log V.
        hidden_RD = normal(self.num_rows, HIDDEN_SIZE).to(self.dtype)
        weight_VD = (normal(self.padded_size, HIDDEN_SIZE) * 0.4).to(self.dtype)
        weight_VD[self.vocab_size :] = float("nan")
        target_R = torch.randint(0, self.vocab_size, (self.num_rows,), generator=generator)
        target_R[-1:] = self.vocab_size - 1
        logprob_grad_R, entropy_grad_R = normal(2, self.num_rows).unbind()
        return hidden_RD, weight_VD, target_R, logprob_grad_R, entropy_grad_R

    def counterfactual(self) -> Tensor:
        """The hidden rows of another view: some near the intact ones, some far; the first one equal."""
        hidden_RD = self.tensors()[0].double()
        generator = torch.Generator().manual_seed(self.seed + 1000)
        noise_RD = torch.randn(hidden_RD.shape, generator=generator, dtype=torch.float64)
        share_R1 = torch.linspace(0, 1, max(self.num_rows, 1), dtype=torch.float64)[: self.num_rows, None]
        return (hidden_RD + share_R1 * noise_RD).to(self.dtype)


def values_and_gradients(op: Callable, case: Case, *, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """All statistics and gradients of one call (``NAMES``)."""
    hidden_RD, weight_VD, target_R, logprob_grad_R, entropy_grad_R = case.tensors()
    hidden_RD, weight_VD = (tensor.to(dtype).requires_grad_() for tensor in (hidden_RD, weight_VD))
    result = op(
        hidden_RD,
        weight_VD,
        target_R,
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        counterfactual_hidden_RD=case.counterfactual().to(dtype),
        **options,
    )
    torch.autograd.backward(
        [result.logprob_R, result.entropy_R],
        [logprob_grad_R.to(result.logprob_R.dtype), entropy_grad_R.to(result.entropy_R.dtype)],
    )
    assert not result.kl_R.requires_grad and not result.counterfactual_logprob_R.requires_grad
    values = [getattr(result, f"{name}_R").detach() for name in VALUES]
    return dict(zip(NAMES, (*values, hidden_RD.grad, weight_VD.grad), strict=True))


def truth_of(case: Case) -> dict[str, Tensor]:
    return values_and_gradients(token_statistics_reference, case, dtype=torch.float64)


def error_of(value: Tensor, truth: Tensor) -> float:
    """Largest error as a share of the largest true number."""
    if truth.numel() == 0:
        return 0.0
    return float((value.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-3))


def assert_as_good_as_naive(ours: dict[str, Tensor], case: Case, *, grain: torch.dtype | None = None) -> None:
    """err(ours) <= err(naive at working precision) + tolerance, for every statistic and gradient.

    ``grain``: dtype in which the implementation rounds what it hands back, where that is coarser than the result's.
    """
    truth, naive = truth_of(case), values_and_gradients(token_statistics_reference, case, dtype=case.dtype)
    for name in NAMES:
        # Both are sums of the same terms in another order; 8 units in the last place of the result's dtype is what
        # that order is worth at these sizes. Naive bf16 logits alone cost thousands of fp32 units.
        tolerance = 8 * torch.finfo(grain or ours[name].dtype).eps
        assert ours[name].isfinite().all(), name
        assert error_of(ours[name], truth[name]) <= error_of(naive[name], truth[name]) + tolerance, name


class Recorder(TorchDispatchMode):
    """Counts multiply-adds of matrix products and remembers the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm):
            a, b = args[1:3] if func.overloadpacket is torch.ops.aten.addmm else args[:2]
            self.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
        tensors = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(tensor.untyped_storage().nbytes() for tensor in tensors)])
        return out
