"""``linear_token_statistics`` and ``group_divergence`` on vocabulary shards: values, gradients and traffic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_ktr.ops.group_divergence import CLAMP, group_divergence, group_divergence_reference
from megatron_ktr.ops.token_statistics import linear_token_statistics
from megatron_ktr.types import GroupSpan, PackedLayout
from tests.support.token_statistics import (
    HIDDEN_SIZE,
    VALUES,
    Case,
    assert_as_good_as_naive,
    error_of,
    truth_of,
    values_and_gradients,
)


def _sharded_values_and_gradients(context, *, cases: list[Case], tensor: int, **more):
    """On one rank: its results for its shard of every case, with a tile that does not divide anything."""
    from megatron_ktr.distributed.groups import ParallelSizes

    groups = context.init(ParallelSizes(tensor=tensor))

    def op(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, **options):
        shard_VD = weight_VD.chunk(tensor)[groups.tensor_rank]
        tile = dict(row_chunk=5, vocab_chunk=11)
        return linear_token_statistics(hidden_RD, shard_VD, target_R, group=groups.tensor, **tile, **options, **more)

    return [values_and_gradients(op, case, dtype=case.dtype) for case in cases]


SHARDED_CASES = [
    Case(37, 104, 101),
    Case(1, 104, 101, seed=1),
    Case(12, 104, 49, temperature=0.7, seed=2),  # at four shards of 26 the third holds 0 and the fourth no real row
    Case(0, 104, 101, seed=3),
    Case(23, 104, 101, torch.bfloat16, seed=4),
    Case(11, 104, 97, torch.float64, temperature=1.3, seed=5),
]


@pytest.mark.parametrize("impl", ["chunked", "naive"])
@pytest.mark.parametrize("tensor, world_size", [(1, 1), (2, 2), (4, 4), (2, 4)])
def test_shards_together_are_as_good_as_full_logits(ranks, tensor: int, world_size: int, impl: str) -> None:
    by_rank = ranks(_sharded_values_and_gradients, world_size=world_size, cases=SHARDED_CASES, tensor=tensor, impl=impl)
    for index, case in enumerate(SHARDED_CASES):
        first, *others = [results[index] for results in by_rank[:tensor]]
        for other in others:
            for name in (*VALUES, "hidden_grad"):
                assert torch.equal(first[name], other[name]), "ranks of a group must not drift apart"
        # A shard's gradient arrives at its own rows of the full weight and is zero elsewhere.
        whole = first | {"weight_grad": sum(results[index]["weight_grad"] for results in by_rank[:tensor])}
        assert_as_good_as_naive(whole, case, grain=case.dtype if impl == "naive" else None)
        for replica in by_rank[tensor:]:  # the second group of two sees the same problem
            assert torch.equal(replica[index]["logprob"], first["logprob"])


def test_partial_hidden_gradients_sum_to_the_whole(ranks) -> None:
    case = Case(13, 104, 101, torch.float64)
    by_rank = ranks(_sharded_values_and_gradients, world_size=2, cases=[case], tensor=2, reduce_hidden_grad=False)
    parts = [results[0]["hidden_grad"] for results in by_rank]
    truth = truth_of(case)["hidden_grad"]
    assert error_of(sum(parts), truth) < 1e-13  # fp64 sums in another order
    assert error_of(parts[0], truth) > 0.01, "one shard's part alone must not already be the whole"


# Traffic


class _Traffic(TorchDispatchMode):
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


def _statistics_traffic(
    context, *, num_rows: int, padded_size: int, num_active: int, has_counterfactual: bool = False, **options
):
    """Bytes this rank sends in each collective of the forward and of the backward pass."""
    import torch.distributed as dist

    case = Case(num_rows, padded_size, padded_size - 3)
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    weight_VD = weight_VD.chunk(context.world_size)[context.rank].clone().requires_grad_()
    with _Traffic() as traffic:
        result = linear_token_statistics(
            hidden_RD.requires_grad_(),
            weight_VD,
            target_R,
            group=dist.group.WORLD,
            vocab_size=case.vocab_size,
            counterfactual_hidden_RD=case.counterfactual() if has_counterfactual else None,
            **options,
        )
        num_forward = len(traffic.sizes)
        (result.logprob_R * (torch.arange(num_rows) < num_active)).sum().backward()
    return traffic.sizes[:num_forward], traffic.sizes[num_forward:]


@pytest.mark.parametrize("impl", ["chunked", "naive"])
@pytest.mark.parametrize("padded_size", [64, 4096])
def test_one_collective_of_a_few_floats_a_row_whatever_the_vocabulary(ranks, padded_size: int, impl: str) -> None:
    arguments = dict(num_rows=31, padded_size=padded_size, num_active=12, impl=impl)
    for forward, backward in ranks(_statistics_traffic, world_size=2, **arguments):
        assert forward == [4 * 31 * 4]
        assert backward == [12 * HIDDEN_SIZE * 4], "remaining rows only, fp32"
    for forward, backward in ranks(
        _statistics_traffic, world_size=2, **arguments, reduce_hidden_grad=False, has_counterfactual=True
    ):
        assert forward == [8 * 31 * 4] and backward == []


def test_no_rows_still_join_the_collectives(ranks) -> None:
    for forward, backward in ranks(_statistics_traffic, world_size=4, num_rows=0, padded_size=64, num_active=0):
        assert len(forward) == len(backward) == 1


# TW-GRPO's divergence


LAYOUT = PackedLayout(
    (
        GroupSpan(start=0, prompt_length=3, response_lengths=(4, 2, 0, 7)),
        GroupSpan(start=16, prompt_length=1, response_lengths=(1, 5)),
        GroupSpan(start=23, prompt_length=2, response_lengths=(3,)),
    ),
    num_padding=2,
)
NUM_ROWS = 22


def _divergence(op: Callable, case: Case, *, dtype: torch.dtype, **options) -> Tensor:
    hidden_RD, weight_VD, *_ = case.tensors()
    options |= dict(layout=LAYOUT, vocab_size=case.vocab_size, temperature=case.temperature)
    return op(hidden_RD.to(dtype), weight_VD.to(dtype), **options)


def _sharded_divergence(context, *, case: Case, tensor: int) -> tuple[Tensor, list[int]]:
    from megatron_ktr.distributed.groups import ParallelSizes

    groups = context.init(ParallelSizes(tensor=tensor))

    def op(hidden_RD: Tensor, weight_VD: Tensor, **options):
        return group_divergence(hidden_RD, weight_VD.chunk(tensor)[groups.tensor_rank], group=groups.tensor, **options)

    with _Traffic() as traffic:
        found_R = _divergence(op, case, dtype=case.dtype)
    return found_R, traffic.sizes


@pytest.mark.parametrize("impl", ["chunked", "naive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_at_least_as_exact_as_full_logits(dtype: torch.dtype, temperature: float, impl: str) -> None:
    case = Case(NUM_ROWS, 104, 101, dtype, temperature)
    truth = _divergence(group_divergence_reference, case, dtype=torch.float64)
    naive = _divergence(group_divergence_reference, case, dtype=dtype)
    ours = _divergence(group_divergence, case, dtype=dtype, impl=impl)
    # exp(d) of sums in another order: some ten units in the last place of the accumulation dtype.
    tolerance = 1e-14 if dtype == torch.float64 else 4e-6
    # A naive log Z is of logits rounded to the inputs' dtype: then ours is as inexact as the naive one, not better.
    share = 2.0 if impl == "naive" else 1.0
    assert error_of(ours, truth) <= share * error_of(naive, truth) + tolerance


def test_divergence_worked_by_hand() -> None:
    """Two responses, the second one token long; p = (3/4, 1/4) against (1/4, 3/4), then against the uniform."""
    layout = PackedLayout((GroupSpan(0, 1, (2, 1)),))
    logit = torch.tensor(3.0, dtype=torch.float64).log()
    hidden_RD = torch.tensor([[1.0], [1.0], [-1.0]], dtype=torch.float64) * logit
    weight_VD = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)
    found = group_divergence(hidden_RD, weight_VD, layout=layout)

    def divergence(p: tuple[float, float], q: tuple[float, float]) -> float:
        total = 0.0
        for a, b in zip(p, q, strict=True):
            half = abs(torch.tensor(a / b, dtype=torch.float64).log()) / 2
            total += float(half.exp() - half - 1 + (-half).exp() + half - 1)
        return total / 2

    opposite, uniform = divergence((0.75, 0.25), (0.25, 0.75)), divergence((0.75, 0.25), (0.5, 0.5))
    assert found.tolist() == pytest.approx([opposite, uniform, opposite], rel=1e-12)


def test_divergence_is_clamped_and_zero_for_a_lone_or_unanimous_group() -> None:
    layout = PackedLayout((GroupSpan(0, 1, (1, 1)), GroupSpan(3, 1, (1,)), GroupSpan(5, 1, (1, 1))))
    hidden_RD = torch.tensor([[1.0], [-1.0], [1.0], [2.0], [2.0]])
    found = group_divergence(hidden_RD, torch.tensor([[1e4], [-1e4]]), layout=layout)
    high, low = (float(torch.tensor(d).exp()) - d - 1 for d in (CLAMP, -CLAMP))
    assert found[:2].tolist() == pytest.approx([high + low] * 2, rel=1e-6)  # fp32
    assert found[2:].tolist() == [0.0] * 3


def test_divergence_refuses_rows_that_are_not_the_layouts() -> None:
    with pytest.raises(ValueError, match="expected 22 hidden rows.*got 21"):
        group_divergence(torch.zeros(21, 2), torch.zeros(5, 2), layout=LAYOUT)
    assert group_divergence(torch.zeros(0, 2), torch.zeros(5, 2), layout=PackedLayout(())).shape == (0,)


@pytest.mark.parametrize("tensor", [2, 4])
def test_divergence_on_shards_is_the_same_in_two_small_collectives(ranks, tensor: int) -> None:
    for vocab_size in (101, 49):  # at four shards of 26 the last then holds padding alone
        case = Case(NUM_ROWS, 104, vocab_size)
        truth = _divergence(group_divergence_reference, case, dtype=torch.float64)
        (first, _), *_ = found = ranks(_sharded_divergence, world_size=tensor, case=case, tensor=tensor)
        assert error_of(first, truth) < 1e-5  # fp32; the naive formula's own error at this size is 1e-6
        for value_R, sizes in found:
            assert torch.equal(value_R, first)
            assert sizes == [2 * NUM_ROWS * 4, (7 + 5 + 3) * 4], "2 floats a row, then a float a position"
