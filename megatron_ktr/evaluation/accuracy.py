"""Accuracy of an engine's responses to prompts that are loaded already, as the quickstart measures it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ktr.evaluation.asking.controls import apply_control
from megatron_ktr.evaluation.item import Control
from megatron_ktr.rewards.accuracy import accuracy_of_record
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.types import Prompt


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


def evaluate(
    engine: RolloutEngine, prompts: Sequence[Prompt], *, control: Control = "intact", step: int = 0, **options: Any
) -> Accuracy:
    """The accuracy of the engine's first response to each prompt. Orders of frames are drawn by the prompt's place.
    ``options`` are passed to ``engine.generate``."""
    numbered = [dataclasses.replace(prompt, draw_number=number) for number, prompt in enumerate(prompts)]
    shown = [apply_control(prompt, control) for prompt in numbered]
    groups = engine.generate(shown, step=step, **options)
    scores: dict[str, list[float]] = {}
    for group in groups:
        record = group.prompt.record
        task = str(record.get("task") or record.get("problem_type"))
        scores.setdefault(task, []).append(accuracy_of_record(group.rollouts[0].text, record))
    values = [value for found in scores.values() for value in found]
    return Accuracy.of(values, by_task={task: Accuracy.of(found) for task, found in sorted(scores.items())})
