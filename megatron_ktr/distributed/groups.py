"""All process groups of a rank in one object, made once from the sizes of every parallel dimension.

Ranks are numbered as megatron-core does by default: tensor varies fastest, then context, (expert,) data, and pipeline.
Example with 8 ranks, tensor 2 and pipeline 2: rank 5 is tensor rank 1, data rank 0, pipeline rank 1.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from megatron_ktr.distributed import rendezvous
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.errors import UserError


@dataclass(frozen=True)
class ParallelSizes:
    """The size of every parallel dimension. The data-parallel size is the world size divided by ``model``."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    virtual_pipeline: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); None or 1 means no interleaving."""
    sequence_parallel: bool = False
    expert: int = 1

    @property
    def model(self) -> int:
        """The number of ranks of one replica."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups that this rank belongs to. A group exists even if it has one rank only, so that a single
    process runs the same code."""

    sizes: ParallelSizes
    rank: int
    world_size: int
    tensor: ProcessGroup
    pipeline: ProcessGroup
    context: ProcessGroup
    tensor_context: ProcessGroup
    """``tensor`` x ``context``: the ranks that hold parts of the same sequences on one stage."""
    alone: ProcessGroup
    """This rank by itself, for modules that are whole on every rank."""
    data: ProcessGroup
    """The ranks with the same tensor, pipeline and context rank in all replicas."""
    data_context: ProcessGroup
    """``data`` x ``context``: the group that gradients are reduced over."""
    model: ProcessGroup
    """All ranks of this replica: tensor x context x pipeline."""
    world: ProcessGroup
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    data_size: int
    process_groups: ProcessGroupCollection
    """The same groups in the object that megatron-core passes around."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this is the first pipeline rank. (With interleaving it also holds later chunks.)"""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.sizes.pipeline - 1

    @property
    def is_source(self) -> bool:
        """Whether this is the reading rank: the one rank of its replica that reads data and reports results."""
        return self.tensor_rank == self.pipeline_rank == self.context_rank == 0


def check_sizes(sizes: ParallelSizes, *, world_size: int) -> None:
    """Raises ``UserError`` for sizes that cannot work, or that megatron-core would accept and get wrong."""
    options = {
        "--tensor-model-parallel-size": sizes.tensor,
        "--pipeline-model-parallel-size": sizes.pipeline,
        "--context-parallel-size": sizes.context,
        "--expert-model-parallel-size": sizes.expert,
        "number of virtual pipeline chunks (--num-layers-per-virtual-pipeline-stage)": sizes.virtual_pipeline or 1,
    }
    for option, size in options.items():
        if size < 1:
            raise UserError(f"{option} must be at least 1, got {size}")
    if world_size % sizes.model:
        raise UserError(
            f"world size {world_size} (torchrun --nnodes x --nproc-per-node) must be a multiple of "
            f"--tensor-model-parallel-size {sizes.tensor} x --pipeline-model-parallel-size {sizes.pipeline} x "
            f"--context-parallel-size {sizes.context} = {sizes.model}"
        )
    if sizes.sequence_parallel and sizes.tensor == 1:
        # megatron-core only warns and continues without sequence parallelism; memory estimates and norms would differ.
        raise UserError("--sequence-parallel needs --tensor-model-parallel-size of at least 2, got 1")
    if (sizes.virtual_pipeline or 1) > 1 and sizes.pipeline == 1:
        raise UserError(
            "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of at least 2, got 1"
        )


