"""Counts what a step's rollout computes: tokens of prompts, sampled tokens, and runs of the vision encoder.

    first prompts    P prompts with G responses each
    second prompts   P prompts with n responses each (``--temporal-bonus``): the same question with its frames in random
                     order. The frames are others in every place, so an engine reuses neither vision features nor keys
                     and values of the first prompt, and reads the prompt again as a whole.

Whichever model runs the encoder, the engine's or the trainer's (``--share-vision-features``), it runs once for each of
these prompts. The time of a rollout is not estimated: it is that of the engine. Responses are counted at their greatest
length.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.accounting.flops import count_vision
from megatron_ktr.accounting.work import GroupWork
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class RolloutWork:
    """The work of some prompts, over all replicas."""

    prompt_tokens: int
    """Tokens that are read before the first one is sampled; once for all responses to a prompt."""
    sampled_tokens: int
    encoder_flops: float
    """Operations of the vision encoder, forward alone."""


def rollout_work(config: Qwen2_5_VLConfig, group: GroupWork, *, num_prompts: int, num_responses: int) -> RolloutWork:
    """The work of ``num_prompts`` prompts like that of ``group`` with ``num_responses`` responses each; without
    responses nothing is asked."""
    asked = num_prompts if num_responses else 0
    return RolloutWork(
        prompt_tokens=asked * group.prompt_length(config),
        sampled_tokens=asked * num_responses * max(group.response_lengths),
        encoder_flops=asked * count_vision(config.vision, group.grids).total,
    )
