"""Rewards groups of responses: computes every part, and does what ``reward_on_error`` says where one fails.

A response has the parts whose reward applies to it. Its reward is their weighted sum (``Rollout.reward``).

    stop         the run ends with one line
    zero         the response gets 0 for that part
    skip_group   every part of every response of the group is 0. No response is then preferred to another, and no bonus
                 for correct ones is paid. Of a variant of a prompt, whose responses are only compared with, no response
                 is left: nothing is compared, and no bonus is paid
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_ktr.errors import UserError
from megatron_ktr.rewards import math_answers
from megatron_ktr.rewards.inputs import RewardInput, inputs_of
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.plug_in import Failed, PlugIn, Value
from megatron_ktr.rewards.pool import PlugInPool
from megatron_ktr.rewards.registry import Reward, load_rewards

if TYPE_CHECKING:
    from megatron_ktr.types import Prompt, Rollout, RolloutGroup


class Rewarder:
    """The rewards of a run. ``reward`` may be called by several threads."""

    def __init__(self, options: RewardOptions | None = None) -> None:
        self.options = options or RewardOptions()
        section = self.options.section
        self._weights = section.weights
        self._lock = threading.Lock()
        self._loaded: dict[tuple[str, ...], dict[str, Reward]] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        # One process compares the mathematics of everybody here; what others lost to it before is not this object's.
        self._math_before = Counter(math_answers.counts())
        self._pool: PlugInPool | None = None
        if section.reward_workers:
            self._pool = PlugInPool(
                section.reward_workers,
                timeout_seconds=section.reward_timeout,
                memory_bytes=round(section.reward_worker_memory_gb * 1e9),
            )

    @property
    def num_threads(self) -> int:
        """How many groups are rewarded at a time."""
        return max(1, self.options.section.reward_workers)

    def reward(self, groups: Sequence[RolloutGroup], *, names: Sequence[str]) -> list[RolloutGroup]:
        """The same groups with ``rewards`` of every rollout filled in.

        Raises:
            UserError: a reward cannot be loaded, or fails and ``reward_on_error`` is ``stop``.
        """
        rewards = self._rewards(names)
        return [self._rewarded(group, rewards) for group in groups]

    def load(self, names: Sequence[str]) -> None:
        """Loads rewards, users' own into a process if there are any.

        Raises:
            UserError: a reward cannot be loaded.
        """
        self._rewards(names)

    def prepare(self, names: Sequence[str]) -> None:
        """Loads rewards and connects to the servers that they ask.

        Raises:
            UserError: a reward cannot be loaded, or a server does not answer.
        """
        for reward in self._rewards(names).values():
            if reward.entry is not None:
                reward.entry.prepare(self.options)

    def take_counts(self) -> Mapping[str, float]:
        """reward_seconds/<part> since the last call, and since the start reward_timeouts/<part>, reward_errors/<part>
        and reward_skipped_groups as far as there are any."""
        with self._lock:
            seconds, self._seconds = self._seconds, defaultdict(float)
            found = {f"reward_seconds/{name}": value for name, value in seconds.items()}
            lost = Counter(math_answers.counts()) - self._math_before
            counts = self._counts + Counter({f"reward_timeouts/{name}": number for name, number in lost.items()})
            return found | {name: float(number) for name, number in counts.items()}

    def close(self) -> None:
        """Ends the processes of rewards and whatever else is still asked, so that ``reward`` fails at once where it is
        running. May be called more than once."""
        for reward in [reward for rewards in list(self._loaded.values()) for reward in rewards.values()]:
            if reward.entry is not None:
                reward.entry.close(self.options)
        if self._pool is not None:
            self._pool.close()

    def _rewards(self, names: Sequence[str]) -> dict[str, Reward]:
        with self._lock:
            key = tuple(names)
            if key not in self._loaded:
                load_own = PlugIn.load if self._pool is None else self._pool.load
                self._loaded[key] = load_rewards(key, options=self.options, load_own=load_own)
            return self._loaded[key]

    def _rewarded(self, group: RolloutGroup, rewards: Mapping[str, Reward]) -> RolloutGroup:
        inputs = inputs_of(group)
        found = {name: self._timed(reward, inputs) for name, reward in rewards.items()}
        failed = [
            (name, index, value)
            for name, values in found.items()
            for index, value in enumerate(values)
            if isinstance(value, Failed)
        ]
        for index in range(len(inputs)):
            if all(values[index] is None for values in found.values()):
                failed.append((" + ".join(found), index, Failed("error", "does not apply: a response has no reward")))
        self._settle(failed, group.prompt)
        is_skipped = bool(failed) and self.options.section.reward_on_error == "skip_group"
        if is_skipped and group.prompt.variant:
            return dataclasses.replace(group, rollouts=())
        return dataclasses.replace(
            group,
            rollouts=tuple(
                self._with_rewards(rollout, {name: values[index] for name, values in found.items()}, is_skipped)
                for index, rollout in enumerate(group.rollouts)
            ),
        )

    def _timed(self, reward: Reward, inputs: Sequence[RewardInput]) -> list[Value]:
        began = time.perf_counter()
        try:
            if reward.plug_in is not None and self._pool is not None:
                return self._pool.score(reward.plug_in, inputs)
            return reward.score_here(inputs)
        finally:
            with self._lock:
                self._seconds[reward.name] += time.perf_counter() - began

    def _settle(self, failed: Sequence[tuple[str, int, Failed]], prompt: Prompt) -> None:
        """Counts what has failed, or ends the run for it."""
        if not failed:
            return
        name, _, first = failed[0]
        policy = self.options.section.reward_on_error
        if policy == "stop":
            raise UserError(
                f"reward {name!r} {_of_response(first.text, prompt)}; --reward-on-error zero or skip_group goes on"
            )
        with self._lock:
            for name, _, failure in failed:
                kind = "reward_timeouts" if failure.kind == "timeout" else "reward_errors"
                self._counts[f"{kind}/{name}"] += 1
            if policy == "skip_group":
                self._counts["reward_skipped_groups"] += 1

    def _with_rewards(self, rollout: Rollout, values: Mapping[str, Value], is_skipped: bool) -> Rollout:
        rewards = {
            name: 0.0 if is_skipped or isinstance(value, Failed) else value
            for name, value in values.items()
            if value is not None
        }
        weights = {name: weight for name, weight in self._weights.items() if name in rewards}
        return dataclasses.replace(rollout, rewards=rewards, reward_weights=weights)


def _of_response(text: str, prompt: Prompt) -> str:
    """``text`` of a failure with the question it is about, in the middle of the sentence."""
    where = f"for a response to problem {prompt.problem_id}"
    for start, end in (("failed", ":"), ("gave", ", expected")):
        if text.startswith(start) and end in text:
            head, sign, rest = text.partition(end)
            return f"{head} {where}{sign}{rest}"
    return f"{text}, {where}"
