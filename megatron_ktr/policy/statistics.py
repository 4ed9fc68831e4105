"""What an intact pass computes for its tokens: statistics such as log-probs, and comparisons of distributions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.batch.micro_batch import MicroBatch, mean_by_view
from megatron_ktr.objectives.base import Objective
from megatron_ktr.ops.token_statistics import TokenStatistics
from megatron_ktr.ops.token_statistics_interface import OtherRows
from megatron_ktr.policy.reference import ReferenceModel
from megatron_ktr.types import PackedBatch, View
from models.qwen2_5_vl.conversion import unwrap_model


@contextlib.contextmanager
def comparing(
    objective: Objective, reference: ReferenceModel | None, *, temperature: float
) -> Iterator[dict[str, Any]]:
    """The options of ``compared`` for the intact passes inside the context, where all tensors are on the device."""
    weight: contextlib.AbstractContextManager[Tensor | None] = contextlib.nullcontext()
    if objective.needs_reference_kl:
        assert reference is not None, "an objective that needs the KL to the reference model needs the model"
        weight = reference.output_weight()
    with weight as weight_VD:
        yield {"objective": objective, "temperature": temperature, "reference_weight_VD": weight_VD}


def compared(
    chunk: torch.nn.Module,
    item: MicroBatch,
    batch: PackedBatch,
    hidden_RD: Tensor,
    *,
    objective: Objective,
    temperature: float,
    reference_weight_VD: Tensor | None = None,
) -> tuple[TokenStatistics, MicroBatch]:
    """The statistics of the intact rows, and the item with all comparisons of whole distributions filled in.

    There are three kinds of comparison: the KL to other views and the KL to the reference model, whose hidden rows the
    item has kept (both computed in the same pass over the vocabulary), and the divergence between the responses of a
    group. ``batch`` is the item's batch on the device. ``reference_weight_VD`` is this rank's shard of the reference
    model's output weight; None: the policy's.
    """
    model = unwrap_model(chunk)
    views: list[tuple[View, Tensor]] = []
    for view, draws in item.counterfactual_hidden_RD.items():
        for rows_RD in draws:
            assert rows_RD is not None, "the last stage has the hidden rows of every view"
            views.append((view, rows_RD))
    reference = None
    if objective.needs_reference_kl:
        rows_RD = item.reference_hidden_RD
        assert rows_RD is not None, "the reference model's pass has run before, and the last stage has its hidden rows"
        reference = OtherRows(rows_RD, reference_weight_VD, has_kl_gradient=objective.needs_reference_kl_gradient)
    statistics = model.response_statistics(
        hidden_RD,
        batch,
        temperature=temperature,
        counterfactual_hidden_RD=tuple(rows for _, rows in views),
        reference=reference,
    )
    if views:
        names: list[View] = [view for view, _ in views]
        item = dataclasses.replace(
            item,
            counterfactual_logprob_R=mean_by_view(names, statistics.counterfactual_logprob_KR),
            counterfactual_kl_R=mean_by_view(names, statistics.kl_KR),
            counterfactual_hidden_RD={},
        )
    # One that an earlier pass without gradient has left would stop the gradient that the objective asks for.
    is_wanted = item.divergence_R is None or objective.needs_divergence_gradient
    if objective.needs_divergence and is_wanted:
        divergence_R = model.group_divergence(
            hidden_RD,
            statistics.log_normalizer_R,
            batch=batch,
            temperature=temperature,
            with_gradient=objective.needs_divergence_gradient,
        )
        item = dataclasses.replace(item, divergence_R=divergence_R)
    return statistics, item
