"""The second prompt of a group: the same question about the same video, its frames in random order (T-GRPO).

    drawn prompt p  ->  p with num_generations responses, and p' = p with shuffled frames with num_responses
    answers         ->  RolloutGroup(p, rollouts, shuffled)

Both go to the engine in one call of ``stream``, the second prompts behind all the first ones. Servers then answer them
side by side, an engine that sleeps is woken once, and every rank of a collective engine makes the same calls, however
many videos its replica drew. ``objectives/bonuses/temporal.py`` has the rule that compares the two.

Only a prompt whose video has an order to lose is asked twice (``attribution.can_shuffle``): two temporal patches at
least, and frames that are not all alike. Every such video of the prompt is shuffled, and no order is the one it had.
The release of Video-R1 differs in both: it shuffles the prompt's first video alone, and its unseeded order may be the
original one.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_ktr.attribution.counterfactuals import can_shuffle, draw_permutations, shuffle_frames
from megatron_ktr.sums import Metrics
from megatron_ktr.types import Prompt, RolloutGroup

SHUFFLED = "shuffled"
"""``Prompt.variant`` of a second prompt. It is part of the prompt's identity, and so of every seed: of the responses,
and of the order of frames, which is therefore another one than that of the view of the same name."""


@dataclass(frozen=True)
class SecondPrompt:
    """What is asked a second time, and how often."""

    num_generations: int
    """Responses to the prompt itself (G)."""
    num_responses: int
    """Responses to the shuffled prompt; T-GRPO has G // 2."""
    seed: int

    def of(self, prompt: Prompt, *, step: int) -> Prompt | None:
        """``prompt`` with its frames in random order; None if it has no order to lose. The order depends on the seed,
        the step and the prompt's identity alone."""
        if not can_shuffle(prompt):
            return None
        variant = dataclasses.replace(prompt, variant=SHUFFLED)
        orders = draw_permutations(variant, seed=self.seed, step=step)
        media = tuple(
            medium if order is None else shuffle_frames(medium, order)
            for medium, order in zip(prompt.media, orders, strict=True)
        )
        return dataclasses.replace(variant, media=media)


@dataclass(frozen=True)
class Question:
    """What an engine is asked for one group: its prompt, and perhaps a second one."""

    group: RolloutGroup
    """The group with the prompt as the engine sees it. Without responses it is still to be answered."""
    second: Prompt | None = None
    is_second_answered: bool = False
    """Whether a checkpoint has the answer to the second prompt. It may be empty: where a reward has failed, no response
    to a second prompt is left (``rewards/rewarder.py``)."""

    @property
    def is_answered(self) -> bool:
        """Whether the group has all its responses, which are then those of a checkpoint."""
        return bool(self.group.rollouts) and (self.second is None or self.is_second_answered)


def ask_twice(groups: Sequence[RolloutGroup], *, second: SecondPrompt | None, step: int) -> list[Question]:
    """The questions of a step's groups, with the frames as they were read."""
    return [Question(group, None if second is None else second.of(group.prompt, step=step)) for group in groups]


def prompts_of(questions: Sequence[Question]) -> list[Prompt]:
    """All prompts in the order in which they are asked: the first ones, and behind them the second ones."""
    first = [question.group.prompt for question in questions]
    return first + [question.second for question in questions if question.second is not None]


def with_prompts(questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[Question]:
    """``questions`` with other ``prompts``, in the order of ``prompts_of``: those that carry vision features."""
    first, second = prompts[: len(questions)], iter(prompts[len(questions) :])
    return [
        Question(dataclasses.replace(question.group, prompt=prompt), question.second and next(second))
        for question, prompt in zip(questions, first, strict=True)
    ]


def counts_of_questions(questions: Sequence[Question], *, second: SecondPrompt | None) -> list[int] | None:
    """The number of responses of each of ``prompts_of``; None if nothing is asked twice."""
    num_second = sum(question.second is not None for question in questions)
    if second is None or not num_second:
        return None
    return [second.num_generations] * len(questions) + [second.num_responses] * num_second


def joined(questions: Sequence[Question], found: Iterable[tuple[int, RolloutGroup]]) -> list[RolloutGroup]:
    """The groups of ``questions``, given the answer to each of ``prompts_of`` by its place. A group that has no answer
    on this rank is returned unchanged."""
    asked_twice = [place for place, question in enumerate(questions) if question.second is not None]
    groups = [question.group for question in questions]
    for place, answer in found:
        if place < len(questions):
            groups[place] = dataclasses.replace(groups[place], rollouts=answer.rollouts)
        else:
            own = asked_twice[place - len(questions)]
            groups[own] = dataclasses.replace(groups[own], shuffled=answer.rollouts)
    return groups


def shuffled_counts(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """What the second prompts of a replica's groups cost, to be summed over replicas: prompts that were asked twice,
    and tokens that were sampled for them."""
    asked_twice = [group for group in groups if group.shuffled]
    tokens = sum(len(rollout.token_ids) for group in asked_twice for rollout in group.shuffled)
    return {"shuffled/prompts": float(len(asked_twice)), "shuffled/tokens": float(tokens)}


def shuffled_means(groups: Sequence[RolloutGroup]) -> Metrics:
    """Means over the responses to shuffled frames, and their share of the tokens sampled."""
    metrics = Metrics()
    for group in groups:
        for rollout in group.shuffled:
            metrics.add("shuffled/response_length", len(rollout.token_ids))
            if "accuracy" in rollout.rewards:
                metrics.add("shuffled/accuracy", rollout.rewards["accuracy"])
    tokens = shuffled_counts(groups)["shuffled/tokens"]
    metrics.add("shuffled/token_share", tokens, tokens + sum(group.num_response_tokens for group in groups))
    return metrics


class SecondsAlone:
    """Measures what second prompts add to the time of a rollout: the seconds in which only they are still answered.

    One call answers both kinds of prompts, often side by side, so no clock can divide its time between them. What is
    measured is the time in which second prompts wait for answers and no first one does. Second prompts cost at least
    that. They cost more where they took room from the first ones; ``shuffled/token_share`` says how much
    of the sampling is theirs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_open = [0, 0]
        """First and second prompts that are still answered, over all calls that run side by side."""
        self._since = 0.0
        self._seconds = 0.0

    def timed(
        self, found: Iterator[tuple[int, RolloutGroup]], *, num_first: int, num_second: int
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """Yields ``found``, the answers to ``num_first`` first prompts and, in the places behind them, to second ones.
        Several threads may do so at a time."""
        missing = [num_first, num_second]
        self._change(missing, by=1)
        try:
            for place, group in found:
                answered = [int(place < num_first), int(place >= num_first)]
                missing = [left - one for left, one in zip(missing, answered, strict=True)]
                self._change(answered, by=-1)
                yield place, group
        finally:
            self._change(missing, by=-1)

    def take(self) -> float:
        """The seconds since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _change(self, numbers: Sequence[int], *, by: int) -> None:
        with self._lock:
            now = time.perf_counter()
            num_first, num_second = self._num_open
            if num_second and not num_first:
                self._seconds += now - self._since
            self._since = now
            self._num_open = [num_first + by * numbers[0], num_second + by * numbers[1]]