def init_parallel(
    sizes: ParallelSizes,
    *,
    platform: Platform,
    seed: int = 0,
    timeout_minutes: float = 10.0,
    rendezvous_minutes: float = rendezvous.RENDEZVOUS_MINUTES,
) -> ParallelGroups:
    """Joins the world and splits it into groups. torchrun sets RANK and WORLD_SIZE; without them the process is alone.

    A second call in one process replaces the first split. ``seed`` seeds megatron-core's tracked random states. They
    are the same on all data-parallel ranks, and differ between tensor ranks inside tensor-parallel regions.

    Raises:
        UserError: the sizes are bad (raised before any collective runs, so that every rank stops with the same line),
            or the ranks do not find each other within ``rendezvous_minutes``.
    """
    world_size = world_size_from_environment()
    check_sizes(sizes, world_size=world_size)
    _join_world(platform, timeout_minutes=timeout_minutes, rendezvous_minutes=rendezvous_minutes)
    if parallel_state.model_parallel_is_initialized():
        _leave_groups()
    virtual = sizes.virtual_pipeline if (sizes.virtual_pipeline or 1) > 1 else None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        # They would duplicate the data-parallel groups for old checkpoint formats, which are not used here.
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    assert not isinstance(pipeline, list), "a list belongs to layouts of several pipelines, which are not made here"
    return ParallelGroups(
        sizes=sizes,
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        tensor=_member(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_member(pipeline),
        context=_member(parallel_state.get_context_parallel_group()),
        tensor_context=_member(parallel_state.get_tensor_and_context_parallel_group()),
        alone=_group_of_one(),
        data=_member(parallel_state.get_data_parallel_group()),
        data_context=_member(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        model=_model_group(sizes, world_size=world_size),
        world=world_group(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        process_groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def destroy_parallel() -> None:
    """Leaves all groups and the world. Collective: every rank calls it. It is safe to call if nothing was started."""
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # Models that are no longer used still hold the groups in reference cycles, and each group keeps threads that wake
    # up for ever. Collecting garbage frees both.
    gc.collect()


def pipeline_comm_settings(sizes: ParallelSizes, *, variable_lengths: bool = True) -> dict[str, Any]:
    """Keyword arguments for ``TransformerConfig`` with which the pipeline's point-to-point messages are correct.

    - Interleaved stages use separate sends and receives: with batched ones and two stages, both directions share
      one pair of ranks, and megatron-core swaps the messages without an error: gradients are silently wrong.
    - Packed sequences differ in length, so shapes are exchanged first. megatron-core asserts the MoE dispatcher
      for that even in dense models.
    """
    is_interleaved = sizes.pipeline > 1 and (sizes.virtual_pipeline or 1) > 1
    settings: dict[str, Any] = {"overlap_p2p_comm": is_interleaved, "batch_p2p_comm": not is_interleaved}
    if variable_lengths:
        settings |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    return settings


def _leave_groups() -> None:
    """Closes every group of an earlier split except the world. megatron-core only forgets groups, and each keeps
    threads that wake up for ever. Models of that split cannot communicate afterwards."""
    # A rank that has made its groups may get here while another rank is still connecting to it.
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    # Wrapped models and their gradient hooks refer to each other, and to the groups.
    gc.collect()


def world_size_from_environment() -> int:
    """The size of the default process group: of the existing one, or of the one that will be made."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    place = rendezvous.read_place()
    return 1 if place is None else place.world_size


def _join_world(platform: Platform, *, timeout_minutes: float, rendezvous_minutes: float) -> None:
    if not torch.distributed.is_initialized():
        rendezvous.join_world(
            platform.backend,
            # Given its device, a backend connects at once; gloo has no device.
            device=platform.device if platform.device.index is not None else None,
            timeout_minutes=timeout_minutes,
            rendezvous_minutes=rendezvous_minutes,
        )


def world_group() -> ProcessGroup:
    """The group of all ranks; ``torch.distributed`` must have been started."""
    world = torch.distributed.group.WORLD
    assert world is not None, "torch.distributed has not been started"
    return world


def _member(group: ProcessGroup | int | None) -> ProcessGroup:
    """``group`` with the type of a group that this rank belongs to. (torch gives ranks outside a group a number
    instead, and megatron-core's signatures repeat that.)"""
    assert group is not None and not isinstance(group, int), "this rank is not in the group"
    return group


def _group_of_one() -> ProcessGroup:
    if torch.distributed.get_world_size() == 1:
        return world_group()
    # With local synchronization only the member itself makes the group. Otherwise each of a thousand ranks would make a
    # thousand groups.
    return _member(torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True))


def _model_group(sizes: ParallelSizes, *, world_size: int) -> ProcessGroup:
    """The group of tensor x context x pipeline ranks of this replica. megatron-core's own model group lacks context."""
    if sizes.context == 1:
        return _member(parallel_state.get_model_parallel_group())
    stage = world_size // sizes.pipeline
    inner = sizes.tensor * sizes.context
    mine = None
    # Every rank makes every group, in the same order: new_group is collective over the world.
    for replica in range(stage // inner):
        ranks = [p * stage + replica * inner + i for p in range(sizes.pipeline) for i in range(inner)]
        group = torch.distributed.new_group(ranks)
        if torch.distributed.get_rank() in ranks:
            mine = group
    return _member(mine)
