"""Part ``parity`` of ``run.py``: one update's numbers on the device against the same on the host in fp32.

A small random model in Hugging Face format is written once. A process on CPU computes the reference: log-probs and
entropies of the intact view, log-probs of both counterfactual views and of the reference model, loss, gradients of
every parameter; in fp32, and in bf16, whose distance from fp32 is what 8 bits cost. Then the device computes the same
through every implementation.

Tolerances. fp32: sums in another order. bf16: twice the distance of the CPU's own bf16 pass. FP8: its 3 (e4m3) bits of
fraction against bf16's 7 make each rounding 16 times as large, e5m2 gradients 32 times; only linear layers round so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite.common import Part, Skipped, group_of, leave_kernels_untuned, release, step_config
from benchmarks.gpu_suite.smoke import checked
from benchmarks.step.ours import save_random_model
from megatron_ktr.batch.micro_batch import MicroBatch
from megatron_ktr.config.part_options import PolicyOptions, StepOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes, destroy_parallel, init_parallel
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import build_objective
from megatron_ktr.policy.policy import Policy
from megatron_ktr.step.scoring import ScoringPasses
from megatron_ktr.types import BatchFacts
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.layer_specs import resolve_transformer_impl
from models.qwen2_5_vl.media import media_spec

Numbers = dict[str, Any]
"""``logprobs``: by pass, [R]; ``loss``; ``gradients``: by published name. fp32, on the host."""

LOCAL = {"transformer_impl": "local"}
TE = {"transformer_impl": "te"}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "local fp32": {**LOCAL, "params_dtype": "fp32"},
    "local fp32, head in torch": {**LOCAL, "params_dtype": "fp32", "token_statistics_impl": "chunked"},
    "local bf16, varlen": {**LOCAL, "attention_impl": "varlen"},
    "local bf16, merged": {**LOCAL, "attention_impl": "merged"},
    "local bf16, torch": {**LOCAL, "attention_impl": "torch", "token_statistics_impl": "chunked"},
    "local bf16, recompute": {**LOCAL, **RECOMPUTE, "recompute_vision": True},
    "te bf16": TE,
    "te bf16, varlen": {**TE, "attention_impl": "varlen"},
    "te bf16, recompute": {**TE, **RECOMPUTE},
    "te fp8 tensorwise": {**TE, "fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
    "te fp8 delayed": {**TE, "fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "te fp8 blockwise": {**TE, "fp8_format": "e4m3", "fp8_recipe": "blockwise"},
    "te fp8 tensorwise, weights too": {**TE, "fp8_format": "hybrid", "fp8_param_gather": True},
}
FP32_TOLERANCE = {"logprob_mean": 1e-5, "logprob_max": 1e-4, "gradient": 1e-4, "loss": 1e-5}
"""fp32 keeps 24 bits: 6e-8 a rounding, sums of up to a thousand terms over 4 layers, backward through them."""
BF16_FACTOR = 2.0
FP8_FACTOR = {"logprob_mean": 32.0, "logprob_max": 32.0, "gradient": 32.0, "loss": 32.0}
"""Times the CPU's bf16 distance. The gradient's is a relative distance, and 1 is no agreement at all: see ``distances``
for the cosine that must hold as well."""
MIN_COSINE = {"fp32": 0.999999, "bf16": 0.995, "fp8": 0.9}


def run_parity(part: Part) -> None:
    leave_kernels_untuned(part.platform)
    with tempfile.TemporaryDirectory() as directory:
        models = Path(directory)
        save_models(models, is_tiny=part.is_tiny)
        reference: dict[str, Numbers] = {}

        def compute_reference() -> dict[str, Any]:
            reference.update(reference_in_own_process(models, is_tiny=part.is_tiny, seconds=part.seconds_left))
            return {"bf16_from_fp32": distances(reference["bf16"], reference["fp32"])}

        part.entry("reference on CPU", compute_reference)
        ranks = init_parallel(ParallelSizes(), platform=part.platform)
        for name, values in VARIANTS.items():
            part.entry(name, lambda values=values: _compare(part, ranks, models, values, reference))
        destroy_parallel()


def save_models(directory: Path, *, is_tiny: bool) -> None:
    """Policy and reference model: heads of 64, sizes that FP8 takes."""
    for seed, name in enumerate(("policy", "reference")):
        hidden_size = 128 if is_tiny else 512
        save_random_model(
            directory / name,
            vocab_size=512 if is_tiny else 4096,
            num_layers=2 if is_tiny else 4,
            hidden_size=hidden_size,
            seed=seed,
        )


def reference_in_own_process(models: Path, *, is_tiny: bool, seconds: float) -> dict[str, Numbers]:
    """megatron-core runs on one platform a process, so the host's numbers come from another, which sees no device."""
    out = models / "reference.pt"
    script = str(Path(__file__).with_name("run.py"))
    command = [sys.executable, script, "--reference", str(out), "--models", str(models), *["--tiny"] * is_tiny]
    result = subprocess.run(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=max(seconds, 1.0),
    )
    if result.returncode:
        raise UserError(f"the reference process failed: {result.stderr.strip().splitlines()[-1:]}")
    return torch.load(out, weights_only=True)


