"""Time and kept memory of shared-prefix attention, forward and backward: every implementation that runs here.

    python benchmarks/prefix_attention/run.py                  the table
    python benchmarks/prefix_attention/run.py --json           the same as JSON on stdout
    python benchmarks/prefix_attention/run.py --prompt 1224 --responses 8 --length 128 --heads 8 --kv-heads 2

Implementations take turns in one process, ``--repeats`` times after a warm-up. Time is the median; on CPU it is the
processor time of this process, which other load on the machine lengthens less than it does wall time. ``kept_bytes``
are the tensors autograd holds between forward and backward, beyond q, k and v.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_ktr.distributed.platform import Platform, start  # noqa: E402
from megatron_ktr.errors import run_cli  # noqa: E402
from megatron_ktr.ops.prefix_attention import choose_impl, prefix_attention  # noqa: E402
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan  # noqa: E402
from megatron_ktr.types import GroupSpan, PackedLayout  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(arguments: argparse.Namespace, platform: Platform) -> dict[str, Any]:
    layout = PackedLayout((GroupSpan(0, arguments.prompt, (arguments.length,) * arguments.responses),))
    generator = torch.Generator().manual_seed(0)
    sizes = [(layout.num_tokens, n, arguments.head_size) for n in (arguments.heads, *[arguments.kv_heads] * 2)]
    q, k, v = (
        torch.randn(size, generator=generator).to(platform.device, DTYPES[arguments.dtype]).requires_grad_()
        for size in sizes
    )
    weight = torch.randn(q.shape, generator=generator).to(q)
    plan = AttentionPlan.of_layout(layout)
    names = [name for name in ("torch", "merged", "varlen") if _runs(name, q)]
    forward = {name: lambda name=name: prefix_attention(q, k, v, plan=plan, impl=name) for name in names}
    clock = time.process_time if platform.name == "cpu" else time.perf_counter
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in names}
    load_before = os.getloadavg()[0]
    for turn in range(arguments.repeats + 1):
        for name in names:
            spent, out = _timed(forward[name], platform, clock)
            back, _ = _timed(lambda out=out: torch.autograd.grad(out, (q, k, v), weight), platform, clock)
            if turn:
                seconds[name]["forward"].append(spent)
                seconds[name]["backward"].append(back)
    results = {
        name: {part: statistics.median(values) for part, values in parts.items()}
        | {"kept_bytes": _kept_bytes(forward[name], (q, k, v))}
        for name, parts in seconds.items()
    }
    about = {key: getattr(arguments, key) for key in ("prompt", "responses", "length", "heads", "kv_heads", "dtype")}
    machine = {"device": platform.name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    load = {"load_before": load_before, "load_after": os.getloadavg()[0]}
    return {"point": about, "machine": machine | load, "auto": choose_impl(q), "results": results}


def _runs(name: str, q: Tensor) -> bool:
    try:
        choose_impl(q, name)
    except ValueError:
        return False
    return True


def _timed(work: Callable[[], Any], platform: Platform, clock: Callable[[], float]) -> tuple[float, Any]:
    platform.synchronize()
    begin = clock()
    result = work()
    platform.synchronize()
    return clock() - begin, result


def _kept_bytes(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> int:
    """Bytes of distinct storages saved for backward."""
    storages: dict[int, int] = {}

    def remember(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        out = forward()
    del out
    known = {x.untyped_storage().data_ptr() for x in inputs}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['point']}  load {report['machine']['load_before']:.1f}  auto: {report['auto']}"]
    for name, found in report["results"].items():
        lines.append(
            f"{name:<8} forward {found['forward']:.3f} s  backward {found['backward']:.3f} s  "
            f"kept {found['kept_bytes'] / 1e6:.1f} MB"
        )
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=1224)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of each response")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    arguments = parser.parse_args()
    report = measure(arguments, start("auto"))
    print(json.dumps(report, indent=1) if arguments.json else _table(report))


if __name__ == "__main__":
    run_cli(_main)
