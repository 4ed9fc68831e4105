"""Qwen2.5-VL: vision encoder on the first pipeline stage, language model over all stages.

    first stage   patches -> vision encoder -> features;  token ids -> embeddings, features in place of placeholders
    every stage   its share of the decoder layers
    last stage    final norm -> the rows that predict response tokens -> (separate call) the vocabulary-parallel head

The model takes one ``PackedBatch`` and knows nothing of training objectives. The head turns hidden rows into
log-probabilities and entropies without ever materialising the full logits (``ops/token_statistics``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ktr.config.words import TokenStatisticsImpl
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.platform import current
from megatron_ktr.ops.context_shard import LocalRows
from megatron_ktr.ops.group_divergence import group_divergence
from megatron_ktr.ops.token_statistics import TokenStatistics
from megatron_ktr.ops.token_statistics_interface import HeadOptions, OtherRows
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedBatch
from models.qwen2_5_vl.attention import OneRank, PrefixSeqParams
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.context import ContextRanks
from models.qwen2_5_vl.language import LanguageModel
from models.qwen2_5_vl.transformer_config import language_transformer_config
from models.qwen2_5_vl.vision import VisionEncoder

if TYPE_CHECKING:
    from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.config.sections import ModelSection


@dataclass(frozen=True)
class ChunkPlace:
    """Where a chunk of the model stands in the pipeline."""

    is_first: bool = True
    """It holds the vision encoder and the embedding."""
    is_last: bool = True
    """It holds the final norm and the vocabulary head."""
    vp_stage: int | None = None
    """Its number among this rank's chunks; None where the rank has one."""


