"""The CUDA forms of shared-prefix attention: their index work here, with the kernel's definition in the kernel's place;
the kernel itself under the marker ``gpu`` (``test_prefix_attention.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops import prefix_attention_merged, prefix_attention_varlen, segment_attention
from megatron_ktr.ops.context_shard import shard_layout
from megatron_ktr.ops.prefix_attention import loop_attention
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan, VarlenCall
from megatron_ktr.ops.segment_attention import SegmentPlan
from megatron_ktr.types import GroupSpan, PackedLayout
from tests.ops.test_prefix_attention import LAYOUTS, random_qkv


def scores_of(q: Tensor, k: Tensor, *, scale: float, is_causal: bool) -> Tensor:
    """[N, L, J], query i of L may attend key j of J iff j <= i + J - L where causal: the kernel's alignment."""
    scores = torch.einsum("inh,jnh->nij", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * scale
    allowed = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    return scores.masked_fill(~allowed, float("-inf")) if is_causal else scores


def pieces(call: VarlenCall) -> list[tuple[slice, slice]]:
    bounds_q, bounds_kv = call.cu_seqlens_q.tolist(), call.cu_seqlens_kv.tolist()
    found = [
        (slice(*pair_q), slice(*pair_kv))
        for pair_q, pair_kv in zip(
            zip(bounds_q, bounds_q[1:], strict=False), zip(bounds_kv, bounds_kv[1:], strict=False), strict=True
        )
    ]
    assert max(q.stop - q.start for q, _ in found) <= call.max_seqlen_q
    assert max(kv.stop - kv.start for _, kv in found) <= call.max_seqlen_kv
    return found


def kernel_forward(q: Tensor, k: Tensor, v: Tensor, *, call: VarlenCall, scale: float, is_causal: bool) -> tuple:
    assert call.cu_seqlens_q[-1] == len(q) and call.cu_seqlens_kv[-1] == len(k) == len(v)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for rows, keys in pieces(call):
        scores = scores_of(q[rows], k[keys], scale=scale, is_causal=is_causal)
        lse[:, rows] = scores.logsumexp(-1)
        value = v[keys].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out[rows] = torch.einsum("nij,jnh->inh", scores.softmax(-1), value)
    return out, lse, (torch.zeros(2), torch.zeros(0))


def kernel_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: tuple,
    *,
    call: VarlenCall,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the formula, with the ``out`` and ``lse`` it is given, as the kernel."""
    assert len(state) == 2 and grad_out.is_contiguous() and lse.is_contiguous()
    repeats = q.shape[1] // k.shape[1]
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, keys in pieces(call):
        key, value = (x[keys].repeat_interleave(repeats, dim=1) for x in (k, v))
        p = (scores_of(q[rows], k[keys], scale=scale, is_causal=is_causal) - lse[:, rows, None]).exp()
        delta = (grad_out[rows] * out[rows]).sum(-1).T[..., None]
        grad_scores = p * (torch.einsum("inh,jnh->nij", grad_out[rows], value) - delta) * scale
        grad_q[rows] = torch.einsum("nij,jnh->inh", grad_scores, key)
        for total, weights, x in ((grad_k, grad_scores, q[rows]), (grad_v, p, grad_out[rows])):
            part = torch.einsum("nij,inh->jnh", weights, x)
            total[keys] = part.unflatten(1, (-1, repeats)).sum(2)
    return grad_q, grad_k, grad_v


@pytest.fixture
def kernel_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact sums, each result rounded once to the dtype of its input, as a kernel's; the log-sum-exp is not."""

    def wide(*tensors: Tensor) -> list[Tensor]:
        return [x.double() for x in tensors]

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple:
        out, lse, state = kernel_forward(*wide(q, k, v), **options)
        return out.to(q.dtype), lse, state

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: tuple, **options: object) -> tuple:
        out, lse, state = found
        gradients = kernel_backward(*wide(grad, q, k, v, out, lse), state, **options)
        return tuple(x.to(q.dtype) for x in gradients)

    for module in (prefix_attention_merged, prefix_attention_varlen):
        monkeypatch.setattr(module, "varlen_forward", forward)
        monkeypatch.setattr(module, "varlen_backward", backward)


def plans() -> dict[str, AttentionPlan]:
    whole = {name: AttentionPlan.of_layout(layout) for name, layout in LAYOUTS.items()}
    local = {
        f"{name}, rank {rank} of 3": shard_layout(LAYOUTS[name], size=3, rank=rank).plan
        for name in ("several groups", "with padding")
        for rank in range(3)
    }
    return {name: plan for name, plan in (whole | local).items() if plan.segments}


