"""Measures how much the scores of signals change by rounding alone, every ``noise_every`` steps.

The same responses are scored twice on the intact view, without gradient, and compared token by token
(``attribution/noise_floor.py``). The first pass is as the update's own. The second is as a counterfactual pass, in
``scoring_precision``, over another pack of the same micro-batch:

    the groups stand in reverse order, so that rows have other neighbours and tiles of kernels other borders;
    every position is larger by ``POSITION_SHIFT``. Attention depends on differences of positions alone, so this changes
    nothing but the rounding: queries and keys are rotated by other angles, and so are rounded to other numbers.

The shift is what makes the two passes differ on every machine, also where a kernel computes a row alike whatever stands
beside it, or where a micro-batch has a single group. In fp32 the passes differ by 1e-6 nats or so, in bf16 by as much
as passes over different videos do by rounding (``docs/numerics.md``).

``shift: kl`` compares whole distributions, for which the second pass keeps its hidden rows; the entropy's noise then
costs a third pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.attribution.noise_floor import AGAIN, Floor, SignalNoise, floor_of
from megatron_ktr.batch.micro_batch import MicroBatch
from megatron_ktr.batch.packing import MediaSpec, pack_groups
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.distributed.collectives import gather_rows
from megatron_ktr.objectives.base import Objective
from megatron_ktr.ops.token_statistics import TokenStatistics
from megatron_ktr.policy.policy import Policy
from megatron_ktr.types import INTACT, PackedBatch, ScoredBatch, TokenScores

POSITION_SHIFT = 64


class NoiseMeter:
    """Measures the floors and keeps them until they are measured again; they are part of a checkpoint."""

    def __init__(self, *, options: StepOptions, policy: Policy, objective: Objective, media: MediaSpec) -> None:
        self.options = options
        self.policy = policy
        self.objective = objective
        self.media = media
        self.floors: dict[str, float] = {}
        """By signal, the newest ones."""
        self._values: dict[str, float] = {}

    def measure(self, micro_batches: Sequence[MicroBatch], *, step: int) -> None:
        """Measures the floors if they are due: at steps 1, 1 + n, 1 + 2 n, ... with n = ``noise_every``, and as long as
        there is a signal that has not met a token yet. Collective over the world."""
        every, signals = self.options.objective.noise_every, self.objective.signals
        if not every or not signals or ((step - 1) % every and self.floors.keys() >= set(signals)):
            return
        found: dict[str, Floor] = self.policy.from_last_stage(self._floors(micro_batches))
        self.floors |= {signal: one.floor for signal, one in found.items()}
        for signal, one in found.items():
            self._values[f"noise_floor/{signal}"] = one.floor
            if one.signal_to_noise is not None:
                self._values[f"signal_to_noise/{signal}"] = one.signal_to_noise

    def take_values(self) -> dict[str, float]:
        """The metrics of the last measurement; empty if there was none since they were taken."""
        taken, self._values = self._values, {}
        return taken

    def state_dict(self) -> dict[str, float]:
        return dict(self.floors)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.floors = {str(signal): float(floor) for signal, floor in state.items()}

    def other_pack(self, item: MicroBatch) -> PackedBatch:
        """The item's groups in the pack of the second pass."""
        packed = pack_groups(
            item.groups[::-1],
            view=INTACT,
            media=self.media,
            pad_to_multiple=self.options.row_multiple,
            vision="media" if self.policy.ranks.is_first_stage else "none",
        )
        return dataclasses.replace(packed, position_ids_3T=packed.position_ids_3T + POSITION_SHIFT)

    def _floors(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Floor] | None:
        """The floor of each signal over the global batch; None on every stage but the last."""
        again = self._second_pass(micro_batches)
        first = self.policy.score_intact([item for item, _ in again], objective=self.objective)
        parts: dict[str, list[SignalNoise]] = {signal: [] for signal in self.objective.signals}
        for (item, second), scored in zip(again, first, strict=True):
            if scored is None or second is None:
                return None
            scored_batch = ScoredBatch(item.batch, scored[1], item.groups)
            for signal, noise in self.objective.signal_noise(scored_batch, second).items():
                parts[signal].append(noise)
        gather = partial(gather_rows, group=self.policy.ranks.data)
        floors = {}
        for signal, of_signal in parts.items():
            score, noise = (gather(torch.cat([getattr(one, name) for one in of_signal])) for name in ("score", "noise"))
            if (floor := floor_of(SignalNoise(score, noise))) is not None:
                floors[signal] = floor
        return floors

    def _second_pass(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, TokenScores | None]]:
        """Each item with the second pass added as the view ``AGAIN``, and that pass's own scores."""
        precision = self.options.objective.scoring_precision
        batches = [cache(partial(self.other_pack, item)) for item in micro_batches]
        restore = [_restorer(item) for item in micro_batches]
        hidden: list[Tensor | None] = [None] * len(micro_batches)
        if self.objective.needs_kl:
            hidden = self.policy.hidden_rows(batches, precision=precision)
        scored = self.policy.score(batches, precision=precision)
        found: list[tuple[MicroBatch, TokenScores | None]] = []
        for item, back, rows_RD, statistics in zip(micro_batches, restore, hidden, scored, strict=True):
            second = None if statistics is None else _scores(statistics, back)
            if self.objective.needs_kl:
                item = item.with_hidden_rows(AGAIN, (None if rows_RD is None else back(rows_RD),))
            else:
                item = item.with_logprobs(AGAIN, None if second is None else second.policy_logprob_R)
            found.append((item, second))
        return found


def _restorer(item: MicroBatch) -> Callable[[Tensor], Tensor]:
    """What puts rows of the second pass, whose groups stand in reverse order, back into the order of ``item``."""
    lengths = [group.num_response_tokens for group in item.groups]
    return lambda rows: torch.cat(rows.split(lengths[::-1])[::-1])


def _scores(statistics: TokenStatistics, back: Callable[[Tensor], Tensor]) -> TokenScores:
    return TokenScores(policy_logprob_R=back(statistics.logprob_R), entropy_R=back(statistics.entropy_R))
