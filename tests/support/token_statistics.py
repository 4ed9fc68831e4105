"""Problems for ``linear_token_statistics`` and the triangle they are judged by: fp64 truth, naive, ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_ktr.ops.group_divergence import group_divergence
from megatron_ktr.ops.token_statistics import TokenStatistics, linear_token_statistics
from megatron_ktr.ops.token_statistics_interface import HeadOptions, OtherRows
from megatron_ktr.ops.token_statistics_reference import token_statistics_reference

HIDDEN_SIZE = 24
OF_COUNTERFACTUALS = ("counterfactual_logprob", "kl")
OF_REFERENCE = ("reference_logprob", "reference_kl")
VALUES = ("logprob", "entropy", "log_normalizer", *OF_COUNTERFACTUALS)
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
    num_counterfactuals: int = 2
    hidden_size: int = HIDDEN_SIZE
    has_entropy_grad: bool = True
    reference: Literal["own weight", "same weight"] | None = None
    """Whether a reference model is compared with, whose KL has a gradient, and whether it has a weight of its own."""
    device: str = "cpu"
    """Where the tensors end; they are drawn on the host."""

    def of(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden, weight, target, and the gradients that arrive at logprob and entropy. Padding rows are NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # Logits with a standard deviation of about 2: entropies well between 0 and log V.
        hidden_RD = normal(self.num_rows, self.hidden_size).to(self.dtype)
        weight_VD = (normal(self.padded_size, self.hidden_size) * 2 / self.hidden_size**0.5).to(self.dtype)
        weight_VD[self.vocab_size :] = float("nan")
        target_R = torch.randint(0, self.vocab_size, (self.num_rows,), generator=generator)
        target_R[-1:] = self.vocab_size - 1  # the last real column, beside padding
        found = (hidden_RD, weight_VD, target_R, *normal(2, self.num_rows).unbind())
        return tuple(tensor.to(self.device) for tensor in found)

    def counterfactuals(self) -> tuple[Tensor, ...]:
        """The hidden rows of other views: of each some near the intact ones, some far; the first row equal."""
        hidden_RD = self.tensors()[0].double().cpu()
        generator = torch.Generator().manual_seed(self.seed + 1000)
        share_R1 = torch.linspace(0, 1, max(self.num_rows, 1), dtype=torch.float64)[: self.num_rows, None]
        return tuple(
            (hidden_RD + share_R1 * torch.randn(hidden_RD.shape, generator=generator, dtype=torch.float64)).to(
                self.device, self.dtype
            )
            for _ in range(self.num_counterfactuals)
        )

    def reference_rows(self, dtype: torch.dtype) -> tuple[OtherRows, Tensor]:
        """The reference model's rows and weight, and the gradient that arrives at its KL. Padding rows are NaN."""
        hidden_RD, weight_VD, *_ = (tensor.double().cpu() for tensor in self.tensors())
        generator = torch.Generator().manual_seed(self.seed + 2000)

        def near(tensor: Tensor) -> Tensor:
            moved = tensor + 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return moved.to(self.dtype).to(self.device, dtype)

        rows_RD, own_VD = near(hidden_RD), near(weight_VD)
        grad_R = torch.randn(self.num_rows, generator=generator, dtype=torch.float64).to(self.device)
        weight = own_VD if self.reference == "own weight" else None
        return OtherRows(rows_RD, weight, has_kl_gradient=True), grad_R


TRITON_CASES = [
    pytest.param(Case(37, 101, 101, hidden_size=48), id="primes"),
    pytest.param(Case(1, 64, 61, hidden_size=16, seed=1, num_counterfactuals=1), id="one-row"),
    pytest.param(Case(40, 448, 389, hidden_size=80, temperature=0.7, seed=2), id="padding"),
    pytest.param(Case(8, 128, 128, hidden_size=32, temperature=2.5, seed=3, num_counterfactuals=0), id="full-tiles"),
    pytest.param(Case(3, 8, 1, hidden_size=64, seed=4), id="one-token-vocabulary"),
    pytest.param(Case(33, 320, 300, hidden_size=64, has_entropy_grad=False, seed=5), id="logprob-gradient-only"),
    pytest.param(Case(5, 129, 129, hidden_size=24, seed=6, num_counterfactuals=3), id="one-column-over"),
    pytest.param(
        Case(37, 320, 301, hidden_size=48, temperature=0.7, reference="own weight", num_counterfactuals=1),
        id="reference",
    ),
    pytest.param(
        Case(37, 101, 101, hidden_size=48, reference="same weight", num_counterfactuals=0, has_entropy_grad=False),
        id="adapters-off",
    ),
]


