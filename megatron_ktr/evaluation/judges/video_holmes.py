"""Video-Holmes' own letter match, which depends on the order of the letters.

Only the last ``<answer>`` block is read, or without one the whole output. Two passes go over the letters A to F in this
order: the first takes the first letter X for which "X ", "X:" or "[X" is in the text, the second the first letter that
is in the text at all. Therefore

    B. A man        A, since "A " is found before B is looked for
    Answer: C       A, the first letter of "Answer"
    D. CIA          A, the last letter of "CIA"
    c               none: small letters are not seen

Read in: TencentARC/Video-Holmes, ``evaluate.py``.
"""

from __future__ import annotations

from megatron_ktr.evaluation.item import Item, Verdict
from megatron_ktr.evaluation.judges.reading import right_letter

_LETTERS = "ABCDEF"


def find_answer(response: str) -> str:
    """The content of the last ``<answer>`` block that is closed; the whole response if there is none."""
    found, place = None, 0
    while (start := response.find("<answer>", place)) >= 0:
        start += len("<answer>")
        end = response.find("</answer>", start)
        if end < 0:
            break
        found, place = response[start:end].strip(), end + len("</answer>")
    return response if found is None else found


def holmes_letter(answer: str) -> str | None:
    """The letter that the two passes find; None is the harness' "WRONG"."""
    for letter in _LETTERS:
        if f"{letter} " in answer or f"{letter}:" in answer or f"[{letter}" in answer:
            return letter
    return next((letter for letter in _LETTERS if letter in answer), None)


def judge(item: Item, response: str) -> Verdict:
    letter = holmes_letter(find_answer(response))
    return Verdict(float(letter is not None and letter == right_letter(item)), letter)
