"""Packed attention against what it replaces: G separate causal sequences, and a dense block-diagonal mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops.prefix_attention import choose_impl, prefix_attention
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan, Segment
from megatron_ktr.ops.segment_attention import SegmentPlan, segment_attention
from megatron_ktr.types import GroupSpan, PackedLayout

HEAD_SIZE = 8

LAYOUTS = {
    "one group": PackedLayout((GroupSpan(0, 5, (2, 3, 1)),)),
    "several groups": PackedLayout((GroupSpan(0, 4, (3, 1)), GroupSpan(8, 7, (2,)), GroupSpan(17, 1, (1, 4, 2)))),
    "with padding": PackedLayout((GroupSpan(0, 6, (2, 5)), GroupSpan(13, 3, (4, 1))), num_padding=3),
    "an empty response": PackedLayout((GroupSpan(0, 3, (2, 0, 2)),)),
    "equal responses": PackedLayout((GroupSpan(0, 9, (3, 3, 3)), GroupSpan(18, 2, (1, 1, 1, 1)))),
    "no prompt": PackedLayout((GroupSpan(0, 0, (3, 2)), GroupSpan(5, 4, (2,))), num_padding=1),
}
IMPLS = ("torch", "merged")
"""What runs on CPU; the same claims run on CUDA under the marker ``gpu``."""
# fp64: rounding of a few dozen additions. fp32: the same at 6e-8, with sums of up to 11 terms of size one.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


def naive_attention(q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v with a dense mask, one line per step of the formula; heads by repetition."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("inh,jnh->nij", q, k) * (scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("nij,jnh->inh", weights, v)


def separate_sequences(q: Tensor, k: Tensor, v: Tensor, *, layout: PackedLayout) -> Tensor:
    """What packing replaces: every response as its own causal sequence behind its own copy of the prompt.

    The prompt's output is taken from one such sequence (they are all equal), padding rows are left zero.
    """
    out = torch.zeros_like(q)
    for group in layout.groups:
        prompt = torch.arange(group.start, group.start + group.prompt_length)
        start = group.start + group.prompt_length
        for length in group.response_lengths:
            rows = torch.cat([prompt, torch.arange(start, start + length)])
            causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
            sequence = naive_attention(q[rows], k[rows], v[rows], allowed=causal)
            out = out.index_copy(0, rows, sequence)
            start += length
    return out


def random_qkv(
    num_rows: int, *, heads: int, kv_heads: int, dtype: torch.dtype, num_keys: int | None = None, size: int = HEAD_SIZE
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_rows * 100 + heads)
    num_keys = num_rows if num_keys is None else num_keys
    sizes = [(rows, n, size) for rows, n in ((num_rows, heads), (num_keys, kv_heads), (num_keys, kv_heads))]
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_group_equals_repeated_prefix(
    name: str, heads: int, kv_heads: int, dtype: torch.dtype, impl: str
) -> None:
    layout, tolerance = LAYOUTS[name], TOLERANCES[dtype]
    inputs = random_qkv(layout.num_tokens, heads=heads, kv_heads=kv_heads, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(layout.num_tokens, heads, HEAD_SIZE, generator=generator, dtype=dtype)
    weight[layout.num_tokens - layout.num_padding :] = 0

    packed = prefix_attention(*inputs, plan=AttentionPlan.of_layout(layout), impl=impl)
    expected = separate_sequences(*inputs, layout=layout)
    num_real = layout.num_tokens - layout.num_padding
    torch.testing.assert_close(packed[:num_real], expected[:num_real], rtol=0, atol=tolerance)

    gradients = torch.autograd.grad((packed * weight).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        # Prompt keys collect gradients of up to three responses: a few more additions than the forward.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * tolerance)


TRIANGLE_LAYOUT = PackedLayout((GroupSpan(0, 150, (70, 1, 33, 33)), GroupSpan(287, 40, (90, 5))), num_padding=7)
"""Longer than a tile of the kernels (32 to 512 rows), ragged, one response of one token."""


def worst_row(values: Tensor, truth: Tensor) -> float:
    """Largest |row - true row| over rows (one token's head), relative to the largest true row."""
    return float((values.double() - truth).norm(dim=-1).max() / truth.norm(dim=-1).max())


def forward_and_gradients(inputs: list[Tensor], weight: Tensor, attend: object) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad((out * weight.to(out)).sum(), inputs)]


def assert_no_worse_than_naive(impl: str, *, dtype: torch.dtype, device: str, extra: float, size: int = 16) -> None:
    layout = TRIANGLE_LAYOUT
    inputs = random_qkv(layout.num_tokens, heads=8, kv_heads=2, dtype=torch.float64, size=size)
    inputs = [x.detach().to(dtype) for x in inputs]  # the truth starts from the rounded inputs
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight[-layout.num_padding :] = 0

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return separate_sequences(q, k, v, layout=layout)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_attention(q, k, v, plan=AttentionPlan.of_layout(layout), impl=impl)

    truth = forward_and_gradients([x.double() for x in inputs], weight, naive)
    rounded = forward_and_gradients(inputs, weight, naive)
    found = forward_and_gradients([x.to(device) for x in inputs], weight.to(device), ours)
    for name, true, theirs, mine in zip(("out", "q", "k", "v"), truth, rounded, found, strict=True):
        assert worst_row(mine.cpu(), true) <= worst_row(theirs, true) + extra, name


