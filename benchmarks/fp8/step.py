"""One training step on fixed responses, up to its gradient, in fp32, in bf16 or with parts of it in FP8."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.fp8.emulation import Emulation, Recipe, language_linears
from benchmarks.fp8.measures import Gradients, Observed
from megatron_ktr.attribution.signals import build_signals, signal_applies, signal_scores
from megatron_ktr.batch.micro_batch import MicroBatch
from megatron_ktr.config import Config
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.config.sections import ObjectiveSection
from megatron_ktr.objectives import build_objective
from megatron_ktr.policy.policy import Policy
from megatron_ktr.step.scoring import ScoringPasses
from megatron_ktr.types import BatchFacts, RolloutGroup, Selection, TokenScores, TokenStreams

Parts = Sequence[Sequence[RolloutGroup]]
"""Groups by micro-batch."""
Case = Literal["everything", "scoring"]


@dataclass(frozen=True)
class Variant:
    """One way of taking the step in FP8."""

    name: str
    recipe: Recipe
    case: Case = "everything"
    is_warm: bool = True
    """Whether delayed scales come from steps before."""


class Step:
    """The training step on fixed responses, in the precision of one policy, up to its gradient."""

    def __init__(self, policy: Policy, *, config: Config, media: Any, parts: Parts) -> None:
        self.policy = policy
        self.objective = build_objective(config.objective, reward=config.reward)
        self.scoring = ScoringPasses(
            options=StepOptions.of(config), policy=policy, objective=self.objective, media=media
        )
        self.parts = parts
        self.model = policy.bare_chunks[0]
        self._row_gradients: list[Tensor] = []
        self.model.language.decoder.layers[0].register_forward_pre_hook(self._watch_input, with_kwargs=True)
        self.last_streams: Sequence[TokenStreams] = ()

    def observe(self, variant: Variant | None, *, fp32_choice: Observed | None = None, warm_up: Parts = ()) -> Observed:
        """The step in FP8 as ``variant`` says, or without FP8. ``fp32_choice``: the gradient is taken once more, with
        the key tokens that this run chose."""
        emulation = Emulation(language_linears(self.model), variant.recipe) if variant else None
        counterfactual = emulation.on if emulation else contextlib.nullcontext
        everywhere = counterfactual if variant is None or variant.case == "everything" else contextlib.nullcontext
        if variant is not None and variant.is_warm and variant.recipe.name == "delayed" and warm_up:
            with everywhere():
                self._backward(self._scored(warm_up, counterfactual))
        with everywhere():
            items = self._scored(self.parts, counterfactual)
        kept = emulation.without_memory() if emulation else contextlib.nullcontext()
        with kept, everywhere():
            scores, streams, gradients = self._backward(items)
        self.last_streams = streams
        observed = Observed(
            scores, [self._signals(*pair) for pair in zip(items, scores, strict=True)], _chosen(streams), gradients
        )
        if fp32_choice is None and variant is not None:
            return observed
        return self._with_same_tokens(observed, items, fp32_choice or observed, emulation, everywhere)

    def _with_same_tokens(
        self,
        observed: Observed,
        items: list[MicroBatch],
        choice: Observed,
        emulation: Emulation | None,
        everywhere: Any,
    ) -> Observed:
        for product in emulation.products.values() if emulation else ():
            product.row_errors = []
        chosen = [
            dataclasses.replace(item, selection=Selection.union(masks))
            for item, masks in zip(items, choice.chosen, strict=True)
        ]
        with everywhere():
            _, _, gradients = self._backward(chosen)
        rows = zip(self._row_gradients, items, strict=True)
        errors = {name: product.row_errors for name, product in emulation.products.items()} if emulation else {}
        return dataclasses.replace(
            observed,
            gradients_same_tokens=gradients,
            token_gradients_RD=torch.cat([gradient_TD[item.batch.predicting_rows_R] for gradient_TD, item in rows]),
            row_errors={name: found for name, found in errors.items() if found},
        )

    def gradients_of_halves(self) -> tuple[Gradients, Gradients]:
        """Of the first and of the second half of the micro-batches, without FP8."""
        items = self._scored(self.parts, contextlib.nullcontext)
        middle = len(items) // 2
        halves = [self._backward(half)[2] if half else {} for half in (items[:middle], items[middle:])]
        return halves[0], halves[1]

    def pull_of_tokens(self) -> Tensor:
        """|advantage| * weight of a key token of each token's response, [R] over the last step's micro-batches; 0 for
        the first token of a response, which all responses of the group predict in one row."""
        pulls = []
        for part, streams in zip(self.parts, self.last_streams, strict=True):
            response_R = self.scoring.pack(part, "intact").response_R
            pull_R = (streams.advantage_R * streams.weight_R).abs()
            largest = torch.zeros(int(response_R.max()) + 1).scatter_reduce(0, response_R, pull_R, "amax")
            is_first_R = torch.cat([response_R.new_ones(1, dtype=torch.bool), response_R[1:] != response_R[:-1]])
            pulls.append(largest[response_R].masked_fill(is_first_R, 0.0))
        return torch.cat(pulls)

    def _scored(self, parts: Parts, counterfactual: Any) -> list[MicroBatch]:
        items = [MicroBatch(tuple(part), self.scoring.pack(part, "intact")) for part in parts]
        with counterfactual():
            return self.scoring.with_counterfactuals(items, step=1)

    def _backward(self, items: list[MicroBatch]) -> tuple[Sequence[TokenScores], Sequence[TokenStreams], dict]:
        self._row_gradients.clear()
        count = sum(item.batch.num_responses for item in items)
        result = self.policy.backward(items, objective=self.objective, facts=BatchFacts(num_responses=count))
        gradients = {name: p.main_grad.float().clone() for name, p in self.model.named_parameters()}
        return result.scores, result.streams, gradients

    def _signals(self, item: MicroBatch, scores: TokenScores) -> dict[str, Tensor]:
        signals = build_signals(ObjectiveSection())
        return signal_scores(signals, scores, applies_R=signal_applies(signals, item.batch, item.groups))

    def _watch_input(self, module: Any, arguments: Any, options: dict[str, Any]) -> None:
        hidden_T1D = options["hidden_states"]
        if torch.is_grad_enabled() and hidden_T1D.requires_grad:
            hidden_T1D.register_hook(lambda gradient: self._row_gradients.append(gradient[:, 0].float().clone()))


def _chosen(streams: Sequence[TokenStreams]) -> list[dict[str, Tensor]]:
    return [dict(part.is_selected_R) for part in streams]
