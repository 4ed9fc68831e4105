"""Reading a response: its answer block, its format, numbers inside it."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_NO_TAG = r"(?:(?!</?think>|</?answer>).)*"
_FORMAT = re.compile(rf"\s*<think>{_NO_TAG}</think>\s*<answer>{_NO_TAG}</answer>\s*", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def extract_answer(text: str) -> str | None:
    """The content of the first ``<answer>`` block without surrounding white space; None if there is none."""
    match = _ANSWER.search(text)
    return match.group(1) if match else None


def has_reasoning_format(text: str) -> bool:
    """Whether the response is ``<think>...</think>`` then ``<answer>...</answer>``, each tag once, and nothing else."""
    return _FORMAT.fullmatch(text) is not None


def parse_number(text: str | None) -> float | None:
    """The number ``text`` consists of (thousands commas allowed, currency and percent signs dropped), or None."""
    if text is None:
        return None
    cleaned = text.strip().strip("$€£% ").strip()
    if not _NUMBER.fullmatch(cleaned):
        return None
    return float(cleaned.replace(",", ""))
