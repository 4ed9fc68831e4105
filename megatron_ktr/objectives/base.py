"""The interface of an objective.

An objective declares which scores (log-probs, entropy, divergence) it needs. It turns them into per-token streams of
advantages and weights, from which its loss is computed. The trainer and the policy know objectives by this class only.
Policy gradients are compositions of parts (``policy_gradient.py``); supervised fine-tuning is not (``sft.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_ktr.attribution.noise_floor import SignalNoise
from megatron_ktr.sums import Metrics
from megatron_ktr.types import (
    BatchFacts,
    PackedBatch,
    RolloutGroup,
    ScoredBatch,
    Selection,
    TokenScores,
    TokenStreams,
    View,
)

Gather = Callable[[Tensor], Tensor]
"""The tensors of all data-parallel replicas, concatenated along dimension 0 in the order of replicas. Their sizes along
it may differ. Collective: every replica calls it equally often."""


class Objective(ABC):
    """An algorithm, from scores to loss.

    Implementations are frozen dataclasses without state. The defaults of this class describe the simplest case: a
    single pass, no reference model, and every response token carries the loss. Implementations override what differs.
    """

    name = ""
    views: frozenset[View] = frozenset()
    """Counterfactual views whose log-probs must be in the scores; never contains ``intact``."""
    signals: tuple[str, ...] = ()
    """The names of the signals whose scores select tokens. Their noise can be measured (``signal_noise``)."""
    needs_kl = False
    """Whether the scores must hold KL(intact || view) over the whole vocabulary for each of ``views``."""
    needs_divergence = False
    """Whether the scores must hold the divergence between the responses of a group."""
    needs_divergence_gradient = False
    """Whether the gradient of the loss also flows through that divergence."""
    needs_reference = False
    """Whether the frozen reference model's log-probs must be in the scores (KL weight above 0)."""
    needs_reference_kl = False
    """Whether the scores must hold KL(policy || reference) over the whole vocabulary. It also needs the reference."""
    needs_reference_kl_gradient = False
    """Whether the gradient of the loss also flows through that KL."""
    reaches_every_token = False
    """Whether tokens that are not key tokens have a gradient as well."""
    needs_batch_rewards = False
    """Whether ``BatchFacts`` must hold the rewards and lengths of all responses of the rollout."""
    needs_selection_first = False
    """Whether ``select`` must see every micro-batch of every replica before the first forward of the update, because
    denominators count *key* tokens, or because thresholds are taken over the global batch."""

    def selects_before_update(self, num_updates: int) -> bool:
        """Whether key tokens are chosen in a separate pass without gradient, before the update.

        ``num_updates`` is the number of optimizer steps on the same responses. With two or more, all of them use the
        selection and the old policy's log-probs of the first, which must therefore be computed before any step.
        """
        return self.needs_selection_first or num_updates > 1

    def may_have_gradient(self, groups: Sequence[RolloutGroup], facts: BatchFacts) -> bool:
        """False only if it is certain that none of this replica's ``groups`` has a gradient. The trainer skips the
        passes of a step if every replica says so; True is no promise."""
        return True

    def rewards_of(self, groups: Sequence[RolloutGroup]) -> list[list[float]]:
        """The reward of each response by group, with what the objective adds to it before responses are compared."""
        return [[rollout.reward for rollout in group.rollouts] for group in groups]

    def with_scores(
        self,
        facts: BatchFacts,
        items: Sequence[ScoredBatch],
        selections: Sequence[Selection | None],
        *,
        gather: Gather,
    ) -> BatchFacts:
        """``facts`` with what the update must know of the global batch and only scores can tell. It is called where
        ``select`` is called before the update, after it, with all micro-batches of the replica."""
        return facts

    def select(
        self, items: Sequence[ScoredBatch], facts: BatchFacts, *, gather: Gather | None = None
    ) -> list[Selection | None]:
        """The selection of each item; None for an objective that does not select.

        Args:
            items: before the update, all micro-batches of the replica; inside it, one.
            gather: reaches the other replicas; None inside the update, where a replica cannot wait for others.
        """
        return [None] * len(items)

    def signal_noise(self, item: ScoredBatch, again: TokenScores) -> Mapping[str, SignalNoise]:
        """How much the scores of each of ``signals`` change by rounding alone, given a second intact pass over the item
        (``attribution/noise_floor.py``)."""
        return {}

    def num_loss_tokens(self, batch: PackedBatch, selection: Selection | None) -> int:
        """The number of tokens of the batch that carry the loss, given the result of ``select``.

        Pipeline stages that do not score pass None; an objective that selects then answers 0.
        """
        return batch.target_ids_R.numel()

    @abstractmethod
    def token_streams(
        self, item: ScoredBatch, facts: BatchFacts, *, selection: Selection | None = None
    ) -> TokenStreams:
        """Advantage, weight and mask of every response token, on the device of the scores.

        ``selection`` is one made earlier, used unchanged (several updates per rollout; proofs). Without it, an
        objective that selects does so here.
        """

    def reason_to_skip(self, metrics: Metrics) -> str | None:
        """Why an update whose loss is not finite may be skipped; None if nothing explains it and the run must stop.

        ``metrics`` are those of the update, reduced over all ranks.
        """
        return None

    @abstractmethod
    def loss(self, statistics: Any, streams: TokenStreams, scores: TokenScores) -> tuple[Tensor, Metrics]:
        """Loss of the micro-batch (differentiable through ``statistics.logprob_R``) and its metrics."""

    def any_gradient(self, streams: TokenStreams, scores: TokenScores) -> Tensor:
        """bool []: whether any token of the micro-batch may have a gradient; by default, whether one that carries the
        loss has a nonzero advantage."""
        return ((streams.weight_R != 0) & (streams.advantage_R != 0)).any()
