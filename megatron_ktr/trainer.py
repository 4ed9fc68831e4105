"""The training step, as the paper's algorithm box.

    groups  <- source                            G responses with rewards for each of P prompts
    scores  <- policy without gradient on the hidden and the shuffled view, reference model on the intact view
    update  <- one intact forward; key tokens chosen from the scores; backward through key tokens; optimizer step

Key tokens are normally chosen inside the update, between its forward and its backward (``Policy.backward``). Two
settings need them before the update starts: loss denominators that count key tokens, and several updates on one
selection. An extra intact pass without gradient then chooses them (``ScoringPasses.with_selection``).

This file knows neither Megatron nor any algorithm by name. Sources give groups (recorded, or freshly generated
and rewarded). Objectives say which views they need, and turn scores into per-token streams.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.accounting.rates import step_rates
from megatron_ktr.batch.micro_batch import MicroBatch, UpdateResult, together
from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.batch.skips import IN_A_ROW, NOT_FINITE, SkipStreak
from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.config.run_length import num_steps_of
from megatron_ktr.distributed.collectives import gather_rows
from megatron_ktr.errors import StepAbandoned
from megatron_ktr.objectives.base import Objective
from megatron_ktr.objectives.response_rewards import lengths_of, reward_rows, with_rewards
from megatron_ktr.policy.finite import require_finite_samples
from megatron_ktr.policy.gradient_norms import TensorGradient, tensor_gradients
from megatron_ktr.policy.policy import Policy
from megatron_ktr.policy.rollout_offload import optimizer_off_device
from megatron_ktr.policy.vision_watch import vision_faults
from megatron_ktr.rollout.check.sampler import SamplerCheck
from megatron_ktr.rollout.second_prompt import shuffled_counts, shuffled_means
from megatron_ktr.rollout.source import ReplicaSource
from megatron_ktr.rollout.step_source import StepSource
from megatron_ktr.run.metrics import PhaseTimer
from megatron_ktr.run.step_report import StepReport
from megatron_ktr.step.noise import NoiseMeter
from megatron_ktr.step.plan import StepBatching
from megatron_ktr.step.score_records import response_scores
from megatron_ktr.step.scoring import ScoringPasses
from megatron_ktr.sums import Metrics
from megatron_ktr.types import BatchFacts, ResponseSelection, RolloutGroup, TokenScores, TokenStreams


class Trainer:
    """Runs training steps. ``policy``, ``source`` and ``noise`` hold all state that outlives a step; the latter two are
    the ``state_dict``."""

    def __init__(
        self, *, options: StepOptions, policy: Policy, source: StepSource, objective: Objective, media: MediaSpec
    ) -> None:
        self.options = options
        self.policy = policy
        self.source = source
        self.objective = objective
        self.batching = StepBatching(options=options, policy=policy, objective=objective)
        self.scoring = ScoringPasses(options=options, policy=policy, objective=objective, media=media)
        self.noise = NoiseMeter(options=options, policy=policy, objective=objective, media=media)
        self.sampler_check: SamplerCheck | None = None
        """A check that runs once, with the weights of the first step."""
        self._check_values: dict[str, float] = {}
        self.timer = PhaseTimer(policy.platform.synchronize)
        self.skips = SkipStreak()
        self.prompts_per_rank = options.trainer.prompts_per_replica(policy.ranks.data_size)

    def train_step(self, step: int) -> StepReport:
        groups = self._rollouts(step)
        facts = self._facts(groups, step=step)
        if not self._anything_to_learn(groups, facts):
            return self._report(step, groups, results=())
        with self.timer.phase("balance"):
            mini_batches = self.batching.mini_batches(groups, number=self.options.objective.mini_batches)
        with self.timer.phase("pack"):
            by_update = [self.batching.plan(of_update) for of_update in mini_batches]
            parts = [part for of_update in by_update for part in of_update]
            micro_batches = [MicroBatch(part, cache(partial(self.scoring.pack, part, "intact"))) for part in parts]
            groups = [group for part in parts for group in part]
        with self.timer.phase("vision"):
            # The first optimizer step makes features of a trained encoder stale, so that no later mini-batch could send
            # its gradient back through this run.
            self.scoring.prepare_vision(micro_batches[: len(by_update[0])])
        with self.timer.phase("score"):
            micro_batches = self.scoring.with_counterfactuals(micro_batches, step=step)
            micro_batches = self.scoring.with_reference(micro_batches)
            self.noise.measure(micro_batches, step=step)
            facts = dataclasses.replace(facts, noise_floor=self.noise.floors)
            micro_batches, facts = self.scoring.with_selection(micro_batches, facts)
            updates = self._updates(micro_batches, facts, sizes=[len(of_update) for of_update in by_update])
        with self.timer.phase("update"):
            results, gradients = self._update(updates * self.options.objective.updates_per_rollout)
        report = self._report(step, groups, results=results, num_mini_batches=len(updates))
        return dataclasses.replace(report, gather_gradients=gradients)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, the newest noise of signals, and the updates skipped in a row, as JSON can represent
        them; the same on every rank of a replica."""
        others = {"noise_floor": self.noise.state_dict(), IN_A_ROW: self.skips.length}
        return self._resumable.state_dict() | {name: value for name, value in others.items() if value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what ``state_dict`` returned."""
        self._resumable.load_state_dict(state)
        self.noise.load_state_dict(state.get("noise_floor", {}))
        self.skips.length = int(state.get(IN_A_ROW, 0))

    @property
    def _resumable(self) -> ReplicaSource:
        assert isinstance(self.source, ReplicaSource), "only a run's own source has a place in the data"
        return self.source

    def _rollouts(self, step: int) -> list[RolloutGroup]:
        """This step's groups, sampled from the weights that the previous step left.

        With ``lag`` 1, sampling runs one step ahead. This step's groups were begun before the previous update, and the
        next step's groups are begun here, so that the engine samples them while this step trains. The responses are
        then one step off-policy, which the objective's importance weights correct.
        """
        with self._room_for_engine():
            if self.source.pending_step != step:
                self._begin_rollouts(step)
            with self.timer.phase("rollout"):
                groups = self.source.finish()
        require_finite_samples(groups, step=step, global_count=self.policy.global_count)
        if self.source.lag and step < num_steps_of(self.options.trainer):
            # Where no server takes the weights, the next step tries again: this one has its responses.
            with contextlib.suppress(StepAbandoned):
                self._begin_rollouts(step + 1)
        return groups

    def _room_for_engine(self) -> AbstractContextManager:
        """Makes room on the device for an engine, with ``offload_during_rollout``. Optimizer state and gradients leave
        the device before the engine takes its memory (to receive weights), and return after it has freed that memory.
        """
        if not self.options.offload_during_rollout:
            return contextlib.nullcontext()
        policy = self.policy
        return optimizer_off_device(
            policy.chunks,
            policy.optimizer,
            platform=policy.platform,
            phase=partial(self.timer.phase, "offload"),
        )

    def _begin_rollouts(self, step: int) -> None:
        if self.source.needs_weights:
            self._check_sampler()
            with self.timer.phase("weights"):
                self.send_weights()
        with self.timer.phase("rollout"):
            self.source.begin(self.prompts_per_rank, step=step)

    def send_weights(self) -> None:
        """Sends the policy's weights to the engine; collective."""
        source = self.source
        source.load_weights(
            self.policy.export(gather_to=source.gather_weights_to, with_vision=source.needs_vision_weights)
        )

    def _check_sampler(self) -> None:
        """Runs the sampler check, if it has not run yet. Every random state is restored afterwards, so that the run
        goes on as if there had been no check."""
        check, self.sampler_check = self.sampler_check, None
        if check is None:
            return
        with self.timer.phase("check"):
            state = self.policy.platform.rng_state()
            # The step sends the weights again later: an engine that sleeps while the ranks train drops them after
            # sampling, so the check cannot share this transfer with the step.
            self.send_weights()
            self._check_values = check.run()
            self.policy.vision.take_counts()  # the check's prompts do not count for the step
            self.policy.platform.set_rng_state(state)

    def evaluate(self, ask: Callable[[], Mapping[str, float] | None]) -> dict[str, float]:
        """The values of ``ask``, which samples from the weights that the last step left, and the seconds it took.

        Nothing in training changes by it. Responses that are being sampled for the next step are finished first,
        because they are those of older weights, and random states are restored.
        """
        policy = self.policy
        with self.timer.phase("evaluate"):
            self.source.settle()
        state = policy.platform.rng_state()
        with self._room_for_engine():
            self._check_sampler()
            with self.timer.phase("evaluate"):
                values = ask()
        policy.vision.take_counts()  # the questions asked do not count for the next step
        policy.platform.set_rng_state(state)
        return {**(values or {}), **self.timer.pop()}

    def _facts(self, groups: Sequence[RolloutGroup], *, step: int) -> BatchFacts:
        """What is known about the rollout of all replicas before anything is scored."""
        lengths = lengths_of(groups)
        num_responses, num_tokens = self.policy.global_counts([len(lengths), sum(lengths)])
        facts = BatchFacts(
            num_responses=round(num_responses),
            num_response_tokens=round(num_tokens),
            step=step,
            seed=self.options.trainer.seed,
        )
        if not self.objective.needs_batch_rewards:
            return facts
        rows = reward_rows(self.objective.rewards_of(groups), lengths, device=self.policy.platform.device)
        return with_rewards(facts, gather_rows(rows, self.policy.ranks.data))

    def _updates(
        self, micro_batches: Sequence[MicroBatch], facts: BatchFacts, *, sizes: Sequence[int]
    ) -> list[tuple[Sequence[MicroBatch], BatchFacts]]:
        """The micro-batches of each optimizer step with its facts, once for each time that the rollout is trained on.
        ``sizes`` are the numbers of micro-batches of this replica. Denominators are counted over a mini-batch, rewards
        over the rollout."""
        found: list[tuple[Sequence[MicroBatch], BatchFacts]] = []
        start = 0
        for size in sizes:
            items = micro_batches[start : start + size]
            start += size
            of_update = facts
            if len(sizes) > 1:
                lengths = [length for item in items for length in lengths_of(item.groups)]
                counts = self.policy.global_counts([len(lengths), sum(lengths)])
                of_update = dataclasses.replace(
                    facts, num_responses=round(counts[0]), num_response_tokens=round(counts[1])
                )
            found.append((items, self._with_num_tokens(of_update, items)))
        return found

    def _update(
        self, updates: Sequence[tuple[Sequence[MicroBatch], BatchFacts]]
    ) -> tuple[list[UpdateResult], Callable[[], dict[str, TensorGradient]]]:
        """Takes the optimizer steps. Returns their results, and what finds the gradient of the first that was skipped
        for a fault, or else of the last: a later update overwrites the gradients, so that they are looked at before."""
        results: list[UpdateResult] = []
        found: Callable[[], dict[str, TensorGradient]] | None = None
        for items, facts in updates:
            results.append(self.policy.update(items, objective=self.objective, facts=facts))
            if found is None and results[-1].skip_reason in NOT_FINITE and len(results) < len(updates):
                found = partial(dict, tensor_gradients(self.policy))
        return results, found or partial(tensor_gradients, self.policy)

    def _with_num_tokens(self, facts: BatchFacts, micro_batches: Sequence[MicroBatch]) -> BatchFacts:
        """``facts`` with the number of tokens that the loss is divided by. It is counted over all micro-batches and
        replicas before the first forward, so that the losses of micro-batches and ranks simply add up."""
        if self.options.objective.loss_aggregation != "token":
            return facts
        num_tokens = sum(self.objective.num_loss_tokens(item.batch, item.selection) for item in micro_batches)
        # Only the last pipeline stage knows the selection, and only the last stage reads this count. The sum therefore
        # runs over the data-parallel ranks of each stage alone.
        return dataclasses.replace(facts, num_tokens=round(self.policy.global_count(num_tokens)))

    def _anything_to_learn(self, groups: Sequence[RolloutGroup], facts: BatchFacts) -> bool:
        """False only if it is certain that no group of any replica has a gradient; then no pass is worth running.

        True is no promise: a length bonus, for example, is known after selection at the earliest. The update itself
        decides in the end.
        """
        return self.policy.global_count(float(self.objective.may_have_gradient(groups, facts))) > 0

    def _report(
        self, step: int, groups: Sequence[RolloutGroup], *, results: Sequence[UpdateResult], num_mini_batches: int = 1
    ) -> StepReport:
        # With several updates of the same responses, the report is about the last of them.
        result = together(results[-num_mini_batches:]) if results else None
        seconds = self.timer.pop()
        step_seconds = max(sum(seconds.values()), 1e-9)
        metrics = Metrics()
        # With lag 1 the prompts were drawn during the step before, which may have been the longer one.
        metrics.add_max("data_wait_fraction", min(1.0, self.source.data_wait_seconds / step_seconds))
        for group in groups:
            for rollout in group.rollouts:
                if rollout.rewards:
                    metrics.add("reward_mean", rollout.reward)
                    if group.prompt.source:
                        metrics.add(f"reward_mean/{group.prompt.source}", rollout.reward)
                metrics.add("response_length", len(rollout.token_ids))
                metrics.add("finished_share", rollout.is_finished)
                for name, value in rollout.rewards.items():
                    metrics.add(f"reward/{name}", value)
        if self.options.num_shuffled:
            metrics.add_max("shuffled/seconds_alone", self.source.shuffled_seconds)
            metrics.merge(shuffled_means(groups))
        num_tokens, num_prompts = self.policy.global_counts([sum(one.num_tokens for one in groups), len(groups)])
        values = self.policy.mean_over_replicas(metrics)
        values["num_prompts"] = num_prompts
        values |= self.policy.sum_over_replicas({"num_skipped": self.source.num_skipped, **self.source.counts})
        values |= self.source.step_values
        if self.options.num_shuffled:
            values |= self.policy.sum_over_replicas(shuffled_counts(groups))
        values |= self._vision_counts(groups)
        values["tokens_per_second"] = num_tokens / step_seconds
        values["has_stepped"] = float(any(update.has_stepped for update in results))
        values |= self.skips.add(results)
        if result is not None:
            values |= result.metrics.means()
            values |= {"loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": self.policy.learning_rate}
            noise = self.noise.floors.get("visual", 0.0)
            values |= vision_faults(result.watched, has_stepped=result.has_stepped, noise=noise)
            values |= step_rates(
                self.policy.model_config,
                groups,
                options=self.options,
                objective=self.objective,
                seconds=seconds,
                num_ranks=self.policy.ranks.world_size,
                global_sum=self.policy.global_count,
                key_share=values.get("key_token_ratio", 1.0),
            )
        values |= self.batching.take_values() | self.noise.take_values() | self._check_values
        self._check_values = {}
        return StepReport(
            step=step,
            values=values | seconds,
            groups=tuple(groups),
            gather_selections=partial(self._selections, groups, result),
            gather_scores=partial(response_scores, groups, result, policy=self.policy),
            noise_floor=dict(self.noise.floors),
        )

    def _vision_counts(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """How often the vision encoder ran for each prompt. Encoding all temporal patches of a prompt's media once
        counts as one run. Empty without media."""
        shown = [medium.grid_thw[0] for group in groups for medium in group.prompt.media]
        num_units, num_encoded = self.policy.global_counts([sum(shown), self.policy.vision.take_counts()])
        return {"vision_runs_per_prompt": num_encoded / num_units} if num_units else {}

    def _selections(
        self, groups: Sequence[RolloutGroup], result: UpdateResult | None
    ) -> tuple[tuple[ResponseSelection, ...], ...]:
        """The update's selection by group and response, on every rank. Only the last pipeline stage has it at first and
        sends it to the others."""
        if result is None:
            return ()
        parts = [_selection_tensors(*found) for found in zip(result.streams, result.scores, strict=True)]
        columns = [torch.cat(column, dim=-1).cpu() for column in zip(*parts, strict=True)]
        names, is_key_R, logprob_R, marks_SR = self.policy.from_last_stage(
            (list(result.streams[0].is_selected_R), *columns) if parts else None
        )
        start, selections = 0, []
        for group in groups:
            responses = []
            for rollout in group.rollouts:
                tokens = slice(start, start + len(rollout.token_ids))
                start = tokens.stop
                responses.append(
                    ResponseSelection(
                        is_key_token=tuple(is_key_R[tokens].tolist()),
                        policy_logprobs=tuple(logprob_R[tokens].tolist()),
                        is_selected={
                            name: tuple(marks_R[tokens].tolist()) for name, marks_R in zip(names, marks_SR, strict=True)
                        },
                    )
                )
            selections.append(tuple(responses))
        return tuple(selections)


def _selection_tensors(streams: TokenStreams, scores: TokenScores) -> tuple[Tensor, Tensor, Tensor]:
    """The selection of one micro-batch: key tokens [R], log-probs [R], marks of every signal [signals, R]."""
    marks = list(streams.is_selected_R.values())
    is_key_R = streams.is_key_token_R
    marks_SR = torch.stack(marks) if marks else is_key_R.new_zeros((0, len(is_key_R)))
    return is_key_R, scores.policy_logprob_R, marks_SR
