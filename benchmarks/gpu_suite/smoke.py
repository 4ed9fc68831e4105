"""Parts ``smoke`` and ``kernels`` of ``run.py``: does each piece run and answer right, and how fast are kernels.

``smoke`` asks for one thing at a time, in the order in which a training step would: matrix product, process group,
compiled fusion, packed attention of every implementation, vocabulary head, Transformer Engine by recipe.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite.common import Part, Skipped, device_bytes, leave_kernels_untuned, timed
from benchmarks.gpu_suite.te import linear_against_bf16, packed_attention, recipes, relative
from benchmarks.head.run_gpu import device_name, measure_shard, milliseconds, parse_arguments
from megatron_ktr.distributed.collectives import all_reduce_sum
from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
from megatron_ktr.ops.prefix_attention import choose_impl, loop_attention, prefix_attention
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan
from megatron_ktr.ops.token_statistics import linear_token_statistics
from megatron_ktr.ops.token_statistics_interface import HeadOptions
from megatron_ktr.types import GroupSpan, PackedLayout

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "numpy")
BF16_TOLERANCE = 0.02
"""Relative to fp64: inputs, probabilities and results in 8 bits, each off by up to 0.4%, gradients through all of them.
A wrong alignment of the mask is off by 1."""
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
ATTENTION_IMPLS = ("torch", "merged", "varlen", "te")


def run_smoke(part: Part) -> None:
    leave_kernels_untuned(part.platform)
    part.entry("machine", lambda: _machine(part))
    part.entry("matmul", lambda: _matmul(part))
    part.entry("process group", lambda: _process_group(part))
    part.entry("compiled fusion", lambda: _compiled(part))
    for impl in ATTENTION_IMPLS:
        part.entry(f"attention {impl}", lambda impl=impl: _attention(part, impl))
    for impl in ("chunked", "triton"):
        part.entry(f"head {impl}", lambda impl=impl: _head(part, impl))
    for name in RECIPES:
        part.entry(f"te linear {name}", lambda name=name: checked(linear_against_bf16(recipes()[name], part.platform)))


def measure_kernels(part: Part) -> None:
    for shards in (1, 8, 4, 2):
        part.entry(f"key-token loss, TP {shards}", lambda shards=shards: _key_token_loss(part, shards))
    for shards in (1, 4):
        for impl in ATTENTION_IMPLS:
            part.entry(
                f"attention {impl}, 7B / TP {shards}",
                lambda impl=impl, shards=shards: _time_attention(part, impl, shards),
            )


def checked(found: dict[str, Any]) -> dict[str, Any]:
    """Raises where ``within`` is False: a wrong answer is a failure, with its numbers."""
    if not found["within"]:
        raise RuntimeError(f"outside its tolerance: {found}")
    return found


def _machine(part: Part) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": device_name(part.platform),
        "memory_gb": device_bytes(part.platform) / 1e9,
        "compute_capability": getattr(part.platform, "compute_capability", None),
        "versions": versions,
    }


def _matmul(part: Part) -> dict[str, Any]:
    size = 256 if part.is_tiny else 8192
    a, b = (torch.randn(size, size, device=part.platform.device).bfloat16() for _ in range(2))
    rows = slice(0, 64)
    difference = relative(a[rows] @ b, a[rows].double().cpu() @ b.double().cpu())
    numbers = timed(lambda: a @ b, part.platform, repeats=10)
    rate = 2 * size**3 / numbers["median_seconds"] / 1e12
    # One rounding of the result to 8 bits; sums are fp32.
    return checked(numbers | {"tflops": rate, "difference": difference, "within": difference < 4e-3})


def _process_group(part: Part) -> dict[str, Any]:
    ranks = init_parallel(ParallelSizes(), platform=part.platform)
    try:
        ones = torch.ones(4, device=part.platform.device)
        torch.distributed.all_reduce(ones, group=ranks.world)
        total = float(all_reduce_sum(ones, ranks.tensor).sum())
        return checked({"backend": part.platform.backend, "within": total == 4.0})
    finally:
        destroy_parallel()


def _compiled(part: Part) -> dict[str, Any]:
    """megatron-core compiles its fusions; on CPU the platform switches that off."""
    if part.platform.name == "cpu":
        raise Skipped("fusions are not compiled on CPU")
    x = torch.randn(1024, 1024, device=part.platform.device)
    out = torch.compile(lambda y: torch.nn.functional.silu(y) * y + 1)(x)
    difference = relative(out, torch.nn.functional.silu(x.double()) * x.double() + 1)
    return checked({"difference": difference, "within": difference < 1e-5})


def _attention_inputs(part: Part, *, shards: int = 1, is_small: bool = False) -> tuple[list[Tensor], AttentionPlan]:
    """q, k, v of one 7B layer on one tensor rank: 28 query and 4 key heads of 128, split ``shards`` ways."""
    if part.is_tiny or is_small:
        layout = PackedLayout((GroupSpan(0, 75, (32, 17, 50)), GroupSpan(174, 40, (9, 33))))
    else:
        layout = PackedLayout((GroupSpan(0, 2248, (768,) * 8),))
    heads, key_heads, size = (4, 2, 32) if part.is_tiny else (28 // shards, 4 // shards, 128)
    generator = torch.Generator().manual_seed(0)
    sizes = [(layout.num_tokens, number, size) for number in (heads, key_heads, key_heads)]
    inputs = [
        torch.randn(shape, generator=generator).to(part.platform.device, torch.bfloat16).requires_grad_()
        for shape in sizes
    ]
    return inputs, AttentionPlan.of_layout(layout)


def _attend(part: Part, impl: str, inputs: list[Tensor], plan: AttentionPlan) -> Callable[[], Tensor]:
    if impl == "te":
        return lambda: packed_attention(*inputs, plan=plan)
    try:
        choose_impl(inputs[0], impl)
    except ValueError as error:
        raise Skipped(str(error)) from error
    return lambda: prefix_attention(*inputs, plan=plan, impl=impl)


def _attention(part: Part, impl: str) -> dict[str, Any]:
    """Output and gradients against the loop over segments in fp64 on the host."""
    inputs, plan = _attention_inputs(part, is_small=True)
    out = _attend(part, impl, inputs, plan)()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = [out, *torch.autograd.grad(out, inputs, weight)]
    exact_inputs = [x.detach().double().cpu().requires_grad_() for x in inputs]
    scale = inputs[0].shape[-1] ** -0.5
    exact_out = loop_attention(*exact_inputs, plan=plan, scale=scale)
    exact = [exact_out, *torch.autograd.grad(exact_out, exact_inputs, weight.double().cpu())]
    names = ("out", "grad_q", "grad_k", "grad_v")
    differences = {name: relative(*pair) for name, *pair in zip(names, found, exact, strict=True)}
    return checked({"differences": differences, "within": max(differences.values()) < BF16_TOLERANCE})


def _head(part: Part, impl: str) -> dict[str, Any]:
    if impl == "triton" and part.platform.name == "cpu":
        raise Skipped("the Triton kernels need a GPU")
    rows, hidden_size, vocabulary = (16, 32, 301) if part.is_tiny else (1000, 1024, 20_001)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(number, hidden_size, generator=generator) for number in (rows, vocabulary))
    hidden, weight = hidden.bfloat16(), (2 * weight / hidden_size**0.5).bfloat16()
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    results = {}
    for device, dtype in ((part.platform.device, torch.bfloat16), (torch.device("cpu"), torch.float64)):
        given = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        is_exact = dtype is torch.float64
        statistics = linear_token_statistics(
            *given, target.to(device), head=HeadOptions(impl="naive" if is_exact else impl)
        )
        gradients = torch.autograd.grad(statistics.logprob_R.sum(), given)
        results[is_exact] = (statistics.logprob_R, statistics.entropy_R, *gradients)
    names = ("logprob", "entropy", "grad_hidden", "grad_weight")
    differences = {name: relative(*pair) for name, *pair in zip(names, results[False], results[True], strict=True)}
    # Values are sums in fp32 of the same bf16 inputs; gradients are rounded to 8 bits twice.
    within = max(differences["logprob"], differences["entropy"]) < 1e-4 and max(differences.values()) < 8e-3
    return checked({"differences": differences, "within": within})


def _key_token_loss(part: Part, shards: int) -> dict[str, Any]:
    flags = ["--milliseconds", "150"]
    if part.is_tiny:
        flags += ["--rows", "32", "--hidden-size", "32", "--vocab-size", "512", "--dtype", "float32"]
    if part.platform.name == "cpu":
        flags += ["--impl", "chunked"]
    return measure_shard(parse_arguments(flags), part.platform, num_shards=shards, key_share=0.4)


def _time_attention(part: Part, impl: str, shards: int) -> dict[str, Any]:
    """Milliseconds of one layer's attention, forward and backward: the paper's group at 32 frames. Backward's are those
    of both less forward's, for Transformer Engine's graph can be used once only."""
    inputs, plan = _attention_inputs(part, shards=shards)
    attend = _attend(part, impl, inputs, plan)
    out = attend()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    budget = 20 if part.is_tiny else 150
    forward = milliseconds(attend, part.platform, budget=budget)
    both = milliseconds(lambda: torch.autograd.grad(attend(), inputs, weight), part.platform, budget=budget)
    backward = both - forward
    pairs = sum(s.length * (s.length + 1) // 2 + s.length * s.prefix_length for s in plan.segments)
    operations = 4 * pairs * inputs[0].shape[1] * inputs[0].shape[2]
    return {
        "forward_milliseconds": forward,
        "backward_milliseconds": backward,
        "forward_tflops": operations / forward / 1e9,
        "backward_tflops": 2 * operations / backward / 1e9,
    }
