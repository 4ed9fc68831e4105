"""``group_divergence``: TW-GRPO's D_t against full logits, on one process and on vocabulary shards."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops.group_divergence import CLAMP, group_divergence_reference
from megatron_ktr.types import GroupSpan, PackedLayout
from tests.support.token_statistics import Case, Traffic, divergence_with, error_of, statistics_with

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


def _ours(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    *,
    layout: PackedLayout,
    impl: str = "auto",
    with_gradient: bool = False,
    has_gradient_R: Tensor | None = None,
    **options,
) -> Tensor:
    """As in a step: the normalizers of the intact pass, then the divergence."""
    no_target_R = torch.zeros(hidden_RD.shape[0], dtype=torch.int64)
    statistics = statistics_with(hidden_RD, weight_VD, no_target_R, impl=impl, **options)
    options |= dict(with_gradient=with_gradient, has_gradient_R=has_gradient_R)
    return divergence_with(hidden_RD, weight_VD, statistics.log_normalizer_R, layout=layout, **options)


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


# The gradient


def _gradients(op: Callable, case: Case, *, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Of a weighted sum of the divergences, whose weights are 0 in the second group."""
    hidden_RD, weight_VD, _, upstream_R, _ = case.tensors()
    hidden_RD, weight_VD = (tensor.to(dtype).requires_grad_() for tensor in (hidden_RD, weight_VD))
    options |= dict(layout=LAYOUT, vocab_size=case.vocab_size, temperature=case.temperature)
    divergence_R = op(hidden_RD, weight_VD, **options)
    is_second_R = (torch.arange(NUM_ROWS) >= 13) & (torch.arange(NUM_ROWS) < 19)
    divergence_R.backward(upstream_R.masked_fill(is_second_R, 0.0).to(divergence_R.dtype))
    return {"hidden": hidden_RD.grad, "weight": weight_VD.grad}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_gradient_is_at_least_as_exact_as_autograd_on_full_logits(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(NUM_ROWS, 104, 101, dtype, temperature)
    truth = _gradients(group_divergence_reference, case, dtype=torch.float64)
    naive = _gradients(group_divergence_reference, case, dtype=dtype)
    # Tiles of 2 positions: sums over tiles run, and a tile's end does not meet a group's end.
    monkeypatch.setattr("megatron_ktr.ops.group_divergence_tiles._tile_sizes", lambda *_, **__: (40, 2))
    ours = _gradients(functools.partial(_ours, with_gradient=True), case, dtype=dtype)
    assert ours["hidden"][:13].any() and not ours["hidden"][13:].any(), "a lone response has no gradient either"
    for name in truth:
        # exp(d) with d up to 11 turns units in the last place of log-probs into tens of them; in bf16 what is handed
        # back is rounded, once on either side.
        tolerance = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 50)
        assert ours[name].dtype == dtype
        assert (
            error_of(ours[name][:101], truth[name][:101]) <= error_of(naive[name][:101], truth[name][:101]) + tolerance
        )
        assert not ours["weight"][101:].any(), "padding has no gradient"


def test_gradient_stops_at_the_clamp_and_is_zero_where_responses_agree() -> None:
    layout = PackedLayout((GroupSpan(0, 1, (1, 1)), GroupSpan(3, 1, (1, 1))))
    hidden_RD = torch.tensor([[1.0], [-1.0], [2.0], [2.0]], requires_grad=True)
    _ours(hidden_RD, torch.tensor([[1e4], [-1e4]]), layout=layout, with_gradient=True).sum().backward()
    assert not hidden_RD.grad.any()
    # p = (3/4, 1/4) against (1/4, 3/4): d = +-log(3)/2 at both tokens, D = 2 cosh(log(3)/2) - 2.
    logit = torch.tensor(3.0, dtype=torch.float64).log()
    hidden_RD = (torch.tensor([[1.0], [-1.0]], dtype=torch.float64) * logit).requires_grad_()
    weight_VD = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)
    layout = PackedLayout((GroupSpan(0, 1, (1, 1)),))
    (divergence, _) = _ours(hidden_RD, weight_VD, layout=layout, with_gradient=True)
    divergence.backward()
    assert float(divergence.detach()) == pytest.approx(2 * math.cosh(float(logit) / 2) - 2, rel=1e-12)
    step = 1e-6
    for row in (0, 1):
        moved = hidden_RD.detach().clone()
        moved[row] += step
        higher = _ours(moved, weight_VD, layout=layout)[0]
        moved[row] -= 2 * step
        lower = _ours(moved, weight_VD, layout=layout)[0]
        # Central differences of a function of order one, in fp64.
        assert float(hidden_RD.grad[row]) == pytest.approx(float(higher - lower) / (2 * step), rel=1e-8)


def _sharded_gradients(context, *, case: Case, tensor: int, is_split: bool) -> tuple[list[dict], list[list[int]]]:
    """Gradients of the rank's shard, and its traffic; ``is_split``: of two halves of the rows, as context ranks'."""
    from megatron_ktr.distributed.groups import ParallelSizes

    groups = context.init(ParallelSizes(tensor=tensor))
    halves = [torch.arange(NUM_ROWS) % 2 == half for half in (0, 1)] if is_split else [None]
    found, sizes = [], []
    for half in halves:

        def op(hidden_RD: Tensor, weight_VD: Tensor, *, half=half, **options):
            shard = weight_VD.chunk(tensor)[groups.tensor_rank]
            options |= dict(group=groups.tensor, with_gradient=True, has_gradient_R=half)
            return _ours(hidden_RD, shard, **options)

        with Traffic() as traffic:
            found.append(_gradients(op, case, dtype=case.dtype))
        sizes.append(traffic.sizes)
    return found, sizes


@pytest.mark.parametrize("tensor", [2, 4])
def test_gradient_on_shards_and_on_halves_of_the_rows_adds_up_to_the_whole(ranks, tensor: int) -> None:
    case = Case(NUM_ROWS, 104, 101)
    truth = _gradients(group_divergence_reference, case, dtype=torch.float64)
    for is_split in (False, True):
        by_rank = ranks(_sharded_gradients, world_size=tensor, case=case, tensor=tensor, is_split=is_split)
        for found, sizes in by_rank:
            hidden_RD = sum(part["hidden"] for part in found)
            assert error_of(hidden_RD, truth["hidden"]) < 1e-5  # fp32; naive autograd's own error is 1e-6
            for part, half in zip(found, (0, 1) if is_split else (), strict=False):
                assert not part["hidden"][torch.arange(NUM_ROWS) % 2 != half].any()
            width, num_active = 4, 7 + 3
            expected = [4 * NUM_ROWS * 4, (7 + 5 + 3) * (1 + width) * 4, num_active * width * case.hidden_size * 4]
            assert sizes == [expected] * len(found)
        weight_VD = sum(part["weight"] for found, _ in by_rank for part in found)  # each rank fills its own shard
        assert error_of(weight_VD[:101], truth["weight"][:101]) < 1e-5


def test_divergence_refuses_rows_that_are_not_the_layouts() -> None:
    for num_rows, num_normalizers in ((21, 22), (22, 21)):
        with pytest.raises(ValueError, match=f"expected 22 hidden rows.*got {num_rows} and {num_normalizers}"):
            divergence_with(torch.zeros(num_rows, 2), torch.zeros(5, 2), torch.zeros(num_normalizers), layout=LAYOUT)
    assert divergence_with(torch.zeros(0, 2), torch.zeros(5, 2), torch.zeros(0), layout=PackedLayout(())).numel() == 0


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
