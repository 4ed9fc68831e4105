"""``group_divergence``: TW-GRPO's D_t against full logits, on one process and on vocabulary shards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops.group_divergence import CLAMP, group_divergence, group_divergence_reference
from megatron_ktr.ops.token_statistics import linear_token_statistics
from megatron_ktr.types import GroupSpan, PackedLayout
from tests.support.token_statistics import Case, Traffic, error_of

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


def _ours(hidden_RD: Tensor, weight_VD: Tensor, *, layout: PackedLayout, impl: str = "auto", **options) -> Tensor:
    """As in a step: the normalizers of the intact pass, then the divergence."""
    no_target_R = torch.zeros(hidden_RD.shape[0], dtype=torch.int64)
    statistics = linear_token_statistics(hidden_RD, weight_VD, no_target_R, impl=impl, **options)
    return group_divergence(hidden_RD, weight_VD, statistics.log_normalizer_R, layout=layout, **options)


def _sharded_divergence(context, *, case: Case, tensor: int) -> tuple[Tensor, list[int]]:
    from megatron_ktr.distributed.groups import ParallelSizes

    groups = context.init(ParallelSizes(tensor=tensor))

    def op(hidden_RD: Tensor, weight_VD: Tensor, **options):
        return _ours(hidden_RD, weight_VD.chunk(tensor)[groups.tensor_rank], group=groups.tensor, **options)

    with Traffic() as traffic:
        found_R = _divergence(op, case, dtype=case.dtype)
    return found_R, traffic.sizes


@pytest.mark.parametrize("impl", ["chunked", "naive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_at_least_as_exact_as_full_logits(dtype: torch.dtype, temperature: float, impl: str) -> None:
    case = Case(NUM_ROWS, 104, 101, dtype, temperature)
    truth = _divergence(group_divergence_reference, case, dtype=torch.float64)
    naive = _divergence(group_divergence_reference, case, dtype=dtype)
    ours = _divergence(_ours, case, dtype=dtype, impl=impl)
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
    found = _ours(hidden_RD, weight_VD, layout=layout)

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
    found = _ours(hidden_RD, torch.tensor([[1e4], [-1e4]]), layout=layout)
    high, low = (float(torch.tensor(d).exp()) - d - 1 for d in (CLAMP, -CLAMP))
    assert found[:2].tolist() == pytest.approx([high + low] * 2, rel=1e-6)  # fp32
    assert found[2:].tolist() == [0.0] * 3


def test_divergence_refuses_rows_that_are_not_the_layouts() -> None:
    for num_rows, num_normalizers in ((21, 22), (22, 21)):
        with pytest.raises(ValueError, match=f"expected 22 hidden rows.*got {num_rows} and {num_normalizers}"):
            group_divergence(torch.zeros(num_rows, 2), torch.zeros(5, 2), torch.zeros(num_normalizers), layout=LAYOUT)
    assert group_divergence(torch.zeros(0, 2), torch.zeros(5, 2), torch.zeros(0), layout=PackedLayout(())).numel() == 0


@pytest.mark.parametrize("tensor", [2, 4])
def test_divergence_on_shards_is_the_same_and_costs_one_small_collective_more(ranks, tensor: int) -> None:
    for vocab_size in (101, 49):  # at four shards of 26 the last then holds padding alone
        case = Case(NUM_ROWS, 104, vocab_size)
        truth = _divergence(group_divergence_reference, case, dtype=torch.float64)
        (first, _), *_ = found = ranks(_sharded_divergence, world_size=tensor, case=case, tensor=tensor)
        assert error_of(first, truth) < 1e-5  # fp32; the naive formula's own error at this size is 1e-6
        for value_R, sizes in found:
            assert torch.equal(value_R, first)
            assert sizes == [4 * NUM_ROWS * 4, (7 + 5 + 3) * 4], "the intact pass's 4 floats a row; a float a position"
