"""What a measurement was taken on."""

from __future__ import annotations

import platform as host
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.distributed.platform import Platform


def about_machine(platform: Platform) -> dict[str, Any]:
    """Device, processor, threads and version of torch, as JSON takes them."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "device": platform.name,
        "processor": names[0] if names else host.processor() or host.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