@pytest.mark.parametrize(
    ("impl", "dtype", "extra"),
    # fp32: sums of up to 220 terms in another order. bf16 (8 bits, 0.4% a rounding): both parts of the merged form are
    # rounded before they are added; torch adds up the key gradients of four heads and five responses in bf16.
    [
        ("torch", torch.float32, 5e-7),
        ("merged", torch.float32, 5e-7),
        ("torch", torch.bfloat16, 1e-2),
        ("merged", torch.bfloat16, 4e-3),
    ],
    ids=str,
)
def test_no_further_from_the_truth_than_the_formula_itself(impl: str, dtype: torch.dtype, extra: float) -> None:
    assert_no_worse_than_naive(impl, dtype=dtype, device="cpu", extra=extra)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "merged", "varlen", "auto"])
def test_no_further_from_the_truth_on_cuda(impl: str) -> None:
    assert_no_worse_than_naive(impl, dtype=torch.bfloat16, device="cuda", extra=1e-2, size=64)


def test_merging_the_parts_keeps_scores_that_differ_by_hundreds() -> None:
    """exp of a score of 300 overflows fp32; log-sum-exp parts far apart leave one part alone, without NaN."""
    layout = PackedLayout((GroupSpan(0, 4, (3, 2)),))
    q, k, v = random_qkv(9, heads=2, kv_heads=2, dtype=torch.float32)
    with torch.no_grad():
        k[:4] *= 300
    expected = separate_sequences(q.double(), k.double(), v.double(), layout=layout)
    out = prefix_attention(q, k, v, plan=AttentionPlan.of_layout(layout), impl="merged")
    # Scores near 1000 are rounded to 6e-5, and so are the weights of neighbours.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-3)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_some_query_rows_against_all_keys_equal_those_rows_of_the_whole(impl: str) -> None:
    """What a context-parallel rank computes: two chunks of a prompt and some responses, keys of everybody."""
    layout = PackedLayout((GroupSpan(0, 11, (3, 4, 2)), GroupSpan(20, 6, (5,))))
    segments = (
        Segment(0, 3, 2, 0, 2),  # prompt rows 2..4
        Segment(3, 2, 9, 0, 9),  # prompt rows 9, 10
        Segment(5, 4, 14, 0, 11),  # response 2
        Segment(9, 2, 18, 0, 11),  # response 3
        Segment(11, 1, 20),  # the second prompt's first row
        Segment(12, 5, 26, 20, 6),
    )
    rows = torch.tensor([2, 3, 4, 9, 10, 14, 15, 16, 17, 18, 19, 20, 26, 27, 28, 29, 30])
    inputs = random_qkv(31, heads=4, kv_heads=2, dtype=torch.float64)
    weight = torch.randn(17, 4, HEAD_SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = separate_sequences(*inputs, layout=layout)[rows]
    local = prefix_attention(
        inputs[0][rows], *inputs[1:], plan=AttentionPlan(segments, num_keys=31, num_padding=0), impl=impl
    )
    torch.testing.assert_close(local, whole, rtol=0, atol=1e-12)
    gradients, expected = (torch.autograd.grad((out * weight).sum(), inputs) for out in (local, whole))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_rows_are_zero_and_touch_nobody(impl: str) -> None:
    layout = LAYOUTS["with padding"]
    inputs = random_qkv(layout.num_tokens, heads=4, kv_heads=2, dtype=torch.float32)
    out = prefix_attention(*inputs, plan=AttentionPlan.of_layout(layout), impl=impl)
    assert bool((out[-layout.num_padding :] == 0).all())
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(bool((g[-layout.num_padding :] == 0).all()) for g in gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_responses_do_not_see_each_other(impl: str) -> None:
    layout = PackedLayout((GroupSpan(0, 5, (2, 3)),))
    q, k, v = random_qkv(10, heads=2, kv_heads=2, dtype=torch.float64)
    out = prefix_attention(q, k, v, plan=AttentionPlan.of_layout(layout), impl=impl)
    (grad_v,) = torch.autograd.grad(out[7:].sum(), v)
    assert bool((grad_v[5:7] == 0).all())  # response 2 never reads response 1
    assert bool((grad_v[:5] != 0).any())


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_replaces_the_default(impl: str) -> None:
    plan = AttentionPlan.of_layout(PackedLayout((GroupSpan(0, 3, (2,)),)))
    q, k, v = random_qkv(5, heads=2, kv_heads=1, dtype=torch.float64)
    expected = naive_attention(q, k, v, allowed=torch.ones(5, 5, dtype=torch.bool).tril(), scale=0.7)
    out = prefix_attention(q, k, v, plan=plan, scale=0.7, impl=impl)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_merged_attention_saves_no_copy_of_the_prompt_per_response() -> None:
    """Bytes autograd keeps: q, k, v, out and the log-sum-exp, whatever G; the reference keeps G prompts and masks."""
    layout = PackedLayout((GroupSpan(0, 64, (4,) * 8),))
    inputs = random_qkv(96, heads=2, kv_heads=2, dtype=torch.float32)

    def saved_bytes(impl: str) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            prefix_attention(*inputs, plan=AttentionPlan.of_layout(layout), impl=impl)
        return sum(storages.values())

    one_tensor = 96 * 2 * HEAD_SIZE * 4
    assert saved_bytes("merged") == 4 * one_tensor + 96 * 2 * 4
    assert saved_bytes("torch") > 2 * saved_bytes("merged")


@pytest.mark.parametrize("name", LAYOUTS)
def test_plan_tiles_the_query_rows_and_joins_responses_into_one_block(name: str) -> None:
    layout = LAYOUTS[name]
    plan = AttentionPlan.of_layout(layout)
    assert plan.num_queries == plan.num_keys == layout.num_tokens
    rows = [row for segment in plan.segments for row in range(*segment.rows.indices(10**6))]
    assert rows == list(range(layout.num_tokens - layout.num_padding))
    assert all(segment.length > 0 for segment in plan.segments)
    groups = [group for group in layout.groups if group.prompt_length and any(group.response_lengths)]
    assert [(block[0].stop, block[1].start) for block in plan.prefix_blocks] == [(g.end, g.start) for g in groups]
    assert sum(first.length * count for first, count in plan.own_runs) == len(rows)


def test_variable_length_calls_of_the_docstrings() -> None:
    plan, device = AttentionPlan.of_layout(PackedLayout((GroupSpan(0, 2, (1, 2)),))), torch.device("cpu")
    whole, own, prefix = plan.whole_call(device), plan.own_call(device), plan.prefix_call(device)
    assert whole.kv_rows is None and plan.whole_copies(device).rows.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4]
    assert plan.own_and_prefix_copies(device).rows.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert whole.cu_seqlens_q.tolist() == [0, 2, 3, 5]
    assert whole.cu_seqlens_kv.tolist() == [0, 2, 5, 9]
    assert own.kv_rows is None and own.cu_seqlens_kv.tolist() == [0, 2, 3, 5]
    assert prefix.q_rows.tolist() == [2, 3, 4] and prefix.kv_rows.tolist() == [0, 1]
    assert prefix.cu_seqlens_q.tolist() == [0, 3] and prefix.cu_seqlens_kv.tolist() == [0, 2]
    assert plan.own_call(device) is own, "made once"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "lengths", [(4, 4, 4), (6, 3, 6, 1, 3), (11,), (2, 0, 5)], ids=["equal", "ragged", "one", "empty segment"]
)
def test_segments_equal_a_block_diagonal_mask(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    num_rows = sum(lengths)
    inputs = random_qkv(num_rows, heads=3, kv_heads=3, dtype=dtype)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = naive_attention(*inputs, allowed=segment[:, None] == segment[None, :])
    segments = SegmentPlan(tuple(itertools.accumulate(lengths, initial=0)))
    out = segment_attention(*inputs, segments=segments)
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCES[dtype])
    assert segments.batches(out.device) is segments.batches(out.device), "made once"
    weight = torch.linspace(-1, 1, num_rows, dtype=dtype)[:, None, None]
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * TOLERANCES[dtype])


def test_wrong_requests_are_named() -> None:
    q, k, v = random_qkv(6, heads=4, kv_heads=3, dtype=torch.float32)
    plan = AttentionPlan.of_layout(PackedLayout((GroupSpan(0, 4, (2,)),)))
    with pytest.raises(ValueError, match="multiple of K"):
        prefix_attention(q, k, v, plan=plan)
    with pytest.raises(ValueError, match="7 query and 7 key rows, but there are 6 queries"):
        prefix_attention(q, q, q, plan=AttentionPlan.of_layout(PackedLayout((GroupSpan(0, 4, (3,)),))))
    with pytest.raises(ValueError, match="impl"):
        prefix_attention(q, q, q, plan=plan, impl="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a CUDA device"):
        prefix_attention(q, q, q, plan=plan, impl="varlen")
    assert choose_impl(q) == "merged"
    for bounds in ((0, 4, 2, 6), (1, 6), ()):
        with pytest.raises(ValueError, match="rise from 0"):
            SegmentPlan(bounds)
    with pytest.raises(ValueError, match="6 queries and 5 keys"):
        segment_attention(q, q[:5], q[:5], segments=SegmentPlan((0, 6)))
