"""Gives texts that look the same one spelling, so that they compare as equal.

The functions unify Unicode forms, letter case and digits, and remove what merely decorates an answer:

    fold_forms    "Ｂ" -> "B", "ﬁ" -> "fi", "e" + acute -> "é"; "²", "½" and "₂" stay, for "10²" is not "102"
    fold_case     fold_forms, and "STRASSE" = "straße", "İ" = "I" = "ı" = "i"
    fold_number   fold_forms, digits of every script as 0..9, every dash as "-": "−５" -> "-5"
    bare          fold_forms without brackets, quotes, emphasis and LaTeX around the whole: "**\\boxed{B}**" -> "B"

All of them take time linear in the length of the text, whatever the text contains.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping

MAX_MARKS = 30
"""The most combining marks in a row that are normalised together. Putting n marks into canonical order takes n^2 steps,
and no script puts more than a few marks on one letter (Unicode's stream-safe text format has the same limit)."""
_KEPT_FORMS = ("<super>", "<sub>", "<fraction>")
_JOINER = "\u034f"
"""An invisible character (combining grapheme joiner); inserted into a long run of marks, it splits the run."""
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
    """Unicode normal form NFKC, except that superscripts, subscripts and fractions stay, as NFKC would change their
    value. Invisible characters are dropped, and a zero-width space becomes a blank."""
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
    """``fold_forms``, then lower case, with typographic quotes and dashes replaced by plain ones."""
    if text.isascii():
        return text.lower()
    # Folding case can leave letters and marks apart; a dotted capital I would otherwise keep its dot.
    return _replace(fold_forms(fold_forms(text).casefold()), _LOOKALIKES)


def fold_number(text: str) -> str:
    """``fold_forms``, with the digits and number signs of every script replaced by ASCII ones."""
    folded = fold_forms(text).replace("\\%", "%").replace("\\$", "$")
    if folded.isascii():
        return folded
    return _replace(folded, {character: _number_character(character) for character in set(folded)})


def bare(text: str, *, trailing: str = "") -> str:
    """``fold_forms`` of the text, stripped of surrounding blanks, paired decoration, and ``trailing`` characters at its
    end."""
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
    """Does what ``str.translate`` does. For few replacements it is many times as fast on text that is not ASCII."""
    for old, new in replacements.items():
        if old != new:
            text = text.replace(old, new)
    return text


def _command_length(text: str, start: int) -> int:
    """The length of the LaTeX command, such as "\\boxed", that begins at ``start`` and is followed by a brace; 0 if no
    such command begins there."""
    return next((len(name) for name in _COMMANDS if text.startswith(name + "{", start)), 0)


def _matching_brackets(text: str) -> dict[int, int]:
    """Maps the place of each opening bracket to the place of the one that closes it."""
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
    """How many marks like ``text[start]`` enclose the text on both sides; 0 if the same mark also occurs inside, as in
    "*A* or *C*"."""
    mark, length = text[start], 0
    while start < end - 1 and text[start] == text[end - 1] == mark:
        start, end, length = start + 1, end - 1, length + 1
    return length if text.find(mark, start, end) < 0 else 0


@functools.lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """The class of a character for ``fold_forms``: mark, kept, ignored, or plain."""
    if character == "\u200b":
        return "plain"  # the blank that it stands for
    is_selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    if is_selector or character in _FILLERS or unicodedata.category(character) == "Cf":
        return "ignored"
    if unicodedata.decomposition(character).startswith(_KEPT_FORMS):
        return "kept"
    # Some characters are not marks themselves but decompose into marks, such as half-width voicing marks.
    return "mark" if unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) else "plain"


@functools.lru_cache(maxsize=1 << 16)
def _number_character(character: str) -> str:
    if character in _NUMBER_SIGNS:
        return _NUMBER_SIGNS[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    return "-" if category == "Pd" else character
