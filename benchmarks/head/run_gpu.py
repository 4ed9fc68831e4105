"""Time and memory of the token statistics on one GPU, against the bare matrix products: one shard of each TP size.

    python benchmarks/head/run_gpu.py --out benchmarks/results/key_token_loss_gpu.json

The floor is what no implementation can avoid, in the library's own products: forward one (logits), backward three
(logits again, d hidden, d weight), over the rows with a gradient. Their results are written to memory, logits too.
`summary` holds the largest ratio to that floor over the shards, all rows with a gradient: `forward_ratio` (aim 1.25)
and `total_ratio` (aim 1.35). `kernels` times the three kernels of a backward chunk beside the library's product of the
same shape, to see where time beyond the floor goes.

Times are medians of device events after warm-up (and tuning). Inputs are random normal numbers: zeros would clock
higher. On a CPU the script runs too, with --impl chunked or with TRITON_INTERPRET=1, and its times mean nothing there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_ktr.distributed.platform import Platform, start  # noqa: E402
from megatron_ktr.errors import run_cli  # noqa: E402
from megatron_ktr.ops.token_statistics import linear_token_statistics  # noqa: E402
from megatron_ktr.ops.token_statistics_interface import (  # noqa: E402
    HeadOptions,  # noqa: E402
    LogitGradient,
    ShardPlan,
)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    platform = start()
    platform.seed(0)
    results = []
    for num_shards in arguments.tensor_parallel:
        for key_share in arguments.key_share:
            results.append(measure_shard(arguments, platform, num_shards=num_shards, key_share=key_share))
            print(format_line(results[-1]), flush=True)
    all_rows = [result for result in results if result["key_share"] == 1.0]
    report: dict[str, Any] = {"device": device_name(platform), "torch": torch.__version__, "results": results}
    if all_rows:
        report["summary"] = {
            name: max(result[name] for result in all_rows) for name in ("forward_ratio", "total_ratio")
        }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=6144, help="default: 8 responses of 768 tokens")
    parser.add_argument("--hidden-size", type=int, default=3584)
    parser.add_argument("--vocab-size", type=int, default=152064)
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--key-share", type=float, nargs="+", default=[1.0, 0.4], help="shares of rows with a gradient")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--impl", choices=("triton", "chunked"), default="triton")
    parser.add_argument("--milliseconds", type=int, default=500, help="of measuring, for each number")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args(argv)


def measure_shard(
    arguments: argparse.Namespace, platform: Platform, *, num_shards: int, key_share: float
) -> dict[str, Any]:
    """Milliseconds, ratios to the floor and bytes beside inputs and results of the first of ``num_shards`` shards."""
    dtype = getattr(torch, arguments.dtype)
    num_rows, hidden_size = arguments.rows, arguments.hidden_size
    num_columns = arguments.vocab_size // num_shards

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=platform.device)

    hidden_RD, counterfactual_RD = (normal(num_rows, hidden_size).to(dtype).requires_grad_() for _ in range(2))
    weight_VD = (normal(num_columns, hidden_size) * 2 / hidden_size**0.5).to(dtype).requires_grad_()
    target_R = torch.randint(0, num_columns, (num_rows,), device=platform.device)
    is_key_row = torch.zeros(num_rows, dtype=torch.bool, device=platform.device)
    is_key_row[torch.randperm(num_rows, device=platform.device)[: max(round(num_rows * key_share), 1)]] = True
    grad_R, head = normal(num_rows) * is_key_row, HeadOptions(impl=arguments.impl)

    def forward(*counterfactuals: Tensor) -> Any:
        return linear_token_statistics(
            hidden_RD, weight_VD, target_R, counterfactual_hidden_RD=counterfactuals, head=head
        )

    def backward(result: Any) -> tuple[Tensor, ...]:
        outputs = (result.logprob_R, result.entropy_R)
        return torch.autograd.grad(outputs, (hidden_RD, weight_VD), (grad_R, grad_R), retain_graph=True)

    measure = partial(milliseconds, platform=platform, budget=arguments.milliseconds)
    result = forward()
    times = {
        "forward": measure(forward),
        "forward_with_counterfactual": measure(lambda: forward(counterfactual_RD)),
        "backward": measure(lambda: backward(result)),
    }
    floor = measure_floor(hidden_RD.detach(), weight_VD.detach(), is_key_row, measure)
    total = times["forward"] + times["backward"]
    return {
        "rows": num_rows,
        "hidden_size": hidden_size,
        "columns": num_columns,
        "tensor_parallel": num_shards,
        "key_share": key_share,
        "dtype": arguments.dtype,
        "impl": arguments.impl,
        "milliseconds": times,
        "floor_milliseconds": floor,
        "forward_ratio": times["forward"] / floor["logits"],
        "forward_with_counterfactual_ratio": times["forward_with_counterfactual"] / (2 * floor["logits"]),
        "total_ratio": total / (floor["logits"] + floor["backward"]),
        "extra_bytes": {
            "forward": extra_bytes(forward, platform),
            "backward": extra_bytes(lambda: backward(result), platform),
        },
        "kernels": measure_kernels(hidden_RD.detach(), weight_VD.detach(), target_R, is_key_row, measure)
        if arguments.impl == "triton"
        else None,
    }


def measure_floor(
    hidden_RD: Tensor, weight_VD: Tensor, is_key_row: Tensor, measure: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    """The library's products alone: logits of all rows; of the key rows logits, d hidden and d weight."""
    key_hidden = hidden_RD[is_key_row]
    z_grad = torch.randn(key_hidden.shape[0], weight_VD.shape[0], device=hidden_RD.device).to(hidden_RD.dtype)
    times = {
        "logits": measure(lambda: hidden_RD @ weight_VD.t()),
        "key_logits": measure(lambda: key_hidden @ weight_VD.t()),
        "hidden_grad": measure(lambda: z_grad @ weight_VD),
        "weight_grad": measure(lambda: z_grad.t() @ key_hidden),
    }
    return times | {"backward": times["key_logits"] + times["hidden_grad"] + times["weight_grad"]}


