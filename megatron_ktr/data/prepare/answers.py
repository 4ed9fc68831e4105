"""Options and right answers of published records, in the form that our rewards read (docs/rewards.md).

Options become "A. text", "B. text", ...; the right answer becomes ``<answer>B</answer>``, or ``<answer>A,C</answer>``
where several letters are right. A right answer that is not among the options is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from megatron_ktr.data.prepare.fields import is_finite, plain_text, short, written
from megatron_ktr.rewards.choices import label_of, named_labels, read_label, read_letters
from megatron_ktr.rewards.text import extract_answer

MULTIPLE_CHOICE = "multiple choice"
TEMPORAL_GROUNDING = "temporal grounding"
MOST_OPTIONS = 26
_OPTION_LINES = (re.compile(r"\s*\(?([A-Z])[.):]\s*(\S.*)$"), re.compile(r"\s*([A-Z])\s+(\S.*)$"))
"""A line of a question that is one of its options: "A. red", "A) red", "(A) red", "A: red"; or "A red"."""
_LABELLED = re.compile(
    r"\s*(?:option\s+)?[(\[（【]?([A-Za-zＡ-Ｚａ-ｚ])(?:[.):\]]\s+|[、．。：）】]\s*|\s+[-–—]\s+)(\S.*)$",  # noqa: RUF001
    re.DOTALL | re.IGNORECASE,
)
"""An option with its letter in any common form: "A. red", "a) red", "[A] red", "A - red", "Option A: red"."""


def option_texts(value: Any, *, name: str = "options") -> list[str]:
    """The texts of a list of options, or of a mapping from letters to options, without their letters."""
    if isinstance(value, dict):
        value = {key: option for key, option in value.items() if option is not None}  # tables fill in missing letters
        letters = [label_of(number) for number in range(len(value))]
        if sorted(value) != letters:
            raise ValueError(f"expected options {', '.join(letters[:3])}, ... in '{name}', got {short(list(value))}")
        value = [value[letter] for letter in letters]
    if not isinstance(value, list) or not 2 <= len(value) <= MOST_OPTIONS:
        raise ValueError(f"expected 2 to {MOST_OPTIONS} options in '{name}', got {short(value)}")
    texts = []
    for option in value:
        if isinstance(option, int | float) and not isinstance(option, bool) and is_finite(option):
            option = str(option)
        if not isinstance(option, str) or not option.strip():
            raise ValueError(f"expected options of '{name}' to be texts, got {short(option)}")
        texts.append(plain_text(option, name=name))
    return without_letters(texts)


def without_letters(options: Sequence[str]) -> list[str]:
    """The options without their letters, if all of them have theirs in order and something behind it.

    Raises:
        ValueError: they have letters in another order, or some are missing: a right letter could mean either.
    """
    for sign in (r"[.):]\s*", r"\s+"):
        found = [
            re.match(rf"\(?{label_of(number)}{sign}(\S.*)$", option, re.DOTALL) for number, option in enumerate(options)
        ]
        if all(found):
            return [match.group(1) for match in found if match]
    labels = [_LABELLED.match(option) for option in options]
    if not all(labels):
        return list(options)
    letters = [unicodedata.normalize("NFKC", match.group(1)).upper() for match in labels if match]
    in_order = [label_of(number) for number in range(len(options))]
    if letters == in_order:
        return [match.group(2) for match in labels if match]
    # Names such as "J. Smith" begin with letters, too, but rarely all with the first of the alphabet.
    if set(letters) <= {label_of(number) for number in range(len(options) + 2)}:
        raise ValueError(f"expected the options to have the letters {', '.join(in_order)}, got {', '.join(letters)}")
    return list(options)


def refuse_unread_options(question: str, answer: str) -> None:
    """Raises ``ValueError`` for a question without options that is answered with a letter, although lines of its text
    look like options: it would become free-form, with the letter as its text."""
    num_lines = sum(_LABELLED.match(line) is not None for line in question.split("\n"))
    if num_lines >= 2 and may_be_letter(answer):
        raise ValueError(f"the answer {short(answer)} is a letter, but the text has no options A, B, ... line by line")


def may_be_letter(answer: str) -> bool:
    """Whether an answer is a letter, or a letter and a text ("B. blue"), with or without tags."""
    inside = extract_answer(answer)
    said = read_label(answer if inside is None else inside)
    return re.fullmatch(r"[A-Za-z](?:[.):].*)?", said, re.DOTALL) is not None


def refuse_letter(answer: str, *, problem_type: str) -> None:
    """Raises ``ValueError`` for a letter as the answer to a question with options of a type that is asked without."""
    if may_be_letter(answer):
        raise ValueError(f"options and the answer {short(answer)} in a question of type {short(problem_type)}")


def is_choice(problem_type: str) -> bool:
    """Whether a published problem type is multiple choice, however it is spelled ("Multiple-Choice")."""
    return re.sub(r"[\s_-]+", " ", problem_type).strip().casefold() == MULTIPLE_CHOICE


def options_in_text(question: str) -> tuple[str, list[str], str]:
    """(question, options without letters, text behind them) of a question whose last lines are its options.

    The options are the last lines in a row that begin with A, B, C, ..., all in one of the two ways; without any, or
    without a question before them, the list is empty.

    >>> options_in_text("Which colour?\\nA. red\\nB. blue\\nAnswer with a letter.")
    ('Which colour?', ['red', 'blue'], 'Answer with a letter.')
    """
    lines = question.split("\n")
    for pattern in _OPTION_LINES:
        matches = [pattern.match(line) for line in lines]
        for first in range(len(lines) - 1, 0, -1):
            texts: list[str] = []
            for match in matches[first:]:
                if match is None or len(texts) == MOST_OPTIONS or match.group(1) != label_of(len(texts)):
                    break
                texts.append(match.group(2).strip())
            asked = "\n".join(lines[:first]).strip()
            if len(texts) >= 2 and asked:
                return asked, texts, "\n".join(lines[first + len(texts) :]).strip()
    return question.strip(), [], ""


def choice(texts: Sequence[str], answer: str, *, may_be_text: bool = False) -> dict[str, Any]:
    """The fields of a multiple-choice record. ``answer`` names options by letter or by text, with or without tags.

    Args:
        may_be_text: a single letter may be the text of an option as well. Without it, it is an option's letter.

    Raises:
        ValueError: the answer names no option, or is letters and the text of another option: "CD" among A to D.
    """
    inside = extract_answer(answer)
    said = (answer if inside is None else inside).strip()
    labelled = {label_of(number): option for number, option in enumerate(texts)}
    letters = read_letters(said.upper() if len(said) == 1 else said)
    if not letters <= labelled.keys():
        letters = frozenset()
    by_text = [label for label, option in labelled.items() if option.casefold() == said.casefold()]
    if letters and by_text and letters != set(by_text) and (may_be_text or len(letters) > 1):
        raise ValueError(
            f"the answer {short(said)} is the text of option {', '.join(by_text)}, but it also reads as the letter(s) "
            f"{', '.join(sorted(letters))}"
        )
    if not letters:
        exact = [label for label in by_text if labelled[label] == said]
        letters = frozenset(exact) if len(exact) == 1 else named_labels(said, labelled)
    if not letters or not letters <= labelled.keys():
        raise ValueError(f"the answer {short(said)} is not among the options A to {label_of(len(texts) - 1)}")
    return _choice(texts, sorted(letters))


def choice_by_text(texts: Sequence[str], answer: str) -> dict[str, Any]:
    """The same where the answer is the text of one option."""
    labels = [label_of(number) for number, option in enumerate(texts) if option.strip() == answer.strip()]
    if len(labels) != 1:
        what = "is not among the options" if not labels else "is several of the options"
        raise ValueError(f"the answer {short(answer)} {what}")
    return _choice(texts, labels)


def choice_by_number(texts: Sequence[str], answer: Any, *, name: str) -> dict[str, Any]:
    """The same where the answer is the number of an option, from 0; CSV files have it as text."""
    if isinstance(answer, str) and answer.strip().isascii() and answer.strip().isdecimal() and len(answer) < 10:
        answer = int(answer)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise ValueError(f"expected the number of an option, from 0, in '{name}', got {short(answer)}")
    if not 0 <= answer < len(texts):
        raise ValueError(f"the answer {short(answer)} in '{name}' is not among the options 0 to {len(texts) - 1}")
    return _choice(texts, [label_of(answer)])


def solution(answer: str) -> str:
    """A right answer in its tags."""
    inside = extract_answer(answer)
    said = (answer if inside is None else inside).strip()
    if not said:
        raise ValueError("the right answer is empty")
    if "<answer>" in said or "</answer>" in said:
        raise ValueError(f"the right answer has tags inside: {short(said)}")
    return f"<answer>{said}</answer>"


def grounding(start: float, end: float) -> dict[str, Any]:
    """The fields of a question that asks when something happens. ``answer_span`` repeats the answer for own rewards."""
    return {
        "problem_type": TEMPORAL_GROUNDING,
        "solution": f"<answer>from {written(start)} to {written(end)} seconds</answer>",
        "answer_span": [start, end],
    }


def when_question(sentence: str) -> str:
    """Our wording of a temporal grounding question about a sentence."""
    return f'When does this happen in the video: "{sentence}"? Give the start and the end in seconds.'


def _choice(texts: Sequence[str], letters: Sequence[str]) -> dict[str, Any]:
    return {
        "problem_type": MULTIPLE_CHOICE,
        "options": [f"{label_of(number)}. {option}" for number, option in enumerate(texts)],
        "solution": f"<answer>{','.join(letters)}</answer>",
    }
