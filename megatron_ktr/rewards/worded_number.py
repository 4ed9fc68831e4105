"""Reads the number that a loosely worded answer states: "5 cm", "about 5", "x = 5", "1/2", "2½", "3 × 10⁸", LaTeX."""

from __future__ import annotations

import math
import unicodedata

from megatron_ktr.rewards.fold import bare, fold_case, fold_number
from megatron_ktr.rewards.text import parse_number, scan_number, without_unit_signs

_SEPARATORS = ",' "
_LEAD_INS = ("approximately", "approx.", "approx", "about", "around", "roughly", "nearly", "≈", "~", "=", "±")
_LATEX = (
    *(("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\frac{", " "), ("}{", "/"), ("{", ""), ("}", "")),
    *(("\\times", "*"), ("\\cdot", "*"), ("\\text", ""), ("\\mathrm", ""), ("\\,", "")),
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_MAX_LENGTH = 1_000
"""In characters. Longer texts are not searched: they say more than one number with its unit."""


def read_number(text: str) -> float | None:
    """The number in a text that consists of one number and possibly its unit; None if the text has no number or
    several."""
    value = parse_number(text)
    if value is not None or len(text) > _MAX_LENGTH:
        return value
    text = _as_arithmetic(text)
    value, place = _scan_value(text)
    unit = text[place:].strip()
    # In "5 m²" the ² belongs to the unit. In "5²" it belongs to the number, which is therefore not 5.
    is_unit = not unit or (unit[0] not in "²³^" and not any(map(_is_digit, unit.replace("²", "").replace("³", ""))))
    return value if is_unit else None


def _as_arithmetic(text: str) -> str:
    """The text without decoration, lead-in and LaTeX; fractions are written "a/b" and products "a*b"."""
    text = bare(text, trailing=".,;:!")
    text = bare(fold_number("".join(map(_as_fraction, text))))
    for command, sign in _LATEX:
        text = text.replace(command, sign)
    lead_in = next((word for word in _LEAD_INS if fold_case(text[:20]).startswith(word)), "")
    text = text[len(lead_in) :].strip()
    name, equals, value = text.partition("=")  # "x = 5"
    return without_unit_signs(value if equals and name.strip().isalpha() else text)


def _as_fraction(character: str) -> str:
    is_fraction = unicodedata.decomposition(character).startswith("<fraction>")
    return " " + unicodedata.normalize("NFKC", character) if is_fraction else character


def _scan_value(text: str) -> tuple[float | None, int]:
    """(value, place behind it) of the number at the beginning of the text: ``a``, ``a/b``, ``a b/c`` or ``a*10^b``."""
    value, place = scan_number(text, separators=_SEPARATORS)
    if value is None:
        return None, 0
    sign = _skip_blanks(text, place)
    if text.startswith("/", sign):
        below, end = scan_number(text, _skip_blanks(text, sign + 1))
        return (value, place) if below is None else (_quotient(value, below), end)  # "12 /h" is 12
    above, end = scan_number(text, sign)
    if sign > place and above is not None and text.startswith("/", end):
        below, end = scan_number(text, end + 1)
        part = None if below is None else _quotient(above, below)
        return None if part is None else value + math.copysign(part, -1.0 if text.startswith("-") else 1.0), end
    return _scan_power_of_ten(text, value, place, sign)


def _scan_power_of_ten(text: str, value: float, place: int, sign: int) -> tuple[float | None, int]:
    ten = _skip_blanks(text, sign + 1)
    if not text.startswith(("*", "x"), sign) or not text.startswith("10", ten):
        return value, place
    start = ten + len("10") + text.startswith("^", ten + len("10"))
    exponent, end = scan_number(text.translate(_SUPERSCRIPTS), start)
    if exponent is None or abs(exponent) > 400 or exponent != int(exponent):
        return None, 0
    digits, _, given = repr(value).partition("e")
    result = float(f"{digits}e{int(given or 0) + int(exponent)}")  # rounded only once, like the literal "3e8"
    return (result if math.isfinite(result) else None), end


def _quotient(above: float, below: float) -> float | None:
    value = above / below if below else math.inf
    return value if math.isfinite(value) else None


def _skip_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _is_digit(character: str) -> bool:
    return unicodedata.category(character)[0] == "N"
