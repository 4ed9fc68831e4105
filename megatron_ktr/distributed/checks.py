"""Refuses settings that megatron-core accepts and then gets wrong, or for which its own errors are hard to read."""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ktr.distributed.platform import Platform, current
from megatron_ktr.errors import UserError


def check_transformer_config(config: TransformerConfig) -> None:
    """Raises ``UserError`` for settings under which gradients are silently wrong or backward never ends.

    Our own configurations never have such settings (``groups.pipeline_comm_settings``); this check guards others.
    """
    is_interleaved = (config.virtual_pipeline_model_parallel_size or 1) > 1
    if is_interleaved and config.batch_p2p_comm:
        raise UserError(
            "interleaved pipeline stages (--num-layers-per-virtual-pipeline-stage) with batch_p2p_comm=True: with two "
            "stages both directions share one pair of ranks and messages are swapped silently; expected "
            "overlap_p2p_comm=True, batch_p2p_comm=False (groups.pipeline_comm_settings)"
        )
    if config.sequence_parallel and config.tensor_model_parallel_size == 1:
        raise UserError("--sequence-parallel needs --tensor-model-parallel-size of at least 2, got 1")
    recomputed = config.recompute_modules or ()
    if config.recompute_granularity == "selective" and "mlp" in recomputed and config.add_bias_linear:
        # The bias is an output of the recomputed region, so its node in the autograd graph leads back to itself.
        raise UserError(
            "selective recomputation of 'mlp' needs an MLP without biases (add_bias_linear=False): with them backward "
            "recomputes for ever; use --recompute-granularity full"
        )


def check_optimizer_config(config: OptimizerConfig, *, platform: Platform) -> None:
    """Raises ``UserError`` for optimizers that cannot exist on ``platform`` or cannot be checkpointed."""
    if config.use_precision_aware_optimizer and platform.name == "cpu":
        raise UserError(
            "use_precision_aware_optimizer needs Transformer Engine's FusedAdam, which needs a GPU; "
            "--platform is cpu: switch it off"
        )
    if config.optimizer == "sgd" and config.use_distributed_optimizer:
        raise UserError("--optimizer sgd has no state to split over ranks: add --no-use-distributed-optimizer")


def check_every_rank_skips(optimizer: MegatronOptimizer) -> None:
    """Raises ``UserError``, on every rank alike, if ``grad_norm_skip_threshold`` would make ranks diverge.

    megatron-core compares the norm only on ranks that have parameters to clip. A rank without any (its stage is frozen,
    or the model is smaller than its shards) does not skip the step. It steps, and waits for the others in a collective
    that they never join. This check is collective over the world.
    """
    # The threshold works in the chained optimizer only; its members, stepped one by one, do not know it.
    assert isinstance(optimizer, ChainedOptimizer), type(optimizer)
    num_here = sum(1 for part in optimizer.chained_optimizers if part.get_parameters())
    has_none = torch.tensor(int(num_here == 0), device=current().device)
    torch.distributed.all_reduce(has_none)
    if int(has_none):
        raise UserError(
            f"--grad-norm-skip-threshold: {int(has_none)} of {torch.distributed.get_world_size()} ranks hold no "
            "parameters to update, and would not skip with the others; leave it out, or choose fewer ranks, another "
            "split of layers, or less in --freeze"
        )


def check_checkpoint_packages() -> None:
    """Raises ``UserError`` if psutil is missing: the writer of distributed checkpoints would then hang silently."""
    if importlib.util.find_spec("psutil") is None:
        raise UserError("saving checkpoints needs the package psutil (pip install psutil): without it saving hangs")
