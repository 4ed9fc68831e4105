"""Options of a multiple-choice question: their labels, and which of them an answer names.

options ["A. red", "B. blue"]     labels A, B
options ["red", "blue", ...]      labels A .. Z, then AA, AB, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_ktr.rewards.fold import bare, fold_case
from megatron_ktr.rewards.words import rouge_words

_TRAILING = ".。,:;!)]"
_BEFORE_LABEL = "([{<*_`\"'「【"
_BEHIND_LABEL = ".:)]}>、」】"
_LIST_SIGNS = str.maketrans(dict.fromkeys(",;/&()[]{}<>.、。*_`$\"'+", " "))
_LATEX = ("\\boxed", "\\text", "\\textbf", "\\mathbf", "\\mathrm")
_OPENERS = ("so", "therefore", "thus", "hence", "所以", "因此")
_LEAD_INS = tuple(
    f"{article}{adjective}{noun}{verb}"
    for article in ("the ", "")
    for adjective in ("", "correct ", "right ", "best ", "final ")
    for noun in ("answer", "option", "choice")
    for verb in (" is option", " is", "")
)
_CHINESE_LEAD_INS = tuple(
    f"{adjective}答案{verb}"
    for adjective in ("正确的", "正确", "最终", "")
    for verb in ("应该是", "应为", "是", "为", "")
)


def label_of(number: int) -> str:
    """The label of option ``number``, counted from 0: A .. Z, AA, AB, ... as spreadsheets name columns."""
    label = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        label = chr(ord("A") + rest) + label
    return label


def read_label(answer: str) -> str:
    """The answer without the decoration that may surround a letter: brackets, emphasis, LaTeX, a final full stop."""
    return bare(answer, trailing=_TRAILING).strip("(). ")


def read_letters(answer: str) -> frozenset[str]:
    """The capital letters that an answer lists ("B", "A, C", "AC", "(A) and (C)"). The set is empty if the answer says
    anything besides letters."""
    words = bare(answer).replace("\\text{and}", " ").translate(_LIST_SIGNS).split()
    for command in _LATEX:
        words = [word for word in words if word != command]
    if len(words) > 1:
        words = [word for word in words if word.lower() != "and"]
    is_list = all(word.isascii() and word.isalpha() and word.isupper() for word in words)
    return frozenset("".join(words)) if is_list else frozenset()


def labelled_options(options: Sequence[str]) -> dict[str, str]:
    """The options as a mapping from label to text.

    If the options carry their labels in order (A, B, ... or 1, 2, ...), these are used and removed from the texts.
    Otherwise the options are labelled A, B, ... here.
    """
    for labels in ([label_of(number) for number in range(len(options))], [str(n + 1) for n in range(len(options))]):
        split = [_without_label(option, label) for option, label in zip(options, labels, strict=True)]
        if options and all(text is not None for text in split):
            return {label: str(text) for label, text in zip(labels, split, strict=True)}
        if len(options) > 1 and all(map(str.startswith, options, (f"{label} " for label in labels))):  # "A red"
            return {label: option[len(label) :].strip() for label, option in zip(labels, options, strict=True)}
    return {label_of(number): option for number, option in enumerate(options)}


def named_labels(answer: str, options: Mapping[str, str]) -> frozenset[str]:
    """The labels of all options that an answer names: the one of ``named_label``, or several letters ("A, C"). The set
    is empty if it names none."""
    label = named_label(answer, options)
    if label is not None:
        return frozenset({label})
    letters = read_letters(answer)
    return letters if not options or letters <= options.keys() else frozenset()


def named_label(answer: str, options: Mapping[str, str]) -> str | None:
    """The label of the one option that a loosely worded answer names.

    The answer may name it by its label ("b", "B. the text", "the answer is (B)") or by its text. The result is None if
    the answer names no option, or combines a label with the text of another option. ``options`` come from
    ``labelled_options``; if there are none, any single letter counts as a label.
    """
    if len(answer) > _longest(options):
        return None
    answer = _without_lead_in(bare(answer, trailing=_TRAILING))
    label = _known_label(read_label(answer), options)
    if label is not None:
        return label
    words = rouge_words(answer)
    restated = [
        label
        for label, text in options.items()
        if (option := rouge_words(text)) and words in (option, [label.lower(), *option])
    ]
    if restated or len(read_letters(answer)) > 1:
        return restated[0] if len(restated) == 1 else None
    start = answer.lstrip(_BEFORE_LABEL)
    for place in range(1, min(len(start), 5)):
        label = _known_label(start[:place], options)
        text = _without_label(start, start[:place]) if label is not None else None
        if text is not None:
            words = rouge_words(text)
            is_another = any(words == rouge_words(other) for other in options.values())
            is_list = words[:1] in (["or"], ["and"]) and len(words) > 1 and _known_label(words[1], options) is not None
            return None if is_another or is_list else label
    return None


def _longest(options: Mapping[str, str]) -> int:
    """The number of characters beyond which an answer cannot just restate an option. It leaves room for marks, emphasis
    and a lead-in."""
    return 1000 + 10 * max(map(len, options.values()), default=0)


def _known_label(text: str, options: Mapping[str, str]) -> str | None:
    if not options:
        return text.upper() if len(text) == 1 and text.isascii() and text.isalpha() else None
    if text in options:
        return text
    near = [label for label in options if label.lower() == text.lower()]
    return near[0] if len(near) == 1 else None


def _without_label(option: str, label: str) -> str | None:
    """The text of an option behind its label and the sign that follows it: "red" for "(B) red", "B. red", "**B** red"
    or "B - red". None if the option does not begin with ``label`` and such a sign."""
    text = bare(option).lstrip(_BEFORE_LABEL)
    if not text.startswith(label):
        return None
    rest = text[len(label) :]
    behind = rest.lstrip("*_`\"'")
    is_emphasised = len(behind) < len(rest)
    if behind[:1] and behind[0] in _BEHIND_LABEL:
        return behind.lstrip(_BEHIND_LABEL + "*_`\"' ")
    if behind.lstrip()[:2] in ("- ", "– ", "— "):
        return behind.lstrip()[2:].strip()
    return behind.strip() if is_emphasised or not behind else None


def _without_lead_in(text: str) -> str:
    """The text without a lead-in at its beginning ("the answer is", "So the answer is", "答案是")."""
    folded = fold_case(text)
    if len(folded) != len(text):
        return text
    start = 0
    for opener in _OPENERS:
        # Chinese puts no blank between words.
        if folded.startswith(opener) and (not opener.isascii() or not text[len(opener) :][:1].isalnum()):
            start = len(text) - len(text[len(opener) :].lstrip(" ,、:"))
    for lead_in in (*_LEAD_INS, *_CHINESE_LEAD_INS):
        end = start + len(lead_in)
        if folded.startswith(lead_in, start) and (not lead_in.isascii() or not text[end : end + 1].isalnum()):
            return bare(text[end:].lstrip(" :"), trailing=_TRAILING)
    return text
