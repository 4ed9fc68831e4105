"""The passes without gradient before an update: other views, reference model, early selection.

    with_counterfactuals    scores the same responses in the counterfactual views that the objective names. Groups to
                            which a view does not apply (no media; no order to lose) are left out of the pass
    with_reference          adds the log-probs of the frozen reference model, or, where the KL to it is taken over the
                            whole vocabulary, its hidden rows
    with_selection          chooses key tokens, if inside the update would be too late

Each method takes micro-batches and returns them with its results added. No work is done twice: vision features come
from the cache of ``policy/vision_pass.py``, the head runs on the predicting rows only, and whole distributions are
compared in the update's own pass over the vocabulary (``needs_kl``, ``needs_reference_kl``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from megatron_ktr.attribution.views.base import ViewDraw
from megatron_ktr.batch.micro_batch import MicroBatch
from megatron_ktr.batch.packing import MediaSpec, pack_groups, with_media
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.config.view_registry import load_view
from megatron_ktr.distributed.collectives import gather_rows
from megatron_ktr.objectives.base import Objective
from megatron_ktr.ops.token_statistics import TokenStatistics
from megatron_ktr.policy.policy import Policy
from megatron_ktr.policy.roles import ModelRole
from megatron_ktr.transfer import send
from megatron_ktr.types import INTACT, BatchFacts, PackedBatch, RolloutGroup, ScoredBatch, View, VisualInput


class ScoringPasses:
    """The scoring passes of a training step. The object keeps no state between calls."""

    def __init__(self, *, options: StepOptions, policy: Policy, objective: Objective, media: MediaSpec) -> None:
        self.options = options
        self.policy = policy
        self.objective = objective
        self.media = media

    def pack(
        self,
        groups: Sequence[RolloutGroup],
        view: View,
        *,
        step: int = 0,
        draw: int = 0,
    ) -> PackedBatch:
        """Packs one micro-batch in one view. ``draw`` numbers the draws of a random view within a step."""
        return pack_groups(
            groups,
            view=view,
            media=self.media,
            pad_to_multiple=self.options.row_multiple,
            shown=self._shown(groups, view, step=step, draw=draw),
            vision="media" if self.policy.ranks.is_first_stage else "none",
        )

    def _shown(
        self, groups: Sequence[RolloutGroup], view: View, *, step: int, draw: int
    ) -> list[tuple[VisualInput, ...]] | None:
        """The media that the view shows, by group; None where they are not needed. A prompt to which the view does not
        apply keeps its own."""
        if view == INTACT or not self.policy.ranks.is_first_stage:
            return None
        seen, options = load_view(view), self.options
        which = ViewDraw(options.objective, sizes=self.media, seed=options.trainer.seed, step=step, draw=draw)
        prompts = [group.prompt for group in groups]
        return [seen.shown(prompt, which) if seen.applies(prompt) else prompt.media for prompt in prompts]

    def prepare_vision(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Runs the vision encoder once over the media that passes without gradient will show before the update does."""
        self.policy.prepare_vision([item.batch for item in micro_batches if self._is_seen_before_update(item)])

    def with_counterfactuals(self, micro_batches: list[MicroBatch], *, step: int) -> list[MicroBatch]:
        """Adds the scores of every view that the objective reads: the log-probs, or, if the objective compares whole
        distributions, the hidden rows they come from. With several draws of a random view (``num_shuffles``) the
        log-probs, or the KLs, are averaged."""
        for view in sorted(self.objective.views):
            draws = load_view(view).num_draws(self.options.objective)
            # Scores are computed by draw, then by micro-batch; zip transposes them to micro-batch, then draw.
            score = self._hidden_rows if self.objective.needs_kl else self._logprobs
            found = zip(*(score(micro_batches, view, step=step, draw=draw) for draw in range(draws)), strict=True)
            if self.objective.needs_kl:
                micro_batches = [
                    item.with_hidden_rows(view, rows_by_draw)
                    for item, rows_by_draw in zip(micro_batches, found, strict=True)
                ]
            else:
                micro_batches = [
                    item.with_logprobs(view, _mean(logprobs_by_draw))
                    for item, logprobs_by_draw in zip(micro_batches, found, strict=True)
                ]
        return micro_batches

    def with_reference(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        if not self.objective.needs_reference:
            return micro_batches
        batches = [item.packed for item in micro_batches]
        if self.objective.needs_reference_kl:
            rows = self.policy.hidden_rows(batches, model=ModelRole.REFERENCE)
            return [
                dataclasses.replace(item, reference_hidden_RD=rows_RD)
                for item, rows_RD in zip(micro_batches, rows, strict=True)
            ]
        found = self.policy.score(batches, model=ModelRole.REFERENCE)
        return [
            dataclasses.replace(item, reference_logprob_R=_logprob(statistics))
            for item, statistics in zip(micro_batches, found, strict=True)
        ]

    def with_selection(self, micro_batches: list[MicroBatch], facts: BatchFacts) -> tuple[list[MicroBatch], BatchFacts]:
        """Chooses key tokens before the update, if inside the update would be too late. It costs one more scoring pass.

        There are these cases: loss denominators that count the key tokens of the global batch, thresholds or moments
        over the global batch, and several updates on the same rollout (selection and old policy are then those of the
        first update).

        Also returns ``facts`` with what only scores can tell; on the last pipeline stage, which alone reads it.
        """
        is_reused = self.options.objective.num_updates > 1
        if not self._selects_first:
            return micro_batches, facts
        found = self.policy.score_intact(micro_batches, objective=self.objective)
        # Only the last pipeline stage has scores, and there every micro-batch has them.
        scored = [result for result in found if result is not None]
        if not scored:
            return micro_batches, facts
        items = [ScoredBatch(item.batch, scores, item.groups) for item, scores in scored]
        gather = partial(gather_rows, group=self.policy.ranks.data)
        chosen = self.objective.select(items, facts, gather=gather)
        facts = self.objective.with_scores(facts, items, chosen, gather=gather)
        selected = [
            dataclasses.replace(
                item,
                selection=selection,
                behaviour_logprob_R=scores.policy_logprob_R if is_reused else item.behaviour_logprob_R,
            )
            for (item, scores), selection in zip(scored, chosen, strict=True)
        ]
        return selected, facts

    @property
    def _selects_first(self) -> bool:
        return self.objective.selects_before_update(self.options.objective.num_updates)

    def _is_seen_before_update(self, item: MicroBatch) -> bool:
        """Whether a pass without gradient shows intact temporal patches of the item."""
        if self._selects_first:
            return True
        views = [load_view(view) for view in self.objective.views]
        prompts = [group.prompt for group in item.groups]
        options = self.options.objective
        return any(
            view.applies(prompt) and view.shows_intact_patches(prompt, options) for view in views for prompt in prompts
        )

    def _hidden_rows(
        self, micro_batches: Sequence[MicroBatch], view: View, *, step: int, draw: int
    ) -> list[Tensor | None]:
        batches = [self._packed(item, item.groups, view, step=step, draw=draw) for item in micro_batches]
        return self.policy.hidden_rows(batches, precision=self.options.objective.scoring_precision)

    def _logprobs(
        self, micro_batches: Sequence[MicroBatch], view: View, *, step: int, draw: int
    ) -> list[Tensor | None]:
        """Log-probs [R] by micro-batch, on the last stage; NaN on tokens of groups to which the view does not apply."""
        applies = load_view(view).applies
        kept = [[applies(group.prompt) for group in item.groups] for item in micro_batches]
        parts = [
            [group for group, is_kept in zip(item.groups, marks, strict=True) if is_kept]
            for item, marks in zip(micro_batches, kept, strict=True)
        ]
        batches = [
            self._packed(item, part, view, step=step, draw=draw)
            for item, part in zip(micro_batches, parts, strict=True)
            if part
        ]
        scored = iter(self.policy.score(batches, precision=self.options.objective.scoring_precision))
        found: list[Tensor | None] = []
        for item, marks in zip(micro_batches, kept, strict=True):
            logprob_R = _logprob(next(scored)) if any(marks) else None
            found.append(self._over_whole_batch(logprob_R, item.batch, marks))
        return found

    def _packed(
        self, item: MicroBatch, part: Sequence[RolloutGroup], view: View, *, step: int, draw: int
    ) -> Callable[[], PackedBatch]:
        """A function that packs ``part`` of the item's groups when it is first called, and keeps the batch."""
        if load_view(view).keeps_rows and len(part) == len(item.groups):
            # The view differs from the intact one only in its media: reuse the packed rows.
            return cache(lambda: with_media(item.batch, view, self._shown(part, view, step=step, draw=draw) or []))
        return cache(partial(self.pack, part, view, step=step, draw=draw))

    def _over_whole_batch(self, logprob_R: Tensor | None, batch: PackedBatch, kept: Sequence[bool]) -> Tensor | None:
        if not self.policy.ranks.is_last_stage or all(kept):
            return logprob_R
        spread_R = torch.full((len(batch.target_ids_R),), float("nan"), device=self.policy.platform.device)
        if logprob_R is not None:
            # Row indices are computed on the host. A mask on the device would make the host wait for its count.
            rows_R = torch.tensor(kept)[batch.group_R].nonzero()[:, 0]
            spread_R[send(rows_R, spread_R.device)] = logprob_R.to(spread_R.dtype)
        return spread_R


def _logprob(statistics: TokenStatistics | None) -> Tensor | None:
    return None if statistics is None else statistics.logprob_R


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    """The mean over draws; None on every stage but the last."""
    if len(values) == 1 or values[0] is None:
        return values[0]
    return torch.stack([value for value in values if value is not None]).mean(dim=0)
