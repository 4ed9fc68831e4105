"""Parts ``step`` and ``training`` of ``run.py``: passes of one update at the published sizes, and a short run.

``step``: random weights, as many layers as fit beside one prompt group (32 or 64 frames, 8 responses of 768 tokens)
without recomputing them; the encoder does run again in backward, which is not credited. Each pass by itself: policy
forward and backward, the two counterfactual views, the reference model's forward; arithmetic from
``megatron_ktr/accounting`` over the seconds. ``baseline``: a whole step, optimizer included, against the same step on
Hugging Face's model (``benchmarks/step/baseline.py``), with few layers, since it needs much more memory. ``training``:
ten steps on recorded (synthetic) responses, everything on.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite.common import (
    NUM_RESPONSES,
    PEAK_TFLOPS,
    Part,
    Skipped,
    device_bytes,
    group_of,
    leave_kernels_untuned,
    model_directory,
    published_shape,
    release,
    step_config,
    timed,
)
from megatron_ktr.accounting.flops import count_step
from megatron_ktr.accounting.layout import Layout
from megatron_ktr.accounting.memory import BytesBeside, estimate_memory
from megatron_ktr.accounting.saved import TORCH_GPU
from megatron_ktr.accounting.work import GroupWork, StepSettings
from megatron_ktr.batch.micro_batch import MicroBatch
from megatron_ktr.config.part_options import PolicyOptions, StepOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.random_groups import FixedSource
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes, init_parallel
from megatron_ktr.objectives import build_objective
from megatron_ktr.step.scoring import ScoringPasses
from megatron_ktr.trainer import Trainer
from megatron_ktr.types import BatchFacts, RolloutGroup
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.layer_specs import resolve_transformer_impl
from models.qwen2_5_vl.media import media_spec
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tools.benchmark_throughput import RandomPolicy

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FP8 = {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"}
RESERVED_BYTES = 6e9
"""Device context, libraries' workspaces, fragmentation."""
BASELINE_LAYERS = 4
NUM_TRAINING_STEPS = 10


def measure_steps(part: Part) -> None:
    leave_kernels_untuned(part.platform)
    ranks = init_parallel(ParallelSizes(), platform=part.platform)
    has_te = resolve_transformer_impl("auto") == "te"
    for size in ("3B", "7B"):
        for frames in (32, 64):
            for precision, values in (("bf16", {}), ("fp8", FP8)):

                def measure(size: str = size, frames: int = frames, values: Mapping[str, Any] = values) -> Any:
                    if values and not has_te:
                        raise Skipped("FP8 needs Transformer Engine")
                    return _with_fewer_layers(part, ranks, size=size, frames=frames, values=values)

                part.entry(f"{size} {frames} frames {precision}", measure)
    part.entry("baseline 3B 32 frames", lambda: _against_baseline(part, ranks))


def run_training(part: Part) -> None:
    leave_kernels_untuned(part.platform)
    ranks = init_parallel(ParallelSizes(), platform=part.platform)
    part.entry("3B 10 steps", lambda: _train(part, ranks))


@dataclass(frozen=True)
class Passes:
    """One prompt group on its way through the passes of a step."""

    run: dict[str, Callable[[], Any]]
    operations: dict[str, float]


