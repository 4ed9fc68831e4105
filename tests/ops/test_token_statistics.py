"""``linear_token_statistics`` against full logits: values, gradients, memory and work, for each implementation.

Sharded vocabularies, traffic and whole training steps: ``test_token_statistics_parallel.py``.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics_reference import token_statistics_reference
from megatron_ktr.ops.vocab_tiles import tile_sizes
from tests.support.token_statistics import (
    HIDDEN_SIZE,
    NAMES,
    OF_COUNTERFACTUALS,
    Case,
    Recorder,
    assert_as_good_as_naive,
    error_of,
    statistics_with,
    truth_of,
    values_and_gradients,
    values_of,
)

IMPLS = ("chunked", "naive")

SHAPES = [
    pytest.param(Case(37, 101, 101), id="primes"),
    pytest.param(Case(1, 64, 61, seed=1), id="one-row"),
    pytest.param(Case(24, 640, 509, temperature=0.7, seed=2), id="padding"),
    pytest.param(Case(8, 50, 50, temperature=2.5, seed=3), id="hot"),
    pytest.param(Case(3, 8, 1, seed=4), id="one-token-vocabulary"),
    pytest.param(Case(23, 128, 101, temperature=0.7, reference="own weight", seed=5), id="reference"),
    pytest.param(
        Case(23, 101, 101, reference="same weight", has_entropy_grad=False, num_counterfactuals=1, seed=6),
        id="adapters-off",
    ),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_that_of_full_logits(shape: Case, dtype: torch.dtype, impl: str) -> None:
    case = shape.of(dtype)
    for tile in ({}, {"row_chunk": 5, "vocab_chunk": 13}):
        ours = values_and_gradients(statistics_with, case, dtype=dtype, impl=impl, **tile)
        assert ours["logprob"].dtype == ours["kl"].dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert ours["hidden_grad"].dtype == ours["weight_grad"].dtype == dtype
        # naive rounds its logits to the inputs' dtype and the gradient of its logits too, once more than autograd.
        assert_as_good_as_naive(ours, case, grain=dtype if impl == "naive" else None)
        assert not ours["weight_grad"][case.vocab_size :].any(), "padding rows are not parameters"
        assert not ours["kl"][:, 0].any(), "the same hidden row has the same distribution"


def test_bf16_inputs_are_summed_in_fp32() -> None:
    case = Case(29, 1024, 1021, torch.bfloat16)
    ours, truth = values_and_gradients(statistics_with, case, dtype=case.dtype), truth_of(case)
    # bf16 products are exact in fp32, so only fp32 rounding is left in the values: 1e-6 of numbers near 7 is 8 units.
    assert error_of(ours["logprob"], truth["logprob"]) < 1e-6
    assert error_of(ours["entropy"], truth["entropy"]) < 1e-6
    # The gradients are rounded to bf16 exactly once: half a unit in the last place of eight significant bits (frexp's
    # exponent is one too high), plus 1% of that and 1e-7 for the fp32 sum before it.
    for name in ("hidden_grad", "weight_grad"):
        half_unit = torch.ldexp(torch.ones_like(truth[name]), truth[name].frexp().exponent - 9)
        assert ((ours[name].double() - truth[name]).abs() <= half_unit * 1.01 + 1e-7).all(), name


@pytest.mark.parametrize("tile", [(1, 1), (3, 7), (64, 10), (4, 1000)], ids=str)
def test_tile_size_does_not_matter(tile: tuple[int, int]) -> None:
    case = Case(19, 101, 97)
    whole = values_and_gradients(statistics_with, case, dtype=torch.float64)
    tiled = values_and_gradients(statistics_with, case, dtype=torch.float64, row_chunk=tile[0], vocab_chunk=tile[1])
    for name in NAMES:
        assert error_of(tiled[name], whole[name]) < 1e-13, name  # fp64 sums in another order: some hundred units


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(temperature: float) -> None:
    hidden_RD, weight_VD, target_R, *_ = Case(5, 13, 11, torch.float64).tensors()

    def op(hidden_RD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        result = statistics_with(
            hidden_RD, weight_VD, target_R, vocab_size=11, temperature=temperature, row_chunk=2, vocab_chunk=4
        )
        return result.logprob_R, result.entropy_R

    assert torch.autograd.gradcheck(op, (hidden_RD.requires_grad_(), weight_VD.nan_to_num().requires_grad_()))


def test_worked_example() -> None:
    # Logits (log 3, 0) give p = (3/4, 1/4); at temperature 1/2 they are (log 9, 0): p = (9/10, 1/10).
    hidden_RD, weight_VD = torch.tensor([[1.0]]), torch.tensor([[math.log(3)], [0.0]])
    for impl, (temperature, p) in itertools.product(IMPLS, ((1.0, 0.75), (0.5, 0.9))):
        result = statistics_with(
            hidden_RD,
            weight_VD,
            torch.tensor([1]),
            temperature=temperature,
            counterfactual_hidden_RD=[torch.zeros(1, 1), hidden_RD],  # q = (1/2, 1/2), and q = p
            impl=impl,
        )
        assert result.counterfactual_logprob_KR[:, 0].tolist() == pytest.approx(
            [math.log(0.5), math.log(1 - p)], rel=1e-6
        )
        kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
        assert result.kl_KR[0].item() == pytest.approx(kl, rel=1e-5)  # a difference of two logarithms, ten times less
        assert result.kl_KR[1].item() == 0
        assert result.log_normalizer_R.item() == pytest.approx(-math.log(1 - p), rel=1e-6)  # the target's logit is 0
        assert result.logprob_R.item() == pytest.approx(math.log(1 - p), rel=1e-6)  # fp32 has 1.2e-7
        assert result.entropy_R.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab_chunk", [7, None])
def test_extreme_logits(vocab_chunk: int | None, impl: str) -> None:
    """Rows: uniform at 0, uniform at 1e4, uniform at -1e4, one at +1e4 on the target, the same off the target."""
    vocab_size = 40
    hidden_RD = (torch.eye(5)[[0, 1, 2, 3, 3]] * torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])[:, None]).requires_grad_()
    weight_VD = torch.zeros(vocab_size, 5)
    weight_VD[:, 1], weight_VD[:, 2], weight_VD[11, 3] = 1e4, -1e4, 1e4
    target_R = torch.tensor([0, 39, 7, 11, 12])
    other_RD = torch.eye(5)[[0, 2, 1, 4, 3]]  # against: itself, twice another uniform row, the one-hot row, itself
    options = dict(counterfactual_hidden_RD=[other_RD * hidden_RD.detach().sum(1, keepdim=True)], impl=impl)
    result = statistics_with(hidden_RD, weight_VD.requires_grad_(), target_R, vocab_chunk=vocab_chunk, **options)
    log_size = torch.tensor(float(vocab_size)).log()
    assert torch.equal(result.entropy_R, torch.stack([log_size] * 3 + [torch.tensor(0.0)] * 2))
    assert torch.equal(result.logprob_R, torch.stack([-log_size] * 3 + [torch.tensor(0.0), torch.tensor(-1e4)]))
    # One-hot against uniform: log V, with or without logits of 1e4.
    assert torch.equal(result.kl_KR[0], torch.stack([torch.tensor(0.0)] * 3 + [log_size, torch.tensor(0.0)]))
    (result.logprob_R.sum() + result.entropy_R.sum()).backward()
    assert hidden_RD.grad.isfinite().all() and weight_VD.grad.isfinite().all()
    assert not weight_VD.grad[:, 4].any() and not hidden_RD.grad[3].any()  # p(target) == 1: nothing left to learn


def test_rows_without_weight_have_no_gradient_and_cost_nothing() -> None:
    case = Case(40, 101, 97)
    hidden_RD, weight_VD, target_R, logprob_grad_R, entropy_grad_R = case.tensors()
    has_logprob, has_entropy = torch.arange(40) % 5 == 0, torch.arange(40) % 8 == 0
    logprob_grad_R, entropy_grad_R = (logprob_grad_R * has_logprob).float(), (entropy_grad_R * has_entropy).float()
    active = has_logprob | has_entropy
    hidden_RD.requires_grad_(), weight_VD.requires_grad_()
    with Recorder() as forward:
        result = statistics_with(hidden_RD, weight_VD, target_R, vocab_size=97, row_chunk=3, vocab_chunk=31)
    with Recorder() as backward:
        torch.autograd.backward([result.logprob_R, result.entropy_R], [logprob_grad_R, entropy_grad_R])
    assert forward.multiply_adds == 40 * 97 * HIDDEN_SIZE
    # The logits again, then the two gradients, for the remaining rows alone.
    assert backward.multiply_adds == 3 * int(active.sum()) * 97 * HIDDEN_SIZE
    assert not hidden_RD.grad[~active].any() and hidden_RD.grad[active].any(dim=1).all()

    hidden_too, weight_too = hidden_RD.detach()[active].requires_grad_(), weight_VD.detach().requires_grad_()
    alone = statistics_with(hidden_too, weight_too, target_R[active], vocab_size=97, row_chunk=3, vocab_chunk=31)
    torch.autograd.backward([alone.logprob_R, alone.entropy_R], [logprob_grad_R[active], entropy_grad_R[active]])
    assert torch.equal(hidden_RD.grad[active], hidden_too.grad) and torch.equal(weight_VD.grad, weight_too.grad)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_kl_of_near_distributions_keeps_its_digits(scale: float) -> None:
    """KL falls with the square of the distance; its error must stay that of sums near log V, and never a sign."""
    case = Case(64, 512, 512)
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    others = [hidden_RD + scale * (other_RD - hidden_RD) for other_RD in case.counterfactuals()]
    found = statistics_with(hidden_RD, weight_VD, target_R, counterfactual_hidden_RD=others).kl_KR
    hidden_RD, weight_VD, *others = (tensor.double() for tensor in (hidden_RD, weight_VD, *others))
    truth = token_statistics_reference(hidden_RD, weight_VD, target_R, counterfactual_hidden_RD=others).kl_KR
    assert (found >= 0).all()
    assert float((found - truth).abs().max()) < 4e-6  # a few units of log 512 in fp32


@pytest.mark.parametrize("num_counterfactuals", [0, 1, 2, 3])
def test_each_counterfactual_costs_one_product_and_leaves_the_rest_as_it_was(num_counterfactuals: int) -> None:
    case = Case(40, 101, 97, num_counterfactuals=3)
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    others = case.counterfactuals()[:num_counterfactuals]
    options = dict(vocab_size=97, row_chunk=7, vocab_chunk=31)
    every = statistics_with(hidden_RD, weight_VD, target_R, counterfactual_hidden_RD=case.counterfactuals(), **options)
    with Recorder() as recorder:
        some = statistics_with(hidden_RD, weight_VD, target_R, counterfactual_hidden_RD=others, **options)
    assert recorder.multiply_adds == (1 + num_counterfactuals) * 40 * 97 * HIDDEN_SIZE
    for name, values in values_of(some).items():
        expected = values_of(every)[name]
        assert torch.equal(values, expected[:num_counterfactuals] if name in OF_COUNTERFACTUALS else expected), name
    assert some.kl_KR.shape == some.counterfactual_logprob_KR.shape == (num_counterfactuals, 40)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_receives_the_weight_gradient_in_fp32(dtype: torch.dtype, impl: str) -> None:
    """And autograd zeros, where a tied embedding adds to them; elsewhere memory that was there, not a tensor of its
    own."""
    case = Case(29, 104, 97).of(dtype)
    hidden_RD, weight_VD, target_R, logprob_grad_R, _ = case.tensors()
    truth = truth_of_logprob_gradient(case)
    weight = torch.nn.Parameter(weight_VD)
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(104, HIDDEN_SIZE), False
    for fused, is_tied in ((False, False), (True, True), (True, False)):
        weight.grad, weight.zero_out_wgrad = None, is_tied
        result = statistics_with(hidden_RD, weight, target_R, vocab_size=97, impl=impl, accumulate_into_main_grad=fused)
        (result.logprob_R * logprob_grad_R.float()).sum().backward()
        assert weight.grad_added_to_main_grad == fused
        assert weight.grad.any() == (not is_tied) and weight.grad.dtype == dtype
        assert (weight.grad.data_ptr() == weight.main_grad.data_ptr()) == (fused and not is_tied)
    # Two backward passes on top of ones; naive's products are rounded to bf16 (8 bits) before they are added.
    tolerance = 0.05 if dtype == torch.bfloat16 and impl == "naive" else 2e-5
    assert float((weight.main_grad - 1 - 2 * truth).abs().max()) < tolerance
    assert (weight.main_grad[97:] == 1).all()


def truth_of_logprob_gradient(case: Case) -> Tensor:
    hidden_RD, weight_VD, target_R, logprob_grad_R, _ = case.tensors()
    weight_VD = weight_VD.double().requires_grad_()
    result = token_statistics_reference(hidden_RD.double(), weight_VD, target_R, vocab_size=case.vocab_size)
    (result.logprob_R * logprob_grad_R).sum().backward()
    return weight_VD.grad


@pytest.mark.parametrize("main_grad", [None, torch.bfloat16], ids=str)
def test_without_a_precise_main_grad_autograd_receives_the_gradient(main_grad: torch.dtype | None) -> None:
    hidden_RD, weight_VD, target_R, *_ = Case(6, 20, 20).tensors()
    weight = torch.nn.Parameter(weight_VD)
    if main_grad is not None:
        weight.main_grad = torch.zeros(20, HIDDEN_SIZE, dtype=main_grad)
    statistics_with(hidden_RD, weight, target_R, accumulate_into_main_grad=True).logprob_R.sum().backward()
    assert weight.grad.any() and not hasattr(weight, "grad_added_to_main_grad")


def test_no_row_with_weight_costs_no_product() -> None:
    hidden_RD, weight_VD, target_R, *_ = Case(6, 20, 20).tensors()
    result = statistics_with(hidden_RD.requires_grad_(), weight_VD.requires_grad_(), target_R)
    with Recorder() as backward:
        (result.logprob_R * 0.0).sum().backward()
    assert backward.multiply_adds == 0
    assert torch.equal(hidden_RD.grad, torch.zeros(6, HIDDEN_SIZE))
    assert torch.equal(weight_VD.grad, torch.zeros(20, HIDDEN_SIZE))


@pytest.mark.parametrize("needs_hidden, needs_weight", [(True, False), (False, True)])
def test_a_frozen_side_costs_no_product(needs_hidden: bool, needs_weight: bool) -> None:
    hidden_RD, weight_VD, target_R, *_ = Case(6, 20, 20).tensors()
    result = statistics_with(hidden_RD.requires_grad_(needs_hidden), weight_VD.requires_grad_(needs_weight), target_R)
    with Recorder() as backward:
        result.entropy_R.sum().backward()
    assert backward.multiply_adds == 2 * 6 * 20 * HIDDEN_SIZE
    assert (hidden_RD.grad is not None, weight_VD.grad is not None) == (needs_hidden, needs_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_grows_with_rows_times_vocabulary(dtype: torch.dtype) -> None:
    num_rows, vocab_size = 512, 4096
    hidden_RD, weight_VD, target_R, *_ = Case(num_rows, vocab_size, vocab_size, dtype).tensors()
    tile = {"row_chunk": 64, "vocab_chunk": 256}
    with Recorder() as recorder:
        result = statistics_with(hidden_RD.requires_grad_(), weight_VD.requires_grad_(), target_R, **tile)
        (result.logprob_R + result.entropy_R).sum().backward()
    # The largest tensor is the weight's own gradient; a row-by-vocabulary tensor would be at least 20 times that.
    assert recorder.largest <= max(weight_VD.nbytes, 64 * 256 * 4)


@pytest.mark.parametrize("hidden_size", [512, 3584, 8192])
@pytest.mark.parametrize("num_columns", [0, 100, 19008, 152064])
def test_default_tiles_fit_the_budget(hidden_size: int, num_columns: int) -> None:
    rows, columns = tile_sizes(6144, num_columns, hidden_size, itemsize=4, budget_bytes=64 * 2**20)
    assert rows >= 256, "thinner products would waste the matrix units"
    assert 4 * (2 * rows * columns + rows * hidden_size + 2 * columns * hidden_size) <= 64 * 2**20


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_RD": torch.zeros(4, 3)}, r"\[4, 3\] and \[10, 2\]"),
        ({"hidden_RD": torch.zeros(4, 1, 2)}, r"expected hidden_RD \[R, D\]"),
        ({"target_R": torch.zeros(3, dtype=torch.int64)}, r"int64 \[4\].* got torch.int64 \[3\]"),
        ({"target_R": torch.zeros(4, dtype=torch.int32)}, "got torch.int32"),
        ({"weight_VD": torch.zeros(10, 2, dtype=torch.bfloat16)}, "torch.float32 and torch.bfloat16"),
        ({"target_R": torch.tensor([0, 1, 9, 2])}, r"0 .. 8 \(vocab_size 9\), got 0 .. 9"),
        ({"target_R": torch.tensor([0, 1, -100, 2])}, "got -100 .. 2"),
        ({"vocab_size": 11}, "between 1 and 10.*got 11"),
        ({"temperature": 0.0}, "temperature, got 0.0"),
        ({"vocab_chunk": 0}, "vocab_chunk of at least 1, got 0"),
        ({"impl": "fast"}, "one of auto, triton, chunked, naive, got 'fast'"),
        ({"counterfactual_hidden_RD": [torch.zeros(4, 2), torch.zeros(3, 2)]}, r"like .*\[4, 2\], got .*\[3, 2\]"),
        (
            {"counterfactual_hidden_RD": torch.zeros(4, 2)},
            r"each of counterfactual_hidden_RD .*got torch.float32 \[2\]",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "hidden_RD": torch.zeros(4, 2),
        "weight_VD": torch.zeros(10, 2),
        "target_R": torch.zeros(4, dtype=torch.int64),
        "vocab_size": 9,
    }
    with pytest.raises(ValueError, match=message):
        statistics_with(**(arguments | change))
