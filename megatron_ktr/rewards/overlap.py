"""How much two lists of words agree: ROUGE and the word error rate, with the same results as rouge-score and jiwer.

Both measures compare every word of one text with every word of the other. ``MAX_WORDS`` bounds the time this takes:
words beyond the first 16,384 of a text count as errors without being looked at. Longer texts that are equal still
agree in full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq, Levenshtein

MAX_WORDS = 16_384


def rouge_mean(answer: Sequence[str], truth: Sequence[str]) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L."""
    scores = [_ngram_f_measure(answer, truth, size=size) for size in (1, 2)]
    scores.append(_lcs_f_measure(answer, truth))
    return sum(scores) / len(scores)


def word_error_rate(answer: Sequence[str], truth: Sequence[str]) -> float:
    """The number of insertions, deletions and substitutions that turn ``truth`` into ``answer``, divided by the number
    of words of ``truth``."""
    if answer == truth:
        return 0.0
    first, second = _as_numbers(answer, truth)
    errors = Levenshtein.distance(second[:MAX_WORDS], first[:MAX_WORDS])
    errors += max(len(first) - MAX_WORDS, len(second) - MAX_WORDS, 0)
    return errors / max(1, len(truth))


def _ngram_f_measure(answer: Sequence[str], truth: Sequence[str], *, size: int) -> float:
    found, expected = _ngrams(answer, size), _ngrams(truth, size)
    return _f_measure((found & expected).total(), found.total(), expected.total())


def _ngrams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[offset:] for offset in range(size)), strict=False))


def _lcs_f_measure(answer: Sequence[str], truth: Sequence[str]) -> float:
    """The F-measure of ROUGE-L, from the longest common subsequence."""
    if answer == truth:
        return _f_measure(len(truth), len(answer), len(truth))
    first, second = _as_numbers(answer, truth)
    return _f_measure(LCSseq.similarity(first[:MAX_WORDS], second[:MAX_WORDS]), len(answer), len(truth))


def _f_measure(num_common: int, num_found: int, num_expected: int) -> float:
    precision, recall = num_common / max(num_found, 1), num_common / max(num_expected, 1)
    return 2 * precision * recall / (precision + recall) if num_common else 0.0


def _as_numbers(*texts: Sequence[str]) -> list[list[int]]:
    """The texts with each word replaced by a number; equal words, and only those, have equal numbers. (Comparing hashes
    of words could take different words for equal.)"""
    numbers: dict[str, int] = {}
    return [[numbers.setdefault(word, len(numbers)) for word in words] for words in texts]
