"""Writes the headline of a demo run: accuracies with their errors, and in words what they show and do not show.

The numbers come from a mapping (``summary.json``). All values are optional:

    accuracy_initial, accuracy_sft, accuracy_ktr      share of right answers, sampled at temperature 1
    accuracy_sft_greedy, accuracy_ktr_greedy          the same models, most likely tokens
    accuracy_sft_continued                            more fine-tuning, as long as Video-KTR took, in its place
    order_accuracy_ktr, order_accuracy_ktr_shuffled   questions on the order of events; frames as they are and shuffled
    accuracy_ktr_shuffled, accuracy_ktr_blank         all questions; frames shuffled, and black
    key_token_ratio, seconds_per_step, steps          of the Video-KTR stage
    standard_error                                    {name of an accuracy: its standard error}; a number is that of
                                                      accuracy_ktr
    num_eval, num_eval_order                          held-out questions; those of them on order

All other values are listed as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.report.bars import bar_drawing
from megatron_ktr.report.markup import Html, element, format_number

ACCURACIES = {
    "accuracy_initial": "before training",
    "accuracy_sft": "after supervised fine-tuning",
    "accuracy_sft_greedy": "the same, greedy",
    "accuracy_ktr": "after Video-KTR",
    "accuracy_ktr_greedy": "the same, greedy",
    "accuracy_sft_continued": "more fine-tuning instead",
    "order_accuracy_ktr": "order questions, frames in order",
    "order_accuracy_ktr_shuffled": "order questions, frames shuffled",
    "accuracy_ktr_shuffled": "all questions, frames shuffled",
    "accuracy_ktr_blank": "all questions, blank video",
}
_CONTROLS = ("order_accuracy_ktr", "order_accuracy_ktr_shuffled", "accuracy_ktr_shuffled", "accuracy_ktr_blank")
_TILES = {
    "steps": ("Video-KTR steps", 4),
    "seconds_per_step": ("seconds a step", 3),
    "key_token_ratio": ("share of tokens that carry the loss", 3),
}


@dataclass(frozen=True)
class Measured:
    """One accuracy."""

    name: str
    value: float
    standard_error: float | None
    num_questions: int | None

    @property
    def text(self) -> str:
        error = "" if self.standard_error is None else f" \u00b1 {100 * self.standard_error:.1f}"
        return f"{100 * self.value:.1f}%{error}"


def read_accuracies(summary: Mapping[str, Any]) -> dict[str, Measured]:
    """The accuracies in a summary, by name.

    Raises:
        UserError: an accuracy is not a share between 0 and 1.
    """
    errors = summary.get("standard_error")
    errors = errors if isinstance(errors, Mapping) else {"accuracy_ktr": errors}
    found = {}
    for name in ACCURACIES:
        value = summary.get(name)
        if value is None:
            continue
        if not _is_number(value) or not 0 <= value <= 1:
            raise UserError(f"--summary: expected {name} to be a number from 0 to 1, got {value!r}")
        error, count = errors.get(name), summary.get("num_eval_order" if name.startswith("order") else "num_eval")
        for key, number in (("standard_error", error), ("num_eval", count)):
            if number is not None and not (_is_number(number) and number >= 0):
                raise UserError(f"--summary: expected {key} of {name} to be a number, got {number!r}")
        found[name] = Measured(name, float(value), error, count)
    return found


def summary_section(summary: Mapping[str, Any]) -> Html:
    """The headline numbers, what they show, and all other values of the summary."""
    found = read_accuracies(summary)
    tiles = [
        element("div", element("b", format_number(summary[name], digits=digits)), element("span", text))
        for name, (text, digits) in _TILES.items()
        if _is_number(summary.get(name))
    ]
    return element(
        "section",
        element("h2", "Results"),
        _bars(found) if found else None,
        element("div", tiles, class_="tiles") if tiles else None,
        _reading(found),
        _rest(summary),
        id="results",
    )


def _bars(found: Mapping[str, Measured]) -> Html:
    rows = []
    for name, item in found.items():
        if name == next((control for control in _CONTROLS if control in found), None):
            rows.append(element("tr", element("th", "Controls, after Video-KTR", colspan=3, scope="colgroup")))
        error = item.standard_error
        drawing = bar_drawing(item.value, (item.value - error, item.value + error) if error else None)
        label = element("th", ACCURACIES[name], scope="row")
        count = f", {item.num_questions:g} questions" if item.num_questions is not None else ""
        value = element("td", element("b", item.text), element("span", count, class_="note"))
        rows.append(element("tr", label, element("td", drawing, class_="drawing"), value))
    caption = "Right answers on held-out questions" + (
        " (\u00b1 one standard error over questions)"
        if any(item.standard_error is not None for item in found.values())
        else " (standard errors were not recorded)"
    )
    caption += "; answers are sampled at temperature 1 unless it says greedy."
    return element("table", element("caption", caption), element("tbody", rows), class_="accuracies")


def _reading(found: Mapping[str, Measured]) -> Html:
    shows = list(_what_it_shows(found))
    limits = [
        "A model of this size on drawn videos says nothing about real videos or large models.",
        "It is no comparison of Video-KTR with GRPO: on a task this easy both end near the ceiling.",
        "Reinforcement learning changed how often the model uses what it can do already; it did not teach new skills.",
        "One run with one seed. Standard errors cover the choice of questions, not what another seed would give.",
    ]
    return element(
        "div",
        element("div", element("h3", "What this shows"), element("ul", [element("li", item) for item in shows]))
        if shows
        else None,
        element(
            "div", element("h3", "What this does not show"), element("ul", [element("li", item) for item in limits])
        ),
        class_="reading",
    )


def _what_it_shows(found: Mapping[str, Measured]) -> Iterator[str]:
    sft, ktr = found.get("accuracy_sft"), found.get("accuracy_ktr")
    if sft and ktr:
        if _is_clear(ktr, sft):
            yield (
                f"The fine-tuned model often guesses on purpose, because many of its examples did; it is right in "
                f"{sft.text}. Video-KTR taught it to stop guessing and to use what it sees: {ktr.text}."
            )
        else:
            yield f"Video-KTR made no clear difference here: {sft.text} before, {ktr.text} after."
    continued = found.get("accuracy_sft_continued")
    if sft and continued:
        yield f"More fine-tuning on the same examples, for the time Video-KTR took, ends at {continued.text}."
    intact, shuffled = found.get("order_accuracy_ktr"), found.get("order_accuracy_ktr_shuffled")
    if intact and shuffled:
        if _is_clear(intact, shuffled):
            yield (
                f"Order questions need the order of the frames: {intact.text} with it, {shuffled.text} when the same "
                "frames come in random order."
            )
        else:
            yield (
                f"Shuffled frames made no clear difference to order questions ({intact.text} and {shuffled.text}): "
                "the model does not show that it uses the order."
            )
    blank = found.get("accuracy_ktr_blank")
    if blank and ktr:
        if _is_clear(ktr, blank):
            yield f"Answers come from the video: with every frame black, {blank.text} are right."
        else:
            yield f"A blank video made no clear difference ({blank.text}): answers may not come from the video."


def _is_clear(higher: Measured, lower: Measured) -> bool:
    """Whether the difference exceeds twice its standard error, or 5 points if that is unknown."""
    errors = [item.standard_error for item in (higher, lower) if item.standard_error is not None]
    spread = math.hypot(*errors) if len(errors) == 2 else 0.025
    return higher.value - lower.value > 2 * spread


def _rest(summary: Mapping[str, Any]) -> Html | None:
    rows = [element("tr", element("th", key, scope="row"), element("td", value)) for key, value in _flat(summary)]
    if not rows:
        return None
    return element(
        "details",
        element("summary", "All numbers of the summary"),
        element("div", element("table", element("tbody", rows)), class_="scroll"),
    )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, bool) or not isinstance(value, int | float):
        yield prefix, str(value)
    else:
        yield prefix, format_number(value, digits=5)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
