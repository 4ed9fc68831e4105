"""The language model: megatron-core's GPTModel, fed with embeddings and stopped at its final hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ktr.ops.token_statistics import TokenStatistics, linear_token_statistics
from megatron_ktr.ops.token_statistics_interface import HeadOptions, OtherRows
from megatron_ktr.stack import end_at_hidden_states
from megatron_ktr.transfer import send
from models.qwen2_5_vl.attention import PrefixSeqParams
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.layer_specs import AttentionImpl, TransformerImpl, language_block_spec
from models.qwen2_5_vl.transformer_config import padded_vocab_size


class LanguageModel(GPTModel):
    """GPTModel with M-RoPE that takes packed batches and returns hidden states instead of logits.

    This class owns the output weight: ``output_layer``'s, or the embedding's if the two are tied and on one stage. Its
    ``forward`` does not apply the head. The caller applies it to the few rows that predict response tokens, so that
    full logits never exist.
    """

    def __init__(
        self,
        model_config: Qwen2_5_VLConfig,
        *,
        config: TransformerConfig,
        process_groups: ProcessGroupCollection,
        transformer_impl: TransformerImpl,
        attention_impl: AttentionImpl,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        text = model_config.text
        super().__init__(
            config=config,
            transformer_layer_spec=language_block_spec(  # pyright: ignore[reportArgumentType]  # core takes a block as well
                config,
                impl=transformer_impl,
                attention_impl=attention_impl,
                vp_stage=vp_stage,
                pp_rank=process_groups.pp.rank(),
            ),
            vocab_size=padded_vocab_size(text.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=text.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model_config.tie_word_embeddings,
            position_embedding_type="mrope",
            rotary_base=text.rope_theta,  # pyright: ignore[reportArgumentType]  # core declares int, computes in floats
            # ``embed`` scatters the rows over the tensor ranks itself, after it has inserted the vision features.
            scatter_embedding_sequence_parallel=False,
            pg_collection=process_groups,
            vp_stage=vp_stage,
        )
        self._ends_at_hidden_states = end_at_hidden_states(self)
        setattr(self.rotary_pos_emb, "__class__", RotaryAngles)  # noqa: B010  # type checkers know no such assignment
        if post_process:
            self.output_layer.__class__ = StatisticsHead

    def embed(self, token_ids_T: Tensor, *, visual_rows: Tensor, features: Tensor | None) -> Tensor:
        """The input of the first layer: word embeddings, with ``features`` in the rows ``visual_rows``.

        Args:
            token_ids_T: int64 [T].
            visual_rows: int64 [n], rows that receive features, in order of occurrence.
            features: [n, D], equal on all tensor-parallel ranks; backward gives every rank the full gradient of them.
                None: no media.

        Returns:
            [T, 1, D], or this rank's [T / tp, 1, D] under sequence parallelism.
        """
        hidden_T1D = self.embedding(input_ids=token_ids_T[None], position_ids=None)
        if features is not None:
            hidden_T1D = hidden_T1D.index_copy(0, visual_rows, features[:, None].to(hidden_T1D.dtype))
        if self.config.sequence_parallel:
            # Backward of this scatter is an all-gather, so that embedding and vision encoder see the gradient of every
            # row on every rank. The scattered rows are a view of the full tensor; copying them lets it be freed.
            hidden_T1D = scatter_to_sequence_parallel_region(hidden_T1D, group=self.tp_group).clone()
        return hidden_T1D

    def forward_packed(
        self, position_ids_3T: Tensor, attention: PrefixSeqParams, *, decoder_input: Tensor | None
    ) -> Tensor:
        """Hidden states after this stage's layers (and the final norm on the last stage).

        T counts this context rank's rows. ``decoder_input`` is ``embed``'s result on the first stage, None elsewhere
        (see ``set_input_tensor``).
        Returns [T, 1, D] or, under sequence parallelism, [T / tp, 1, D].
        """
        return self(
            input_ids=None,
            position_ids=position_ids_3T[:, None],
            attention_mask=None,
            decoder_input=decoder_input,
            packed_seq_params=attention,
            **self._ends_at_hidden_states,
        )

    def output_weight(self) -> Tensor:
        """This rank's shard [padded V / tp, D] of the output weight; last stage only."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        assert weight is not None, "the last stage has an output weight"
        return weight


class RotaryAngles(MultimodalRotaryEmbedding):
    """Replaces the class of GPTModel's rotary embedding: angle = position * frequency, element by element in fp32.

    megatron-core computes the angles as a matrix product, and autocast and TF32 reduce the precision of matrix
    products. An angle of 3,000 rad would then be off by 8 rad in bf16 and by 1 rad in TF32, which makes the rotation
    arbitrary.
    """

    def forward(self, position_ids_31T: Tensor, mrope_section: list[int], cp_group: Any = None) -> Tensor:
        """[3, 1, T] positions along time, height and width -> angles [T, 1, 1, H] in fp32.

        ``mrope_section`` says how many channels of a head's first half follow each of the three axes. The second half
        repeats the first, because it holds the partners of the rotated pairs. ``cp_group`` is unused: rows are
        distributed over the context ranks before the first layer (``attention.OneRank``).
        """
        frequencies = send(self.inv_freq, position_ids_31T.device)
        # The sections are expanded from their sizes, because an index tensor would have to be sent to the device.
        sections = zip(position_ids_31T.float().split(1), mrope_section, strict=True)
        positions_T1H = torch.cat([axis_11T.expand(size, -1, -1) for axis_11T, size in sections]).permute(2, 1, 0)
        angles_T1H = positions_T1H * frequencies
        return torch.cat([angles_T1H, angles_T1H], dim=-1)[:, :, None]


class StatisticsHead(ColumnParallelLinear):
    """Replaces the class of GPTModel's output layer: it returns statistics of the logits instead of the logits.

    The head stays a module and is called as a module, because megatron-core's DDP waits for its overlapped parameter
    all-gather in module hooks. Code that reads the weight without calling the module may read the previous step's.
    """

    def forward(
        self,
        hidden_RD: Tensor,
        target_ids_R: Tensor,
        *,
        head: HeadOptions,
        weight: Tensor | None = None,
        counterfactual_hidden_RD: Sequence[Tensor] = (),
        reference: OtherRows | None = None,
    ) -> TokenStatistics:
        """Applies ``linear_token_statistics`` to this layer's weight shard, or to ``weight`` (a tied embedding's)."""
        weight_VD = self.weight if weight is None else weight
        assert weight_VD is not None, "an output layer without a weight of its own is given the embedding's"
        return linear_token_statistics(
            hidden_RD,
            weight_VD,
            target_ids_R,
            counterfactual_hidden_RD=counterfactual_hidden_RD,
            reference=reference,
            head=head,
        )
