"""Input and result of one update. The trainer makes the input and reads the result; the policy runs the update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ktr.ops.token_statistics import TokenStatistics
from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedBatch, RolloutGroup, Selection, TokenScores, TokenStreams, View

WATCHED = "watched/"
"""The beginning of the names of an update's numbers that guards look at and that are no metrics."""
Packed = PackedBatch | Callable[[], PackedBatch]
"""A batch, or a function that packs it on the first call and keeps it. The function defers packing, which is work of
the host, until the device is busy with an earlier batch."""


def ready(packed: Packed) -> PackedBatch:
    return packed if isinstance(packed, PackedBatch) else packed()


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of the update: its groups, their packed intact view, and the results of earlier passes over it.

    ===========================  ============================  ===========================================
    field                        set by                        read by
    ===========================  ============================  ===========================================
    counterfactual_logprob_R     scoring, one pass per view;   ``scores``
                                 for KL, the intact pass
    counterfactual_hidden_RD     scoring, for KL               the next intact pass, which empties it
    counterfactual_kl_R          that intact pass              ``scores``
    divergence_R                 the first intact pass         ``scores`` (TW-GRPO)
    reference_logprob_R          scoring, reference model      ``scores``
    reference_hidden_RD          scoring, reference model,     every intact pass
                                 for the KL to it
    behaviour_logprob_R,         scoring's own intact pass,    ``scores``; the objective, which otherwise
    selection                    where there is one            selects inside the update
    ===========================  ============================  ===========================================

    The results of passes exist on the last pipeline stage only.
    """

    groups: tuple[RolloutGroup, ...]
    packed: Packed
    """The view ``intact``. If it is a function, the first call packs the batch and later calls return the same one."""
    counterfactual_logprob_R: dict[View, Tensor | None] = field(default_factory=dict)
    """The responses' log-probs in the other views, from ``score``; None on every stage but the last."""
    counterfactual_kl_R: dict[View, Tensor] = field(default_factory=dict)
    """KL(intact || view), once an intact pass has used ``counterfactual_hidden_RD``."""
    counterfactual_hidden_RD: dict[View, tuple[Tensor | None, ...]] = field(default_factory=dict)
    """The hidden rows of the other views, from ``hidden_rows``, for objectives that need the KL. There is one entry per
    random order (views other than ``shuffled`` have one order). The next intact pass compares the distributions of all
    views in its own pass over the vocabulary, so that no logits are kept."""
    divergence_R: Tensor | None = None
    """The divergence between the responses of a group, from the first intact pass; for objectives that need it."""
    reference_logprob_R: Tensor | None = None
    reference_hidden_RD: Tensor | None = None
    """The hidden rows of the reference model, from ``hidden_rows``, for objectives that need the KL to it over the
    whole vocabulary. Every intact pass compares them with its own; that pass also gives the reference's log-probs."""
    behaviour_logprob_R: Tensor | None = None
    selection: Selection | None = None
    """The key tokens, if they are chosen before the update (several updates per rollout, denominators that count key
    tokens, or thresholds over the global batch). None: the objective selects inside the update, right after the intact
    forward."""

    @property
    def batch(self) -> PackedBatch:
        """The packed batch in view ``intact``."""
        return ready(self.packed)

    def with_hidden_rows(self, view: View, rows_by_draw: tuple[Tensor | None, ...]) -> MicroBatch:
        """This micro-batch with the hidden rows of ``view``, for objectives that need the KL to that view."""
        known = self.counterfactual_hidden_RD
        return dataclasses.replace(self, counterfactual_hidden_RD={**known, view: rows_by_draw})

    def with_logprobs(self, view: View, logprob_R: Tensor | None) -> MicroBatch:
        """This micro-batch with the log-probs of its responses in ``view``."""
        known = self.counterfactual_logprob_R
        return dataclasses.replace(self, counterfactual_logprob_R={**known, view: logprob_R})

    def scores(self, statistics: TokenStatistics) -> TokenScores:
        """All scores of the micro-batch, given the statistics of an intact pass."""
        return TokenScores(
            policy_logprob_R=statistics.logprob_R.detach(),
            entropy_R=statistics.entropy_R.detach(),
            logprob_of_view={view: found for view, found in self.counterfactual_logprob_R.items() if found is not None},
            kl_of_view=self.counterfactual_kl_R,
            divergence_R=self.divergence_R,
            reference_logprob_R=(
                self.reference_logprob_R if statistics.reference_logprob_R is None else statistics.reference_logprob_R
            ),
            reference_kl_R=statistics.reference_kl_R,
            behaviour_logprob_R=self.behaviour_logprob_R,
            sampler_logprob_R=self._sampler_logprobs(statistics.logprob_R.device),
        )

    def _sampler_logprobs(self, device: torch.device) -> Tensor | None:
        recorded = [rollout.sampler_logprobs for group in self.groups for rollout in group.rollouts]
        known = [logprobs for logprobs in recorded if logprobs is not None]
        if len(known) < len(recorded):
            return None
        return send(torch.tensor([value for logprobs in known for value in logprobs], dtype=torch.float32), device)


