"""KL(policy || reference) over the whole vocabulary, as a loss: worked numbers, gradients, work and traffic.

Against full logits in every implementation and dtype: ``test_token_statistics.py``, ``test_token_statistics_triton.py``
and ``test_token_statistics_parallel.py``, whose cases include a reference; in whole steps: ``tests/step``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics_interface import OtherRows
from tests.support.token_statistics import HIDDEN_SIZE, Case, Recorder, Traffic, statistics_with

IMPLS = ("chunked", "naive")


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl: str) -> None:
    """p = (0.5, 0.3, 0.2) and q = (0.4, 0.4, 0.2): KL(p || q) = 0.0252672, by hand.

    Its gradient with respect to the logits is p (log p - log q - KL) = (0.0989382, -0.0938848, -0.0050534). The weight
    is the identity, so that hidden dimensions are logits, and the gradient of the hidden row is that of the logits.
    """
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.4, 0.4, 0.2]])
    hidden_RD, weight_VD = p.log().requires_grad_(), torch.eye(3, requires_grad=True)
    # The reference's weight doubles its hidden row, which is half the logits.
    reference = OtherRows(q.log() / 2, 2 * torch.eye(3), has_kl_gradient=True)
    found = statistics_with(hidden_RD, weight_VD, torch.tensor([1]), reference=reference, impl=impl)
    assert found.reference_kl_R.item() == pytest.approx(0.0252672, abs=2e-7)  # rounded to 7 digits; fp32
    assert found.reference_logprob_R.item() == pytest.approx(-0.9162907, abs=2e-7)  # log 0.4
    found.reference_kl_R.sum().backward()
    assert hidden_RD.grad[0].tolist() == pytest.approx([0.0989382, -0.0938848, -0.0050534], abs=2e-7)
    # d weight = d z . hidden^T: the first column is d z log 0.5.
    expected = [0.0989382 * -0.6931472, -0.0938848 * -0.6931472, -0.0050534 * -0.6931472]
    assert weight_VD.grad[:, 0].tolist() == pytest.approx(expected, abs=2e-7)


def test_gradcheck() -> None:
    """All three statistics at once, by finite differences; tiles divide nothing, and two columns are padding."""
    case = Case(5, 13, 11, torch.float64, reference="own weight")
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    reference, _ = case.reference_rows(torch.float64)

    def op(hidden_RD: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
        found = statistics_with(
            hidden_RD,
            weight_VD,
            target_R,
            reference=reference,
            vocab_size=11,
            temperature=0.6,
            row_chunk=2,
            vocab_chunk=4,
        )
        return found.logprob_R, found.entropy_R, found.reference_kl_R

    assert torch.autograd.gradcheck(op, (hidden_RD.requires_grad_(), weight_VD.nan_to_num().requires_grad_()))


@pytest.mark.parametrize("has_own_weight", [True, False])
def test_entropy_and_both_kinds_of_kl_come_from_one_pass(has_own_weight: bool) -> None:
    """Forward: one product for the policy, one for each view, one for the reference. Backward, of key rows alone: the
    logits of both models again, and the two gradients."""
    case = Case(40, 101, 97, num_counterfactuals=2, reference="own weight" if has_own_weight else "same weight")
    hidden_RD, weight_VD, target_R, logprob_grad_R, entropy_grad_R = case.tensors()
    reference, kl_grad_R = case.reference_rows(torch.float32)
    with Recorder() as forward:
        found = statistics_with(
            hidden_RD.requires_grad_(),
            weight_VD.requires_grad_(),
            target_R,
            vocab_size=97,
            counterfactual_hidden_RD=case.counterfactuals(),
            reference=reference,
        )
    one = 97 * HIDDEN_SIZE
    assert forward.multiply_adds == (1 + 2 + 1) * 40 * one
    is_key_R = torch.arange(40) % 5 == 0
    has_kl_R = torch.arange(40) % 8 == 0
    with Recorder() as backward:
        torch.autograd.backward(
            [found.logprob_R, found.entropy_R, found.reference_kl_R],
            [(logprob_grad_R * is_key_R).float(), (entropy_grad_R * is_key_R).float(), (kl_grad_R * has_kl_R).float()],
        )
    is_active_R = is_key_R | has_kl_R
    assert backward.multiply_adds == 4 * int(is_active_R.sum()) * one
    assert not hidden_RD.grad[~is_active_R].any() and hidden_RD.grad[is_active_R].any(dim=1).all()


def test_without_its_gradient_the_kl_is_a_score() -> None:
    """Backward then costs what it costs without a reference, and nothing of the reference is kept for it."""
    case = Case(12, 40, 40, reference="own weight")
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    reference, _ = case.reference_rows(torch.float32)
    weight_VD.requires_grad_(), hidden_RD.requires_grad_()
    wanted = statistics_with(hidden_RD, weight_VD, target_R, reference=reference)
    found = statistics_with(hidden_RD, weight_VD, target_R, reference=replace(reference, has_kl_gradient=False))
    assert wanted.reference_kl_R.requires_grad and not found.reference_kl_R.requires_grad
    assert torch.equal(wanted.reference_kl_R, found.reference_kl_R) and torch.equal(wanted.logprob_R, found.logprob_R)
    with Recorder() as backward:
        found.logprob_R.sum().backward()
    assert backward.multiply_adds == 3 * 12 * 40 * HIDDEN_SIZE
    with Recorder() as backward:  # asked for, but not used by the loss
        wanted.logprob_R.sum().backward()
    assert backward.multiply_adds == 3 * 12 * 40 * HIDDEN_SIZE


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tied_weight_of_the_reference_gets_no_gradient_and_the_policys_goes_to_main_grad(impl: str) -> None:
    case = Case(29, 104, 97, reference="own weight", has_entropy_grad=False)
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    reference, kl_grad_R = case.reference_rows(torch.float32)
    kl_grad_R = kl_grad_R.float()
    rows_RD, own_VD = reference.hidden_RD.clone().requires_grad_(), reference.weight_VD.clone().requires_grad_()
    reference = OtherRows(rows_RD, own_VD, has_kl_gradient=True)
    plain = weight_VD.clone().requires_grad_()
    statistics_with(hidden_RD, plain, target_R, vocab_size=97, reference=reference, impl=impl).reference_kl_R.backward(
        kl_grad_R
    )
    weight = torch.nn.Parameter(weight_VD)
    weight.main_grad, weight.zero_out_wgrad = torch.ones(104, HIDDEN_SIZE), True
    options = dict(vocab_size=97, reference=reference, impl=impl, accumulate_into_main_grad=True)
    statistics_with(hidden_RD, weight, target_R, **options).reference_kl_R.backward(kl_grad_R)
    assert weight.grad_added_to_main_grad and not weight.grad.any()
    # The same fp32 sums, once on top of ones: half a unit in the last place of numbers below 16.
    assert float((weight.main_grad - 1 - plain.grad).abs().max()) < 2e-6
    assert rows_RD.grad is None and own_VD.grad is None


def test_no_tensor_grows_with_rows_times_vocabulary() -> None:
    case = Case(512, 4096, 4096, torch.bfloat16, reference="own weight", num_counterfactuals=0)
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    reference, _ = case.reference_rows(torch.bfloat16)
    with Recorder() as recorder:
        found = statistics_with(
            hidden_RD.requires_grad_(),
            weight_VD.requires_grad_(),
            target_R,
            reference=reference,
            row_chunk=64,
            vocab_chunk=256,
        )
        (found.logprob_R + found.entropy_R + found.reference_kl_R).sum().backward()
    # The weight's own gradient is the largest; a row-by-vocabulary tensor would be at least 20 times that.
    assert recorder.largest <= max(weight_VD.nbytes, 64 * 256 * 4)


def _traffic(context, *, num_active: int) -> tuple[list[int], list[int]]:
    """Bytes this rank sends in each collective of forward and of backward: two views and a reference."""
    import torch.distributed as dist

    case = Case(31, 4096, 4093, reference="own weight", num_counterfactuals=2)
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    reference, _ = case.reference_rows(torch.float32)
    shard_VD, own_VD = (whole.chunk(2)[context.rank].clone() for whole in (weight_VD, reference.weight_VD))
    with Traffic() as traffic:
        found = statistics_with(
            hidden_RD.requires_grad_(),
            shard_VD.requires_grad_(),
            target_R,
            group=dist.group.WORLD,
            vocab_size=case.vocab_size,
            counterfactual_hidden_RD=case.counterfactuals(),
            reference=replace(reference, weight_VD=own_VD),
        )
        num_forward = len(traffic.sizes)
        ((found.entropy_R + found.reference_kl_R) * (torch.arange(31) < num_active)).sum().backward()
    return traffic.sizes[:num_forward], traffic.sizes[num_forward:]


def test_shards_join_all_statistics_in_one_collective(ranks) -> None:
    for forward, backward in ranks(_traffic, world_size=2, num_active=12):
        assert forward == [(4 + 4 * 3) * 31 * 4], "entropy, both views and the reference together"
        assert backward == [12 * HIDDEN_SIZE * 4], "one all-reduce of the remaining rows, fp32"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_RD": torch.zeros(3, 2)}, r"the reference's hidden_RD like hidden_RD.* got torch.float32 \[3, 2\]"),
        ({"weight_VD": torch.zeros(5, 2)}, r"the reference's weight_VD like weight_VD.*\[10, 2\], got .*\[5, 2\]"),
        ({"weight_VD": torch.zeros(10, 2).bfloat16()}, "got torch.bfloat16"),
        ({"weight_VD": torch.zeros(10, 2, device="meta")}, r"\(on cpu and meta\)"),
    ],
)
def test_a_reference_that_does_not_fit_is_named(change: dict, message: str) -> None:
    reference = OtherRows(**{"hidden_RD": torch.zeros(4, 2), "weight_VD": torch.zeros(10, 2), **change})
    with pytest.raises(ValueError, match=message):
        statistics_with(torch.zeros(4, 2), torch.zeros(10, 2), torch.zeros(4, dtype=torch.int64), reference=reference)
