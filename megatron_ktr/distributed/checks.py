"""Refusals of settings that megatron-core 0.16 accepts and then gets wrong, or reports where nobody understands it."""

from __future__ import annotations

import importlib.util

from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ktr.distributed.platform import Platform
from megatron_ktr.errors import UserError


def check_transformer_config(config: TransformerConfig) -> None:
    """Raises ``UserError`` for settings under which gradients are silently wrong or backward never ends.

    Our own configurations never hold them (``groups.pipeline_comm_settings``); this guards those made otherwise.
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
    if config.recompute_granularity == "selective" and "mlp" in config.recompute_modules and config.add_bias_linear:
        # The bias leaves the recomputed region as an output: its node in the graph then leads back to itself.
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


def check_checkpoint_packages() -> None:
    """Raises ``UserError`` where saving a distributed checkpoint would hang: its writer wants psutil, silently."""
    if importlib.util.find_spec("psutil") is None:
        raise UserError("saving checkpoints needs the package psutil (pip install psutil): without it saving hangs")
