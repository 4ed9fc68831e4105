"""Turns questions into prompts of token ids and settings of the sampler, for engines that run a model of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.data.template import PromptBuilder
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.evaluation.engines.base import Question
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.types import Prompt, Rollout, VisualInput


class CannotAsk(Exception):
    """This model cannot take the question. The message says why, for ``Answer.problem``."""


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts for one model."""

    builder: PromptBuilder
    max_model_len: int
    """The most tokens of a prompt and its response together."""

    def make(self, question: Question) -> tuple[Prompt, SamplingSettings]:
        """The prompt, and the settings for its one response. The prompt's identity is the question's, so that the
        response is seeded by the question alone.

        A response may have ``max_tokens`` tokens, or fewer if the context leaves less room, as in vLLM. It is then cut
        off, and counted so.

        Raises:
            CannotAsk: the prompt fills the context, or its text holds control tokens.
        """
        try:
            prompt = self.builder.build({**question.record, "problem_id": question.identity}, question.media)
        except UnusableSample as error:
            raise CannotAsk(error.reason) from error
        room = self.max_model_len - len(prompt.token_ids)
        if room < 1:
            raise CannotAsk(
                f"its prompt of {len(prompt.token_ids)} tokens leaves no room for a response in the context of "
                f"{self.max_model_len} tokens"
            )
        wanted = question.sampling
        return prompt, SamplingSettings(
            num_generations=1,
            max_response_length=min(wanted.max_tokens, room),
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            stop=wanted.stop,
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            seed=question.seed,
        )


def answer_of(rollout: Rollout, prompt: Prompt, *, seconds: float) -> Answer:
    """The answer that a response is. Its number of tokens counts the end token."""
    return Answer(
        text=rollout.text,
        num_tokens=len(rollout.token_ids),
        num_prompt_tokens=len(prompt.token_ids),
        num_frames=num_frames(prompt.media),
        seconds=seconds,
        is_finished=rollout.is_finished,
    )


def num_frames(media: Sequence[VisualInput]) -> int:
    """Frames of all videos and images."""
    return sum(len(medium.frames_FCHW) for medium in media)
