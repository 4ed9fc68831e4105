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
from megatron_ktr.ops.token_statistics_interface import HeadOptions
from megatron_ktr.stack import end_at_hidden_states
from megatron_ktr.transfer import send
from models.qwen2_5_vl.attention import PrefixSeqParams
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.layer_specs import AttentionImpl, TransformerImpl, language_block_spec
from models.qwen2_5_vl.transformer_config import padded_vocab_size


class LanguageModel(GPTModel):
    """GPTModel with M-RoPE that takes packed batches and returns hidden states instead of logits.

    The output weight lives here (``output_layer``, or the embedding where both are tied and on one stage), but the
    head is applied outside, to the few rows that predict response tokens: full logits never exist.
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
            # Vision features are put between the word embeddings first; ``embed`` scatters afterwards.
            scatter_embedding_sequence_parallel=False,
            pg_collection=process_groups,
            vp_stage=vp_stage,
        )
        self._ends_at_hidden_states = end_at_hidden_states(self)
        setattr(self.rotary_pos_emb, "__class__", RotaryAngles)  # noqa: B010  # type checkers know no such assignment
        if post_process:
            self.output_layer.__class__ = StatisticsHead

    def embed(self, token_ids_T: Tensor, *, visual_rows: Tensor, features: Tensor | None) -> Tensor:
        """Word embeddings with ``features`` in place of ``visual_rows``: the input of the first layer.

        Args:
            token_ids_T: int64 [T].
            visual_rows: int64 [n], rows that receive features, in order of occurrence.
            features: [n, D], equal on all tensor-parallel ranks; each gets its full gradient. None: no media.

        Returns:
            [T, 1, D], or this rank's [T / tp, 1, D] under sequence parallelism.
        """
        hidden_T1D = self.embedding(input_ids=token_ids_T[None], position_ids=None)
        if features is not None:
            hidden_T1D = hidden_T1D.index_copy(0, visual_rows, features[:, None].to(hidden_T1D.dtype))
        if self.config.sequence_parallel:
            # Backward gathers, so that embedding and vision encoder see the gradient of every row on every rank.
            # The copy frees the full tensor, of which the scattered rows are a view.
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
        """[padded V / tp, D]: this rank's shard of the output weight; last stage only."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        assert weight is not None, "the last stage has an output weight"
        return weight


class RotaryAngles(MultimodalRotaryEmbedding):
    """The rotary embedding GPTModel built: angle = position * frequency, multiplied element by element in fp32.

    megatron-core's own is a matrix product, and matrix products are what autocast and TF32 lower: the angle 3,000 would
    be off by 8 in bf16 and by 1 in TF32, and the rotation by anything.
    """

    def forward(self, position_ids_31T: Tensor, mrope_section: list[int], cp_group: Any = None) -> Tensor:
        """[3, 1, T] positions along time, height and width -> angles [T, 1, 1, H] in fp32.

        Channels of the first half of a head take their axis by section; the second half are their partners. Rows of
        context ranks are shared out before (``attention.OneRank``), so that ``cp_group`` has nothing to cut.
        """
        frequencies = send(self.inv_freq, position_ids_31T.device)
        # Sections by their sizes: an index would have to be sent to the device.
        sections = zip(position_ids_31T.float().split(1), mrope_section, strict=True)
        positions_T1H = torch.cat([axis_11T.expand(size, -1, -1) for axis_11T, size in sections]).permute(2, 1, 0)
        angles_T1H = positions_T1H * frequencies
        return torch.cat([angles_T1H, angles_T1H], dim=-1)[:, :, None]


class StatisticsHead(ColumnParallelLinear):
    """The output layer GPTModel built, answering with statistics of the logits instead of the logits.

    It stays a module of its own, and is called as one, because megatron-core's DDP hangs its overlapped parameter
    gathering on module calls: a weight read behind its module's back may still be the last step's.
    """

    def forward(
        self,
        hidden_RD: Tensor,
        target_ids_R: Tensor,
        *,
        head: HeadOptions,
        weight: Tensor | None = None,
        counterfactual_hidden_RD: Sequence[Tensor] = (),
    ) -> TokenStatistics:
        """``linear_token_statistics`` on this layer's weight shard, or on ``weight`` (a shared embedding's)."""
        weight_VD = self.weight if weight is None else weight
        assert weight_VD is not None, "an output layer without a weight of its own is given the embedding's"
        return linear_token_statistics(
            hidden_RD, weight_VD, target_ids_R, counterfactual_hidden_RD=counterfactual_hidden_RD, head=head
        )
