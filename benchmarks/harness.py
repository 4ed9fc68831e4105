"""What the benchmarks share: measurements in fresh processes, peaks of memory, files of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.distributed.platform import Platform
from megatron_ktr.errors import UserError
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.json_files import to_json


def in_fresh_process(script: str, job: dict[str, Any]) -> Any:
    """What ``script --job JSON`` prints on its last line, parsed. Its messages go to our stderr."""
    command = [sys.executable, script, "--job", json.dumps(job)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    if result.returncode:
        raise UserError(f"measurement failed (exit status {result.returncode}): {job}")
    return json.loads(result.stdout.splitlines()[-1])


def extra_peak_bytes(run: Callable[[], Any], *, platform: Platform) -> int:
    """Peak of memory while ``run`` runs, beside what was there before: the allocator's on a GPU, resident memory of the
    process on CPU. For a fresh process."""
    platform.empty_cache()
    platform.reset_peak_memory()
    before = platform.peak_memory_bytes()
    run()
    platform.synchronize()
    return platform.peak_memory_bytes() - before


def allocated_peak_bytes(run: Callable[[], Any]) -> int:
    """Peak of what ``run`` holds of torch's CPU allocator, beside what was there before; tells tensors from what the
    process keeps of freed memory. The records of the profiler are no tensors."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(records, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def write_report(report: dict[str, Any], *, out: Path | None, figure: Path | None, draw: Callable) -> str:
    """The report as JSON text, also in the files that were asked for."""
    text = to_json(report, indent=1)
    if out is not None:
        _write(out, text + "\n")
    if figure is not None:
        _write(figure, draw(report))
    return text


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(path: Path, content: str) -> None:
    """Replaces the file whole: a benchmark that is stopped leaves the last complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
