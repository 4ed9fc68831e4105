"""The scores of an update by response, on every rank of the replica, for dumps of a step that went wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ktr.batch.micro_batch import UpdateResult
from megatron_ktr.policy.policy import Policy
from megatron_ktr.types import RolloutGroup, TokenScores

ResponseScores = Mapping[str, tuple[float, ...]]
"""The scores of one response's tokens by name; each has the response's length."""


def response_scores(
    groups: Sequence[RolloutGroup], result: UpdateResult | None, *, policy: Policy
) -> tuple[tuple[ResponseScores, ...], ...]:
    """By group and response: policy, sampler, reference and old log-probs, entropy, and those of every view, as far as
    the update had them. Collective over the replica, because only the last pipeline stage has them at first."""
    if result is None:
        return ()
    parts = [_by_name(scores) for scores in result.scores]
    names = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
    columns = {name: torch.cat([part[name] for part in parts]).cpu() for name in names}
    columns = policy.from_last_stage(columns if parts else None)
    found, start = [], 0
    for group in groups:
        responses: list[ResponseScores] = []
        for rollout in group.rollouts:
            tokens = slice(start, start + len(rollout.token_ids))
            start = tokens.stop
            responses.append({name: tuple(values_R[tokens].tolist()) for name, values_R in columns.items()})
        found.append(tuple(responses))
    return tuple(found)


def _by_name(scores: TokenScores) -> dict[str, Tensor]:
    """Every score that is there, without its shape's suffix; those of views as ``logprob/VIEW`` and ``kl/VIEW``."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(scores):
        value = getattr(scores, field.name)
        if isinstance(value, Tensor):
            found[field.name.removesuffix("_R")] = value.detach().float()
        elif value is not None:
            kind = field.name.removesuffix("_of_view")
            found |= {f"{kind}/{view}": value_R.detach().float() for view, value_R in value.items()}
    return found
