"""Tries every implementation of packed attention once on this machine's device, and finds the cuDNN that was loaded.

    python -m megatron_ktr.doctor.attention      prints one JSON object: the result of each, and the libraries loaded

This runs in a separate process, because a kernel that fails may crash its process. The libraries are listed after all
implementations have run. Output and gradients are compared with those of the loop over segments in fp64. On CPU only
the implementations with a CPU form run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_ktr.distributed.wheel_cudnn import missing_libraries, wheels_folder
from megatron_ktr.doctor.check import Check

IMPLEMENTATIONS = ("torch", "merged", "varlen", "te")
NOT_HERE = "not here: "
MASK = "padding_causal_bottom_right"
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}
"""The largest relative error of the output and of each gradient: some units in the last place, or in that of sums of a
hundred values."""


@dataclass(frozen=True)
class AttentionFacts:
    """The results of the process, or the reason why there are none."""

    problems: dict[str, str]
    """The problem of each implementation. It is empty if the numbers are right, and ``NOT_HERE`` with a reason if this
    machine cannot run the implementation."""
    cudnn: tuple[str, ...] = ()
    """The files of cuDNN that were loaded after all implementations had run."""
    error: str = ""


def read_attention(*, timeout_seconds: float = 600.0) -> AttentionFacts:
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "megatron_ktr.doctor.attention"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_seconds)
        # Libraries may print other lines before and after the JSON object.
        found = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    except subprocess.TimeoutExpired:
        return AttentionFacts({}, error=f"no answer within {timeout_seconds:.0f} s")
    except (IndexError, ValueError):
        words = [line for line in done.stderr.splitlines() if line.strip()] or [f"it ended with code {done.returncode}"]
        return AttentionFacts({}, error=words[-1].strip()[:300])
    return AttentionFacts(found["problems"], tuple(found["cudnn"]))


def check_attention(facts: AttentionFacts) -> Check:
    if facts.error:
        remedy = "python -m megatron_ktr.doctor.attention shows all of it"
        return Check("attention", False, facts.error, remedy)
    failed = {name: problem for name, problem in facts.problems.items() if problem and not problem.startswith(NOT_HERE)}
    if failed:
        detail = "; ".join(f"{name}: {problem}" for name, problem in failed.items())
        remedy = "see the check cudnn, then transformer engine; --attention-impl chooses another"
        return Check("attention", False, detail, remedy)
    right = [name for name, problem in facts.problems.items() if not problem]
    rest = [f"{name} {problem}" for name, problem in facts.problems.items() if problem]
    return Check("attention", True, "; ".join([f"{', '.join(right)} right", *rest]))


def check_cudnn(loaded: Sequence[str], *, lacking: Sequence[str] = ()) -> Check:
    """Checks that only one cuDNN is loaded. ``lacking`` are libraries that the wheel's cuDNN looks for but does not
    contain."""
    if not loaded:
        return Check("cudnn", True, "none is loaded")
    folders: dict[str, list[str]] = {}
    for path in loaded:
        folders.setdefault(str(Path(path).parent), []).append(Path(path).name)
    detail = "; ".join(f"{folder}: {', '.join(names)}" for folder, names in folders.items())
    if len(folders) > 1:
        remedy = (
            "two versions of cuDNN in one process: tools/install_gpu.sh --te makes torch's whole; unset CUDNN_HOME and "
            "take other cuDNNs off LD_LIBRARY_PATH"
        )
        return Check("cudnn", False, detail, remedy)
    advice = f"it lacks {', '.join(lacking)}; a system's may be taken: tools/install_gpu.sh --te" if lacking else ""
    return Check("cudnn", True, detail, advice)


def lacking_libraries() -> list[str]:
    folder = wheels_folder()
    return [] if folder is None else missing_libraries(folder)


def loaded_cudnn(maps: str = "/proc/self/maps") -> list[str]:
    """The files of cuDNN that are mapped into this process. Empty if the system does not list them."""
    try:
        lines = Path(maps).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith("libcudnn"))


# --- the process that tries -----------------------------------------------------------------------------------------


def try_implementation(name: str, *, device: Any) -> str:
    """The problem of one implementation, as in ``AttentionFacts.problems``."""
    import torch

    from megatron_ktr.ops.prefix_attention import choose_impl, loop_attention, prefix_attention
    from megatron_ktr.ops.prefix_attention_plan import AttentionPlan
    from megatron_ktr.types import GroupSpan, PackedLayout

    is_host = device.type == "cpu"
    if is_host and name in ("varlen", "te"):
        return f"{NOT_HERE}it runs on GPUs"
    if name == "te" and importlib.util.find_spec("transformer_engine") is None:
        return f"{NOT_HERE}Transformer Engine is not installed"
    layout = PackedLayout((GroupSpan(0, 75, (32, 17, 50)), GroupSpan(174, 40, (9, 33))))
    plan = AttentionPlan.of_layout(layout)
    dtype = torch.float32 if is_host else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(layout.num_tokens, heads, 64, generator=generator).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]
    exact_inputs = [x.detach().double().cpu().requires_grad_() for x in inputs]
    try:
        if name == "te":
            out = transformer_engine_attention(*inputs, plan=plan)
        else:
            choose_impl(inputs[0], name)  # type: ignore[arg-type]
            out = prefix_attention(*inputs, plan=plan, impl=name)  # type: ignore[arg-type]
        weight = torch.randn(out.shape, generator=generator)
        found = [out, *torch.autograd.grad(out, inputs, weight.to(out))]
        exact_out = loop_attention(*exact_inputs, plan=plan, scale=64**-0.5)
        exact = [exact_out, *torch.autograd.grad(exact_out, exact_inputs, weight.to(dtype).double())]
        off = [_relative(*pair) for pair in zip(found, exact, strict=True)]
    except Exception as error:  # a broken library may raise anything, and that is the result
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    limit = TOLERANCE[str(dtype).removeprefix("torch.")]
    return "" if max(off) <= limit else f"wrong numbers: off by {max(off):.1e} of the whole, expected {limit:g} at most"


def _relative(ours: Any, exact: Any) -> float:
    exact = exact.detach()
    return float((ours.detach().double().cpu() - exact).norm() / exact.norm())


def transformer_engine_attention(q: Any, k: Any, v: Any, *, plan: Any) -> Any:
    """``prefix_attention`` by Transformer Engine, called as the model's layers call it: in THD layout, with a causal
    mask aligned at the bottom right, and with every response behind its own copy of the prompt."""
    call, copies = plan.whole_call(q.device), plan.whole_copies(q.device)
    out = _engine_module(q.shape[1], k.shape[1], q.shape[2])(
        q,
        copies.take(k),
        copies.take(v),
        attn_mask_type=MASK,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_kv=call.cu_seqlens_kv,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_kv=call.max_seqlen_kv,
    )
    return out.view(q.shape)


@cache
def _engine_module(num_heads: int, num_key_heads: int, head_size: int) -> Any:
    """Makes the module once, so that the time of a call is that of its kernels."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]  # optional

    return te.DotProductAttention(
        num_heads, head_size, num_gqa_groups=num_key_heads, qkv_format="thd", attn_mask_type=MASK
    )


def main() -> None:
    from megatron_ktr.distributed.platform_probe import first_device

    device = first_device()
    problems = {name: try_implementation(name, device=device) for name in IMPLEMENTATIONS}
    print(json.dumps({"problems": problems, "cudnn": loaded_cudnn()}), flush=True)


if __name__ == "__main__":
    main()
