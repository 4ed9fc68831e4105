"""Video-MME's ``extract_characters_regex``, and lmms-eval's copy of it: the first capital A to D anywhere.

Some phrases are deleted first. Two of them never occur, because commas are missing between the strings in the list.
lmms-eval's list lacks "Answer:", so that it reads "Answer: C" as A. Both read "Because B" as B, the capital of
"Because". An answer of more than 10 words without any capital A to D has no letter, and neither has a short one.

The benchmark leaves answers without a letter out of its denominator; lmms-eval counts them as wrong.

Read in: a copy of BradyFU/Video-MME's ``eval_your_results.py`` (the file itself was not found);
EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/tasks/videomme/utils.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ktr.evaluation.item import Item, Verdict
from megatron_ktr.evaluation.judges.reading import right_letter, without_reasoning

_SHARED = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)
OWN_PHRASES = (*_SHARED, "Answer:", "Option:", "The correct answer", "The correct option")
LMMS_EVAL_PHRASES = _SHARED


def first_capital(answer: str, *, phrases: Sequence[str] = OWN_PHRASES) -> str | None:
    """The first capital A to D behind what is left without the phrases; None if there is none."""
    for phrase in phrases:
        answer = answer.replace(phrase, "")
    return next((character for character in answer if character in "ABCD"), None)


def judge(item: Item, response: str) -> Verdict:
    """The benchmark's rule on the answer without its reasoning."""
    return _verdict(item, first_capital(without_reasoning(response)))


def judge_lmms_eval(item: Item, response: str) -> Verdict:
    """lmms-eval's rule on the answer without its reasoning."""
    return _verdict(item, first_capital(without_reasoning(response), phrases=LMMS_EVAL_PHRASES))


def _verdict(item: Item, letter: str | None) -> Verdict:
    return Verdict(float(letter is not None and letter == right_letter(item)), letter)
