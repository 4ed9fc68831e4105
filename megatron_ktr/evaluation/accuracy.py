"""Accuracy of sampled or greedy responses on held-out questions, with controls that change only the video.

intact     the video as it is
shuffled   its frames in random order (seeded by the question's place, never the identity), which removes their order
blank      every frame black, which removes all that the video shows
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megatron_ktr.attribution.counterfactuals import draw_permutations, shuffle_frames
from megatron_ktr.rewards import accuracy_reward
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.types import Prompt

Control = Literal["intact", "shuffled", "blank"]


@dataclass(frozen=True)
class Accuracy:
    """The mean accuracy over questions, in all and by the record's ``task`` (or ``problem_type``)."""

    mean: float
    standard_error: float
    num_questions: int
    by_task: dict[str, Accuracy] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Sequence[float], *, by_task: dict[str, Accuracy] | None = None) -> Accuracy:
        """The mean of the questions' accuracies, with its standard error (sample standard deviation / sqrt(n))."""
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
        return cls(mean, math.sqrt(variance / len(values)), len(values), by_task or {})


def apply_control(prompt: Prompt, control: Control, *, seed: int = 0) -> Prompt:
    """The same question about a changed video. Positions and lengths do not change."""
    if control == "intact":
        return prompt
    if control == "blank":
        media = tuple(
            dataclasses.replace(medium, frames_FCHW=torch.zeros_like(medium.frames_FCHW)) for medium in prompt.media
        )
        return dataclasses.replace(prompt, media=media)
    orders = draw_permutations(prompt, seed=seed, step=0)
    media = tuple(
        medium if order is None else shuffle_frames(medium, order)
        for medium, order in zip(prompt.media, orders, strict=True)
    )
    return dataclasses.replace(prompt, media=media)


def evaluate(
    engine: RolloutEngine, prompts: Sequence[Prompt], *, control: Control = "intact", step: int = 0, **options: Any
) -> Accuracy:
    """The accuracy of the engine's first response to each prompt. ``options`` are passed to ``engine.generate``."""
    numbered = [dataclasses.replace(prompt, draw_number=number) for number, prompt in enumerate(prompts)]
    shown = [apply_control(prompt, control) for prompt in numbered]
    groups = engine.generate(shown, step=step, **options)
    scores: dict[str, list[float]] = {}
    for group in groups:
        record = group.prompt.record
        task = str(record.get("task") or record.get("problem_type"))
        scores.setdefault(task, []).append(accuracy_reward(group.rollouts[0].text, record))
    values = [value for found in scores.values() for value in found]
    return Accuracy.of(values, by_task={task: Accuracy.of(found) for task, found in sorted(scores.items())})