class Qwen2_5_VLModel(MegatronModule):
    """One pipeline chunk of the model. ``vision`` is None on all but the first chunk of the first stage.

    megatron-core's pipeline schedules and gradient finalisation read these members of a chunk: ``pre_process``,
    ``post_process``, ``share_embeddings_and_output_weights``, ``shared_embedding_or_output_weight``,
    ``set_input_tensor``, ``model_type`` and ``vp_stage``.
    """

    def __init__(
        self,
        model_config: Qwen2_5_VLConfig,
        *,
        transformer_config: TransformerConfig,
        process_groups: ProcessGroupCollection,
        chunk: ChunkPlace,
        context_group: torch.distributed.ProcessGroup | None = None,
        whole_vision_group: torch.distributed.ProcessGroup | None = None,
        options: ModelOptions | None = None,
    ) -> None:
        """
        Args (those that the names do not explain):
            whole_vision_group: a process group of this rank alone. If given, every tensor rank keeps the whole vision
                encoder (``vision_parallel: frame``); otherwise its weights are split.
            options: None means the defaults, without a data-parallel wrapper whose gradient buffers could be added to.
        """
        super().__init__(config=transformer_config)
        self.model_config = model_config
        self.pre_process, self.post_process = chunk.is_first, chunk.is_last
        self.vp_stage = chunk.vp_stage
        self.tensor_group = process_groups.tp
        sequence_shares = transformer_config.tensor_model_parallel_size if transformer_config.sequence_parallel else 1
        self.row_multiple = sequence_shares if options is None else options.row_multiple
        self.context = None
        if context_group is not None and context_group.size() > 1:
            self.context = ContextRanks(context_group, multiple=self.row_multiple)
        section = ModelSection() if options is None else options.model
        self.statistics_impl: TokenStatisticsImpl = section.token_statistics_impl
        self.accumulate_into_main_grad = options is not None and section.gradient_accumulation_fusion is not False
        self.share_embeddings_and_output_weights = model_config.tie_word_embeddings
        self.keeps_graph = False
        """If True, the first layer's input requires a gradient even when nothing before that layer is trained."""
        self.vision: VisionEncoder | None = None
        if chunk.is_first:
            self.vision = VisionEncoder(
                model_config.vision,
                transformer_config=transformer_config,
                process_groups=_with_tensor_group(process_groups, whole_vision_group or process_groups.tp),
                transformer_impl=section.transformer_impl,
                fp8=section.fp8_vision,
            )
            if whole_vision_group is not None:
                for parameter in self.vision.parameters():
                    # Tensor-parallel layers mark their weights as shards, even in a group of one rank. These weights
                    # are copies: gradient norms must count them once, and each rank's gradient is one part of the sum
                    # that ``sum_gradients`` in ``policy/vision_pass.py`` computes.
                    setattr(parameter, "tensor_model_parallel", False)  # noqa: B010  # a mark that core reads
        self.language = LanguageModel(
            model_config,
            config=transformer_config,
            process_groups=process_groups,
            transformer_impl=section.transformer_impl,
            attention_impl=section.attention_impl,
            pre_process=chunk.is_first,
            post_process=chunk.is_last,
            vp_stage=chunk.vp_stage,
        )
        self.model_type = self.language.model_type

    @property
    def vocab_size(self) -> int:
        """The vocabulary size without padding; rows of the output weight beyond it are padding."""
        return self.model_config.text.vocab_size

    def output_weight(self) -> Tensor:
        """This rank's shard [padded V / tp, D] of the output weight (the embedding's, if tied); last stage only."""
        return self.language.output_weight()

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """This chunk's copy of the tied weight; megatron-core keeps the first and the last stage's copies equal."""
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Stores the previous stage's activation; the pipeline schedule calls this before ``forward``."""
        self.language.set_input_tensor(input_tensor)  # pyright: ignore[reportArgumentType]  # the schedule's list of one

    def forward(self, batch: PackedBatch) -> Tensor:
        """Runs this chunk on one packed batch.

        The last stage returns the hidden rows ``[R, D]`` that predict the response tokens. Every other stage returns
        the activation for the next stage: ``[T, 1, D]``, or ``[T / tp, 1, D]`` under sequence parallelism.

        ``batch`` must be on this rank's device, and must be equal on all tensor and context ranks. Under context
        parallelism T and R count the rows that this context rank keeps (``megatron_ktr/ops/context_shard.py``).

        Raises:
            ValueError: sequence parallelism cannot split T, or there are visual rows but neither patches nor features.
        """
        self._check(batch)
        rotating = batch.token_ids_T.device if self.config.apply_rope_fusion else None
        if self.context is None:
            local = LocalRows.whole(batch)
            attention = PrefixSeqParams.from_layout(batch.layout, bounds_on=rotating)
        else:
            local, attention = self.context.share(batch, bounds_on=rotating)
        decoder_input = self._embed(batch, local) if self.pre_process else None
        hidden_T1D = self.language.forward_packed(local.position_ids_3T, attention, decoder_input=decoder_input)
        if not self.post_process:
            return hidden_T1D
        if self.config.sequence_parallel:
            # The rows that predict response tokens may lie on any tensor rank, so all rows are gathered. Backward sums
            # the ranks' partial gradients of all rows and scatters the result (see ``_head``).
            hidden_T1D = gather_from_sequence_parallel_region(
                hidden_T1D, tensor_parallel_output_grad=True, group=self.tensor_group
            )
        # A prompt's last row is selected once per response, so backward sums its gradient over the group of responses.
        return hidden_T1D[:, 0].index_select(0, local.predicting_rows_R)

    def response_statistics(
        self,
        hidden_RD: Tensor,
        batch: PackedBatch,
        *,
        temperature: float = 1.0,
        counterfactual_hidden_RD: Sequence[Tensor] = (),
        reference: OtherRows | None = None,
    ) -> TokenStatistics:
        """Computes log-probability and entropy of all response tokens of ``batch``; last stage only.

        ``hidden_RD`` is what ``forward`` returned. ``counterfactual_hidden_RD`` holds the rows of the same tokens in
        other views of the batch; with them, the result also has the tokens' log-probabilities in each such view and
        the KL divergence to it. ``reference`` is the same for a reference model, whose ``forward`` gave the rows.

        Every context rank gets the statistics of all tokens; each must compute the same loss from them and call
        backward. ``batch`` may be in host memory.
        """
        targets_R = send(batch.target_ids_R, hidden_RD.device)
        if self.context is not None:
            targets_R = targets_R[send(self.context.mine(batch), hidden_RD.device)]
        statistics = self.language.output_layer(
            hidden_RD,
            targets_R,
            weight=self.output_weight() if self.share_embeddings_and_output_weights else None,
            counterfactual_hidden_RD=counterfactual_hidden_RD,
            reference=reference,
            head=self._head(temperature),
        )
        return statistics if self.context is None else self.context.gather_statistics(statistics, batch)

    def group_divergence(
        self,
        hidden_RD: Tensor,
        log_normalizer_R: Tensor,
        *,
        batch: PackedBatch,
        temperature: float = 1.0,
        with_gradient: bool = False,
    ) -> Tensor:
        """TW-GRPO's divergence between the responses of each group, [R], on every context rank; last stage only.

        With gradient, every context rank must compute the same loss from it and call backward.

        Call this after ``response_statistics`` of the same pass, which also gives ``log_normalizer_R``. If the
        all-gather of updated parameters overlaps with computation, only that earlier call waits until the output
        weight of the last optimizer step has arrived (``StatisticsHead``).
        """
        has_gradient_R = None
        if self.context is not None:
            # The responses of a group lie on different ranks, and the divergence compares all of them, so every rank
            # gathers all rows. Gradient flows back only through a rank's own rows, as in ``gather_statistics``.
            own_RD, mine = hidden_RD, send(self.context.mine(batch), hidden_RD.device)
            hidden_RD = self.context.gather_hidden(own_RD, batch)
            if with_gradient:
                hidden_RD = hidden_RD.index_copy(0, mine, own_RD)
                has_gradient_R = torch.zeros(len(hidden_RD), dtype=torch.bool, device=mine.device)
                has_gradient_R.index_fill_(0, mine, True)
        return group_divergence(
            hidden_RD,
            self.output_weight(),
            log_normalizer_R,
            layout=batch.layout,
            head=self._head(temperature),
            with_gradient=with_gradient,
            has_gradient_R=has_gradient_R,
        )

    def _head(self, temperature: float) -> HeadOptions:
        """The options with which this rank's vocabulary shard is computed."""
        return HeadOptions(
            group=self.tensor_group,
            vocab_size=self.vocab_size,
            temperature=temperature,
            # Each tensor rank computes only its vocabulary shard's part of the hidden rows' gradient, so the parts must
            # be summed. Under sequence parallelism the backward of the gather just before the head already sums them
            # (it is a reduce-scatter); summing twice would be wrong.
            reduce_hidden_grad=not self.config.sequence_parallel,
            accumulate_into_main_grad=self.accumulate_into_main_grad,
            impl=self.statistics_impl,
        )

    def _embed(self, batch: PackedBatch, local: LocalRows) -> Tensor:
        # The encoder always runs before the embedding, so that backward always reaches them in the opposite order.
        features = batch.features_ED
        if features is None and (batch.patches_SD is not None or self._needs_vision_gradients()):
            assert self.vision is not None, "only the first stage embeds"
            features = self.vision(batch.patches_SD, batch.grid_thw_M3)
        if features is not None and local.visual_index is not None:
            # Every context rank encodes all frames, then keeps the features of its own rows. Backward gives each rank
            # the gradient of its own rows only; parameter gradients then add up over the context ranks, as the
            # language model's do.
            features = features.index_select(0, local.visual_index)
        hidden_T1D = self.language.embed(local.token_ids_T, visual_rows=local.visual_rows, features=features)
        if self.keeps_graph and torch.is_grad_enabled() and not hidden_T1D.requires_grad:
            hidden_T1D.requires_grad_()
        return hidden_T1D

    def _needs_vision_gradients(self) -> bool:
        """Whether backward must reach the vision encoder even if this micro-batch has no media.

        Overlapped data-parallel reduction sends a bucket of gradients as soon as all of its parameters have a
        gradient, and all replicas must send the same buckets in the same order. If a replica without media skipped the
        encoder, the other replicas would wait for its buckets forever. If it only added the parameters times zero to
        the loss, their gradients would come at another moment of backward, and different buckets would be summed with
        each other. So the encoder runs on a single dummy unit, and its (empty) result is connected to every parameter:
        the graph and the order of gradients are the same, and the gradients are zero.
        """
        assert self.vision is not None, "only the first stage embeds"
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.vision.parameters())

    def _check(self, batch: PackedBatch) -> None:
        num_tokens = batch.token_ids_T.shape[0]
        if self.context is None and num_tokens % self.row_multiple:
            raise ValueError(
                f"sequence parallelism and FP8 need T in multiples of {self.row_multiple}, got T = {num_tokens}; "
                "pack with pad_to_multiple set to such a multiple"
            )
        has_vision = batch.patches_SD is not None or batch.features_ED is not None
        if self.pre_process and not has_vision and len(batch.visual_rows):
            raise ValueError(f"the batch has {len(batch.visual_rows)} visual rows but neither patches nor features")


