"""The Triton kernels are right: under the interpreter, where no GPU is needed (on one: ``*_triton_device.py``).

Triton decides when a kernel is decorated whether it will be interpreted. The interpreter tests therefore run in one
process of their own, started with TRITON_INTERPRET=1, so that this process can compile the same kernels and no other
test sees the variable. The interpreter's tiles are 32 x 64 x 32 with splits of 128 columns: the small problems below
have many tiles, splits and chunks, ragged in every direction.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics_interface import GradientSums, LogitGradient, OtherRows, ShardPlan
from megatron_ktr.ops.token_statistics_reference import token_statistics_reference
from tests.support.token_statistics import (
    GRADIENTS,
    NAMES,
    TRITON_CASES,
    VALUES,
    Case,
    assert_as_good_as_naive,
    error_of,
    statistics_with,
    truth_of,
    values_and_gradients,
    values_of,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

Interpreter = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """Runs a function of this module where Triton interprets; an exception there is raised here."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # inherited by the process that the first call spawns
            pool.submit(_start_interpreting).result()
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def _start_interpreting() -> None:
    torch.set_num_threads(1)
    from megatron_ktr.ops import token_statistics_triton

    assert token_statistics_triton.IS_INTERPRETED


def results(case: Case) -> dict[str, Tensor]:
    return values_and_gradients(statistics_with, case, dtype=case.dtype, impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", TRITON_CASES)
def test_error_is_at_most_that_of_full_logits(interpreter: Interpreter, case: Case, dtype: torch.dtype) -> None:
    case = case.of(dtype)
    ours = interpreter(results, case)
    for name in VALUES:
        assert ours[name].dtype == torch.float32, name
    for name in GRADIENTS:
        assert ours[name].dtype == dtype, name
    # d z is rounded to 16 bits by both, but at other values, since only naive also rounds the logits.
    assert_as_good_as_naive(ours, case)
    assert not ours["weight_grad"][case.vocab_size :].any(), "padding rows are not parameters"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_of_16_bit_inputs_are_exact_to_fp32(interpreter: Interpreter, dtype: torch.dtype) -> None:
    case = Case(40, 512, 509, dtype, hidden_size=64)
    ours, truth = interpreter(results, case), truth_of(case)
    # 16-bit products are exact in fp32, so only fp32 sums are left: 1e-6 of the largest number is 8 units.
    for name in VALUES:
        assert error_of(ours[name], truth[name], least=float(truth["entropy"].max())) < 1e-6, name


def shards(case: Case, shard_size: int) -> dict[str, Tensor]:
    """As ``results``, from shards as tensor-parallel ranks have them, joined here in fp64; one counterfactual."""
    from megatron_ktr.ops.token_statistics_triton import IMPLEMENTATION

    hidden_RD, weight_VD, target_R, g, e = case.tensors()
    scale, others = 1 / case.temperature, [OtherRows(other_RD) for other_RD in case.counterfactuals()]
    plans = [
        ShardPlan(first, min(max(case.vocab_size - first, 0), shard_size), case.vocab_size, scale)
        for first in range(0, case.padded_size, shard_size)
    ]
    weights = weight_VD.split(shard_size)
    partial = torch.stack(
        [
            IMPLEMENTATION.forward(hidden_RD, weight, target_R, plan, others)
            for weight, plan in zip(weights, plans, strict=True)
        ],
        dim=1,
    )
    m, s, u, t, m2, s2, w, t2 = partial.double()
    top, top2 = m.amax(0), m2.amax(0)
    decay = (m - top).exp()
    total, total2 = (decay * s).sum(0), ((m2 - top2).exp() * s2).sum(0)
    mean = (decay * (u + s * (m - top))).sum(0) / total
    difference = (decay * (w + s * ((m - top) - (m2 - top2)))).sum(0) / total
    gradient = LogitGradient(
        target=target_R,
        grad=g.float(),
        maximum=top.float(),
        offset=(-(g - e * mean) / total).float(),
        slope=(-e / total).float(),
    )
    hidden_grad, weight_grad = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (hidden_RD, weight_VD))
    for weight, plan, weight_grad_part in zip(weights, plans, weight_grad.split(shard_size), strict=True):
        IMPLEMENTATION.backward(hidden_RD, weight, gradient, plan, GradientSums(hidden_grad, weight_grad_part))
    return {
        "logprob": t.sum(0) - top - total.log(),
        "entropy": total.log() - mean,
        "log_normalizer": top + total.log(),
        "counterfactual_logprob": (t2.sum(0) - top2 - total2.log())[None],
        "kl": (difference - total.log() + total2.log())[None],
        "hidden_grad": hidden_grad,
        "weight_grad": weight_grad,
    }


