"""One spelling for texts that look the same: Unicode forms, letter case, digits, and what merely decorates an answer.

    fold_forms    "Ｂ" -> "B", "ﬁ" -> "fi", "e" + acute -> "é"; "²", "½" and "₂" stay, for "10²" is not "102"
    fold_case     fold_forms, and "STRASSE" = "straße", "İ" = "I" = "ı" = "i"
    fold_number   fold_forms, digits of every script as 0..9, every dash as "-": "−５" -> "-5"
    bare          fold_forms without brackets, quotes, emphasis and LaTeX around the whole: "**\\boxed{B}**" -> "B"

All take time linear in the length of the text, whatever it says.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping

MAX_MARKS = 30
"""Combining marks that are normalised together. Putting n marks into canonical order takes n^2 steps, and no writing
has more than a few on one letter (Unicode's stream-safe text format has the same limit)."""
_KEPT_FORMS = ("<super>", "<sub>", "<fraction>")
_JOINER = "\u034f"
"""Parts marks without being seen."""
_FILLERS = _JOINER + "\u115f\u1160\u3164"
_NUMBER_SIGNS = {
    "\u066c": ",",  # Arabic thousands separator
    "\u066b": ".",  # Arabic decimal separator
    "\u066a": "%",  # Arabic percent sign
    "\u2212": "-",  # minus sign
    "\u207b": "-",  # superscript minus, which has a form of its own
    "\u2019": "'",  # apostrophe between thousands
    "\u2044": "/",  # fraction slash
    "\u2215": "/",  # division slash
    "\u22c5": "*",  # dot operator
    "\u00b7": "*",  # middle dot
    "\u00d7": "*",  # multiplication sign
}
_LOOKALIKES = dict(zip("‘’ʼ“”‐–−ı", "'''\"\"---i", strict=True)) | {"i\u0307": "i"}
_BRACKETS = dict(zip("([{<“‘«「『【〔《〈", ")]}>”’»」』】〕》〉", strict=True))
_OPENED_BY = {closing: opening for opening, closing in _BRACKETS.items()}
_ANY_BRACKET = re.compile("[" + re.escape("".join([*_BRACKETS, *_OPENED_BY])) + "]")
_MARKS = "$*_`\"'"
_COMMANDS = tuple(f"\\{name}" for name in ("boxed", "fbox", "textbf", "textit", "text", "mathbf", "mathrm"))


def fold_forms(text: str) -> str:
    """NFKC without what changes a value (super- and subscripts, fractions); invisible characters are dropped, and a
    zero-width space is a blank."""
    if text.isascii():
        return text
    of_kind: dict[str, list[str]] = {}
    for character in set(text):
        of_kind.setdefault(_kind(character), []).append(character)
    text = _replace(text, {"\u200b": " "} | dict.fromkeys(of_kind.get("ignored", ()), ""))
    if marks := "".join(of_kind.get("mark", ())):
        text = re.sub(f"([{marks}]{{{MAX_MARKS}}})(?=[{marks}])", rf"\1{_JOINER}", text)
    kept = "".join(of_kind.get("kept", ()))
    pieces = re.split(f"([{kept}]+)", text) if kept else [text]
    pieces[::2] = [unicodedata.normalize("NFKC", piece) for piece in pieces[::2]]
    return "".join(pieces).replace(_JOINER, "")


def fold_case(text: str) -> str:
    """``fold_forms`` without upper case and typographic quotes and dashes."""
    if text.isascii():
        return text.lower()
    # Folding case can leave letters and marks apart; a dotted capital I would otherwise keep its dot.
    return _replace(fold_forms(fold_forms(text).casefold()), _LOOKALIKES)


def fold_number(text: str) -> str:
    """``fold_forms`` with the digits and signs of every script as ASCII writes them."""
    folded = fold_forms(text).replace("\\%", "%").replace("\\$", "$")
    if folded.isascii():
        return folded
    return _replace(folded, {character: _number_character(character) for character in set(folded)})


def bare(text: str, *, trailing: str = "") -> str:
    """``fold_forms`` of the text without blanks, paired decoration and ``trailing`` characters around it."""
    text = fold_forms(text)
    closed_at = _matching_brackets(text)
    start, end = 0, len(text)
    while start < end:
        mark = text[start]
        opening = start + (_command_length(text, start) if mark == "\\" else 0)
        if mark.isspace():
            start += 1
        elif text[end - 1].isspace():
            end -= 1
        elif closed_at.get(opening) == end - 1:
            start, end = opening + 1, end - 1
        elif text.startswith(("\\(", "\\["), start) and closed_at.get(start + 1) == end - 1 and text[end - 2] == "\\":
            start, end = start + 2, end - 2
        elif mark in _MARKS and (length := _marked_length(text, start, end)):
            start, end = start + length, end - length
        elif text[end - 1] in trailing:
            end -= 1
        else:
            break
    return text[start:end]


def _replace(text: str, replacements: Mapping[str, str]) -> str:
    """``str.translate`` for few characters, many times as fast on text that is not ASCII."""
    for old, new in replacements.items():
        if old != new:
            text = text.replace(old, new)
    return text


def _command_length(text: str, start: int) -> int:
    """Of the command before a brace that begins at ``start``, "\\boxed"; 0 without one."""
    return next((len(name) for name in _COMMANDS if text.startswith(name + "{", start)), 0)


def _matching_brackets(text: str) -> dict[int, int]:
    """Place of each opening bracket -> place of the one that closes it."""
    closed_at: dict[int, int] = {}
    opened: dict[str, list[int]] = {opening: [] for opening in _BRACKETS}
    for match in _ANY_BRACKET.finditer(text):
        character = match.group()
        if character in opened:
            opened[character].append(match.start())
        elif places := opened[_OPENED_BY[character]]:
            closed_at[places.pop()] = match.start()
    return closed_at


def _marked_length(text: str, start: int, end: int) -> int:
    """How many marks like ``text[start]`` stand on both sides of the text; 0 if others are inside ("*A* or *C*")."""
    mark, length = text[start], 0
    while start < end - 1 and text[start] == text[end - 1] == mark:
        start, end, length = start + 1, end - 1, length + 1
    return length if text.find(mark, start, end) < 0 else 0


@functools.lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """What ``fold_forms`` does with a character: mark, kept, ignored, or plain."""
    if character == "\u200b":
        return "plain"  # the blank that it stands for
    is_selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    if is_selector or character in _FILLERS or unicodedata.category(character) == "Cf":
        return "ignored"
    if unicodedata.decomposition(character).startswith(_KEPT_FORMS):
        return "kept"
    # Some characters are no marks but decompose into them, as half-width voicing marks do.
    return "mark" if unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) else "plain"


@functools.lru_cache(maxsize=1 << 16)
def _number_character(character: str) -> str:
    if character in _NUMBER_SIGNS:
        return _NUMBER_SIGNS[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    return "-" if category == "Pd" else character
