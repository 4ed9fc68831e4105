"""Collects the tokens of an in-process vLLM engine into responses, and the responses of several engines into groups.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.rollout.sampling import StopStrings
from megatron_ktr.rollout.vllm.sampling import rollout_of
from megatron_ktr.types import Prompt, Rollout, RolloutGroup

Answer = tuple[int, int, Rollout]
"""(index of the prompt among those of the share group, sample, response)."""
Asked = tuple[Prompt, int]
"""A prompt and the number of its responses."""


class GrowingResponse:
    """One response while it is being generated."""

    def __init__(self, prompt: int, sample: int, *, stop: StopStrings | None) -> None:
        self.prompt, self.sample = prompt, sample
        self.finish_reason: str | None = None
        self._stop = stop
        self._token_ids: list[int] = []
        self._logprobs: list[float] | None = []

    def add(self, output: Any) -> None:
        """Adds the tokens that vLLM has generated since the last call. Tokens after the one that completes a stop
        string are dropped."""
        token_ids = list(output.token_ids)
        self.finish_reason = output.finish_reason
        if self._stop is not None:
            for length, token_id in enumerate(token_ids, start=1):
                if self._stop.completed_by(0, token_id):
                    del token_ids[length:]
                    self.finish_reason = "stop"
                    break
        self._token_ids += token_ids
        if output.logprobs is None:
            self._logprobs = None
        elif self._logprobs is not None:
            assert output.logprobs.token_ids[: len(token_ids)] == token_ids
            self._logprobs += output.logprobs.logprobs[: len(token_ids)]

    def rollout(self, end_token_ids: Sequence[int], tokenizer: Tokenizer) -> Rollout:
        return rollout_of(
            self._token_ids,
            self._logprobs,
            finish_reason=self.finish_reason,
            end_token_ids=end_token_ids,
            tokenizer=tokenizer,
        )


class GroupCollector:
    """Collects the responses to one reading rank's prompts into groups. Responses to other prompts are ignored."""

    def __init__(self, asked_by_reader: Mapping[int, Sequence[Asked]], *, rank: int) -> None:
        self._asked: dict[int, tuple[int, Asked]] = {}
        """Maps an index among all prompts to (index among the reader's own prompts, what was asked)."""
        start = 0
        for reader, asked in asked_by_reader.items():
            if reader == rank:
                self._asked = {start + index: (index, one) for index, one in enumerate(asked)}
            start += len(asked)
        self._rollouts: dict[int, dict[int, Rollout]] = {index: {} for index in self._asked}

    def add(self, answer: Answer) -> Iterator[tuple[int, RolloutGroup]]:
        """Yields the group that ``answer`` completes, if it completes one."""
        index, sample, rollout = answer
        if index not in self._asked:
            return
        own_index, (prompt, number) = self._asked[index]
        rollouts = self._rollouts[index]
        rollouts[sample] = rollout
        if len(rollouts) == number:
            yield own_index, RolloutGroup(prompt, tuple(rollouts[key] for key in sorted(rollouts)))
