"""What the parts of ``run.py`` share: entries that may fail alone, timing by device events, models and groups."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.config import Config, config_from_values
from megatron_ktr.data.random_groups import SyntheticSizes, TokenIds, synthetic_group
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.types import RolloutGroup
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS, to_hf_config

NUM_RESPONSES = 8
PEAK_TFLOPS = 989.0
"""Dense bf16 peak of an H100 or H200 (SXM)."""


class Skipped(Exception):
    """An entry that cannot run here, with the reason; no failure."""


@dataclass
class Part:
    """One part of the suite inside its own process. Entries are written as they come: a crash keeps those before it."""

    platform: Platform
    is_tiny: bool
    results: Path
    deadline: float
    """``time.monotonic()`` after which no entry is begun."""

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def entry(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
        """Runs ``measure`` and writes what it returns; its error, and an entry begun too late, are recorded too."""
        begin = time.monotonic()
        found: dict[str, Any] | None = None
        try:
            if self.seconds_left <= 0:
                raise Skipped("out of time")
            found = dict(measure())
            line = {"name": name, **found}
        except Skipped as reason:
            line = {"name": name, "skipped": str(reason)}
        except Exception as error:
            line = {"name": name, "error": error_line(error)}
        line["seconds"] = round(time.monotonic() - begin, 2)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        release(self.platform)
        return found


def leave_kernels_untuned(platform: Platform) -> None:
    """Tuning the vocabulary head takes a minute for each hidden size; only the part that measures it can spend that."""
    if platform.name != "cpu":
        from megatron_ktr.ops.token_statistics_triton import leave_untuned

        leave_untuned()


def error_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def release(platform: Platform) -> None:
    """Frees what an entry left behind, a failed one too."""
    gc.collect()
    platform.empty_cache()


def timed(function: Callable[[], Any], platform: Platform, *, repeats: int = 3) -> dict[str, Any]:
    """Median and all seconds of ``repeats`` calls after one that warms up (compiles, tunes); peak memory of them.

    By device events around each call; on CPU by the clock.
    """
    function()
    platform.synchronize()
    platform.empty_cache()
    platform.reset_peak_memory()
    seconds = [one_call(function, platform) for _ in range(repeats)]
    return {
        "median_seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "peak_memory_gb": platform.peak_memory_bytes() / 1e9,
    }


def one_call(function: Callable[[], Any], platform: Platform) -> float:
    if platform.name == "cpu":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    device = torch.get_device_module(platform.device)
    begin, end = device.Event(enable_timing=True), device.Event(enable_timing=True)
    platform.synchronize()
    begin.record()
    function()
    end.record()
    platform.synchronize()
    return begin.elapsed_time(end) / 1e3


def device_bytes(platform: Platform) -> float:
    """Memory of the device; on CPU what a tiny run may take."""
    if platform.name == "cpu":
        return 4e9
    return float(torch.get_device_module(platform.device).get_device_properties(platform.device).total_memory)


def published_shape(size: str, *, num_layers: int, is_tiny: bool) -> Qwen2_5_VLConfig:
    """The published model ``size`` with fewer layers; tiny: its kind with all sizes small."""
    config = PUBLISHED_CONFIGS[size]
    if not is_tiny:
        return dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=num_layers))
    text = dataclasses.replace(
        config.text,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=min(num_layers, 2),
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(2, 3, 3),
    )
    vision = dataclasses.replace(
        config.vision, depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64
    )
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), range(500, 504), strict=True))
    ids = {f"{name}_token_id": value for name, value in ids.items()}
    return dataclasses.replace(config, text=text, vision=dataclasses.replace(vision, fullatt_block_indexes=(1,)), **ids)


def model_directory(config: Qwen2_5_VLConfig, directory: Path) -> Path:
    """``directory`` with the model's ``config.json`` and no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_hf_config(config)), encoding="utf-8")
    return directory


def step_config(hf_dir: Path, platform: Platform, **values: Any) -> Config:
    """One prompt group a step on one device, the paper's settings, ``values`` over them."""
    return config_from_values(
        {
            "model": str(hf_dir),
            "platform": platform.name,
            "params_dtype": "bf16",
            "prompts_per_step": 1,
            "num_generations": NUM_RESPONSES,
            "length_bonus": 0.0,
            "peak_tflops": PEAK_TFLOPS,
            **values,
        }
    )


def group_of(config: Qwen2_5_VLConfig, *, frames: int, is_tiny: bool, seed: int = 0) -> RolloutGroup:
    """A video of ``frames`` frames of 128 visual tokens a pair, and 8 responses of 768 tokens."""
    sizes = (
        SyntheticSizes(4, 56, 56, 12, (6,) * NUM_RESPONSES)
        if is_tiny
        else SyntheticSizes(frames, 224, 448, 200, (768,) * NUM_RESPONSES)
    )
    tokens = TokenIds.of(config)
    return synthetic_group(sizes, tokens=tokens, seed=seed)