# 300 real columns of 400: a shard boundary inside, padding at the end of one shard, and shards of padding alone.
@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_shards_join_to_the_whole_vocabulary(interpreter: Interpreter, num_shards: int) -> None:
    case = Case(20, 400, 300, temperature=1.3, seed=7, hidden_size=32, num_counterfactuals=1)
    joined, truth = interpreter(shards, case, case.padded_size // num_shards), truth_of(case)
    for name in NAMES:
        assert error_of(joined[name], truth[name]) < 2e-6, name  # fp32: 16 units


def extreme_logits(dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows: uniform at 0, uniform at 1e4, uniform at -1e4, one at +1e4 on the target, the same off the target."""
    vocab_size = 150
    hidden_RD = torch.eye(16)[[0, 1, 2, 3, 3]] * torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    weight_VD = torch.zeros(vocab_size, 16)
    weight_VD[:, 1], weight_VD[:, 2], weight_VD[11, 3] = 1e4, -1e4, 1e4
    hidden_RD, weight_VD = (tensor.to(dtype).requires_grad_() for tensor in (hidden_RD, weight_VD))
    result = statistics_with(
        hidden_RD,
        weight_VD,
        torch.tensor([0, 139, 7, 11, 12]),
        counterfactual_hidden_RD=[hidden_RD.detach(), hidden_RD.detach().flip(0)],
        impl="triton",
    )
    (result.logprob_R.sum() + result.entropy_R.sum()).backward()
    values = values_of(result)
    return values | {"hidden_grad": hidden_RD.grad, "weight_grad": weight_VD.grad, "top": weight_VD.detach()[11, 3]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits(interpreter: Interpreter, dtype: torch.dtype) -> None:
    found = interpreter(extreme_logits, dtype)
    logprob, entropy, top = found["logprob"], found["entropy"], found["top"].float()
    hidden_grad, weight_grad = found["hidden_grad"], found["weight_grad"]
    assert torch.equal(found["counterfactual_logprob"][0], logprob) and not found["kl"][0].any()
    other_logprob, kl = found["counterfactual_logprob"][1], found["kl"][1]
    log_size = torch.tensor(150.0).log()
    assert torch.equal(entropy, torch.stack([log_size] * 3 + [torch.tensor(0.0)] * 2)), "uniform: exactly log V"
    assert torch.equal(logprob, torch.stack([-log_size] * 3 + [torch.tensor(0.0), -top]))
    # Row 0 against row 4 (all mass on one token), row 2 against itself, row 4 against row 0 (uniform).
    assert kl[0] == pytest.approx(float(top) * 149 / 150 - float(log_size), rel=1e-5)  # fp32 sums of 150 terms
    assert kl[2] == 0 and kl[4] == log_size
    assert other_logprob[0] == -top and other_logprob[3] == -log_size
    assert hidden_grad.isfinite().all() and weight_grad.isfinite().all()
    assert not hidden_grad[3].any(), "p(target) == 1: nothing left to learn"


def main_grad(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(main_grad before, after, what autograd received) for a 16-bit weight."""
    hidden_RD, weight_VD, target_R, logprob_grad_R, _ = case.tensors()
    weight_VD = torch.nn.Parameter(weight_VD.nan_to_num())
    before = torch.randn(weight_VD.shape, generator=torch.Generator().manual_seed(1))
    weight_VD.main_grad, weight_VD.zero_out_wgrad = before.clone(), True
    result = statistics_with(
        hidden_RD,
        weight_VD,
        target_R,
        vocab_size=case.vocab_size,
        accumulate_into_main_grad=True,
        impl="triton",
    )
    result.logprob_R.backward(logprob_grad_R.float())
    assert weight_VD.grad_added_to_main_grad
    return before, weight_VD.main_grad, weight_VD.grad


def test_weight_gradient_is_added_to_main_grad_unrounded(interpreter: Interpreter) -> None:
    case = Case(40, 320, 300, torch.bfloat16, hidden_size=48, has_entropy_grad=False)
    before, after, returned = interpreter(main_grad, case)
    truth = truth_of(case)["weight_grad"]
    assert not returned.any()
    # d z is rounded to 8 significant bits, at most 2^-9 of each term; the terms of the largest element, either sign
    # counted, are less than twice it.
    assert error_of((after - before)[:300], truth[:300]) < 2**-8
    assert torch.equal(after[300:], before[300:]), "padding rows are not parameters"
    assert not torch.equal(after, after.bfloat16().float())


def key_rows(case: Case, is_key_row: Tensor) -> list[Tensor]:
    """Gradients with a zero incoming gradient at all other rows."""
    hidden_RD, weight_VD, target_R, logprob_grad_R, _ = case.tensors()
    hidden_RD.requires_grad_(), weight_VD.requires_grad_()
    result = statistics_with(hidden_RD, weight_VD, target_R, vocab_size=case.vocab_size, impl="triton")
    result.logprob_R.backward((logprob_grad_R * is_key_row).float())
    return [hidden_RD.grad, weight_VD.grad]


@pytest.mark.parametrize("num_key_rows", [0, 1, 17])
def test_rows_without_weight_get_no_gradient(interpreter: Interpreter, num_key_rows: int) -> None:
    case = Case(40, 160, 150, hidden_size=32)
    is_key_row = torch.arange(40) % 2 == 0
    is_key_row &= is_key_row.cumsum(0) <= num_key_rows
    hidden_grad, weight_grad = interpreter(key_rows, case, is_key_row)
    hidden_RD, weight_VD, target_R, logprob_grad_R, _ = case.tensors()
    hidden_RD, weight_VD = (tensor.double().requires_grad_() for tensor in (hidden_RD, weight_VD))
    truth = token_statistics_reference(hidden_RD, weight_VD, target_R, vocab_size=150)
    truth.logprob_R.backward(logprob_grad_R * is_key_row)
    assert not hidden_grad[~is_key_row].any()
    for ours, theirs in ((hidden_grad, hidden_RD.grad), (weight_grad, weight_VD.grad)):
        assert error_of(ours, theirs) < 2e-6  # fp32: 16 units


def unusual_calls() -> None:
    """No rows; targets outside the vocabulary; one gradient only; a hidden matrix that is a view."""
    from megatron_ktr.ops.token_statistics_triton import IMPLEMENTATION

    case = Case(6, 90, 90, hidden_size=32)
    plan = ShardPlan(first_id=0, num_columns=90, vocab_size=90, scale=1.0)
    hidden_RD, weight_VD, target_R, logprob_grad_R, _ = case.tensors()

    empty = statistics_with(hidden_RD[:0].requires_grad_(), weight_VD, target_R[:0], impl="triton")
    assert empty.logprob_R.shape == (0,)
    empty.logprob_R.sum().backward()

    usual = IMPLEMENTATION.forward(hidden_RD, weight_VD, target_R, plan)
    unknown = IMPLEMENTATION.forward(hidden_RD, weight_VD, torch.tensor([-100, 90, *target_R[2:]]), plan)
    assert unknown[3].isnan().tolist() == [True, True, False, False, False, False]
    assert torch.equal(unknown[:3], usual[:3]) and torch.equal(unknown[3, 2:], usual[3, 2:])

    assert torch.equal(IMPLEMENTATION.forward(hidden_RD.t().contiguous().t(), weight_VD, target_R, plan), usual)
    # The same numbers, in the same bits, however many counterfactuals are there.
    others = [OtherRows(other_RD) for other_RD in case.counterfactuals()]
    both = IMPLEMENTATION.forward(hidden_RD, weight_VD, target_R, plan, others)
    second = IMPLEMENTATION.forward(hidden_RD, weight_VD, target_R, plan, others[1:])
    assert torch.equal(both[:4], usual) and torch.equal(second, both[[0, 1, 2, 3, 8, 9, 10, 11]])
    assert both.is_contiguous() and both.shape == (12, 6)

    grad_R = logprob_grad_R.float()
    gradient = LogitGradient(target_R, grad_R, usual[0], -grad_R / usual[1], None)

    def add_gradients(*, hidden: bool, weight: bool) -> GradientSums:
        sums = GradientSums(
            torch.zeros_like(hidden_RD) if hidden else None, torch.zeros_like(weight_VD) if weight else None
        )
        IMPLEMENTATION.backward(hidden_RD, weight_VD, gradient, plan, sums)
        return sums

    whole = add_gradients(hidden=True, weight=True)
    assert torch.equal(add_gradients(hidden=True, weight=False).hidden_RD, whole.hidden_RD)
    assert torch.equal(add_gradients(hidden=False, weight=True).weight_VD, whole.weight_VD)
    IMPLEMENTATION.backward(hidden_RD, weight_VD, gradient, plan, whole)
    twice = add_gradients(hidden=True, weight=True)
    # Backward adds: a second call doubles, up to the rounding of sums that no longer start at zero.
    assert error_of(whole.hidden_RD, 2 * twice.hidden_RD.double()) < 1e-6
    assert error_of(whole.weight_VD, 2 * twice.weight_VD.double()) < 1e-6


def test_unusual_calls(interpreter: Interpreter) -> None:
    interpreter(unusual_calls)
