"""What helps a selection whose passes are in bf16: which tokens it chooses, and where its gradient points.

The model trains and scores in bf16. It is compared with the same weights (rounded to bf16, as published ones are) in
fp32, on the same responses, with the signed shift and a fifth of the tokens per signal:

    paper           every score counts (``min_shift: 0``), one order of frames
    floor           ``min_shift: auto``
    orders          ``num_shuffles: 4``, the mean of four orders
    orders, floor   both

``agreement``: tokens that both choose / that either chooses, bf16 with the remedy against fp32 with as many orders and
no floor. ``of_fp32``: the share of the chosen tokens that fp32 chooses, too. ``chosen``: tokens chosen / those of fp32.
``gradient_cosine``: of the whole gradient of the step to that of fp32, with rewards of 1 and 0 in turn. (The tiny
model's answers to long prompts are all wrong, and equal rewards have no gradient.) ``..._same_floor`` compares with
fp32 that drops scores below the same floor, and so shows what rounding still decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.fp8.measures import Gradients, agreement, cosine
from megatron_ktr.batch.micro_batch import MicroBatch
from megatron_ktr.config import Config
from megatron_ktr.config.objective_section import AUTO
from megatron_ktr.config.part_options import PolicyOptions, StepOptions
from megatron_ktr.distributed.platform import current
from megatron_ktr.objectives import build_objective
from megatron_ktr.ops.main_grad import main_gradient
from megatron_ktr.policy.policy import Policy
from megatron_ktr.step.noise import NoiseMeter
from megatron_ktr.step.scoring import ScoringPasses
from megatron_ktr.types import BatchFacts, RolloutGroup, Selection

ORDERS = (1, 4)
SIGNALS = ("visual", "temporal")


@dataclass(frozen=True)
class Chosen:
    """The key tokens of all micro-batches by signal (bool [R]) and by either of them, and the gradient they make."""

    masks: Mapping[str, Tensor]
    gradients: Gradients


class Precision:
    """One policy, with the counterfactual scores of all micro-batches by number of orders."""

    def __init__(self, config: Config, *, precision: str, ranks: Any, media: Any, parts: Sequence[Any]) -> None:
        self.config = dataclasses.replace(config, model=dataclasses.replace(config.model, params_dtype=precision))
        self.policy = Policy(
            config.model.model,
            options=PolicyOptions.of(self.config),
            ranks=ranks,
            platform=current(),
            num_steps=1,
        )
        if precision == "fp32":
            _round_weights(self.policy)
        self.media = media
        self.items: dict[int, list[MicroBatch]] = {}
        for number in ORDERS:
            scoring = self._scoring(number)
            packed = [MicroBatch(tuple(part), scoring.pack(part, "intact")) for part in parts]
            self.items[number] = scoring.with_counterfactuals(packed, step=1)

    def floors(self) -> tuple[dict[str, float], dict[str, float]]:
        """The floor of each signal, and its signal-to-noise ratio."""
        options = self._options(1, noise_every=1)
        objective = build_objective(options.objective)
        meter = NoiseMeter(options=options, policy=self.policy, objective=objective, media=self.media)
        meter.measure(self.items[1], step=1)
        values = meter.take_values()
        return meter.floors, {name: values[f"signal_to_noise/{name}"] for name in SIGNALS}

    def choose(self, number: int, *, floors: Mapping[str, float] | None = None) -> Chosen:
        """The step with ``number`` orders; with ``floors``, scores below them are not selected."""
        section = self._options(number, min_shift=0.0 if floors is None else AUTO).objective
        objective = build_objective(section)
        count = sum(len(group.rollouts) for item in self.items[number] for group in item.groups)
        facts = BatchFacts(num_responses=count, noise_floor=floors or {})
        result = self.policy.backward(self.items[number], objective=objective, facts=facts)
        masks = {signal: torch.cat([streams.is_selected_R[signal] for streams in result.streams]) for signal in SIGNALS}
        masks["union"] = Selection.union(masks).is_key_R
        masks["key tokens"] = torch.cat([streams.is_key_token_R for streams in result.streams])
        model = self.policy.bare_chunks[0]
        return Chosen(masks, {name: main_gradient(p).float().clone() for name, p in model.named_parameters()})

    def _options(self, number: int, **values: Any) -> StepOptions:
        section = dataclasses.replace(self.config.objective, num_shuffles=number, kl_beta=0.0, **values)
        return StepOptions.of(dataclasses.replace(self.config, objective=section))

    def _scoring(self, number: int) -> ScoringPasses:
        options = self._options(number)
        objective = build_objective(options.objective)
        return ScoringPasses(options=options, policy=self.policy, objective=objective, media=self.media)


def measure_remedies(
    config: Config, *, ranks: Any, media: Any, parts: Sequence[Sequence[RolloutGroup]]
) -> dict[str, Any]:
    """The noise of both precisions, and each remedy against fp32."""
    parts = [[_with_rewards(group) for group in part] for part in parts]
    by_precision = {
        name: Precision(config, precision=name, ranks=ranks, media=media, parts=parts) for name in ("bf16", "fp32")
    }
    lower, full = by_precision["bf16"], by_precision["fp32"]
    floors, ratios = lower.floors()
    remedies = {}
    for number in ORDERS:
        expected = full.choose(number)
        above_floor = full.choose(number, floors=floors)
        for has_floor in (False, True):
            found = lower.choose(number, floors=floors if has_floor else None)
            name = ", ".join(["orders"] * (number > 1) + ["floor"] * has_floor) or "paper"
            remedies[name] = _compare(found, expected) | (
                {f"{key}_same_floor": value for key, value in _compare(found, above_floor).items()} if has_floor else {}
            )
    fp32_floors, _ = full.floors()
    return {"floors": {"bf16": floors, "fp32": fp32_floors}, "signal_to_noise": ratios, "remedies": remedies}


def _with_rewards(group: RolloutGroup) -> RolloutGroup:
    rollouts = [
        dataclasses.replace(rollout, rewards={"accuracy": float(index % 2)})
        for index, rollout in enumerate(group.rollouts)
    ]
    return dataclasses.replace(group, rollouts=tuple(rollouts))


def _compare(found: Chosen, expected: Chosen) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for name, mask_R in found.masks.items():
        theirs_R = expected.masks[name]
        key = name.replace(" ", "_")
        chosen, of_fp32 = int(mask_R.sum()), int((mask_R & theirs_R).sum())
        result[f"agreement_{key}"] = agreement([(mask_R, theirs_R)])
        result[f"of_fp32_{key}"] = of_fp32 / chosen if chosen else None
        result[f"chosen_{key}"] = chosen / max(1, int(theirs_R.sum()))
    return {**result, "gradient_cosine": cosine(found.gradients, expected.gradients)}


@torch.no_grad()
def _round_weights(policy: Policy) -> None:
    for parameter in policy.bare_chunks[0].parameters():
        parameter.copy_(parameter.to(torch.bfloat16).float())
