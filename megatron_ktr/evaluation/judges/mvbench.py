"""MVBench's ``check_ans``, and lmms-eval's ``mcq_acc``.

``check_ans`` compares first words in lower case: the answer's, without full stops, must be a part of the truth's "(b)",
or the other way round. So ")" and "(" are right, and so is an empty answer. Newer copies refuse words without a letter
a to g; this is the notebook's.

``mcq_acc`` takes the letter of "B. text" in either case; else it deletes punctuation and takes the first single letter
A to E in either case, so that the article "a" is A. Empty answers are left out of its denominator.

Read in: OpenGVLab/Ask-Anything, ``video_chat2/mvbench.ipynb``; EvolvingLMMs-Lab/lmms-eval,
``lmms_eval/tasks/mvbench/utils.py``.
"""

from __future__ import annotations

import re

from megatron_ktr.evaluation.item import Item, Verdict
from megatron_ktr.evaluation.judges.reading import right_letter, without_reasoning

_OPTION = re.compile(r"([A-E])\.\s*(.+)$", re.IGNORECASE)
_PUNCTUATION = (*';/[]"{}()=+\\_->', "<", "@", "`", ",", "?", "!")
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = int(re.UNICODE)
"""The harness passes ``re.UNICODE`` where ``sub`` expects how many full stops to delete, which is 32."""
_SINGLE_LETTER = re.compile(r"\b([A-E])\b", re.IGNORECASE)


def is_same_first_word(answer: str, right: str) -> bool:
    """``check_ans`` for the truth "(``right``) ..."."""
    word, truth = answer.lower().split(" ")[0], f"({right.lower()})"
    return word.replace(".", "") in truth or truth in word


def lmms_eval_reading(answer: str) -> str:
    """What ``mcq_acc`` compares with the right letter: a letter, or else what is left of the text."""
    if match := _OPTION.match(answer.strip()):
        return match.group(1).upper()
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    has_comma, left = _NUMBER_WITH_COMMA.search(answer) is not None, answer
    for sign in _PUNCTUATION:
        is_at_blank = f"{sign} " in answer or f" {sign}" in answer
        left = left.replace(sign, "" if is_at_blank or has_comma else " ")
    left = _FULL_STOP.sub("", left, count=_MOST_FULL_STOPS)
    left = left.strip("'").strip('"').strip(")").strip("(").strip().lower()
    match = _SINGLE_LETTER.search(left)
    return match.group(1).upper() if match else left


def judge(item: Item, response: str) -> Verdict:
    """The notebook's rule on the first line of the answer without its reasoning, which is all that it generates."""
    answer = without_reasoning(response).split("\n")[0]
    right = right_letter(item)
    return Verdict(float(bool(right) and is_same_first_word(answer, right)), answer.split(" ")[0] or None)


def judge_lmms_eval(item: Item, response: str) -> Verdict:
    """lmms-eval's rule on the answer without its reasoning."""
    found, right = lmms_eval_reading(without_reasoning(response)), right_letter(item)
    return Verdict(float(bool(right) and found == right), found or None)