def values_and_gradients(op: Callable, case: Case, *, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """All statistics and gradients of one call (``NAMES``)."""
    hidden_RD, weight_VD, target_R, logprob_grad_R, entropy_grad_R = case.tensors()
    hidden_RD, weight_VD = (tensor.to(dtype).requires_grad_() for tensor in (hidden_RD, weight_VD))
    if case.reference:
        options["reference"], kl_grad_R = case.reference_rows(dtype)
    result = op(
        hidden_RD,
        weight_VD,
        target_R,
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        counterfactual_hidden_RD=[other_RD.to(dtype) for other_RD in case.counterfactuals()],
        **options,
    )
    outputs, gradients = [result.logprob_R], [logprob_grad_R]
    if case.has_entropy_grad:
        outputs, gradients = outputs + [result.entropy_R], gradients + [entropy_grad_R]
    if case.reference:
        outputs, gradients = outputs + [result.reference_kl_R], gradients + [kl_grad_R]
    torch.autograd.backward(outputs, [grad.to(result.logprob_R.dtype) for grad in gradients])
    scores = (result.kl_KR, result.counterfactual_logprob_KR, result.log_normalizer_R)
    assert not any(score.requires_grad for score in scores)
    values = values_of(result)
    return values | dict(zip(GRADIENTS, (hidden_RD.grad, weight_VD.grad), strict=True))


def values_of(result) -> dict[str, Tensor]:
    values = {
        name: getattr(result, f"{name}_KR" if name in OF_COUNTERFACTUALS else f"{name}_R").detach() for name in VALUES
    }
    if result.reference_kl_R is not None:
        values |= {name: getattr(result, f"{name}_R").detach() for name in OF_REFERENCE}
    return values


def truth_of(case: Case) -> dict[str, Tensor]:
    return values_and_gradients(token_statistics_reference, case, dtype=torch.float64)


def error_of(value: Tensor, truth: Tensor, *, least: float = 1e-3) -> float:
    """Largest error as a share of the largest true number, or of ``least`` if that is larger."""
    assert value.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    return float((value.double() - truth).abs().max() / truth.abs().max().clamp_min(least))


def assert_as_good_as_naive(
    ours: dict[str, Tensor], case: Case, *, grain: torch.dtype | None = None, units: int = 8
) -> None:
    """err(ours) <= err(naive at working precision) + tolerance, for every statistic and gradient.

    ``grain``: dtype in which the implementation rounds what it hands back, where that is coarser than the result's.
    ``units``: of the last place, the tolerance.
    """
    truth, naive = truth_of(case), values_and_gradients(token_statistics_reference, case, dtype=case.dtype)
    # KL is a difference of numbers of the entropy's size; its errors are theirs.
    least = dict.fromkeys(("kl", "reference_kl"), max(float(truth["entropy"].max()), 1e-3) if case.num_rows else 1e-3)
    assert ours.keys() == truth.keys()
    for name in truth:
        # Both are sums of the same terms in another order; 8 units in the last place of the result's dtype is what
        # that order is worth at these sizes. Naive bf16 logits alone cost thousands of fp32 units.
        tolerance = units * torch.finfo(grain or ours[name].dtype).eps
        assert ours[name].isfinite().all(), name
        errors = [error_of(found[name], truth[name], least=least.get(name, 1e-3)) for found in (ours, naive)]
        assert errors[0] <= errors[1] + tolerance, name


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


class Traffic(TorchDispatchMode):
    """Bytes this rank sends in each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # allgather_base_(output, input, ...) sends its input; the all-reduce sends what it is given.
            sent = tree_flatten(args[1] if "gather" in func.overloadpacket.__name__ else args[0])[0]
            self.sizes.append(sum(tensor.nbytes for tensor in sent))
        return func(*args, **(kwargs or {}))


def statistics_with(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    *,
    counterfactual_hidden_RD: Any = (),
    reference: OtherRows | None = None,
    **head: Any,
) -> TokenStatistics:
    """``linear_token_statistics`` with the fields of ``HeadOptions`` as keywords."""
    return linear_token_statistics(
        hidden_RD,
        weight_VD,
        target_R,
        counterfactual_hidden_RD=counterfactual_hidden_RD,
        reference=reference,
        head=HeadOptions(**head),
    )


def divergence_with(hidden_RD: Tensor, weight_VD: Tensor, log_normalizer_R: Tensor, **options: Any) -> Tensor:
    """``group_divergence`` with the fields of ``HeadOptions`` as keywords."""
    own = {name: options.pop(name) for name in ("layout", "with_gradient", "has_gradient_R") if name in options}
    return group_divergence(hidden_RD, weight_VD, log_normalizer_R, head=HeadOptions(**options), **own)
