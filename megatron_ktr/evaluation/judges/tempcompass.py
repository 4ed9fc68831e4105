"""TempCompass' own matching rules, without the language model that judges what they do not match.

    multi-choice      the whole right line ("B. down"); else a lone A to D; else what begins with "B." or "B)"
    yes_no            what begins with yes or no in any case, so that "nothing" is no
    caption_matching  a whole option line, its sentence, or its label with or without full stops

What matches none of them goes to a language model in the release; here, as with its ``--disable_llm``, it is wrong and
has no answer. Descriptions (captioning) can only be judged by a model.

Our prompts show all questions of the benchmark with lettered options ("A. yes", "B. no"), since the paper's wording
asks for a letter. A lone letter is therefore first read as the option that stands at it, for which the release has no
need; lmms-eval accepts lone letters likewise.

Read in: llyx97/TempCompass, ``eval_multi-choice.py``, ``eval_yes_no.py``, ``eval_caption_matching.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ktr.evaluation.item import Item, Verdict
from megatron_ktr.evaluation.judges.reading import option_texts, right_letter, without_reasoning

_END_TOKEN = "</s>"


def multi_choice(answer: str, right: str) -> bool | None:
    """Whether ``answer`` matches the right line ("B. down"); None if no rule applies."""
    if answer == right:
        return True
    if answer in ("A", "B", "C", "D"):
        return answer == right[:1]
    if answer[:1] in ("A", "B", "C", "D") and answer[1:2] in (".", ")"):
        return answer[0] == right[:1]
    return None


def yes_no(answer: str, right: str) -> bool | None:
    """Whether the answer begins with the right one of yes and no; None if it begins with neither."""
    found = next((word for word in ("yes", "no") if answer.lower().startswith(word)), None)
    return None if found is None else found == right


def caption_matching(answer: str, options: Sequence[str], right: str) -> bool | None:
    """Whether ``answer`` names the right one of ``options`` ("Caption A: a cat"); None if it names none.

    Later rules override earlier ones: line, then sentence, then label.
    """
    behind_bracket = answer.split(") ")[1] if ") " in answer else answer
    labels = [option.split(":")[0] for option in options]
    sentences = [_sentence(option) for option in options]
    found = answer if answer in options else None
    found = next((one for one in sentences if one in (answer, behind_bracket)), found)
    found = next((one for one in labels if one in (answer, answer.replace(".", ""))), found)
    return None if found is None else found in (right, right.split(":")[0], _sentence(right))


def _sentence(option: str) -> str:
    """ "a cat" of "Caption A: a cat"."""
    return (option.split(": ") + [""])[1]


def judge(item: Item, response: str) -> Verdict:
    """The rule of the item's task on the answer without its reasoning."""
    answer = without_reasoning(response).replace(_END_TOKEN, "")
    texts, right, task = option_texts(item), right_letter(item), item.categories.get("task", "")
    is_letter = answer.rstrip(".") in texts
    if task == "yes_no":
        is_right = yes_no(texts[answer.rstrip(".")] if is_letter else answer, texts.get(right, ""))
    elif task == "caption_matching":
        lines = [str(line) for line in item.record.get("published_options") or ()]
        by_letter = dict(zip(texts, lines, strict=False))
        is_right = caption_matching(
            by_letter.get(answer.rstrip("."), answer) if is_letter else answer, lines, by_letter.get(right, "")
        )
    else:
        is_right = multi_choice(answer, f"{right}. {texts.get(right, '')}")
    return Verdict(float(bool(is_right)), None if is_right is None else answer)
