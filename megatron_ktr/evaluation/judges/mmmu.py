"""MMMU's parsers as VideoMMMU uses them in lmms-eval, for multiple choice and for open questions.

Multiple choice: signs at both ends are stripped and blanks put there. The letters with "X." or "X:" anywhere are the
candidates, else those with "(X)", else those with "X ", else, in more than 5 words, the options whose text occurs. Of
several candidates the one whose last occurrence is last is taken. "X." matches inside of words: "U.S.A." names A.

Open: from the lower-case text, split into lines, the shortest text behind one of many phrases ("is ", "answer ", "=",
...) in each line, and all numbers in these, rounded to 2 decimals. The answer is right if one of its numbers is the
truth, or one of its texts contains it.

An empty answer is an "API Error" there, which is left out of the denominator. Questions of the type "perception" that
have options are judged as multiple choice here; the release would compare a list with a letter, so that none is right.

Read in: EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/videommmu/utils.py`` and
``lmms_eval/tasks/_task_utils/mmmu_mcq_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_ktr.evaluation.item import Item, Verdict
from megatron_ktr.evaluation.judges.reading import option_texts, right_letter, truth_of, without_reasoning

_STRIPPED = (",", ".", "!", "?", ";", ":", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_LEAD_INS = (
    *("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "are ", "in total ", "total "),
    *("identify ", "recognize ", "calculated as ", "counted as ", "measured as ", "observed as ", "concluded as "),
    *("found to be ", "equals ", "determined to be ", "number of ", "value is ", "adds up to ", "have ", "has "),
)
_NO_NUMBER = re.compile(r"\d{101,}")
"""Runs of digits that are no answer. The expressions above take time quadratic in the length of a run."""


def multi_choice_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that the parser finds among ``options`` (letter -> text); None is "No Answer Found."."""
    for sign in _STRIPPED:
        answer = answer.strip(sign)
    text = f" {answer} "
    # "X." and "X:" are looked for together, but where there is an "X." the places of all are those of "X.".
    with_stop = [letter for letter in options if f"{letter}." in text]
    with_colon = [letter for letter in options if f"{letter}:" in text]
    if with_stop or with_colon:
        return _last(with_stop + with_colon, text, "{}." if with_stop else "{}:")
    for looked_for, place in (("({})", "({})"), ("{} ", " {} ")):
        if found := [letter for letter in options if looked_for.format(letter) in text]:
            return _last(found, text, place)
    if len(text.split()) > 5:
        lower = text.lower()
        named = {letter: lower.rfind(option.lower()) for letter, option in options.items() if option.lower() in lower}
        return max(named, key=lambda letter: named[letter]) if named else None
    return None


def _last(letters: list[str], text: str, place: str) -> str:
    return max(letters, key=lambda letter: text.rfind(place.format(letter)))


def open_answers(answer: str) -> list[str | float]:
    """The texts and numbers that the parser reads as answers."""
    found: list[str] = []
    text = _NO_NUMBER.sub(" ", answer).strip().strip(".").lower()
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        lead_ins = (*_LEAD_INS, "=") if number == len(lines) else _LEAD_INS
        behind = [line.split(lead_in)[-1].strip() for lead_in in lead_ins if lead_in in line]
        shortest = _shortest(behind)
        if shortest and shortest not in _STRIPPED:
            found.append(shortest)
    found = found or [text]
    numbers = [number for part in found for pattern in _NUMBERS for number in pattern.findall(part)]
    return [form for part in found + numbers for form in _forms(part)]


def _shortest(texts: list[str]) -> str:
    """The shortest text, the first of equal ones; an empty one gives way to whatever follows it."""
    shortest = ""
    for text in texts:
        if not shortest or len(text) < len(shortest):
            shortest = text
    return shortest


def _forms(text: str) -> list[str | float]:
    """A number rounded to 2 decimals, or a text in lower case. A single letter gets a blank on either side, so that it
    is not found in every word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def is_open_right(answer: str, right: str) -> bool:
    """Whether one of the answers is the right one or, as texts, contains it."""
    expected = _forms(right)
    texts = [form for form in expected if isinstance(form, str)]
    for found in open_answers(answer):
        if any(form in found for form in texts) if isinstance(found, str) else found in expected:
            return True
    return False


def judge(item: Item, response: str) -> Verdict:
    """The parser of the question's type on the answer without its reasoning."""
    answer, options = without_reasoning(response), option_texts(item)
    if not answer:
        return Verdict(0.0, None)
    if options:
        letter = multi_choice_letter(answer, options)
        return Verdict(float(letter is not None and letter == right_letter(item)), letter)
    return Verdict(float(is_open_right(answer, truth_of(item).text)), answer)
