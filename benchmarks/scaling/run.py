"""The numbers, tables and figure of ``docs/scaling.md``: 7B to 72B on 8 to 1,024 GPUs, on paper.

    python benchmarks/scaling/run.py            # plans everything again (minutes): JSON, page, figure
    python benchmarks/scaling/run.py --redraw   # page and figure from the committed JSON

Nothing here is measured: ``megatron_ktr/accounting`` has the formulas, ``MACHINE`` the assumptions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.scaling.page import draw, tables  # noqa: E402
from megatron_ktr.accounting.communication import PARTS, rank_messages  # noqa: E402
from megatron_ktr.accounting.layout import Layout  # noqa: E402
from megatron_ktr.accounting.links import Machine  # noqa: E402
from megatron_ktr.accounting.memory import Memory  # noqa: E402
from megatron_ktr.accounting.planner import GB, Plan, Request, judge, layouts, memory_of  # noqa: E402
from megatron_ktr.accounting.work import StepSettings  # noqa: E402
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RESULT, PAGE, FIGURE = (
    ROOT / name
    for name in ("benchmarks/results/scaling.json", "docs/scaling.md", "docs/figures/scaling.svg")
)  # fmt: skip
BEGIN, END = "<!-- {name}: made by benchmarks/scaling/run.py -->", "<!-- end of {name} -->"

MACHINE = Machine(
    peak_tflops=989.0, efficiency=0.45, gpus_per_node=8, link_gb_per_second=360.0, network_gb_per_second=40.0
)
"""H100: NVLink 450 GB/s each way and a 400 Gb/s card for every GPU, both at 80%; kernels at 45% of dense bf16."""
GPU_MEMORY_GB = 80.0
MODELS = (("7B", 8, 32), ("32B", 64, 64), ("72B", 256, 256), ("72B", 1024, 256))
"""Size, GPUs, prompts a step."""
FRAMES = (32, 128, 512)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true", help="page and figure from the committed JSON")
    options = parser.parse_args(argv)
    if not options.redraw:
        entries = []
        for size, num_gpus, prompts in MODELS:
            for frames in FRAMES:
                entries.append(plan_entry(size, num_gpus, prompts, frames))
                print(json.dumps(entries[-1]["layout"]), flush=True)
        report = {"machine": dataclasses.asdict(MACHINE), "gpu_memory_gb": GPU_MEMORY_GB, "entries": entries}
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
    report = json.loads(RESULT.read_text())
    PAGE.write_text(with_tables(PAGE.read_text(), report))
    FIGURE.write_text(draw(report))
    return 0


def with_tables(page: str, report: dict[str, Any]) -> str:
    """The page with the tables of ``report`` between their markers."""
    for name, text in tables(report).items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def request_of(size: str, num_gpus: int, prompts: int, frames: int, **changes: Any) -> Request:
    values: dict[str, Any] = dict(
        config=PUBLISHED_CONFIGS[size],
        num_gpus=num_gpus,
        gpu_memory_gb=GPU_MEMORY_GB,
        num_frames=frames,
        prompts_per_step=prompts,
        machine=MACHINE,
    )
    return Request(**{**values, **changes})


Sized = list[tuple[Memory, Layout]]


def fitting(request: Request) -> Sized:
    sizes = ((memory_of(request, layout), layout) for layout in layouts(request))
    return [(memory, layout) for memory, layout in sizes if memory.total <= request.gpu_memory_gb * GB]


def fastest(request: Request, sizes: Sized) -> Plan:
    """Of equally fast ones the one that needs least memory."""
    plans = [judge(request, layout, memory=memory) for memory, layout in sizes]
    return min(plans, key=lambda plan: (round(plan.time.total, 6), plan.memory.total))


def plan_entry(size: str, num_gpus: int, prompts: int, frames: int) -> dict[str, Any]:
    where: dict[str, Any] = {"model": size, "gpus": num_gpus, "prompts": prompts, "frames": frames}
    found = []
    for vision_parallel in ("tensor", "frame"):
        request = request_of(size, num_gpus, prompts, frames, vision_parallel=vision_parallel)
        if sizes := fitting(request):
            found.append((request, sizes, fastest(request, sizes)))
    if not found:
        return {**where, "layout": None}
    request, sizes, plan = min(found, key=lambda one: one[2].time.total)
    return {
        **where,
        "rows": request.group.prompt_length(request.config) + request.group.num_response_tokens,
        "petaflop_per_prompt": round(request.useful_flops / 1e15, 4),
        "layout": dataclasses.asdict(plan.layout),
        "memory_gb": {name: round(value / GB, 2) for name, value in dataclasses.asdict(plan.memory).items()},
        "sent_gb": sent_gb(request, plan),
        "seconds": {name: round(value, 3) for name, value in dataclasses.asdict(plan.time).items()},
        "step_seconds": round(plan.time.total, 3),
        "bubble_fraction": round(plan.time.bubble_fraction, 4),
        "mfu": round(plan.mfu, 4),
        "gains": gains(request, sizes, plan),
    }


def sent_gb(request: Request, plan: Plan) -> dict[str, dict[str, float]]:
    """10^9 bytes that a GPU sends in a step, by part and link: of the first or the last stage, where it is more; and
    ``total``, likewise."""
    layout, settings = plan.layout, request.settings_for(plan.layout)
    found = []
    for stage in {0, layout.pipeline - 1}:
        rank = stage * (layout.num_ranks // layout.pipeline)
        sums = {part: {"node": 0.0, "network": 0.0} for part in (*PARTS, "total")}
        for message in rank_messages(
            request.config,
            [request.group],
            layout,
            rank=rank,
            num_micro_batches=request.prompts_per_step // layout.data,
            settings=settings,
        ):
            crossed = message.crossed(layout, rank=rank, gpus_per_node=request.machine.gpus_per_node)
            for part in (message.part, "total"):
                sums[part]["node"] += crossed.node / GB
                sums[part]["network"] += crossed.network / GB
        found.append(sums)
    return {
        part: {link: round(max(sums[part][link] for sums in found), 3) for link in ("node", "network")}
        for part in found[0]
    }


def gains(request: Request, sizes: Sized, plan: Plan) -> dict[str, float]:
    """How many times faster a prompt would go through, planned anew, if one limit fell; 1.0 means: no limit.

    ``sizes``: the layouts that fit as it is.
    """
    slow, endless = request.machine, 1e9
    network = dataclasses.replace(request, machine=dataclasses.replace(slow, network_gb_per_second=endless))
    links = dataclasses.replace(
        request, machine=dataclasses.replace(slow, network_gb_per_second=endless, link_gb_per_second=endless)
    )
    prompts = dataclasses.replace(request, prompts_per_step=4 * request.prompts_per_step)
    vision = dataclasses.replace(request, settings=StepSettings(frozen=frozenset({"vision", "merger"})))
    # With all the memory one could want nothing is computed twice.
    everything = [layout for layout in layouts(request) if layout.recompute == "none" and not layout.recompute_vision]
    found = {
        "memory": fastest(request, [(plan.memory, layout) for layout in everything]),
        "network": fastest(network, sizes),
        "links": fastest(links, sizes),
        "prompts": fastest(prompts, fitting(prompts)),
        "vision": fastest(vision, fitting(vision)),
    }
    times = {name: one.time.total / (1 + 3 * (name == "prompts")) for name, one in found.items()}
    return {name: round(plan.time.total / seconds, 3) for name, seconds in times.items()}


if __name__ == "__main__":
    sys.exit(main())
