"""``linear_token_statistics`` against full logits: values, gradients, memory, work and traffic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_ktr.ops.token_statistics import linear_token_statistics
from megatron_ktr.ops.token_statistics_reference import token_statistics_reference
from megatron_ktr.ops.vocab_tiles import tile_sizes

HIDDEN_SIZE = 24
NAMES = ("logprob", "entropy", "hidden_grad", "weight_grad")


@dataclass(frozen=True)
class Case:
    """One problem; made from its seed alone, so that every rank makes the same one."""

    num_rows: int
    padded_size: int
    vocab_size: int
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    seed: int = 0

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


def _values_and_gradients(op, case: Case, *, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    hidden_RD, weight_VD, target_R, logprob_grad_R, entropy_grad_R = case.tensors()
    hidden_RD, weight_VD = (tensor.to(dtype).requires_grad_() for tensor in (hidden_RD, weight_VD))
    result = op(hidden_RD, weight_VD, target_R, vocab_size=case.vocab_size, temperature=case.temperature, **options)
    torch.autograd.backward(
        [result.logprob_R, result.entropy_R],
        [logprob_grad_R.to(result.logprob_R.dtype), entropy_grad_R.to(result.entropy_R.dtype)],
    )
    tensors = (result.logprob_R.detach(), result.entropy_R.detach(), hidden_RD.grad, weight_VD.grad)
    return dict(zip(NAMES, tensors, strict=True))


def _truth(case: Case) -> dict[str, Tensor]:
    return _values_and_gradients(token_statistics_reference, case, dtype=torch.float64)


def _error(value: Tensor, truth: Tensor) -> float:
    """Largest error as a share of the largest true number."""
    if truth.numel() == 0:
        return 0.0
    return float((value.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-3))


def _assert_as_good_as_naive(ours: dict[str, Tensor], case: Case) -> None:
    truth, naive = _truth(case), _values_and_gradients(token_statistics_reference, case, dtype=case.dtype)
    for name in NAMES:
        # Both are sums of the same terms in another order; 8 units in the last place of the result's dtype is what
        # that order is worth at these sizes. Naive bf16 logits alone cost thousands of fp32 units.
        tolerance = 8 * torch.finfo(ours[name].dtype).eps
        assert ours[name].isfinite().all(), name
        assert _error(ours[name], truth[name]) <= _error(naive[name], truth[name]) + tolerance, name


SHAPES = [
    pytest.param(Case(37, 101, 101), id="primes"),
    pytest.param(Case(1, 64, 61, seed=1), id="one-row"),
    pytest.param(Case(24, 640, 509, temperature=0.7, seed=2), id="padding"),
    pytest.param(Case(8, 50, 50, temperature=2.5, seed=3), id="hot"),
    pytest.param(Case(3, 8, 1, seed=4), id="one-token-vocabulary"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_that_of_full_logits(shape: Case, dtype: torch.dtype) -> None:
    case = Case(shape.num_rows, shape.padded_size, shape.vocab_size, dtype, shape.temperature, shape.seed)
    for tile in ({}, {"row_chunk": 5, "vocab_chunk": 13}):
        ours = _values_and_gradients(linear_token_statistics, case, dtype=dtype, **tile)
        assert ours["logprob"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ours["hidden_grad"].dtype == ours["weight_grad"].dtype == dtype
        _assert_as_good_as_naive(ours, case)
        assert not ours["weight_grad"][case.vocab_size :].any(), "padding rows are not parameters"


def test_bf16_inputs_are_summed_in_fp32() -> None:
    case = Case(29, 1024, 1021, torch.bfloat16)
    ours, truth = _values_and_gradients(linear_token_statistics, case, dtype=case.dtype), _truth(case)
    # bf16 products are exact in fp32, so only fp32 rounding is left in the values: 1e-6 of numbers near 7 is 8 units.
    assert _error(ours["logprob"], truth["logprob"]) < 1e-6
    assert _error(ours["entropy"], truth["entropy"]) < 1e-6
    # The gradients are rounded to bf16 exactly once: half a unit in the last place of eight significant bits (frexp's
    # exponent is one too high), plus 1% of that and 1e-7 for the fp32 sum before it.
    for name in ("hidden_grad", "weight_grad"):
        half_unit = torch.ldexp(torch.ones_like(truth[name]), truth[name].frexp().exponent - 9)
        assert ((ours[name].double() - truth[name]).abs() <= half_unit * 1.01 + 1e-7).all(), name


@pytest.mark.parametrize("tile", [(1, 1), (3, 7), (64, 10), (4, 1000)], ids=str)
def test_tile_size_does_not_matter(tile: tuple[int, int]) -> None:
    case = Case(19, 101, 97)
    whole = _values_and_gradients(linear_token_statistics, case, dtype=torch.float64)
    tiled = _values_and_gradients(
        linear_token_statistics, case, dtype=torch.float64, row_chunk=tile[0], vocab_chunk=tile[1]
    )
    for name in NAMES:
        assert _error(tiled[name], whole[name]) < 1e-13, name  # fp64 sums in another order: some hundred units


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(temperature: float) -> None:
    hidden_RD, weight_VD, target_R, *_ = Case(5, 13, 11, torch.float64).tensors()

    def op(hidden_RD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        result = linear_token_statistics(
            hidden_RD, weight_VD, target_R, vocab_size=11, temperature=temperature, row_chunk=2, vocab_chunk=4
        )
        return result.logprob_R, result.entropy_R

    assert torch.autograd.gradcheck(op, (hidden_RD.requires_grad_(), weight_VD.nan_to_num().requires_grad_()))


def test_worked_example() -> None:
    # Logits (log 3, 0) give p = (3/4, 1/4); at temperature 1/2 they are (log 9, 0): p = (9/10, 1/10).
    hidden_RD, weight_VD = torch.tensor([[1.0]]), torch.tensor([[math.log(3)], [0.0]])
    for temperature, p in ((1.0, 0.75), (0.5, 0.9)):
        result = linear_token_statistics(hidden_RD, weight_VD, torch.tensor([1]), temperature=temperature)
        assert result.logprob_R.item() == pytest.approx(math.log(1 - p), rel=1e-6)  # fp32 has 1.2e-7
        assert result.entropy_R.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-6)


@pytest.mark.parametrize("vocab_chunk", [7, None])
def test_extreme_logits(vocab_chunk: int | None) -> None:
    """Rows: uniform at 0, uniform at 1e4, uniform at -1e4, one at +1e4 on the target, the same off the target."""
    vocab_size = 40
    hidden_RD = (torch.eye(5)[[0, 1, 2, 3, 3]] * torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])[:, None]).requires_grad_()
    weight_VD = torch.zeros(vocab_size, 5)
    weight_VD[:, 1], weight_VD[:, 2], weight_VD[11, 3] = 1e4, -1e4, 1e4
    target_R = torch.tensor([0, 39, 7, 11, 12])
    result = linear_token_statistics(hidden_RD, weight_VD.requires_grad_(), target_R, vocab_chunk=vocab_chunk)
    log_size = torch.tensor(float(vocab_size)).log()
    assert torch.equal(result.entropy_R, torch.stack([log_size] * 3 + [torch.tensor(0.0)] * 2))
    assert torch.equal(result.logprob_R, torch.stack([-log_size] * 3 + [torch.tensor(0.0), torch.tensor(-1e4)]))
    (result.logprob_R.sum() + result.entropy_R.sum()).backward()
    assert hidden_RD.grad.isfinite().all() and weight_VD.grad.isfinite().all()
    assert not weight_VD.grad[:, 4].any() and not hidden_RD.grad[3].any()  # p(target) == 1: nothing left to learn


class _Recorder(TorchDispatchMode):
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


def test_rows_without_weight_have_no_gradient_and_cost_nothing() -> None:
    case = Case(40, 101, 97)
    hidden_RD, weight_VD, target_R, logprob_grad_R, entropy_grad_R = case.tensors()
    has_logprob, has_entropy = torch.arange(40) % 5 == 0, torch.arange(40) % 8 == 0
    logprob_grad_R, entropy_grad_R = (logprob_grad_R * has_logprob).float(), (entropy_grad_R * has_entropy).float()
    active = has_logprob | has_entropy
    hidden_RD.requires_grad_(), weight_VD.requires_grad_()
    with _Recorder() as forward:
        result = linear_token_statistics(hidden_RD, weight_VD, target_R, vocab_size=97, row_chunk=3, vocab_chunk=31)
    with _Recorder() as backward:
        torch.autograd.backward([result.logprob_R, result.entropy_R], [logprob_grad_R, entropy_grad_R])
    assert forward.multiply_adds == 40 * 97 * HIDDEN_SIZE
    # The logits again, then the two gradients, for the remaining rows alone.
    assert backward.multiply_adds == 3 * int(active.sum()) * 97 * HIDDEN_SIZE
    assert not hidden_RD.grad[~active].any() and hidden_RD.grad[active].any(dim=1).all()

    hidden_too, weight_too = hidden_RD.detach()[active].requires_grad_(), weight_VD.detach().requires_grad_()
    alone = linear_token_statistics(
        hidden_too, weight_too, target_R[active], vocab_size=97, row_chunk=3, vocab_chunk=31
    )
    torch.autograd.backward([alone.logprob_R, alone.entropy_R], [logprob_grad_R[active], entropy_grad_R[active]])
    assert torch.equal(hidden_RD.grad[active], hidden_too.grad) and torch.equal(weight_VD.grad, weight_too.grad)


def test_no_row_with_weight_costs_no_product() -> None:
    hidden_RD, weight_VD, target_R, *_ = Case(6, 20, 20).tensors()
    result = linear_token_statistics(hidden_RD.requires_grad_(), weight_VD.requires_grad_(), target_R)
    with _Recorder() as backward:
        (result.logprob_R * 0.0).sum().backward()
    assert backward.multiply_adds == 0
    assert torch.equal(hidden_RD.grad, torch.zeros(6, HIDDEN_SIZE))
    assert torch.equal(weight_VD.grad, torch.zeros(20, HIDDEN_SIZE))


@pytest.mark.parametrize("needs_hidden, needs_weight", [(True, False), (False, True)])
def test_a_frozen_side_costs_no_product(needs_hidden: bool, needs_weight: bool) -> None:
    hidden_RD, weight_VD, target_R, *_ = Case(6, 20, 20).tensors()
    result = linear_token_statistics(
        hidden_RD.requires_grad_(needs_hidden), weight_VD.requires_grad_(needs_weight), target_R
    )
    with _Recorder() as backward:
        result.entropy_R.sum().backward()
    assert backward.multiply_adds == 2 * 6 * 20 * HIDDEN_SIZE
    assert (hidden_RD.grad is not None, weight_VD.grad is not None) == (needs_hidden, needs_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_grows_with_rows_times_vocabulary(dtype: torch.dtype) -> None:
    num_rows, vocab_size = 512, 4096
    hidden_RD, weight_VD, target_R, *_ = Case(num_rows, vocab_size, vocab_size, dtype).tensors()
    tile = {"row_chunk": 64, "vocab_chunk": 256}
    with _Recorder() as recorder:
        result = linear_token_statistics(hidden_RD.requires_grad_(), weight_VD.requires_grad_(), target_R, **tile)
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
        linear_token_statistics(**(arguments | change))


# --- tensor parallel ---------------------------------------------------------------------------------------------


def _sharded_values_and_gradients(context, *, cases: list[Case], tensor: int, reduce_hidden_grad: bool):
    """On one rank: its results for its shard of every case, with a tile that does not divide anything."""
    from megatron_ktr.distributed.groups import ParallelSizes

    groups = context.init(ParallelSizes(tensor=tensor))
    results = []
    for case in cases:

        def op(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, **options):
            shard_VD = weight_VD.chunk(tensor)[groups.tensor_rank]
            return linear_token_statistics(
                hidden_RD,
                shard_VD,
                target_R,
                group=groups.tensor,
                reduce_hidden_grad=reduce_hidden_grad,
                row_chunk=5,
                vocab_chunk=11,
                **options,
            )

        results.append(_values_and_gradients(op, case, dtype=case.dtype))
    return results


SHARDED_CASES = [
    Case(37, 104, 101),
    Case(1, 104, 101, seed=1),
    Case(12, 104, 49, temperature=0.7, seed=2),  # at four shards of 26 the third holds 0 and the fourth no real row
    Case(0, 104, 101, seed=3),
    Case(23, 104, 101, torch.bfloat16, seed=4),
    Case(11, 104, 97, torch.float64, temperature=1.3, seed=5),
]


@pytest.mark.parametrize("tensor, world_size", [(1, 1), (2, 2), (4, 4), (2, 4)])
def test_shards_together_are_as_good_as_full_logits(ranks, tensor: int, world_size: int) -> None:
    by_rank = ranks(
        _sharded_values_and_gradients,
        world_size=world_size,
        cases=SHARDED_CASES,
        tensor=tensor,
        reduce_hidden_grad=True,
    )
    for index, case in enumerate(SHARDED_CASES):
        first, *others = [results[index] for results in by_rank[:tensor]]
        for other in others:
            for name in ("logprob", "entropy", "hidden_grad"):
                assert torch.equal(first[name], other[name]), "ranks of a group must not drift apart"
        # A shard's gradient arrives at its own rows of the full weight and is zero elsewhere.
        _assert_as_good_as_naive(first | {"weight_grad": sum(r[index]["weight_grad"] for r in by_rank[:tensor])}, case)
        for replica in by_rank[tensor:]:  # the second group of two sees the same problem
            assert torch.equal(replica[index]["logprob"], first["logprob"])


def test_partial_hidden_gradients_sum_to_the_whole(ranks) -> None:
    case = Case(13, 104, 101, torch.float64)
    by_rank = ranks(_sharded_values_and_gradients, world_size=2, cases=[case], tensor=2, reduce_hidden_grad=False)
    parts = [results[0]["hidden_grad"] for results in by_rank]
    truth = _truth(case)["hidden_grad"]
    assert _error(sum(parts), truth) < 1e-13  # fp64 sums in another order
    assert _error(parts[0], truth) > 0.01, "one shard's part alone must not already be the whole"


def _collective_traffic(context, *, num_rows: int, padded_size: int, num_active: int, reduce_hidden_grad: bool):
    """(name, bytes this rank sends) of every collective, forward and backward."""
    import torch.distributed as dist

    case = Case(num_rows, padded_size, padded_size - 3)
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    weight_VD = weight_VD.chunk(context.world_size)[context.rank].clone().requires_grad_()
    calls: list[tuple[str, int]] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                name = func.overloadpacket.__name__
                # allgather_base_(output, input, ...) sends its input; the all-reduce sends what it is given.
                sent = tree_flatten(args[1] if "gather" in name else args[0])[0]
                calls.append((name, sum(tensor.nbytes for tensor in sent)))
            return func(*args, **(kwargs or {}))

    with Counter():
        result = linear_token_statistics(
            hidden_RD.requires_grad_(),
            weight_VD,
            target_R,
            group=dist.group.WORLD,
            vocab_size=case.vocab_size,
            reduce_hidden_grad=reduce_hidden_grad,
        )
        num_forward = len(calls)
        (result.logprob_R * (torch.arange(num_rows) < num_active)).sum().backward()
    return calls[:num_forward], calls[num_forward:]


@pytest.mark.parametrize("padded_size", [64, 4096])
def test_one_collective_of_four_floats_a_row_whatever_the_vocabulary(ranks, padded_size: int) -> None:
    arguments = {"num_rows": 31, "padded_size": padded_size, "num_active": 12}
    for forward, backward in ranks(_collective_traffic, world_size=2, **arguments, reduce_hidden_grad=True):
        assert [size for _, size in forward] == [4 * 31 * 4]
        assert [size for _, size in backward] == [12 * HIDDEN_SIZE * 4], "remaining rows only, fp32"
    for forward, backward in ranks(_collective_traffic, world_size=2, **arguments, reduce_hidden_grad=False):
        assert [size for _, size in forward] == [4 * 31 * 4] and backward == []


def test_no_rows_still_join_the_collectives(ranks) -> None:
    arguments = {"num_rows": 0, "padded_size": 64, "num_active": 0, "reduce_hidden_grad": True}
    for forward, backward in ranks(_collective_traffic, world_size=4, **arguments):
        assert len(forward) == len(backward) == 1
