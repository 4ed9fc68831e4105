"""Checks that refuse a run before any process waits for another and before any weight is read.

``config/checks.py`` holds the rules between options. This file checks options against the model's sizes and the number
of ranks. The checks need only arithmetic, the model's small files and the headers of its weights, so every rank gets
the same answer by itself. They also work before the ranks exist, because ``world_size`` is an argument.
"""

from __future__ import annotations

import contextlib
import os

from megatron_ktr.config import Config
from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.config.pipeline_split import virtual_stages
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.distributed.groups import ParallelSizes, check_sizes
from megatron_ktr.errors import UserError
from megatron_ktr.files.chat_template import read_chat_template
from megatron_ktr.objectives import Objective, build_objective
from megatron_ktr.policy.policy import DTYPES
from megatron_ktr.rewards import Rewarder, RewardOptions
from megatron_ktr.rollout.colocated.layout import require_vllm, share_groups
from megatron_ktr.run.directory import check_run_directory
from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig
from models.qwen2_5_vl.hf_weights import open_hf_weights
from models.qwen2_5_vl.transformer_config import language_transformer_config


def parallel_sizes(config: Config, *, num_layers: int) -> ParallelSizes:
    """Sizes for the process groups; virtual pipeline chunks are counted from the layers of one chunk."""
    parallel = config.parallel
    return ParallelSizes(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        virtual_pipeline=virtual_stages(num_layers, options=parallel),
        sequence_parallel=parallel.sequence_parallel,
    )


def check_layout(config: Config, model_config: Qwen2_5_VLConfig, *, world_size: int) -> ParallelSizes:
    """The run's parallel sizes. The platform has been started.

    Raises:
        UserError: the ranks, layers, heads or prompts of a step cannot be split by the sizes, or a kernel or precision
            is not available here.
    """
    sizes = parallel_sizes(config, num_layers=model_config.text.num_hidden_layers)
    check_sizes(sizes, world_size=world_size)
    language_transformer_config(
        model_config, sizes=sizes, dtype=DTYPES[config.model.params_dtype], options=ModelOptions.of(config)
    )
    if config.has_engine and config.rollout.engine == "vllm_colocated":
        share_groups(sizes, world_size=world_size, engine_size=config.rollout.rollout_tensor_parallel_size)
    return sizes


def restart_notes(*, resumes: bool) -> list[str]:
    """What the user should know about restarts. ``resumes`` says that the run has ``--resume`` or ``--auto-resume``."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "").strip()
    if resumes or not restarts.isdecimal() or not int(restarts):
        return []
    return [
        f"restarts: the launcher may start the ranks again (--max-restarts {restarts}), but they would find a run "
        "directory that is not empty, and end: give --auto-resume"
    ]


def check_micro_batches(config: Config, *, sizes: ParallelSizes, data_size: int) -> None:
    """Refuses prompts that do not make whole micro-batches, and numbers of micro-batches that megatron-core's
    interleaved schedule would refuse in the first step."""
    prompts = config.trainer.prompts_per_replica(data_size)
    mini_batches = config.objective.mini_batches
    unit = mini_batches * config.trainer.micro_batch_groups
    if mini_batches > 1 and prompts % unit:
        raise UserError(
            f"--mini-batches {mini_batches} needs prompts for every replica in each: {prompts} prompts per replica "
            f"(--prompts-per-step {config.trainer.prompts_per_step} / data-parallel size {data_size}) must be a "
            f"multiple of {mini_batches} x --micro-batch-groups {config.trainer.micro_batch_groups} = {unit}"
        )
    prompts //= mini_batches
    number = -(-prompts // config.trainer.micro_batch_groups)
    if (sizes.virtual_pipeline or 1) > 1 and number % sizes.pipeline:
        raise UserError(
            f"interleaved pipeline stages (--num-layers-per-virtual-pipeline-stage, "
            f"--num-virtual-stages-per-pipeline-rank) need a multiple of {sizes.pipeline} (pipeline stages) "
            f"micro-batches per replica and optimizer step, got {number} = {prompts} prompts / --micro-batch-groups "
            f"{config.trainer.micro_batch_groups}"
        )


def check_files(config: Config, *, world_size: int) -> tuple[ParallelSizes, Objective]:
    """All checks that need neither a platform nor other ranks: sizes, the model's files, the run directory, packages of
    engines, the objective and the rewards. No weight is read, and no device is touched. Loading the rewards may run the
    user's own code, in processes that see no device.

    Raises:
        UserError: names the first thing that is wrong.
    """
    check_run_directory(config)
    if config.data.chat_template is not None:
        read_chat_template(config.data.chat_template)
    model_config = Qwen2_5_VLConfig.from_hf(config.model.model)
    sizes = parallel_sizes(config, num_layers=model_config.text.num_hidden_layers)
    check_sizes(sizes, world_size=world_size)
    check_micro_batches(config, sizes=sizes, data_size=world_size // sizes.model)
    if config.has_engine and config.rollout.engine == "vllm_colocated":
        require_vllm()
        share_groups(sizes, world_size=world_size, engine_size=config.rollout.rollout_tensor_parallel_size)
    # This checks the tensors' names and shapes, from the headers of the files.
    open_hf_weights(config.model.model, config=model_config)
    check_patches(PreprocessSettings.from_model(config.model.model), model_config.vision)
    return sizes, check_objective(config)


def check_run(config: Config, *, world_size: int) -> tuple[ParallelSizes, Objective]:
    """``check_files`` and ``check_layout``, for those who have started the platform already."""
    found = check_files(config, world_size=world_size)
    check_layout(config, Qwen2_5_VLConfig.from_hf(config.model.model), world_size=world_size)
    return found


def check_objective(config: Config) -> Objective:
    """The run's objective, after all of its rewards could be loaded. That may run the user's own code.

    Raises:
        UserError: a reward cannot be loaded, or a setting of the objective is out of range.
    """
    if config.samples:
        options = RewardOptions(config.reward, config.rollout.max_response_length)
        with contextlib.closing(Rewarder(options)) as rewarder:
            rewarder.load(config.reward.reward_functions)
            for source in config.data.sources:
                rewarder.load(source.reward_functions or ())
    return build_objective(config.objective, reward=config.reward, rollout=config.rollout)


def check_patches(settings: PreprocessSettings, vision: VisionConfig) -> None:
    """Refuses patch sizes in the preprocessor files that differ from those the encoder was built for."""
    names = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size"}
    names |= {"merge_size": "spatial_merge_size"}
    for ours, theirs in names.items():
        if getattr(settings, ours) != getattr(vision, theirs):
            raise UserError(
                f"model: {ours} is {getattr(settings, ours)} in the preprocessor files, and {theirs} "
                f"{getattr(vision, theirs)} in config.json: the encoder could not read such patches"
            )
