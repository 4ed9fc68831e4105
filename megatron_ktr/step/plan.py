"""From the groups a replica drew to the micro-batches it trains on.

    balanced    redistributes the groups of all replicas, so that no replica waits for the one with the longest videos
    plan        splits this replica's groups into micro-batches

Where a group ends up does not change the result. Losses are divided by counts of the global batch. Nothing in a step
pairs the micro-batches of two replicas, and one replica may have more of them than another. (Gradients are reduced
once, after or during each replica's last backward; parameters are gathered in its first forward.)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from megatron_ktr.accounting.flops import count_step
from megatron_ktr.accounting.rates import settings_of
from megatron_ktr.accounting.work import GroupWork
from megatron_ktr.batch.packing import plan_micro_batches
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.objectives.base import Objective
from megatron_ktr.policy.policy import Policy
from megatron_ktr.step.balance import Placement, count_oversized, pack_by_tokens
from megatron_ktr.step.exchange import agree_on_placement, exchange_groups
from megatron_ktr.step.mini_batches import plan_mini_batches
from megatron_ktr.types import RolloutGroup

logger = logging.getLogger(__name__)


class StepBatching:
    """Plans the micro-batches of a step. ``balanced`` and ``plan`` are collective; every rank of a replica gets the
    same result."""

    def __init__(self, *, options: StepOptions, policy: Policy, objective: Objective) -> None:
        self._settings = options.trainer
        self._model_config = policy.model_config
        self._policy = policy
        self._work = settings_of(options, objective)
        sizes = policy.ranks.sizes
        # An interleaved pipeline needs a number of micro-batches that is a multiple of its stages.
        self._multiple = sizes.pipeline if (sizes.virtual_pipeline or 1) > 1 else 1
        self._values: dict[str, float] = {}
        self._has_warned = False

    def mini_batches(self, groups: list[RolloutGroup], *, number: int) -> list[list[RolloutGroup]]:
        """This replica's share of each of ``number`` mini-batches of all replicas' groups (``step/mini_batches.py``).
        Every replica's share is nearly the same amount of work."""
        if number == 1:
            return [self.balanced(groups)]
        parallel = self._policy.ranks
        draws = [group.prompt.draw_number for group in groups]
        by_replica: list[tuple[list[int], list[float]]] = [(draws, self._costs(groups))] * parallel.data_size
        if parallel.data_size > 1:
            torch.distributed.all_gather_object(by_replica, (draws, self._costs(groups)), group=parallel.data)
        plan = plan_mini_batches(
            [of_replica for of_replica, _ in by_replica],
            [costs for _, costs in by_replica],
            number=number,
            has_balance=self._settings.balance_replicas,
            keep_counts=self._multiple > 1,
        )
        if parallel.data_size > 1:
            self._note(plan.placement)
            groups = exchange_groups(groups, plan.placement, ranks=parallel)
        return [[groups[place] for place in places] for places in plan.split_of(parallel.data_rank)]

    def balanced(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """This replica's share of all replicas' groups. Every replica's share is nearly the same amount of work."""
        parallel = self._policy.ranks
        if not self._settings.balance_replicas or parallel.data_size == 1:
            return groups
        # An interleaved pipeline keeps each replica's number of groups, which was drawn as a multiple of the stages:
        # only then can a multiple of the stages be filled with micro-batches under any bound on tokens.
        placement = agree_on_placement(self._costs(groups), ranks=parallel, keep_counts=self._multiple > 1)
        self._note(placement)
        return exchange_groups(groups, placement, ranks=parallel)

    def plan(self, groups: Sequence[RolloutGroup]) -> list[tuple[RolloutGroup, ...]]:
        """``groups``, those of this replica in one mini-batch, by micro-batch."""
        max_tokens = self._settings.max_tokens_per_microbatch
        if max_tokens is None:
            return plan_micro_batches(groups, groups_per_micro_batch=self._settings.micro_batch_groups)
        num_tokens = [group.num_tokens for group in groups]
        parts = pack_by_tokens(num_tokens, costs=self._costs(groups), max_tokens=max_tokens, multiple_of=self._multiple)
        num_oversized = count_oversized(num_tokens, max_tokens=max_tokens)
        counts = {"num_micro_batches": float(len(parts)), "oversized_groups": float(num_oversized)}
        for name, value in self._policy.sum_over_replicas(counts).items():
            self._values[name] = self._values.get(name, 0.0) + value
        if num_oversized and self._policy.ranks.is_source and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "groups of up to %d tokens exceed --max-tokens-per-microbatch %d: each is a micro-batch of its own, "
                "counted in the metrics as oversized_groups",
                max(num_tokens),
                max_tokens,
            )
        return [tuple(groups[index] for index in part) for part in parts]

    def take_values(self) -> dict[str, float]:
        """Metrics of the last step's placement and plan, by name; the same on every rank. They are then forgotten."""
        taken, self._values = self._values, {}
        return taken

    def _note(self, placement: Placement) -> None:
        self._values |= {
            "flops_imbalance/before": placement.imbalance_before,
            "flops_imbalance/after": placement.imbalance_after,
            "groups_moved": float(sum(map(len, placement.moves.values()))),
        }

    def _costs(self, groups: Sequence[RolloutGroup]) -> list[float]:
        """The cost of each group: its FLOPs in all passes of a step."""
        config = self._model_config
        return [count_step(config, [GroupWork.of(group, config=config)], settings=self._work).total for group in groups]