@dataclass(frozen=True)
class UpdateResult:
    """What one optimizer step did. ``streams`` and ``scores`` are per micro-batch, on the last stage only."""

    loss: float
    """The loss of the global batch."""
    has_gradient: bool
    """Whether any token of the global batch has a gradient. Without one ``update`` takes no optimizer step: Adam's
    momentum and weight decay would move the weights on no evidence."""
    metrics: Metrics
    num_not_finite: int = 0
    """Response tokens of the global batch whose log-prob is NaN or infinite."""
    watched: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are no metrics, for guards: how far features differ, and scores (``policy/vision_watch.py``)."""
    has_stepped: bool = False
    skip_reason: str | None = None
    """Why no step was taken although there was a gradient (``batch/skips.py``); None if a step was taken, or there was
    nothing to learn."""
    grad_norm: float = 0.0
    """The norm before clipping; NaN if the update was skipped before it was known."""
    streams: tuple[TokenStreams, ...] = ()
    scores: tuple[TokenScores, ...] = ()

    @property
    def is_skipped(self) -> bool:
        """Whether there was a gradient but no step was taken; ``skip_reason`` says why. A NaN hides gradients, too, so
        that an update with one of its reasons is skipped whatever ``has_gradient`` says."""
        return self.skip_reason is not None or (self.has_gradient and not self.has_stepped)


def together(results: Sequence[UpdateResult]) -> UpdateResult:
    """The results of several mini-batches as one: losses and norms averaged, metrics and micro-batches joined. A single
    result stays as it is."""
    if len(results) == 1:
        return results[0]
    metrics = Metrics()
    for result in results:
        metrics.merge(result.metrics)
    return UpdateResult(
        loss=sum(result.loss for result in results) / len(results),
        has_gradient=any(result.has_gradient for result in results),
        metrics=metrics,
        num_not_finite=sum(result.num_not_finite for result in results),
        watched={
            name: max(result.watched.get(name, -math.inf) for result in results)
            for name in dict.fromkeys(name for result in results for name in result.watched)
        },
        has_stepped=any(result.has_stepped for result in results),
        skip_reason=next((result.skip_reason for result in results if result.skip_reason is not None), None),
        grad_norm=sum(result.grad_norm for result in results) / len(results),
        streams=tuple(streams for result in results for streams in result.streams),
        scores=tuple(scores for result in results for scores in result.scores),
    )


def mean_by_view(views: Sequence[View], values_KR: Tensor) -> dict[View, Tensor]:
    """The rows of ``values_KR`` by view; ``views`` names the view of each row. Rows of the same view are averaged."""
    rows: dict[View, list[Tensor]] = {}
    for view, value_R in zip(views, values_KR, strict=True):
        rows.setdefault(view, []).append(value_R)
    return {view: torch.stack(found).mean(dim=0) if len(found) > 1 else found[0] for view, found in rows.items()}


def measures(loss: Tensor, scores: TokenScores, *, has_gradient: Tensor) -> Metrics:
    """One micro-batch's part of the numbers that ``UpdateResult`` reports. They are not read from the device here."""
    found = Metrics()
    num_not_finite = (~scores.policy_logprob_R.isfinite()).sum()
    values = torch.stack([loss.detach().double(), num_not_finite.double(), has_gradient.double()])
    found.add_later(["loss", "num_not_finite", "has_gradient"], values)
    for view, shift in _largest_shifts(scores).items():
        found.add_later([f"{WATCHED}shift/{view}"], shift, are_maxima=True)
    return found


def _largest_shifts(scores: TokenScores) -> dict[View, Tensor]:
    """By view: the largest score of a token that compares the intact view with it, log-probs or KL; -1 without one."""
    shifts: dict[View, Tensor] = {
        view: (scores.policy_logprob_R.float() - logprob_R.float()).abs()
        for view, logprob_R in scores.logprob_of_view.items()
    }
    shifts |= {view: kl_R.float() for view, kl_R in scores.kl_of_view.items() if view not in shifts}
    return {view: torch.where(shift_R.isfinite(), shift_R, -1.0).amax() for view, shift_R in shifts.items()}
