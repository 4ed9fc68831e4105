"""Reads a response: its answer block, its format, and the number that a text consists of.

Each function scans the text in time linear in its length. None uses a regular expression that can backtrack: a model
that degenerates may write a hundred thousand blanks, digits or tags, and every rank waits for the reward of its
response.
"""

from __future__ import annotations

import math
import unicodedata

from megatron_ktr.rewards.fold import bare, fold_number

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_GROUP_SEPARATORS = ",'"


def extract_answer(text: str) -> str | None:
    """The content of the first ``<answer>`` block without surrounding white space; None if there is none."""
    start = text.find("<answer>")
    end = text.find("</answer>", start + len("<answer>")) if start >= 0 else -1
    return text[start + len("<answer>") : end].strip() if end >= 0 else None


def extract_only_answer(text: str) -> str | None:
    """``extract_answer`` for responses with exactly one ``<answer>`` and one ``</answer>``; None for all others."""
    is_single = text.count("<answer>") == 1 and text.count("</answer>") == 1
    return extract_answer(text) if is_single else None


def has_reasoning_format(text: str) -> bool:
    """Whether the response is ``<think>...</think>`` then ``<answer>...</answer>``, each tag once, and nothing else."""
    text = text.strip()
    if not (text.startswith("<think>") and text.endswith("</answer>") and all(text.count(tag) == 1 for tag in TAGS)):
        return False
    between = text[text.index("</think>") + len("</think>") : text.index("<answer>")]
    return text.index("</think>") < text.index("<answer>") and not between.strip()


def parse_number(text: str | None) -> float | None:
    """The finite number that ``text`` consists of; None if the text is anything else.

    Digits, signs and separators of every script are read. Currency signs, percent signs and decoration
    (``\\boxed{5}``, ``**5**``) are dropped. Commas or apostrophes may separate the usual groups of digits: "1,200" and
    "1,00,000" are numbers, "3,14" is not.
    """
    if text is None:
        return None
    text = without_unit_signs(bare(fold_number(text), trailing="。"))
    value, end = scan_number(text)
    return value if end == len(text) else None


def without_unit_signs(text: str) -> str:
    """The text without blanks, currency and percent signs at both ends."""
    start, end = 0, len(text)
    while start < end and _is_unit_sign(text[start]):
        start += 1
    while start < end and _is_unit_sign(text[end - 1]):
        end -= 1
    return text[start:end]


def scan_number(text: str, start: int = 0, *, separators: str = _GROUP_SEPARATORS) -> tuple[float | None, int]:
    """(value, place behind it) of the decimal number that begins at ``start``. If no number begins there the result is
    (None, ``start``); if it is too large for a float, that too. ``text`` comes from ``fold_number``."""
    place = start
    sign = ""
    if place < len(text) and text[place] in "+-":
        sign = text[place]
        place += 1
    while place < len(text) and _is_unit_sign(text[place]):
        place += 1
    whole, place = _scan_whole(text, place, separators)
    fraction = ""
    if place < len(text) and text[place] == "." and (whole or _digits_end(text, place + 1) > place + 1):
        end = _digits_end(text, place + 1)
        fraction, place = text[place + 1 : end], end
    if not whole and not fraction:
        return None, start
    exponent = ""
    if place < len(text) and text[place] in "eE":
        digits = place + 2 if text[place + 1 : place + 2] in ("+", "-") else place + 1
        end = _digits_end(text, digits)
        if end > digits:
            exponent, place = text[place:end], end
    value = float(f"{sign}{whole or '0'}.{fraction or '0'}{exponent}")
    return (value, place) if math.isfinite(value) else (None, start)


def _scan_whole(text: str, start: int, separators: str) -> tuple[str, int]:
    """(digits before the decimal point without separators, place behind them).

    Separated groups have two or three digits each. The first may have one, and the last must have three.
    """
    end = _digits_end(text, start)
    groups, place = [text[start:end]], end
    if not 1 <= end - start <= 3:
        return groups[0], end
    separator = text[place : place + 1]
    while separator and separator in separators and text[place : place + 1] == separator:
        end = _digits_end(text, place + 1)
        if not 2 <= end - place - 1 <= 3:
            break
        groups.append(text[place + 1 : end])
        place = end
    is_grouped = len(groups) > 1 and len(groups[-1]) == 3
    return ("".join(groups), place) if is_grouped else (groups[0], start + len(groups[0]))


def _digits_end(text: str, start: int) -> int:
    end = start
    while end < len(text) and "0" <= text[end] <= "9":
        end += 1
    return end


def _is_unit_sign(character: str) -> bool:
    return character == "%" or character.isspace() or unicodedata.category(character) == "Sc"
