"""The options of rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.limits import MOST_GB, MOST_SECONDS, MOST_TOKENS, MOST_TRIES, MOST_WEIGHT
from megatron_ktr.config.words import AnswerProtocol, RewardErrorPolicy


@dataclass(frozen=True)
class RewardSection:
    """Reward of a response = sum of its named parts, each times its weight, + length bonus."""

    reward_functions: tuple[str, ...] = _option(
        (),
        "Reward parts by name (accuracy, format; soft_choice: accuracy that pays in part for some of several right "
        "letters; length, overlong, repetition, tag_count, tag_count_lines, math, temporal_iou, box_iou, judge: "
        "docs/rewards.md), or own ones as module:function; empty = accuracy and format; recorded rollouts keep theirs",
    )
    reward_weights: tuple[str, ...] = _option(
        (), "Weights of parts as name=number, e.g. accuracy=1,format=0.5; parts that are not named weigh 1"
    )
    reward_workers: int = _option(
        1,
        "Processes in which each reading rank runs own reward functions, so that one that hangs, crashes or swells "
        "costs its response alone; 0 = in the training process, where nothing can end them",
        low=0,
        high=256,
    )
    reward_timeout: float = _option(
        30.0, "Longest time for the reward of one response, in seconds", above=0, high=MOST_SECONDS
    )
    reward_worker_memory_gb: float = _option(
        4.0, "Most memory of one reward process with what it starts, in 10^9 bytes", above=0, high=MOST_GB
    )
    reward_on_error: RewardErrorPolicy = _option(
        "stop",
        "Where a reward fails, takes too long or gives no number: end the run, give the response 0 for that part, or "
        "give every part of every response of its group 0, so that the group prefers none; the last two are counted",
    )
    answer_protocol: AnswerProtocol = _option(
        "standard",
        "How the built-in rewards read and judge an answer: official = the verdicts of the Video-KTR release, slips "
        "included; strict = one answer block only; standard = the first block; lenient = the right answer however it "
        "is worded (docs/rewards.md)",
    )
    length_bonus: float = _option(
        0.2,
        "Added to a correct response of length_bonus_min..length_bonus_max tokens where more than one response of "
        "the group is correct; 0 = off",
        low=0,
        high=MOST_WEIGHT,
    )
    length_bonus_min: int = _option(
        320, "Shortest response that gets the length bonus, and the reward length, in tokens", low=0, high=MOST_TOKENS
    )
    length_bonus_max: int = _option(
        512, "Longest response that gets the length bonus, and the reward length, in tokens", low=0, high=MOST_TOKENS
    )
    overlong_length: int | None = _option(
        None,
        "Length from which the reward overlong is -1, in tokens; none = max_response_length",
        low=1,
        high=MOST_TOKENS,
    )
    overlong_buffer: int | None = _option(
        None,
        "Tokens before overlong_length over which overlong falls from 0 to -1; none = a fifth of it",
        low=1,
        high=MOST_TOKENS,
    )
    repetition_ngram: int = _option(
        3, "Tokens of the pieces whose repetition the reward repetition counts", low=1, high=100_000
    )
    judge_url: str | None = _option(
        None, "Server with OpenAI's chat API whose model gives the reward judge, e.g. http://node7:8000"
    )
    judge_model: str | None = _option(None, "The judge's name at that server; none = the only one that it has")
    judge_key_env: str | None = _option(
        None, "Name of the environment variable that holds the server's key (not the key itself)"
    )
    judge_retries: int = _option(
        3, "How often a question is put to the judge again after no or no usable reply", low=0, high=MOST_TRIES
    )
    judge_concurrency: int = _option(16, "Questions open at the judge's server for each replica", low=1, high=1024)

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights other than 1, by short name."""
        return {name: weight for name, weight in map(_weight_of, self.reward_weights) if weight != 1.0}


def weight_problems(section: RewardSection, parts: set[str]) -> Iterator[str]:
    """What is wrong with ``reward_weights``, in sentences; ``parts`` are the short names of all parts of the run."""
    seen: set[str] = set()
    for text in section.reward_weights:
        name, weight = _weight_of(text)
        if not name or not math.isfinite(weight):
            yield f"--reward-weights: expected name=number, got {text[:80]!r}"
        elif name not in parts:
            yield f"--reward-weights: {name!r} is none of the reward parts {', '.join(sorted(parts))}"
        elif name in seen:
            yield f"--reward-weights names {name!r} twice"
        seen.add(name)


def _weight_of(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        return name.strip(), math.nan