def write_reference(out: Path, models: Path, *, platform: Platform, is_tiny: bool) -> None:
    ranks = init_parallel(ParallelSizes(), platform=platform)
    numbers = {
        dtype: step_numbers(models, {"params_dtype": dtype}, ranks=ranks, platform=platform, is_tiny=is_tiny)
        for dtype in ("fp32", "bf16")
    }
    torch.save(numbers, out)
    destroy_parallel()


def step_numbers(
    models: Path, values: Mapping[str, Any], *, ranks: ParallelGroups, platform: Platform, is_tiny: bool
) -> Numbers:
    """One group through every pass, GRPO's gradient (no selection, which rounding would change)."""
    hf_dir = models / "policy"
    options = {"optimizer": "sgd", "use_distributed_optimizer": False, "kl_beta": 0.04, **values}
    config = step_config(hf_dir, platform, objective="grpo", **options)
    policy = Policy(hf_dir, options=PolicyOptions.of(config), ranks=ranks, platform=platform, num_steps=1)
    policy.add_reference(models / "reference")
    objective = build_objective(config.objective, reward=config.reward)
    model_config = Qwen2_5_VLConfig.from_hf(hf_dir)
    media = media_spec(model_config, patchify=PreprocessSettings().patchify)
    scoring = ScoringPasses(options=StepOptions.of(config), policy=policy, objective=objective, media=media)
    # Also on the device the small group: the host's bf16 pass must take seconds, not minutes.
    group = group_of(model_config, frames=4, is_tiny=True)
    batches = {view: scoring.pack((group,), view) for view in ("intact", "hidden", "shuffled")}
    logprobs = {}
    for view, batch in batches.items():
        (statistics,) = policy.score([batch])
        logprobs[view] = statistics.logprob_R.float().cpu()
        logprobs[f"entropy, {view}"] = statistics.entropy_R.float().cpu()
    (item,) = scoring.with_reference([MicroBatch((group,), batches["intact"])])
    logprobs["reference"] = item.reference_logprob_R.float().cpu()
    result = policy.backward([item], objective=objective, facts=BatchFacts(num_responses=len(group.rollouts)))
    gradients = {
        name: tensor.float().cpu().clone()
        for name, tensor in policy.export(tensor_of=lambda parameter: getattr(parameter, "main_grad", None))
    }
    return {"logprobs": logprobs, "loss": result.loss, "gradients": gradients}


def distances(ours: Numbers, exact: Numbers) -> dict[str, float]:
    """Log-probs and entropies: mean and largest difference over all passes, nats. Gradient: |g - g'| / |g'| of all
    parameters together, and the cosine. Loss: the difference."""
    differences = torch.cat([(ours["logprobs"][name] - values).abs() for name, values in exact["logprobs"].items()])
    if ours["gradients"].keys() != exact["gradients"].keys():
        raise RuntimeError(f"other parameters: {sorted(ours['gradients'].keys() ^ exact['gradients'].keys())[:4]}")
    mine, theirs = (
        torch.cat([numbers["gradients"][name].flatten().double() for name in exact["gradients"]])
        for numbers in (ours, exact)
    )
    return {
        "logprob_mean": float(differences.mean()),
        "logprob_max": float(differences.max()),
        "gradient": float((mine - theirs).norm() / theirs.norm()),
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(mine, theirs, dim=0)),
        "loss": abs(ours["loss"] - exact["loss"]),
    }


def tolerances(values: Mapping[str, Any], reference: Mapping[str, Numbers]) -> tuple[str, dict[str, float]]:
    """(precision, largest distances from the host's fp32 numbers)."""
    if values.get("params_dtype") == "fp32":
        return "fp32", FP32_TOLERANCE
    of_bf16 = distances(reference["bf16"], reference["fp32"])
    factors = FP8_FACTOR if "fp8_format" in values else dict.fromkeys(FP8_FACTOR, BF16_FACTOR)
    found = {name: factor * of_bf16[name] for name, factor in factors.items()}
    # The loss is one number whose bf16 error may be small by chance: what the log-probs allow is allowed.
    found["loss"] = max(found["loss"], found["logprob_mean"])
    return "fp8" if "fp8_format" in values else "bf16", found


def _compare(
    part: Part, ranks: ParallelGroups, models: Path, values: Mapping[str, Any], reference: Mapping[str, Numbers]
) -> dict[str, Any]:
    if not reference:
        raise Skipped("there is no reference")
    is_host = part.platform.name == "cpu"
    if values["transformer_impl"] == "te" and (is_host or resolve_transformer_impl("auto") != "te"):
        raise Skipped("Transformer Engine is not installed, or the platform cannot run it")
    if is_host and (values.get("attention_impl") == "varlen" or values.get("token_statistics_impl") == "triton"):
        raise Skipped("needs a GPU")
    try:
        ours = step_numbers(models, values, ranks=ranks, platform=part.platform, is_tiny=part.is_tiny)
    except UserError as error:
        if "fp8_format" in values:  # a recipe that this GPU lacks
            raise Skipped(str(error)) from error
        raise
    release(part.platform)
    precision, limits = tolerances(values, reference)
    found = distances(ours, reference["fp32"])
    within = all(found[name] <= limit for name, limit in limits.items())
    within = within and found["gradient_cosine"] >= MIN_COSINE[precision]
    return checked({"precision": precision, "distances": found, "limits": limits, "within": within})
