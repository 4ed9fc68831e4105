"""Memory and time of a run on paper, from its configuration (``megatron_ktr/accounting`` has the formulas)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_ktr.accounting.layout import Layout
from megatron_ktr.accounting.links import Machine
from megatron_ktr.accounting.planner import GB, PIXELS_PER_TOKEN, Plan, Request, judge
from megatron_ktr.accounting.rates import settings_of
from megatron_ktr.accounting.saved import FUSED, TORCH_CPU, TORCH_GPU, Kernels
from megatron_ktr.accounting.work import StepSettings
from megatron_ktr.config import Config
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.config.sections import TrainerSection
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.objectives import Objective
from models.qwen2_5_vl.config import Qwen2_5_VLConfig

MOST_RESPONSES = 2**16
"""Of a micro-batch. With one token each they would fill a GPU, and their arithmetic takes long."""


@dataclass(frozen=True)
class Estimate:
    """What a step of the run needs, on paper."""

    request: Request
    plan: Plan
    training_gb: float
    """On the fullest GPU while it trains, in 10^9 bytes; what waits in host memory is taken off."""
    rollout_gb: float | None
    """On the fullest GPU while a colocated engine generates; None if nothing generates on these GPUs."""
    has_time: bool
    """Whether the peak of the GPUs is known, without which there is no time."""


def estimate_run(
    config: Config, model_config: Qwen2_5_VLConfig, *, sizes: ParallelSizes, num_gpus: int, objective: Objective
) -> Estimate:
    """The estimate for prompts with the longest video that the data options allow, and responses of the most tokens.

    Raises:
        UserError: a micro-batch has more responses than any GPU could hold.
    """
    responses = config.rollout.num_generations * config.trainer.micro_batch_groups
    if responses > MOST_RESPONSES:
        raise UserError(
            f"--num-generations {config.rollout.num_generations} x --micro-batch-groups "
            f"{config.trainer.micro_batch_groups}: no GPU holds {responses} responses in one micro-batch"
        )
    request = _request(config, model_config, num_gpus=num_gpus, objective=objective)
    layout = _layout(config, sizes, num_gpus=num_gpus)
    plan = judge(request, layout)
    memory = plan.memory
    bytes_in_training = memory.total - memory.reference * config.model.offload_reference
    if config.optimizer.offload_optimizer_states:
        # Two of Adam's three fp32 numbers wait on the host; in fp32 the parameter is its own main copy.
        bytes_in_training -= memory.optimizer * (1.0 if request.kernels.bytes_per_number == 4 else 2 / 3)
    rollout = None
    if _generates_here(config):
        offloads = config.optimizer.offload_during_rollout
        rollout = (plan.rollout.peak_with_offload if offloads else plan.rollout.peak) / GB
        rollout -= memory.reference * config.model.offload_reference / GB
    has_time = config.trainer.peak_tflops is not None or request.kernels.bytes_per_number == 2
    return Estimate(request, plan, bytes_in_training / GB, rollout, has_time)


def require_fits(estimate: Estimate, trainer: TrainerSection) -> None:
    """Raises ``UserError`` if training, or an engine beside it, needs more than a GPU has."""
    plan, request, gpu_memory_gb = estimate.plan, estimate.request, trainer.dry_run_gpu_memory_gb
    gpus = f"{plan.layout.num_ranks} GPUs"
    if trainer.dry_run_gpus is None:
        gpus += ", one replica's (--dry-run-gpus says how many there are),"
    needs = {"training": estimate.training_gb, "the rollout": estimate.rollout_gb or 0.0}
    for what, needed in needs.items():
        if needed > gpu_memory_gb:
            raise UserError(
                f"on paper {what} needs {needed:.1f} GB on the fullest GPU, and --dry-run-gpu-memory-gb is "
                f"{gpu_memory_gb:g}: with {gpus} this layout does not fit "
                f"(tools/plan_parallelism.py --gpus {plan.layout.num_ranks} --gpu-memory {gpu_memory_gb:g} "
                f"--frames {request.num_frames} --prompts-per-step {request.prompts_per_step} finds those that do; "
                "docs/memory.md)"
            )


def _request(config: Config, model_config: Qwen2_5_VLConfig, *, num_gpus: int, objective: Objective) -> Request:
    data, trainer = config.data, config.trainer
    frames = data.video_num_frames or data.video_max_frames
    defaults = Machine()
    is_hf = config.rollout.engine == "hf" and config.has_engine
    has_vllm = config.rollout.engine == "vllm_colocated" and config.has_engine
    request = Request(
        config=model_config,
        num_gpus=num_gpus,
        gpu_memory_gb=trainer.dry_run_gpu_memory_gb,
        num_frames=frames,
        pixels_per_frame=max(PIXELS_PER_TOKEN, min(data.video_max_pixels, 2 * data.video_total_pixels // frames)),
        response_length=config.rollout.max_response_length,
        num_generations=1 if config.objective.is_supervised else config.rollout.num_generations,
        num_shuffled=config.rollout.num_shuffled if config.samples else 0,
        prompts_per_step=trainer.prompts_per_step,
        micro_batch_groups=trainer.micro_batch_groups,
        vision_cache_gb=config.parallel.vision_cache_gb,
        settings=_settings(config, objective),
        machine=dataclasses.replace(defaults, peak_tflops=trainer.peak_tflops or defaults.peak_tflops),
        kernels=_kernels(config),
        vision_parallel=config.parallel.vision_parallel,
        engine="hf" if is_hf else "vllm_colocated",
        engine_gb=Request.engine_gb if has_vllm else 0.0,
        engine_share=config.rollout.rollout_memory_share if has_vllm else 0.0,
    )
    if trainer.max_tokens_per_microbatch is None:
        return request
    group_tokens = request.group.prompt_length(model_config) + request.group.num_response_tokens
    groups = min(trainer.prompts_per_step, max(1, trainer.max_tokens_per_microbatch // group_tokens))
    return dataclasses.replace(request, micro_batch_groups=groups)


def _settings(config: Config, objective: Objective) -> StepSettings:
    model = config.model
    return dataclasses.replace(
        settings_of(StepOptions.of(config), objective),
        compares_distributions=objective.needs_kl,
        has_streamed_head=model.token_statistics_impl != "naive",
        trains_in_fp8=model.fp8_format is not None,
        scores_in_fp8=model.fp8_format is None and config.objective.scoring_precision == "fp8",
        keeps_fp8_weights=model.fp8_param_gather,
        has_fp8_vision=model.fp8_vision,
    )


def _kernels(config: Config) -> Kernels:
    model = config.model
    number_bytes = 4 if model.params_dtype == "fp32" else 2
    if config.trainer.platform == "cpu":
        kernels = TORCH_CPU
    else:
        kernels = TORCH_GPU if model.transformer_impl == "local" else FUSED
    return dataclasses.replace(kernels, bytes_per_number=number_bytes)


def _layout(config: Config, sizes: ParallelSizes, *, num_gpus: int) -> Layout:
    parallel = config.parallel
    return Layout(
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        context=sizes.context,
        data=num_gpus // sizes.model,
        virtual=sizes.virtual_pipeline or 1,
        sequence_parallel=sizes.sequence_parallel,
        recompute=parallel.recompute_granularity or "none",
        recompute_vision=parallel.recompute_vision,
        mlp_chunks=parallel.mlp_chunks,
        vision_parallel=parallel.vision_parallel,
        uses_distributed_optimizer=config.optimizer.use_distributed_optimizer,
    )


def _generates_here(config: Config) -> bool:
    """Of steps, or of evaluation: an engine that only answers held-out questions takes its memory, too."""
    return config.has_engine and config.rollout.engine in ("hf", "vllm_colocated")
