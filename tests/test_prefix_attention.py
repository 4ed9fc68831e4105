"""Packed attention against what it replaces: G separate causal sequences, and a dense block-diagonal mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ktr.ops.prefix_attention import prefix_attention, segment_attention
from megatron_ktr.types import GroupSpan, PackedLayout

HEAD_SIZE = 8

LAYOUTS = {
    "one group": PackedLayout((GroupSpan(0, 5, (2, 3, 1)),)),
    "several groups": PackedLayout((GroupSpan(0, 4, (3, 1)), GroupSpan(8, 7, (2,)), GroupSpan(17, 1, (1, 4, 2)))),
    "with padding": PackedLayout((GroupSpan(0, 6, (2, 5)), GroupSpan(13, 3, (4, 1))), num_padding=3),
    "an empty response": PackedLayout((GroupSpan(0, 3, (2, 0, 2)),)),
}
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


def random_qkv(num_rows: int, *, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_rows * 100 + heads)
    sizes = [(num_rows, n, HEAD_SIZE) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_group_equals_repeated_prefix(name: str, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    layout, tolerance = LAYOUTS[name], TOLERANCES[dtype]
    inputs = random_qkv(layout.num_tokens, heads=heads, kv_heads=kv_heads, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(layout.num_tokens, heads, HEAD_SIZE, generator=generator, dtype=dtype)
    weight[layout.num_tokens - layout.num_padding :] = 0

    packed = prefix_attention(*inputs, layout=layout)
    expected = separate_sequences(*inputs, layout=layout)
    num_real = layout.num_tokens - layout.num_padding
    torch.testing.assert_close(packed[:num_real], expected[:num_real], rtol=0, atol=tolerance)

    gradients = torch.autograd.grad((packed * weight).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        # Prompt keys collect gradients of up to three responses: a few more additions than the forward.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * tolerance)


def test_padding_rows_are_finite_and_touch_nobody() -> None:
    layout = LAYOUTS["with padding"]
    inputs = random_qkv(layout.num_tokens, heads=4, kv_heads=2, dtype=torch.float32)
    out = prefix_attention(*inputs, layout=layout)
    assert out.isfinite().all()
    gradients = torch.autograd.grad(out[: -layout.num_padding].sum(), inputs)
    assert all(bool((g[-layout.num_padding :] == 0).all()) for g in gradients)


def test_responses_do_not_see_each_other() -> None:
    layout = PackedLayout((GroupSpan(0, 5, (2, 3)),))
    q, k, v = random_qkv(10, heads=2, kv_heads=2, dtype=torch.float64)
    out = prefix_attention(q, k, v, layout=layout)
    (grad_v,) = torch.autograd.grad(out[7:].sum(), v)
    assert bool((grad_v[5:7] == 0).all())  # response 2 never reads response 1
    assert bool((grad_v[:5] != 0).any())


def test_scale_replaces_the_default() -> None:
    layout = PackedLayout((GroupSpan(0, 3, (2,)),))
    q, k, v = random_qkv(5, heads=2, kv_heads=1, dtype=torch.float64)
    expected = naive_attention(q, k, v, allowed=torch.ones(5, 5, dtype=torch.bool).tril(), scale=0.7)
    torch.testing.assert_close(prefix_attention(q, k, v, layout=layout, scale=0.7), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "lengths", [(4, 4, 4), (6, 3, 6, 1, 3), (11,), (2, 0, 5)], ids=["equal", "ragged", "one", "empty segment"]
)
def test_segments_equal_a_block_diagonal_mask(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    num_rows = sum(lengths)
    inputs = random_qkv(num_rows, heads=3, kv_heads=3, dtype=dtype)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = naive_attention(*inputs, allowed=segment[:, None] == segment[None, :])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    out = segment_attention(*inputs, cu_seqlens=bounds)
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCES[dtype])
    torch.testing.assert_close(segment_attention(*inputs, cu_seqlens=bounds.tolist()), out, rtol=0, atol=0)
    weight = torch.linspace(-1, 1, num_rows, dtype=dtype)[:, None, None]
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * TOLERANCES[dtype])


def test_wrong_sizes_are_named() -> None:
    q, k, v = random_qkv(6, heads=4, kv_heads=3, dtype=torch.float32)
    layout = PackedLayout((GroupSpan(0, 4, (2,)),))
    with pytest.raises(ValueError, match="multiple of K"):
        prefix_attention(q, k, v, layout=layout)
    with pytest.raises(ValueError, match="7 rows, but the queries have 6"):
        prefix_attention(q, q, q, layout=PackedLayout((GroupSpan(0, 4, (3,)),)))
    with pytest.raises(ValueError, match="impl"):
        prefix_attention(q, q, q, layout=layout, impl="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rise from 0 to 6"):
        segment_attention(q, q, q, cu_seqlens=[0, 4, 2, 6])