def _with_tensor_group(
    process_groups: ProcessGroupCollection, group: torch.distributed.ProcessGroup
) -> ProcessGroupCollection:
    """Returns a copy of ``process_groups`` that uses ``group`` for tensor parallelism."""
    changed = copy.copy(process_groups)
    changed.tp = group
    return changed


def build_model(
    model_config: Qwen2_5_VLConfig,
    *,
    ranks: ParallelGroups,
    options: ModelOptions | None = None,
    dtype: torch.dtype = torch.float32,
    shapes_only: bool = False,
) -> list[Qwen2_5_VLModel]:
    """Builds this rank's model chunks, randomly initialised, on the platform's device.

    A rank has one chunk, or one per virtual pipeline stage.

    Args:
        model_config: the architecture.
        ranks: the process groups, which say which part of the model this rank holds.
        options: the run's options (implementations, recomputation); None: the defaults, for use without DDP.
        dtype: the dtype of parameters and activations.
        shapes_only: the parameters have shapes and no values (torch's meta device), so that nothing is allocated.

    Raises:
        UserError: the parallel layout does not fit the model's sizes.
    """
    transformer_config = language_transformer_config(model_config, sizes=ranks.sizes, dtype=dtype, options=options)
    if shapes_only:
        # core then leaves the device of new parameters to the surrounding context.
        transformer_config.use_cpu_initialization, transformer_config.perform_initialization = True, False
        with torch.device("meta"):
            return _build_chunks(model_config, transformer_config, ranks=ranks, options=options)
    chunks = _build_chunks(model_config, transformer_config, ranks=ranks, options=options)
    return [chunk.to(current().device) for chunk in chunks]


def _build_chunks(
    model_config: Qwen2_5_VLConfig,
    transformer_config: TransformerConfig,
    *,
    ranks: ParallelGroups,
    options: ModelOptions | None,
) -> list[Qwen2_5_VLModel]:
    process_groups = copy.copy(ranks.process_groups)
    setattr(process_groups, "cp", OneRank())  # noqa: B010  # core declares a group of torch's
    num_chunks = transformer_config.virtual_pipeline_model_parallel_size
    pipeline_group = ranks.process_groups.pp
    chunks = []
    for vp_stage in range(num_chunks) if num_chunks else [None]:
        chunk = Qwen2_5_VLModel(
            model_config,
            transformer_config=transformer_config,
            process_groups=process_groups,
            chunk=ChunkPlace(
                is_first=is_pp_first_stage(pipeline_group) and vp_stage in (None, 0),
                is_last=is_pp_last_stage(pipeline_group) and (num_chunks is None or vp_stage == num_chunks - 1),
                vp_stage=vp_stage,
            ),
            context_group=ranks.context,
            whole_vision_group=ranks.alone if options and options.parallel.vision_parallel == "frame" else None,
            options=options,
        )
        chunks.append(chunk)
    return chunks