def _with_fewer_layers(
    part: Part, ranks: ParallelGroups, *, size: str, frames: int, values: Mapping[str, Any]
) -> dict[str, Any]:
    """The estimate of what fits may err: three quarters of the layers are tried after it, twice."""
    num_layers = layers_that_fit(part, size, frames=frames, has_optimizer=False)
    for _ in range(2):
        try:
            return _measure_passes(part, ranks, size=size, frames=frames, num_layers=num_layers, values=values)
        except torch.OutOfMemoryError:
            num_layers = max(1, num_layers * 3 // 4)
        release(part.platform)
    return _measure_passes(part, ranks, size=size, frames=frames, num_layers=num_layers, values=values)


def layers_that_fit(part: Part, size: str, *, frames: int, has_optimizer: bool, recompute: str = "none") -> int:
    """Most layers of the language model with which a step fits the device, at least one."""
    for num_layers in range(PUBLISHED_CONFIGS[size].text.num_hidden_layers, 1, -1):
        config = published_shape(size, num_layers=num_layers, is_tiny=part.is_tiny)
        work = GroupWork.of(group_of(config, frames=2, is_tiny=True), config=config)
        if not part.is_tiny:
            work = GroupWork(200, (768,) * NUM_RESPONSES, ((frames // 2, 16, 32),))
        memory = estimate_memory(
            config,
            [work],
            Layout(recompute=recompute, recompute_vision=True),
            rank=0,
            num_micro_batches=1,
            settings=StepSettings(recompute=recompute, recompute_vision=True, has_reference=has_optimizer),
            kernels=TORCH_GPU,
            beside=BytesBeside(reserved=RESERVED_BYTES if not part.is_tiny else 0.0),
        )
        # Without an optimizer's moments: of its 12 bytes a parameter 4, the fp32 copy.
        unused = 0.0 if has_optimizer else memory.optimizer * 8 / 12
        if memory.total - unused <= 0.9 * device_bytes(part.platform):
            return num_layers
    return 1


def _measure_passes(
    part: Part, ranks: ParallelGroups, *, size: str, frames: int, num_layers: int, values: Mapping[str, Any]
) -> dict[str, Any]:
    model_config = published_shape(size, num_layers=num_layers, is_tiny=part.is_tiny)
    group = group_of(model_config, frames=frames, is_tiny=part.is_tiny)
    with tempfile.TemporaryDirectory() as directory:
        passes = _build_passes(part, ranks, model_config, group, directory=Path(directory), values=values)
    found: dict[str, Any] = {
        "num_layers": model_config.text.num_hidden_layers,
        "tokens": group.num_tokens,
        "prompt_tokens": len(group.prompt.token_ids),
        "passes": {},
    }
    for name, run in passes.run.items():
        numbers = timed(run, part.platform, repeats=2 if part.is_tiny else 3)
        rate = passes.operations[name] / numbers["median_seconds"] / 1e12
        found["passes"][name] = numbers | {"tflops": rate, "mfu": rate / PEAK_TFLOPS}
    return found


def _build_passes(
    part: Part,
    ranks: ParallelGroups,
    model_config: Qwen2_5_VLConfig,
    group: RolloutGroup,
    *,
    directory: Path,
    values: Mapping[str, Any],
) -> Passes:
    # SGD without the distributed optimizer: no moments, so that more layers fit; the optimizer does not run here.
    options = {"optimizer": "sgd", "use_distributed_optimizer": False, "recompute_vision": True, **values}
    hf_dir = model_directory(model_config, directory)
    config = step_config(hf_dir, part.platform, **options)
    policy = RandomPolicy(hf_dir, options=PolicyOptions.of(config), ranks=ranks, platform=part.platform, num_steps=1)
    objective = build_objective(step_config(hf_dir, part.platform, objective="grpo", kl_beta=0.0).objective)
    media = media_spec(model_config, patchify=PreprocessSettings().patchify)
    scoring = ScoringPasses(options=StepOptions.of(config), policy=policy, objective=objective, media=media)
    item = MicroBatch((group,), scoring.pack((group,), "intact"))
    views = {view: scoring.pack((group,), view) for view in ("hidden", "shuffled")}

    def score(batch: Any) -> None:
        # Every view runs its encoder, as in a real step, where only the intact one's features are shared.
        policy.vision.after_step()
        policy.score([batch])

    def update() -> None:
        policy.vision.after_step()
        policy.backward([item], objective=objective, facts=BatchFacts(num_responses=NUM_RESPONSES))

    settings = StepSettings(has_streamed_head=False, has_reference=True)
    flops = count_step(model_config, [GroupWork.of(group, config=model_config)], settings=settings)
    return Passes(
        run={
            "hidden": lambda: score(views["hidden"]),
            "shuffled": lambda: score(views["shuffled"]),
            "reference": lambda: score(item.batch),
            "forward_backward": update,
        },
        operations={
            **{name: flops.of(name) for name in ("hidden", "shuffled")},
            # The intact view without gradient, by the policy's weights: the same work as by the reference model's.
            "reference": flops.of("reference"),
            "forward_backward": flops.of("policy_forward", "policy_backward"),
        },
    )


def build_trainer(part: Part, ranks: ParallelGroups, hf_dir: Path, **values: Any) -> Trainer:
    config = step_config(hf_dir, part.platform, **values)
    objective = build_objective(config.objective, reward=config.reward)
    policy = RandomPolicy(
        hf_dir,
        options=PolicyOptions.of(config),
        ranks=ranks,
        platform=part.platform,
        num_steps=config.trainer.train_steps,
    )
    policy.add_reference()
    media = media_spec(policy.model_config, patchify=PreprocessSettings().patchify)
    return Trainer(
        options=StepOptions.of(config), policy=policy, source=FixedSource([]), objective=objective, media=media
    )


def _train(part: Part, ranks: ParallelGroups) -> dict[str, Any]:
    """Every step on one of three groups in turn; numbers of each step."""
    num_layers = layers_that_fit(part, "3B", frames=32, has_optimizer=True, recompute="full")
    model_config = published_shape("3B", num_layers=num_layers, is_tiny=part.is_tiny)
    with tempfile.TemporaryDirectory() as directory:
        hf_dir = model_directory(model_config, Path(directory))
        trainer = build_trainer(
            part, ranks, hf_dir, train_steps=NUM_TRAINING_STEPS, lr=1e-4, recompute_vision=True, **RECOMPUTE
        )
    recorded = [group_of(model_config, frames=32, is_tiny=part.is_tiny, seed=seed) for seed in range(3)]
    parameter = next(p for p in trainer.policy.chunks[0].parameters() if p.requires_grad and p.dim() > 1)
    before = parameter.detach().clone()
    steps = []
    part.platform.reset_peak_memory()
    for step in range(1, NUM_TRAINING_STEPS + 1):
        trainer.source.groups = [recorded[step % len(recorded)]]
        values = trainer.train_step(step).values
        kept = ("loss", "grad_norm", "kl", "key_token_ratio", "tokens_per_second", "tflops_per_gpu", "mfu")
        numbers = {name: values[name] for name in kept}
        numbers["step_seconds"] = sum(value for name, value in values.items() if name.startswith("seconds/"))
        if not all(math.isfinite(value) for value in numbers.values()):
            raise RuntimeError(f"step {step} has a number that is not finite: {numbers}")
        steps.append(numbers)
    if torch.equal(before, parameter.detach()):
        raise RuntimeError("the weights have not moved")
    return {
        "num_layers": model_config.text.num_hidden_layers,
        "transformer_impl": resolve_transformer_impl("auto"),
        "peak_memory_gb": part.platform.peak_memory_bytes() / 1e9,
        "steps": steps,
    }


def _against_baseline(part: Part, ranks: ParallelGroups) -> dict[str, Any]:
    """Seconds and peak of a whole step on both sides, from packing to the changed weights."""
    from benchmarks.gpu_suite.baseline import DeviceBaseline

    model_config = published_shape("3B", num_layers=BASELINE_LAYERS, is_tiny=part.is_tiny)
    group = group_of(model_config, frames=32, is_tiny=part.is_tiny)
    found: dict[str, Any] = {"num_layers": model_config.text.num_hidden_layers, "tokens": group.num_tokens}
    with tempfile.TemporaryDirectory() as directory:
        hf_dir = model_directory(model_config, Path(directory))
        found["ours"] = _time_our_steps(part, ranks, hf_dir, group)
        release(part.platform)
        baseline = DeviceBaseline(hf_dir, platform=part.platform)
        found["baseline"] = timed(lambda: baseline.step_on_device(group), part.platform)
    found["speedup"] = found["baseline"]["median_seconds"] / found["ours"]["median_seconds"]
    return found


def _time_our_steps(part: Part, ranks: ParallelGroups, hf_dir: Path, group: RolloutGroup) -> dict[str, Any]:
    # Layers and encoder are run again in backward, as the baseline's are.
    trainer = build_trainer(part, ranks, hf_dir, train_steps=100, recompute_vision=True, **RECOMPUTE)
    trainer.source.groups = [group]
    steps = iter(range(1, 100))
    return timed(lambda: trainer.train_step(next(steps)), part.platform)
