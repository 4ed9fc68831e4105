"""Recorded rollouts: training without sampling, on a JSONL file of questions with G responses and their rewards.

One line is one group:

    {"problem_id": "7", "problem": "Which colour came first?", "video": "clips/7.mp4", "options": ["A. red", "B. blue"],
     "responses": [{"text": "<think>..</think><answer>A</answer>", "rewards": {"accuracy": 1.0, "format": 1.0}},
                   {"token_ids": [151667, 198, 151645], "logprobs": [-0.1, -0.7, 0.0],
                    "rewards": {"accuracy": 0.0, "format": 0.0}}]}

The question is a Video-R1 record (``data/records.py``), or ``messages``. A response is either text or token ids. Token
ids are taken as they are. The end token is added to text, except with ``"is_finished": false``, which says that the
response was cut at the length limit. The reward is the sum of the named parts; it may also be given as one number,
``"reward": 0.0``.

The length bonus is on by default and goes to correct responses. It therefore needs the part ``accuracy`` of every
response; with files that lack it, use ``--length-bonus 0``. ``write_rollouts`` writes the responses that a run sampled
in the same format.

With ``--temporal-bonus`` a question with a video also has ``shuffled_responses``: responses to its frames in random
order, in the form of ``responses``. The list is empty for a video that has no order to lose, and null where a reward
of one of them had failed: nothing is then compared. Runs without the bonus do not read it.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ktr.attribution.counterfactuals import can_shuffle
from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.data.records import NORMALISED, Record, read_records
from megatron_ktr.data.source import DatasetSource
from megatron_ktr.data.template import control_tokens
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.errors import UserError
from megatron_ktr.files.json_files import to_json
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.second_prompt import SHUFFLED, Question, SecondPrompt, counts_of_questions, joined, prompts_of
from megatron_ktr.types import Prompt, ResponseSelection, Rollout, RolloutGroup

_log = logging.getLogger(__name__)
MAX_FLOAT = sys.float_info.max
_LINE = "record_number"
"""The field of a record with the number of its line. It identifies the record's responses; problem ids may repeat."""
_RESPONSES, _SHUFFLED_RESPONSES = "responses", "shuffled_responses"


@dataclass(frozen=True)
class Required:
    """What recorded responses must contain."""

    rewards: Mapping[str, str] = field(default_factory=dict)
    """The reward parts that every response must have, each with the end of the error message if a response lacks it:
    why it is needed, and what the user can do."""
    logprobs: bool = False
    """Whether every response must have the sampler's log-probs."""
    num_shuffled: int = 0
    """Responses to shuffled frames that a question with a video must have; 0: they are not read."""


NOTHING_REQUIRED = Required()