@pytest.mark.usefixtures("kernel_by_definition")
@pytest.mark.parametrize("form", ["merged", "varlen"])
@pytest.mark.parametrize("name", plans())
def test_calls_of_the_variable_length_kernel_add_up_to_the_reference(name: str, form: str) -> None:
    plan = plans()[name]
    inputs = random_qkv(plan.num_queries, num_keys=plan.num_keys, heads=4, kv_heads=2, dtype=torch.float64)
    weight = torch.randn(plan.num_attending, 4, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if form == "merged":
        out = prefix_attention_merged._DeviceMerged.apply(inputs[0][: plan.num_attending], *inputs[1:], plan, 0.3, None)
    else:
        out = prefix_attention_varlen.varlen_attention(*inputs, plan=plan, scale=0.3)
    expected = loop_attention(*inputs, plan=plan, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    gradients, wanted = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected))
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


class AddedInBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros(ctx.shape)
        for row, part in zip(ctx.rows.tolist(), grad, strict=True):
            total[row] += part
        return total, None


@pytest.mark.usefixtures("kernel_by_definition")
def test_gradients_of_shared_keys_in_bf16_are_as_exact_as_those_of_the_merged_form() -> None:
    """Of the prompt's rows, relative to fp64 in norm. Added one after the other in bf16, as ``index_select`` does it on
    CUDA (on CPU torch sums in fp32), the copies of 16 responses lose more than twice as much."""
    layout = PackedLayout((GroupSpan(0, 40, (12,) * 16),))
    plan, scale = AttentionPlan.of_layout(layout), 0.3
    exact = [
        x.detach().bfloat16().double().requires_grad_()
        for x in random_qkv(layout.num_tokens, heads=4, kv_heads=2, dtype=torch.float64)
    ]
    inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
    weight = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    wanted = torch.autograd.grad(loop_attention(*exact, plan=plan, scale=scale), exact, weight.double())

    def error(attend: Callable[..., Tensor]) -> float:
        out = attend(*inputs, plan=plan, scale=scale)
        found = torch.autograd.grad(out, inputs, weight)
        pairs = [(x[:40], y[:40]) for x, y in zip(found[1:], wanted[1:], strict=True)]
        return max(float((x - y).norm() / y.norm()) for x, y in pairs)

    def in_bf16(q: Tensor, k: Tensor, v: Tensor, *, plan: AttentionPlan, scale: float) -> Tensor:
        rows, call = plan.whole_copies(q.device).rows, plan.whole_call(q.device)
        key, value = (AddedInBf16.apply(x, rows) for x in (k, v))
        return prefix_attention_varlen.varlen_call(q, key, value, call=call, scale=scale, is_causal=True)

    def on_device(q: Tensor, k: Tensor, v: Tensor, *, plan: AttentionPlan, scale: float) -> Tensor:
        return prefix_attention_merged._DeviceMerged.apply(q, k, v, plan, scale, None)

    merged = error(prefix_attention_merged.merged_attention)
    ours, ours_merged = error(prefix_attention_varlen.varlen_attention), error(on_device)
    assert max(ours, ours_merged) <= merged < 0.01
    assert error(in_bf16) > 2 * ours


@pytest.mark.parametrize("name", plans())
def test_copied_rows_have_the_gradient_of_a_sum(name: str) -> None:
    plan = plans()[name]
    copies = plan.whole_copies(torch.device("cpu"))
    x = torch.randn(plan.num_keys, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(copies.take(x), x.index_select(0, copies.rows))
    assert torch.autograd.gradcheck(copies.take, (x,))


@pytest.mark.usefixtures("kernel_by_definition")
def test_segments_as_one_variable_length_call_equal_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = SegmentPlan((0, 4, 4, 5, 9, 15))  # two of one length, an empty one
    inputs = random_qkv(15, heads=4, kv_heads=2, dtype=torch.float64)
    weight = torch.linspace(-1, 1, 15, dtype=torch.float64)[:, None, None]
    found = []
    for is_device in (False, True):
        monkeypatch.setattr(segment_attention, "can_flash_varlen", lambda q, is_device=is_device: is_device)
        out = segment_attention.segment_attention(*inputs, segments=segments)
        found.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    assert segments.call(out.device).cu_seqlens_q.tolist() == list(segments.bounds)
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)
