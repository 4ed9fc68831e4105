"""Part ``positions`` of ``run.py``: log-probs of one long response against Hugging Face's model in fp32.

Rotary angles grow with the position. Computed in bf16 they are off by whole radians from a few hundred on, and only a
long sequence shows it. So a response of 6,000 tokens is scored on the device by every implementation, and the error is
given for each quarter of it: in fp32 it is rounding everywhere, in bf16 the last quarter's is no larger than twice the
first's, and no larger than twice that of Hugging Face's model in bf16.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from benchmarks.gpu_suite.common import Part, Skipped, leave_kernels_untuned, release, step_config
from benchmarks.gpu_suite.parity import save_models
from benchmarks.gpu_suite.smoke import checked
from benchmarks.step.baseline import continued, patches, video_positions
from megatron_ktr.config.part_options import PolicyOptions, StepOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.random_groups import SyntheticSizes, TokenIds, synthetic_group
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes, destroy_parallel, init_parallel
from megatron_ktr.objectives import build_objective
from megatron_ktr.policy.policy import Policy
from megatron_ktr.step.scoring import ScoringPasses
from megatron_ktr.types import RolloutGroup
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.layer_specs import resolve_transformer_impl
from models.qwen2_5_vl.media import media_spec

LENGTH = 6000
VARIANTS: dict[str, dict[str, Any]] = {
    "local fp32": {"transformer_impl": "local", "params_dtype": "fp32"},
    "local bf16, merged": {"transformer_impl": "local", "attention_impl": "merged"},
    "local bf16, varlen": {"transformer_impl": "local", "attention_impl": "varlen"},
    "te bf16": {"transformer_impl": "te"},
}
FP32_TOLERANCE = 1e-3
"""Nats, the mean of a quarter: sums over 6,000 keys in another order."""
BF16_FACTOR = 2.0


def run_positions(part: Part) -> None:
    leave_kernels_untuned(part.platform)
    with tempfile.TemporaryDirectory() as directory:
        save_models(Path(directory), is_tiny=part.is_tiny)
        hf_dir = Path(directory) / "policy"
        group = long_group(Qwen2_5_VLConfig.from_hf(hf_dir), length=96 if part.is_tiny else LENGTH)
        exact: dict[str, Tensor] = {}

        def reference() -> dict[str, Any]:
            for dtype in (torch.float32, torch.bfloat16):
                exact[str(dtype)] = hugging_face_logprobs(part, hf_dir, group, dtype=dtype)
                release(part.platform)
            return {"bf16_error_by_quarter": quarters(exact["torch.bfloat16"] - exact["torch.float32"])}

        part.entry("hugging face", reference)
        ranks = init_parallel(ParallelSizes(), platform=part.platform)
        for name, values in VARIANTS.items():
            part.entry(name, lambda values=values: _compare(part, ranks, hf_dir, group, values, exact))
        destroy_parallel()


def long_group(config: Qwen2_5_VLConfig, *, length: int) -> RolloutGroup:
    """A small video, and one response of ``length`` random tokens."""
    tokens = TokenIds.of(config)
    return synthetic_group(SyntheticSizes(4, 56, 56, 12, (length,)), tokens=tokens, seed=0)


@torch.no_grad()
def hugging_face_logprobs(part: Part, hf_dir: Path, group: RolloutGroup, *, dtype: torch.dtype) -> Tensor:
    """Log-probs [R] of the response, on the host in fp32."""
    model = HFModel.from_pretrained(hf_dir, dtype=dtype, attn_implementation="sdpa").to(part.platform.device).eval()
    (video,), (rollout,) = group.prompt.media, group.rollouts
    with torch.device(part.platform.device):
        video = dataclasses.replace(video, frames_FCHW=video.frames_FCHW.to(part.platform.device))
        token_L = torch.tensor([*group.prompt.token_ids, *rollout.token_ids])
        logits_LV = model(
            input_ids=token_L[None],
            position_ids=continued(video_positions(model, group), len(rollout.token_ids))[:, None],
            pixel_values_videos=patches(video.frames_FCHW).to(dtype),
            video_grid_thw=torch.tensor([video.grid_thw]),
            use_cache=False,
        ).logits[0]
    first = len(group.prompt.token_ids)
    logprob_RV = logits_LV[first - 1 : -1].float().log_softmax(dim=-1)
    return logprob_RV.gather(1, token_L[first:, None])[:, 0].cpu()


def quarters(difference_R: Tensor) -> list[float]:
    """Mean absolute difference of each quarter of the response, nats."""
    return [float(part.abs().mean()) for part in difference_R.tensor_split(4)]


def _compare(
    part: Part,
    ranks: ParallelGroups,
    hf_dir: Path,
    group: RolloutGroup,
    values: Mapping[str, Any],
    exact: Mapping[str, Tensor],
) -> dict[str, Any]:
    is_host = part.platform.name == "cpu"
    if len(exact) < 2:
        raise Skipped("there is no reference")
    if values["transformer_impl"] == "te" and (is_host or resolve_transformer_impl("auto") != "te"):
        raise Skipped("Transformer Engine is not installed, or the platform cannot run it")
    if is_host and values.get("attention_impl") == "varlen":
        raise Skipped("needs a GPU")
    options = {"objective": "grpo", "kl_beta": 0.0, "optimizer": "sgd", "use_distributed_optimizer": False, **values}
    config = step_config(hf_dir, part.platform, num_generations=len(group.rollouts), **options)
    policy = Policy(hf_dir, options=PolicyOptions.of(config), ranks=ranks, platform=part.platform, num_steps=1)
    objective = build_objective(config.objective, reward=config.reward)
    media = media_spec(policy.model_config, patchify=PreprocessSettings().patchify)
    scoring = ScoringPasses(options=StepOptions.of(config), policy=policy, objective=objective, media=media)
    (statistics,) = policy.score([scoring.pack((group,), "intact")])
    found = quarters(statistics.logprob_R.float().cpu() - exact["torch.float32"])
    if values.get("params_dtype") == "fp32":
        return checked({"error_by_quarter": found, "within": max(found) <= FP32_TOLERANCE})
    theirs = quarters(exact["torch.bfloat16"] - exact["torch.float32"])
    within = found[-1] <= BF16_FACTOR * min(found[0], theirs[-1])
    return checked({"error_by_quarter": found, "hugging_face": theirs, "within": within})
