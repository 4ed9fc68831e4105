"""``linear_token_statistics`` on vocabulary shards: values, gradients and traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.token_statistics import (
    HIDDEN_SIZE,
    Case,
    Traffic,
    assert_as_good_as_naive,
    error_of,
    statistics_with,
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
        reference = options.get("reference")
        if reference is not None and reference.weight_VD is not None:
            own_VD = reference.weight_VD.chunk(tensor)[groups.tensor_rank]
            options["reference"] = replace(reference, weight_VD=own_VD)
        return statistics_with(hidden_RD, shard_VD, target_R, group=groups.tensor, **tile, **options, **more)

    return [values_and_gradients(op, case, dtype=case.dtype) for case in cases]


SHARDED_CASES = [
    Case(37, 104, 101),
    Case(1, 104, 101, seed=1),
    Case(
        12, 104, 49, temperature=0.7, seed=2, num_counterfactuals=3
    ),  # at four shards of 26 the third holds 0 and the fourth no real row
    Case(0, 104, 101, seed=3),
    Case(23, 104, 101, torch.bfloat16, seed=4, num_counterfactuals=1),
    Case(11, 104, 97, torch.float64, temperature=1.3, seed=5),
    Case(12, 104, 49, temperature=0.7, reference="own weight", num_counterfactuals=1, seed=6),
    Case(23, 104, 101, torch.bfloat16, reference="same weight", num_counterfactuals=0, seed=7),
]


@pytest.mark.parametrize("impl", ["chunked", "naive"])
@pytest.mark.parametrize("tensor, world_size", [(1, 1), (2, 2), (4, 4), (2, 4)])
def test_shards_together_are_as_good_as_full_logits(ranks, tensor: int, world_size: int, impl: str) -> None:
    by_rank = ranks(_sharded_values_and_gradients, world_size=world_size, cases=SHARDED_CASES, tensor=tensor, impl=impl)
    for index, case in enumerate(SHARDED_CASES):
        first, *others = [results[index] for results in by_rank[:tensor]]
        for other in others:
            for name in first.keys() - {"weight_grad"}:
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


def _statistics_traffic(
    context, *, num_rows: int, padded_size: int, num_active: int, num_counterfactuals: int = 0, **options
):
    """Bytes this rank sends in each collective of the forward and of the backward pass."""
    import torch.distributed as dist

    case = Case(num_rows, padded_size, padded_size - 3, num_counterfactuals=num_counterfactuals)
    hidden_RD, weight_VD, target_R, *_ = case.tensors()
    weight_VD = weight_VD.chunk(context.world_size)[context.rank].clone().requires_grad_()
    with Traffic() as traffic:
        result = statistics_with(
            hidden_RD.requires_grad_(),
            weight_VD,
            target_R,
            group=dist.group.WORLD,
            vocab_size=case.vocab_size,
            counterfactual_hidden_RD=case.counterfactuals(),
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
    for number in (1, 2, 3):
        arguments |= dict(reduce_hidden_grad=False, num_counterfactuals=number)
        for forward, backward in ranks(_statistics_traffic, world_size=2, **arguments):
            assert forward == [(4 + 4 * number) * 31 * 4] and backward == []


def test_no_rows_still_join_the_collectives(ranks) -> None:
    for forward, backward in ranks(_statistics_traffic, world_size=4, num_rows=0, padded_size=64, num_active=0):
        assert len(forward) == len(backward) == 1