class ReplayEngine(RolloutEngine):
    """Answers each prompt with its recorded responses, independently of the weights."""

    def __init__(
        self,
        path: Path | str,
        *,
        tokenizer: Tokenizer,
        num_generations: int | None = None,
        end_token_id: int | None = None,
        vocab_size: int | None = None,
        required: Required = NOTHING_REQUIRED,
        ignored: Collection[str] = (),
        problems: RecordProblems | None = None,
    ) -> None:
        """Reads and checks the whole file.

        Args:
            num_generations: take the first ``num_generations`` responses of each group; None takes all.
            end_token_id: appended to responses given as text; None means the tokenizer's end token.
            vocab_size: token ids must be below it; None means the tokenizer's length.
            required: what every response taken must contain.
            ignored: fields that are data although they look like instructions (``data/records.py``).
            problems: collects the lines that cannot be used; None means that such lines are an error.

        Raises:
            UserError: lines cannot be used; the message names them, and the response, counted from 1.
        """
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.end_token_id = tokenizer.eos_token_id if end_token_id is None else end_token_id
        if self.end_token_id is None:
            raise UserError("model: the tokenizer has no end token, which recorded responses need (eos_token)")
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self._control = control_tokens(tokenizer)
        found = RecordProblems("replay_path", self.path) if problems is None else problems
        self.records: list[Record] = read_records(
            path, option="replay_path", needs_solution=False, ignored=ignored, problems=found
        )
        self._required = required
        self._rollouts: dict[int, tuple[Rollout, ...]] = {}
        self._shuffled: dict[int, tuple[Rollout, ...] | None] = {}
        """None: there are none, because a reward had failed."""
        for place, record in enumerate(self.records):
            if place in found.places:
                continue
            line = record[_LINE]
            try:
                rollouts = self._read_responses(record.pop(_RESPONSES, None))
                if num_generations is not None and len(rollouts) < num_generations:
                    raise ValueError(f"{len(rollouts)} responses, but num_generations is {num_generations}")
                _check_rewards(rollouts[:num_generations], required.rewards)
                if required.logprobs:
                    _check_logprobs(rollouts[:num_generations])
                self._shuffled[line] = self._read_shuffled(record)
            except ValueError as error:
                found.add(place, number=line, problem_id=record["problem_id"], reason=error)
                continue
            self._rollouts[line] = rollouts[:num_generations]
        if problems is None:
            found.settle(len(self.records), max_share=0.0)

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int = 0,
        sampling: SamplingSettings | None = None,
        counts: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """Yields the recorded group of each prompt. Every prompt must have been built from one of ``records``.

        Without ``counts`` a prompt has the responses that were read for it. Of a prompt whose variant is ``shuffled``
        only the name matters, and its frames may be in any order.
        """
        del step, sampling
        for index, prompt in enumerate(prompts):
            line = prompt.record.get(_LINE)
            if line not in self._rollouts:
                raise UserError(f"replay_path: {self.path} has no recorded responses for prompt {prompt.problem_id}")
            rollouts = (self._shuffled if prompt.variant == SHUFFLED else self._rollouts)[line]
            if rollouts is None:
                yield index, RolloutGroup(prompt, ())
                continue
            if not rollouts:
                raise UserError(
                    f"replay_path: {self.path}, record {line} (problem_id {prompt.problem_id}): its shuffled_responses "
                    "are empty, but its video has an order to lose: frames or sizes differ from those when it was "
                    "recorded; record it again, or set --temporal-bonus 0"
                )
            if counts is not None and len(rollouts) < counts[index]:
                raise ValueError(f"prompt {prompt.problem_id} has {len(rollouts)} responses, asked for {counts[index]}")
            recorded_length = prompt.record.get("prompt_length")
            if not prompt.variant and recorded_length is not None and recorded_length != len(prompt.token_ids):
                _log.warning(
                    "prompt %s has %d tokens, %d when its responses were recorded: frames, sizes or wording differ",
                    prompt.problem_id,
                    len(prompt.token_ids),
                    recorded_length,
                )
            yield index, RolloutGroup(prompt=prompt, rollouts=rollouts[: None if counts is None else counts[index]])

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Ignores the weights, on which recorded responses do not depend. The stream is still read to its end, because
        it is produced by collective gathers that all ranks must finish."""
        for _ in named_tensors:
            pass

    def _read_shuffled(self, record: Record) -> tuple[Rollout, ...] | None:
        """The responses to shuffled frames; none where the run does not compare with them, or there is no video."""
        number, given = self._required.num_shuffled, record.pop(_SHUFFLED_RESPONSES, "missing")
        if not number or given == [] or all(kind != "video" for kind, _ in record["media"]):
            return ()
        if given is None:
            return None
        if given == "missing":
            raise ValueError(
                "no 'shuffled_responses', with which --temporal-bonus compares: record them ([] for a video without an "
                "order to lose), or set --temporal-bonus 0"
            )
        try:
            rollouts = self._read_responses(given)
            _check_rewards(rollouts[:number], {"accuracy": "--temporal-bonus compares accuracies"})
        except ValueError as error:
            raise ValueError(f"shuffled_responses: {error}") from error
        if len(rollouts) < number:
            raise ValueError(f"{len(rollouts)} shuffled_responses, but {number} are asked for (temporal_responses)")
        return rollouts[:number]

    def _read_responses(self, responses: Any) -> tuple[Rollout, ...]:
        if not isinstance(responses, list) or not responses:
            raise ValueError(f"expected a list of responses in 'responses', got {_short(responses)}")
        rollouts = []
        for number, response in enumerate(responses, start=1):
            try:
                rollouts.append(self._read_response(response))
            except ValueError as error:
                raise ValueError(f"response {number}: {error}") from error
        return tuple(rollouts)

    def _read_response(self, response: Any) -> Rollout:
        if not isinstance(response, dict):
            raise ValueError(f"expected an object, got {_short(response)}")
        text, token_ids = response.get("text"), response.get("token_ids")
        if token_ids is None:
            if not isinstance(text, str):
                raise ValueError(f"expected 'text' or 'token_ids', got keys {sorted(response)}")
            is_finished = bool(response.get("is_finished", True))
            if is_finished:
                text = text.removesuffix(self.tokenizer.convert_ids_to_tokens(self.end_token_id))
            if (control := self._control.search(text)) is not None:
                raise ValueError(
                    f"its text contains the control token {control.group()}: give token_ids if it was sampled"
                )
            token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if is_finished:
                token_ids = [*token_ids, self.end_token_id]
        else:
            _check_token_ids(token_ids, self.vocab_size)
            is_finished = bool(response.get("is_finished", token_ids[-1:] == [self.end_token_id]))
            if text is None:
                text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        if not token_ids:
            raise ValueError("it has no tokens; an unfinished response cannot be empty")
        return Rollout(
            token_ids=tuple(token_ids),
            sampler_logprobs=_read_logprobs(response.get("logprobs"), len(token_ids)),
            text=str(text),
            is_finished=is_finished,
            rewards=_read_rewards(response),
            reward_weights=_read_numbers(response.get("reward_weights", {}), name="reward_weights"),
        )


class ReplaySource(DatasetSource):
    """Recorded groups, in the order of a ``PromptDataset`` over ``engine.records``."""

    def __init__(self, dataset: PromptDataset, *, engine: ReplayEngine, second: SecondPrompt | None = None) -> None:
        super().__init__(dataset)
        self.engine = engine
        self.second = second

    def groups_of(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        questions = [Question(RolloutGroup(prompt, ()), self._second_of(prompt)) for prompt in prompts]
        counts = counts_of_questions(questions, second=self.second)
        return joined(questions, self.engine.stream(prompts_of(questions), counts=counts))

    def _second_of(self, prompt: Prompt) -> Prompt | None:
        """The second prompt, whose responses are recorded. Nobody sees its frames, so they are not shuffled."""
        if self.second is None or not can_shuffle(prompt):
            return None
        return dataclasses.replace(prompt, variant=SHUFFLED)


def write_rollouts(
    path: Path | str,
    groups: Sequence[RolloutGroup],
    *,
    selections: Sequence[Sequence[ResponseSelection]] = (),
    scores: Sequence[Sequence[Mapping[str, Sequence[float]]]] = (),
    append: bool = True,
    with_shuffled: bool = False,
) -> int:
    """Writes groups as lines of a replay file, flushes them to disk, and returns their number.

    Frames are not stored, only the path in the record; a replay samples the frames again, with its own settings. Each
    replica of a run writes its own lines. Sorted by ``draw_number`` they are the run's data in the order drawn, and a
    replay in this order repeats the shuffled orders of frames, too. (A run that filters groups writes only those that
    it trained on. A replay numbers them without gaps, and then shuffles their frames otherwise.)

    With ``selections`` each response also contains its key tokens (``is_key_token``, ``is_selected`` by signal) and the
    trainer's log-probs (``policy_logprobs``), with ``scores`` all of its scores; a replay ignores them. Numbers that
    are not finite become null. ``with_shuffled``: every group has ``shuffled_responses``. Raises UserError if the file
    cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", encoding="utf-8") as file:
            for group, chosen, scored in itertools.zip_longest(groups, selections, scores):
                line = _group_line(group, chosen)
                for response, of_response in zip(line[_RESPONSES], scored or (), strict=False):
                    response["scores"] = of_response
                if with_shuffled or group.shuffled:
                    found = [_plain_response(rollout) for rollout in group.shuffled]
                    line[_SHUFFLED_RESPONSES] = found or (None if can_shuffle(group.prompt) else [])
                file.write(to_json(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"rollouts cannot be written to {path}: {error.strerror}") from error
    return len(groups)


def _group_line(group: RolloutGroup, selections: Sequence[ResponseSelection] | None) -> dict[str, Any]:
    left_out = (*NORMALISED, _RESPONSES, _SHUFFLED_RESPONSES)
    line = {name: value for name, value in group.prompt.record.items() if name not in left_out}
    line["problem_id"] = group.prompt.problem_id
    line["draw_number"] = group.prompt.draw_number
    line["prompt_length"] = len(group.prompt.token_ids)
    line[_RESPONSES] = []
    for rollout, selection in itertools.zip_longest(group.rollouts, selections or ()):
        response = _plain_response(rollout)
        if selection is not None:
            response["is_key_token"] = [int(mark) for mark in selection.is_key_token]
            response["is_selected"] = {
                name: [int(mark) for mark in marks] for name, marks in selection.is_selected.items()
            }
            response["policy_logprobs"] = list(selection.policy_logprobs)
        line[_RESPONSES].append(response)
    return line


def _plain_response(rollout: Rollout) -> dict[str, Any]:
    response: dict[str, Any] = {
        "text": rollout.text,
        "token_ids": list(rollout.token_ids),
        "is_finished": rollout.is_finished,
        "rewards": dict(rollout.rewards),
    }
    if rollout.reward_weights:
        response["reward_weights"] = dict(rollout.reward_weights)
    if rollout.sampler_logprobs is not None:
        response["logprobs"] = list(rollout.sampler_logprobs)
    return response


def _check_token_ids(token_ids: Any, vocab_size: int) -> None:
    is_list = isinstance(token_ids, list)
    if not is_list or not all(isinstance(token, int) and not isinstance(token, bool) for token in token_ids):
        raise ValueError(f"expected token_ids to be a list of whole numbers, got {_short(token_ids)}")
    wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size}")


