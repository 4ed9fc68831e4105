"""What several judges share: the text that a harness sees of a reasoning model's response, and an item's answer."""

from __future__ import annotations

from megatron_ktr.evaluation.item import Item
from megatron_ktr.rewards.choices import labelled_options, named_labels
from megatron_ktr.rewards.text import extract_answer
from megatron_ktr.rewards.truth import Truth


def without_reasoning(response: str) -> str:
    """The content of the first ``<answer>`` block, else of the first ``\\boxed{}``, else the whole response.

    lmms-eval's classes of Qwen2.5-VL do this before any rule of a benchmark sees a response
    (EvolvingLMMs-Lab/lmms-eval, ``lmms_eval/models/model_utils/reasoning_model_utils.py``). The rules of benchmarks
    were written for models that answer at once; applied to a whole response with reasoning they would match its first
    words.
    """
    inside = extract_answer(response)
    if inside is not None:
        return inside
    start = response.find("\\boxed{")
    end = response.find("}", start) if start >= 0 else -1
    return response[start + len("\\boxed{") : end].strip() if end >= 0 else response


def truth_of(item: Item) -> Truth:
    """The right answer of an item."""
    return Truth.of(item.record["solution"], options=item.record["options"])


def option_texts(item: Item) -> dict[str, str]:
    """The options of a multiple-choice item by letter, without their letters; empty if it has none."""
    return labelled_options(item.record["options"])


def right_letter(item: Item) -> str:
    """The letter of the right option; "" if the item has not exactly one."""
    labels = named_labels(truth_of(item).text, option_texts(item))
    return next(iter(labels)) if len(labels) == 1 else ""
