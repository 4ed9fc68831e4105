"""A tiny megatron-core GPT whose weights do not depend on the parallel layout, and a training loop around it."""

from __future__ import annotations

import re
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ktr.distributed.groups import ParallelGroups, pipeline_comm_settings

VOCAB, HIDDEN, LAYERS, SEQUENCE, MICRO_BATCHES = 64, 32, 4, 8, 4


class Norm(torch.nn.LayerNorm):
    """Layer norm that marks its parameters for sequence parallelism; megatron-core's torch wrapper refuses it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


@dataclass
class Trainee:
    """One rank's model, ready to step."""

    ranks: ParallelGroups
    config: TransformerConfig
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    lengths: Sequence[int] = field(default_factory=lambda: [SEQUENCE] * MICRO_BATCHES)
    """Tokens of each micro-batch of the global batch."""


def make_trainee(
    ranks: ParallelGroups,
    *,
    optimizer: str = "adam",
    distributed_optimizer: bool | None = None,
    lengths: Sequence[int] | None = None,
    bf16: bool = False,
    overlap: bool = False,
    **overrides: Any,
) -> Trainee:
    """Builds the model with layout-independent weights. ``overrides`` go to ``TransformerConfig``."""
    sizes = ranks.sizes
    if distributed_optimizer is None:
        # megatron-core's distributed optimizer asserts that it is Adam.
        distributed_optimizer = optimizer == "adam"
    settings = dict(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_query_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline,
        sequence_parallel=sizes.sequence_parallel,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        **pipeline_comm_settings(sizes, variable_lengths=lengths is not None),
    )
    config = TransformerConfig(**(settings | overrides))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        # Small buckets: several per model, so that overlapping has something to overlap.
        bucket_size=4000 if overlap else None,
    )
    chunks = [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=_wrap(config, chunk))
        for chunk in _build_chunks(config, ranks)
    ]
    optimizer_config = OptimizerConfig(
        optimizer=optimizer,
        lr=1e-2,
        weight_decay=0.0,
        sgd_momentum=0.0,
        clip_grad=1e6,
        bf16=bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=distributed_optimizer,
        overlap_param_gather=overlap,
    )
    config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    made = get_megatron_optimizer(optimizer_config, chunks, use_gloo_process_groups=False)
    # Weak, as in the policy: layers hold this config, autograd nodes of the optimizer's views of fp32 parameters hold
    # the layers. Back to the optimizer it is a cycle through C++: nothing is freed, and every group keeps three
    # threads.
    scaling = weakref.ref(made)
    config.grad_scale_func = lambda loss: scaling().scale_loss(loss)
    trainee = Trainee(ranks=ranks, config=config, chunks=chunks, optimizer=made)
    if lengths is not None:
        trainee.lengths = lengths
    return trainee


def _wrap(config: TransformerConfig, chunk: GPTModel) -> torch.nn.Module:
    from megatron.core.transformer.module import Float16Module

    return Float16Module(config, chunk) if config.bf16 else chunk


def _build_chunks(config: TransformerConfig, ranks: ParallelGroups) -> list[GPTModel]:
    from megatron.core import parallel_state

    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    num_chunks = ranks.sizes.virtual_pipeline or 1
    chunks = []
    for stage in range(num_chunks):
        vp_stage = stage if num_chunks > 1 else None
        is_first = ranks.is_first_stage and stage == 0
        is_last = ranks.is_last_stage and stage == num_chunks - 1
        per_chunk = LAYERS // (ranks.sizes.pipeline * num_chunks)
        if vp_stage is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(vp_stage)
        block = TransformerBlockSubmodules(layer_specs=[layer] * per_chunk, layer_norm=Norm)
        model = GPTModel(
            config,
            block,
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE * 2,
            pre_process=is_first,
            post_process=is_last,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            parallel_output=True,
            vp_stage=vp_stage,
        )
        _fill_weights(model, ranks)
        chunks.append(model)
    return chunks


def _fill_weights(model: GPTModel, ranks: ParallelGroups) -> None:
    """Fills each parameter with this rank's slice of a tensor drawn from a seed made of its global name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_slice_of_full(_global_name(model, name), parameter, ranks))


def _global_name(model: GPTModel, name: str) -> str:
    def globalise(match: re.Match[str]) -> str:
        return f"layers.{model.decoder.layers[int(match[1])].layer_number - 1}."

    # The last stage's copy of the tied embedding is called output_layer.
    name = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
    return re.sub(r"layers\.(\d+)\.", globalise, name)


def _slice_of_full(name: str, parameter: Tensor, ranks: ParallelGroups) -> Tensor:
    shape = list(parameter.shape)
    axis = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    if axis is not None:
        shape[axis] *= ranks.sizes.tensor
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    full = torch.randn(shape, generator=generator) * 0.2
    if "layernorm" in name and name.endswith("weight"):
        full += 1.0
    return full if axis is None else full.chunk(ranks.sizes.tensor, dim=axis)[ranks.tensor_rank]


def _micro_batches(trainee: Trainee) -> Iterator[tuple[Tensor, Tensor]]:
    """This replica's share of the global batch: micro-batch i goes to data rank i modulo the data size."""
    for index, length in enumerate(trainee.lengths):
        if index % trainee.ranks.data_size == trainee.ranks.data_rank:
            generator = torch.Generator().manual_seed(1000 + index)
            tokens = torch.randint(0, VOCAB, (1, length + 1), generator=generator)
            yield tokens[:, :-1], tokens[:, 1:]


def _forward_step(batches: Iterator[tuple[Tensor, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    tokens, targets = next(batches)
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    losses = model(tokens, torch.arange(length)[None], mask, labels=targets)

    def reduce(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = losses.float().sum()
        return total, torch.tensor(length, dtype=torch.int), {"loss": total.detach()}

    return losses, reduce


def accumulate_gradients(trainee: Trainee) -> float:
    """Forward and backward of one global batch; returns the summed loss on every rank of the world."""
    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    num_chunks = len(trainee.chunks)
    iterators = [_micro_batches(trainee) for _ in range(num_chunks)]
    outputs = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if num_chunks > 1 else iterators[0],
        model=trainee.chunks if num_chunks > 1 else trainee.chunks[0],
        num_microbatches=len(trainee.lengths) // trainee.ranks.data_size,
        seq_length=SEQUENCE,
        micro_batch_size=1,
    )
    loss = torch.tensor(float(sum(output["loss"] for output in outputs)))
    groups = trainee.ranks
    if groups.tensor_rank != 0:
        loss.zero_()
    torch.distributed.all_reduce(loss)
    return float(loss)


def train(trainee: Trainee, *, num_steps: int) -> list[tuple[float, float]]:
    """(summed loss, gradient norm) of each step."""
    rows = []
    for _ in range(num_steps):
        loss = accumulate_gradients(trainee)
        _, norm, _ = trainee.optimizer.step()
        rows.append((loss, float(norm)))
    return rows