def _read_logprobs(logprobs: Any, num_tokens: int) -> tuple[float, ...] | None:
    if logprobs is None:
        return None
    if not isinstance(logprobs, list) or not all(_is_number(value) and value <= 1e-6 for value in logprobs):
        raise ValueError(f"expected logprobs to be a list of numbers <= 0, got {_short(logprobs)}")
    if len(logprobs) != num_tokens:
        raise ValueError(f"{len(logprobs)} logprobs for {num_tokens} tokens (the end token counts)")
    return tuple(float(value) for value in logprobs)


def _read_rewards(response: Mapping[str, Any]) -> dict[str, float]:
    rewards = response.get("rewards")
    if rewards is None and "reward" in response:
        rewards = {"reward": response["reward"]}
    if not isinstance(rewards, dict) or not rewards:
        raise ValueError("expected 'rewards' (an object of named numbers) or 'reward' (a number)")
    return _read_numbers(rewards, name="rewards")


def _read_numbers(values: Any, *, name: str) -> dict[str, float]:
    if not isinstance(values, dict) or not all(map(_is_number, values.values())):
        raise ValueError(f"expected {name} to be finite numbers by name, got {_short(values)}")
    return {str(key): float(value) for key, value in values.items()}


def _check_rewards(rollouts: Sequence[Rollout], required: Mapping[str, str]) -> None:
    for number, rollout in enumerate(rollouts, start=1):
        for name, because in required.items():
            if name not in rollout.rewards:
                found = ", ".join(map(repr, rollout.rewards))
                raise ValueError(f"response {number}: no reward {name!r}, only {found}; {because}")


def _check_logprobs(rollouts: Sequence[Rollout]) -> None:
    for number, rollout in enumerate(rollouts, start=1):
        if rollout.sampler_logprobs is None:
            raise ValueError(
                f"response {number}: no 'logprobs' of the sampler, which --importance-sampling and --importance-mask "
                "compare with: record them, or leave both options off"
            )


def _is_number(value: Any) -> bool:
    # The value is compared and not converted, because JSON may contain whole numbers that no float can hold.
    return isinstance(value, int | float) and -MAX_FLOAT <= value <= MAX_FLOAT


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
