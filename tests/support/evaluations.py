"""Evaluations made up for tests, without a model: every item says by a letter how it is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ktr.evaluation.item import Answer, Condition, Evaluation, Item, Outcome, Verdict

INTACT = Condition(32)
SETTINGS = {"model": "made-up", "engine": "none"}


def item_of(number: int, *, benchmark: str = "bench", video: str = "", **categories: str) -> Item:
    """A question with four options whose answer is B."""
    record: dict[str, Any] = {
        "problem_id": str(number),
        "problem": f"What is in scene {number}?",
        "problem_type": "multiple choice",
        "data_type": "video",
        "options": ["A. a cat", "B. a dog", "C. a cow", "D. a hen"],
        "solution": "<answer>B</answer>",
        "media": [("video", f"{video or number}.mp4")],
    }
    return Item(benchmark, f"q{number}", record, categories, video)


def outcome_of(
    item: Item,
    score: float | Mapping[str, float],
    *,
    condition: Condition = INTACT,
    text: str = "<think>so</think><answer>B</answer>",
    answers: Sequence[Answer] | None = None,
    has_format: bool = True,
    **answer: Any,
) -> Outcome:
    """An outcome with one score under all protocols, or one each; ``answer`` are fields of ``Answer``."""
    scores = dict.fromkeys(("official", "strict", "lenient"), float(score)) if isinstance(score, int | float) else score
    return Outcome(
        item,
        condition,
        tuple(answers or [Answer(text, **{"num_tokens": 10, "num_frames": 32, "seconds": 1.0, **answer})]),
        text,
        {name: Verdict(value, "B" if value else "A") for name, value in scores.items()},
        has_format,
    )


def evaluation_of(
    outcomes: Sequence[Outcome], *, items: Sequence[Item] = (), settings: Mapping[str, Any] | None = None
) -> Evaluation:
    """Of all items and conditions that the outcomes name, and ``items`` that are not answered."""
    found = {(item.benchmark, item.item_id): item for item in [*(outcome.item for outcome in outcomes), *items]}
    conditions = dict.fromkeys(outcome.condition for outcome in outcomes)
    return Evaluation(settings or SETTINGS, tuple(found.values()), tuple(conditions), tuple(outcomes))
