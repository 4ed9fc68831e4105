"""Reads and checks the contents of a run directory for the report: config, metrics by step, recorded rollouts.

    run_dir/config.yaml                          the resolved options
    run_dir/metrics.jsonl                        one object per step
    run_dir/rollouts/step_XXXXXXXX.jsonl         groups of one step, as ``rollout/replay.py`` writes them; those of
                                                 further replicas in step_XXXXXXXX_replica_YYYY.jsonl

The files of a run that is still going may end in half a line. That line is left out; any other damage is an error.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_ktr.config import read_notes
from megatron_ktr.data.records import Record, check_record
from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import open_file, read_yaml_text
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.files.listing import paths_in
from megatron_ktr.objectives.bonuses.temporal import TemporalBonus
from megatron_ktr.run.metrics import MOST_STEPS
from megatron_ktr.types import Prompt, Rollout, RolloutGroup

_STEP_FILE = re.compile(r"step_(\d+)(?:_replica_\d+)?\.jsonl")


@dataclass(frozen=True)
class RecordedResponse:
    """One response with what was logged about its tokens. Every tuple has the length of ``token_ids`` or is empty."""

    text: str
    token_ids: tuple[int, ...]
    rewards: Mapping[str, float]
    is_finished: bool = True
    is_key_token: tuple[bool, ...] = ()
    is_selected: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """Whether each token was selected, by signal. Empty if no signals were logged, or if the objective has none, so
    that every token carries the loss."""
    policy_logprobs: tuple[float, ...] = ()
    sampler_logprobs: tuple[float, ...] = ()
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """The weights of parts of the reward, where they are not 1."""

    @property
    def reward(self) -> float:
        return sum(self.reward_weights.get(name, 1.0) * value for name, value in self.rewards.items())

    def signals_of(self, index: int) -> tuple[str, ...]:
        """The signals that selected token ``index``; none if it is no key token, as a token that only some signals
        select if key tokens are those that all select."""
        if self.is_key_token and not self.is_key_token[index]:
            return ()
        return tuple(name for name, marks in self.is_selected.items() if marks[index])


@dataclass(frozen=True)
class RecordedGroup:
    """A question and its responses at one step."""

    step: int
    record: Record
    responses: tuple[RecordedResponse, ...]
    shuffled: tuple[RecordedResponse, ...] = ()
    """Responses to the same frames in random order, which were not trained on."""

    @property
    def has_unequal_rewards(self) -> bool:
        """Whether the group teaches anything. If all its rewards are equal, all its advantages are zero."""
        return len({response.reward for response in self.responses}) > 1


@dataclass(frozen=True)
class RunData:
    """One run directory."""

    path: Path
    config: Mapping[str, Mapping[str, Any]]
    """The options by section; empty if there is no config.yaml."""
    notes: tuple[str, ...]
    """What the run noted beside its options: how its questions were worded."""
    steps: tuple[int, ...]
    metrics: Mapping[str, tuple[float, ...]]
    """The values of each metric over ``steps``; NaN if a step did not log it."""
    rollout_files: tuple[tuple[int, Path], ...]
    """(step, file) in the order of steps."""

    def option(self, section: str, name: str) -> Any:
        return self.config.get(section, {}).get(name)

    @property
    def trained(self) -> RunData:
        """The run without step 0, which holds an evaluation of the untrained model and nothing else."""
        if not self.steps or self.steps[0] > 0:
            return self
        start = sum(step <= 0 for step in self.steps)
        metrics = {name: values[start:] for name, values in self.metrics.items()}
        return dataclasses.replace(self, steps=self.steps[start:], metrics=metrics)

    def groups_of(self, step: int) -> list[RecordedGroup]:
        """The groups recorded at ``step``."""
        return [group for at, path in self.rollout_files if at == step for group in self._read(path, step=at)]

    @property
    def temporal_bonus(self) -> TemporalBonus | None:
        """The bonus that compares with responses to shuffled frames; None in a run without it."""
        bonus, margin = (self.option("rollout", name) for name in ("temporal_bonus", "temporal_margin"))
        return TemporalBonus(bonus, margin) if bonus and _is_number(bonus) and _is_number(margin) else None

    def _read(self, path: Path, *, step: int) -> list[RecordedGroup]:
        groups = _read_groups(path, step=step, ignored=self.option("data", "ignore_fields") or ())
        return [with_bonus(group, self.temporal_bonus) for group in groups]


def read_run(run_dir: Path | str) -> RunData:
    """Reads everything except the rollouts, which are read only when they are needed.

    Raises:
        UserError: this is not a run directory, or a file in it is damaged. The message names file and line.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is not a directory")
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"--run-dir {run_dir} has no metrics.jsonl: expected the --run-dir of a training run")
    by_step: dict[int, Mapping[str, float]] = {}
    for line, values in read_lines(run_dir / "metrics.jsonl"):
        step = values.get("step")
        numbers = {name: _or_nan(value) for name, value in values.items() if name != "step"}
        if (
            not isinstance(step, int)
            or isinstance(step, bool)
            or abs(step) >= MOST_STEPS
            or not all(_is_number(value) for value in numbers.values())
        ):
            raise UserError(f"{run_dir / 'metrics.jsonl'}, line {line}: expected a whole 'step' and numbers")
        by_step[step] = numbers
    steps = tuple(sorted(by_step))
    names = dict.fromkeys(name for step in steps for name in by_step[step])
    found = [
        (int(match[1]), path)
        for path in paths_in(run_dir / "rollouts", "step_*.jsonl")
        if (match := _STEP_FILE.fullmatch(path.name))
    ]
    return RunData(
        path=run_dir,
        config=_read_config(run_dir / "config.yaml"),
        notes=_read_notes(run_dir / "config.yaml"),
        steps=steps,
        metrics={name: tuple(float(by_step[step].get(name, math.nan)) for step in steps) for name in names},
        rollout_files=tuple(sorted(found)),
    )