def measure_kernels(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    is_key_row: Tensor,
    measure: Callable[[Callable[[], Any]], float],
) -> dict[str, dict[str, float]]:
    """Milliseconds of the kernels of one backward chunk, and of the library's product of the same shape."""
    from megatron_ktr.ops import token_statistics_triton as fused

    hidden, target = hidden_RD[is_key_row], target_R[is_key_row]
    num_rows, num_columns = hidden.shape[0], weight_VD.shape[0]
    size = min(fused.choose_chunk_columns(num_rows, num_columns, itemsize=hidden.itemsize), num_columns)
    weight, chunk = weight_VD[:size], hidden.new_empty(num_rows, size)
    plan = ShardPlan(first_id=0, num_columns=num_columns, vocab_size=num_columns, scale=1.0)
    ones = torch.ones(num_rows, device=hidden.device)
    gradient = LogitGradient(target, grad=ones, maximum=10 * ones, offset=-ones, slope=-ones)
    hidden_grad = torch.zeros_like(hidden, dtype=torch.float32)
    weight_grad = torch.zeros_like(weight, dtype=torch.float32)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "logit_gradient": (
            lambda: fused.write_logit_gradient(chunk, hidden, weight, gradient, plan, first_column=0),
            lambda: hidden @ weight.t(),
        ),
        "hidden_grad": (
            lambda: fused.add_product(hidden_grad, chunk, weight, num_rows=num_rows),
            lambda: chunk @ weight,
        ),
        "weight_grad": (
            lambda: fused.add_product(weight_grad, chunk, hidden, num_rows=num_rows, is_weight_grad=True),
            lambda: chunk.t() @ hidden,
        ),
    }
    return {name: {"ours": measure(ours), "library": measure(library)} for name, (ours, library) in pairs.items()}


def milliseconds(function: Callable[[], Any], platform: Platform, *, budget: int) -> float:
    """Median of one call, after warm-up."""
    function()  # compiling and tuning stay out of the warm-up, whose length is measured too
    if platform.name != "cpu":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=budget // 5, rep=budget, return_mode="median"))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) * 1e3


def extra_bytes(function: Callable[[], Any], platform: Platform) -> int:
    """Peak of one call beyond what was allocated before it; its results count."""
    platform.empty_cache()
    platform.synchronize()
    platform.reset_peak_memory()
    before = platform.peak_memory_bytes()
    function()
    platform.synchronize()
    return platform.peak_memory_bytes() - before


def device_name(platform: Platform) -> str:
    if platform.name == "cpu":
        return "cpu"
    return torch.get_device_module(platform.device).get_device_name(platform.device)


def format_line(result: dict[str, Any]) -> str:
    times, extra = result["milliseconds"], result["extra_bytes"]
    return (
        f"TP {result['tensor_parallel']}, {result['key_share']:.0%} key rows: "
        f"forward {times['forward']:.2f} ms ({result['forward_ratio']:.2f}x), "
        f"with counterfactual {times['forward_with_counterfactual']:.2f} ms "
        f"({result['forward_with_counterfactual_ratio']:.2f}x), backward {times['backward']:.2f} ms, "
        f"total {result['total_ratio']:.2f}x the floor; "
        f"extra {extra['forward'] / 2**20:.0f} and {extra['backward'] / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    run_cli(main)
