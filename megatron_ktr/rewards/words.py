"""Splits texts into words, for ROUGE and for the word error rate.

A word is a run of letters, digits and combining marks of any script. In scripts that put no blanks between words
(Chinese, Japanese kana, Thai, Lao, Khmer, Burmese and others) each character with its marks is a word; Korean has
blanks. For English the words are those of the packages rouge-score and jiwer.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from bisect import bisect_right

from megatron_ktr.rewards.fold import fold_case

MAX_STEMMED_LETTERS = 64
"""Longer words are not stemmed: they are not English, and the stemmer would need time quadratic in their length."""
ASCII_WORDS = re.compile("[a-z0-9]+")
_SCRIPTS_WITHOUT_BLANKS = (
    (0x0E00, 0x0EFF, "Thai, Lao"),
    (0x0F00, 0x0FFF, "Tibetan"),
    (0x1000, 0x109F, "Burmese"),
    (0x1780, 0x17FF, "Khmer"),
    (0x1950, 0x19DF, "Tai Le, New Tai Lue"),
    (0x1A20, 0x1AAF, "Tai Tham"),
    (0x1B00, 0x1B7F, "Balinese"),
    (0x2E80, 0x2FDF, "Chinese radicals"),
    (0x3005, 0x3007, "Chinese iteration mark, closing mark, zero"),
    (0x3021, 0x3029, "Hangzhou numerals"),
    (0x3031, 0x312F, "Japanese kana, Bopomofo"),
    (0x31A0, 0x31FF, "Bopomofo, kana"),
    (0x3400, 0x4DBF, "Chinese"),
    (0x4E00, 0xA4CF, "Chinese, Yi"),
    (0xA980, 0xA9FF, "Javanese, Burmese"),
    (0xAA60, 0xAADF, "Burmese, Tai Viet"),
    (0xF900, 0xFAFF, "Chinese"),
    (0x16FE0, 0x18DFF, "Tangut, Khitan"),
    (0x1AFF0, 0x1B2FF, "kana, Nushu"),
    (0x20000, 0x3FFFF, "Chinese"),
)
_STARTS = [first for first, _, _ in _SCRIPTS_WITHOUT_BLANKS]


def rouge_words(text: str) -> list[str]:
    """The words, case folded. Blanks, signs and punctuation separate them."""
    folded = fold_case(text)
    return ASCII_WORDS.findall(folded) if folded.isascii() else _split(folded, keeps_punctuation=False)


def written_words(text: str) -> list[str]:
    """The words, case folded, with the punctuation that touches them. Only blanks separate them."""
    folded = fold_case(text).split()
    return [word for run in folded for word in ([run] if run.isascii() else _split(run, keeps_punctuation=True))]


def _split(text: str, *, keeps_punctuation: bool) -> list[str]:
    words: list[str] = []
    word: list[str] = []
    is_single = False
    kinds = {character: _kind(character) for character in set(text)}
    for character in text:
        kind = kinds[character]
        is_break = kind == "break" and not keeps_punctuation
        if word and (is_break or (kind != "mark" and (is_single or kind == "single"))):
            words.append("".join(word))
            word = []
        if is_break:
            continue
        if kind != "mark" or not word:
            is_single = kind == "single"
        word.append(character)
    return [*words, "".join(word)] if word else words


def stem(word: str) -> str:
    """The Porter stem of an English word of more than three letters, as in rouge-score; other words are unchanged."""
    return _stem(word) if word.isascii() and 3 < len(word) <= MAX_STEMMED_LETTERS else word


@functools.lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """The class of a character: word (part of a word), single (a word of its own), mark, or break."""
    category = unicodedata.category(character)[0]
    if category == "M":
        return "mark"
    if category not in "LN":
        return "break"
    index = bisect_right(_STARTS, ord(character)) - 1
    is_inside = index >= 0 and ord(character) <= _SCRIPTS_WITHOUT_BLANKS[index][1]
    return "single" if is_inside and unicodedata.category(character) != "Nd" else "word"


@functools.lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@functools.cache
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