def choose_groups(run: RunData, *, max_groups: int) -> list[RecordedGroup]:
    """Up to ``max_groups`` groups to show: half from the first recorded step and half from the last, for comparison.

    Within a step the groups with unequal rewards come first, because only these have advantages other than zero. The
    kinds of questions alternate.
    """
    if not run.rollout_files or max_groups < 1:
        return []
    first, last = run.rollout_files[0][0], run.rollout_files[-1][0]
    of_last = _varied(run.groups_of(last))
    if first == last:
        return of_last[:max_groups]
    of_first = _varied(run.groups_of(first))
    num_last = min(len(of_last), max(max_groups - min(len(of_first), max_groups // 2), 0))
    return of_first[: max_groups - num_last] + of_last[:num_last]


def _varied(groups: Sequence[RecordedGroup]) -> list[RecordedGroup]:
    taken: dict[tuple[bool, str], int] = {}
    keyed = []
    for position, group in enumerate(groups):
        kind = (not group.has_unequal_rewards, str(group.record.get("task") or group.record["problem_type"]))
        taken[kind] = taken.get(kind, 0) + 1
        keyed.append(((kind[0], taken[kind], position), group))
    return [group for _, group in sorted(keyed, key=lambda item: item[0])]


def _read_groups(path: Path, *, step: int, ignored: Collection[str]) -> list[RecordedGroup]:
    groups = []
    for line, values in read_lines(path):
        try:
            record = check_record(values, number=line, needs_solution=False, ignored=ignored)
            responses = record.pop("responses", None)
            if not isinstance(responses, list) or not all(isinstance(item, dict) for item in responses):
                raise ValueError("expected a list of objects in 'responses'")
            shuffled = record.pop("shuffled_responses", None) or []
            if not isinstance(shuffled, list) or not all(isinstance(item, dict) for item in shuffled):
                raise ValueError("expected a list of objects in 'shuffled_responses'")
            groups.append(RecordedGroup(step, record, _read_responses(responses), _read_responses(shuffled)))
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}") from error
    return groups


def with_bonus(group: RecordedGroup, bonus: TemporalBonus | None) -> RecordedGroup:
    """``group`` with the bonus among the rewards of its responses, as the objective added it after they were
    recorded."""
    everyone = (*group.responses, *group.shuffled)
    if bonus is None or not group.shuffled or not all("accuracy" in response.rewards for response in everyone):
        return group
    values = bonus.values(_as_rollouts(group), [len(response.token_ids) for response in group.responses])
    responses = tuple(
        dataclasses.replace(response, rewards={**response.rewards, bonus.name: value})
        for response, value in zip(group.responses, values, strict=True)
    )
    return dataclasses.replace(group, responses=responses)


def _as_rollouts(group: RecordedGroup) -> RolloutGroup:
    responses, shuffled = (
        tuple(Rollout(response.token_ids, rewards=response.rewards) for response in found)
        for found in (group.responses, group.shuffled)
    )
    return RolloutGroup(Prompt(str(group.record["problem_id"]), ()), responses, shuffled)


def _read_responses(items: Sequence[Mapping[str, Any]]) -> tuple[RecordedResponse, ...]:
    return tuple(_read_response(item) for item in items)


def _read_response(item: Mapping[str, Any]) -> RecordedResponse:
    token_ids, rewards = item.get("token_ids", []), item.get("rewards", {})
    if not isinstance(token_ids, list) or not all(_is_whole(token) and token >= 0 for token in token_ids):
        raise ValueError("expected token_ids to be a list of whole numbers")
    weights = item.get("reward_weights", {})
    for name, values in (("rewards", rewards), ("reward_weights", weights)):
        if not isinstance(values, dict) or not all(_is_number(value) for value in values.values()):
            raise ValueError(f"expected {name} to be an object of numbers")
    selected = item.get("is_selected", {})
    if not isinstance(selected, dict):
        raise ValueError("expected is_selected to be an object of lists")
    num_tokens = len(token_ids)
    return RecordedResponse(
        text=str(item.get("text", "")),
        token_ids=tuple(token_ids),
        rewards={str(name): float(value) for name, value in rewards.items()},
        is_finished=bool(item.get("is_finished", True)),
        is_key_token=tuple(map(bool, _numbers(item, "is_key_token", num_tokens))),
        is_selected={str(name): tuple(map(bool, _numbers(selected, name, num_tokens))) for name in selected},
        policy_logprobs=tuple(map(float, _numbers(item, "policy_logprobs", num_tokens))),
        sampler_logprobs=tuple(map(float, _numbers(item, "logprobs", num_tokens))),
        reward_weights={str(name): float(value) for name, value in weights.items()},
    )


def _numbers(item: Mapping[str, Any], name: str, num_tokens: int) -> list[float]:
    values = item.get(name)
    if values is None or values == []:
        return []
    if isinstance(values, list):
        values = [_or_nan(value) for value in values]
    if not isinstance(values, list) or len(values) != num_tokens or not all(_is_number(value) for value in values):
        raise ValueError(f"expected {name} to be a list of {num_tokens} numbers, one per token")
    return values


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, object) of each line. Half a line at the end is left out, as it is still being written."""
    try:
        with open_file(path) as file:
            lines = file.read().decode("utf-8").split("\n")  # not splitlines: JSON text may contain U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: expected an object, got {type(values).__name__}")
        yield number, values


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(read_yaml_text(path))
    except RecursionError:
        raise UserError(f"{path} cannot be read as YAML: nested too deeply") from None
    except (OSError, ValueError, LookupError, AttributeError, yaml.YAMLError) as error:  # a date that is none, ...
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise UserError(f"{path}: expected sections of options")
    return content


def _read_notes(path: Path) -> tuple[str, ...]:
    """The notes of a file that ``_read_config`` has read."""
    return tuple(read_notes(path.read_text(encoding="utf-8"))) if path.is_file() else ()


def _or_nan(value: Any) -> Any:
    """The value, with None replaced by NaN: our files store numbers that are not finite as null."""
    return math.nan if value is None else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold; JSON has whole numbers that none can."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)
