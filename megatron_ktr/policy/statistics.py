"""What an intact pass computes for its tokens: statistics such as log-probs, and comparisons of distributions."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_ktr.batch.micro_batch import MicroBatch, mean_by_view
from megatron_ktr.objectives.base import Objective
from megatron_ktr.ops.token_statistics import TokenStatistics
from megatron_ktr.types import PackedBatch, View
from models.qwen2_5_vl.conversion import unwrap_model


def compared(
    chunk: torch.nn.Module,
    item: MicroBatch,
    batch: PackedBatch,
    hidden_RD: Tensor,
    *,
    objective: Objective,
    temperature: float,
) -> tuple[TokenStatistics, MicroBatch]:
    """The statistics of the intact rows, and the item with all comparisons of whole distributions filled in.

    There are two kinds of comparison: the KL to other views, whose hidden rows the item has kept (computed in the same
    pass over the vocabulary), and the divergence between the responses of a group. ``batch`` is the item's batch on the
    device.
    """
    model = unwrap_model(chunk)
    views: list[tuple[View, Tensor]] = []
    for view, draws in item.counterfactual_hidden_RD.items():
        for rows_RD in draws:
            assert rows_RD is not None, "the last stage has the hidden rows of every view"
            views.append((view, rows_RD))
    statistics = model.response_statistics(
        hidden_RD, batch, temperature=temperature, counterfactual_hidden_RD=tuple(rows for _, rows in views)
    )
    if views:
        names: list[View] = [view for view, _ in views]
        item = dataclasses.replace(
            item,
            counterfactual_logprob_R=mean_by_view(names, statistics.counterfactual_logprob_KR),
            counterfactual_kl_R=mean_by_view(names, statistics.kl_KR),
            counterfactual_hidden_RD={},
        )
    if objective.needs_divergence and item.divergence_R is None:
        divergence_R = model.group_divergence(
            hidden_RD,
            statistics.log_normalizer_R,
            batch=batch,
            temperature=temperature,
            with_gradient=objective.needs_divergence_gradient,
        )
        item = dataclasses.replace(item, divergence_R=divergence_R)
    return statistics, item
