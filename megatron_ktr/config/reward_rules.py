"""Rules between the options of rewards and others. ``checks.py`` applies them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_ktr.config.given import flag, given
from megatron_ktr.config.reward_section import weight_problems

if TYPE_CHECKING:
    from megatron_ktr.config import Config

_OF_BONUS = ("length_bonus", "length_bonus_min", "length_bonus_max")
_OF_PART = {
    "overlong": ("overlong_length", "overlong_buffer"),
    "repetition": ("repetition_ngram",),
    "judge": ("judge_url", "judge_model", "judge_key_env", "judge_retries", "judge_concurrency"),
}
"""Options that one built-in part alone reads."""
_OF_PROCESSES = ("reward_workers", "reward_worker_memory_gb")


def problems(config: Config) -> Iterator[str]:
    """One sentence for each rule that is broken."""
    section = config.reward
    if config.rollout.engine == "replay" and not config.objective.is_supervised:
        names = [option.name for option in dataclasses.fields(section) if option.name not in _OF_BONUS]
        for name in _given(config, names):
            yield f"{flag(name)} is not read by --engine replay: rewards come with the recorded rollouts"
    elif not config.objective.is_supervised:
        yield from _parts(config)
    yield from _accuracy_for_bonus(config)
    if section.length_bonus_min > section.length_bonus_max:
        yield f"--length-bonus-min {section.length_bonus_min} exceeds --length-bonus-max {section.length_bonus_max}"


def _parts(config: Config) -> Iterator[str]:
    section = config.reward
    names = _names_of_run(config)
    short_names = {_short(name) for name in names}
    for part, options in _OF_PART.items():
        for name in _given(config, options) if part not in names else ():
            yield f"{flag(name)} is not read without {part} among --reward-functions"
    if "judge" in names and section.judge_url is None:
        yield "--reward-functions judge needs --judge-url, the address of a server with OpenAI's chat API"
    yield from weight_problems(section, short_names)
    if section.reward_on_error == "skip_group" and config.objective.advantage == "batch":
        yield (
            "--reward-on-error skip_group makes the rewards of a group equal, which --advantage batch does not pass "
            "over: choose zero or stop, or another advantage"
        )
    yield from _processes(config, has_own=any(":" in name for name in names), has_judge="judge" in names)
    if "overlong" in names:
        yield from _overlong(config)


def _processes(config: Config, *, has_own: bool, has_judge: bool) -> Iterator[str]:
    timeout = () if has_judge else ("reward_timeout",)
    if not has_own:
        for name in _given(config, _OF_PROCESSES):
            yield f"{flag(name)} is not read: there are no own reward functions (module:function)"
        for name in _given(config, timeout):
            yield f"{flag(name)} is not read: there is neither an own reward function (module:function) nor a judge"
    elif config.reward.reward_workers == 0:
        for name in _given(config, (*timeout, "reward_worker_memory_gb")):
            yield f"{flag(name)} needs --reward-workers above 0: nothing can end a function in the training process"


def _overlong(config: Config) -> Iterator[str]:
    section, longest = config.reward, config.rollout.max_response_length
    end = section.overlong_length or longest
    buffer = section.overlong_buffer or max(1, end // 5)
    if buffer > end:
        yield f"--overlong-buffer {buffer} exceeds the {end} tokens of --overlong-length"
    elif end - buffer >= longest:
        yield (
            f"--overlong-length {end} with --overlong-buffer {buffer} punishes responses of more than {end - buffer} "
            f"tokens, which --max-response-length {longest} does not allow"
        )


def _accuracy_for_bonus(config: Config) -> Iterator[str]:
    bonuses = {"--length-bonus": config.reward.length_bonus, "--temporal-bonus": config.rollout.temporal_bonus}
    needs_accuracy = [name for name, bonus in bonuses.items() if bonus and not config.objective.is_supervised]
    for name in needs_accuracy:
        if not _have_accuracy(config.reward.reward_functions):
            yield f"{name} goes to correct responses: add accuracy to --reward-functions, or set {name} 0"
    for source in config.data.sources:
        if source.reward_functions and config.objective.is_supervised:
            yield f"--data-path: {source.label} names reward_functions, which --objective sft does not read"
        for name in needs_accuracy:
            if not _have_accuracy(source.reward_functions or ()):
                yield (
                    f"{name} goes to correct responses: add accuracy to the reward_functions of {source.label}, or set "
                    f"{name} 0"
                )


def _have_accuracy(names: Sequence[str]) -> bool:
    """Whether accuracy is among the reward parts; without names they are the default ones."""
    return not names or "accuracy" in map(_short, names)


def _names_of_run(config: Config) -> set[str]:
    """The reward parts of all files of the run, as they were named."""
    default = config.reward.reward_functions or ("accuracy", "format")
    files = [source.reward_functions or default for source in config.data.sources]
    return {name for names in (files or [default]) for name in names}


def _short(name: str) -> str:
    return name.rpartition(":")[2]


def _given(config: Config, names: Sequence[str]) -> list[str]:
    return given(config.reward, names, objective=config.objective.objective)
