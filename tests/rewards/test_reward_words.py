"""Texts as words: the numbers of rouge-score and jiwer for English, and texts of the world equal to themselves."""

from __future__ import annotations

import random
import unicodedata

import jiwer
import pytest
from rouge_score import rouge_scorer

from megatron_ktr.rewards import official, overlap, standard
from megatron_ktr.rewards.fold import bare, fold_case, fold_forms, fold_number
from megatron_ktr.rewards.truth import Truth
from megatron_ktr.rewards.words import rouge_words, written_words

ENGLISH = (
    "The red ball, which rolled quickly, hit the three walls' corners; it's moving-left at 3.5 m/s (maybe) and DOORS "
    'running Runner relational generously yyy syzygy a_b x^2 100% don\'t e.g. I "said" happily ponies caresses'
).split()
TYPOGRAPHIC = ["don’t", "“said”", "left–right", "…", "—", "3.5°"]
"""English with signs that ASCII lacks: words of rouge-score all the same."""


def draws(words: list[str], *, count: int, shortest: int) -> list[tuple[str, str]]:
    """(answer, truth): the truth's words, some of them dropped, doubled or exchanged."""
    draw = random.Random(0)
    pairs = []
    for _ in range(count):
        truth = draw.choices(words, k=max(shortest, draw.choice([shortest, 2, 5, 12, 40])))
        edits = [draw.choices([[word], [], [word, word], [draw.choice(words)]], [6, 1, 1, 2])[0] for word in truth]
        answer = [word for edit in edits for word in edit] or truth
        pairs.append((" ".join(answer if len(answer) >= shortest else truth), " ".join(truth)))
    return pairs


def library_rouge(truth: str, answer: str) -> float:
    scores = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(truth, answer)
    return sum(score.fmeasure for score in scores.values()) / 3


def test_english_has_exactly_the_numbers_of_rouge_score() -> None:
    values = set()
    for answer, truth in draws(ENGLISH + TYPOGRAPHIC, count=400, shortest=2):
        expected = library_rouge(truth, answer)
        assert official.free_form(answer, Truth(truth)) == expected, (answer, truth)
        words = rouge_words(truth)
        is_one_word = len(words) == 1 and rouge_words(answer) == words  # 2/3 for ROUGE, which finds no bigram
        assert standard.free_form(answer, Truth(truth)) == (1.0 if is_one_word else expected), (answer, truth)
        values.add(expected)
    assert len(values) > 100


def test_english_has_exactly_the_numbers_of_jiwer() -> None:
    values = set()
    for answer, truth in draws(ENGLISH, count=400, shortest=1):
        for judge, fold in ((standard.ocr, str.lower), (official.ocr, str)):
            expected = min(1.0, max(0.0, 1.0 - jiwer.wer(fold(truth), fold(answer))))
            assert judge(answer, Truth(truth)) == expected, (answer, truth)
            values.add(expected)
    assert len(values) > 20


def test_official_rouge_is_rouge_score_for_every_text() -> None:
    for answer, truth in draws([*ENGLISH, *TEXTS.values()], count=200, shortest=1):
        assert official.free_form(answer, Truth(truth)) == library_rouge(truth, answer), (answer, truth)


TEXTS = {
    "English": "Move to the left.",
    "one word": "left",
    "digits": "42",
    "Chinese": "小球向左移动",
    "rare Chinese": "\U00020000\U00030000",
    "Japanese": "ボールは左に動く",
    "half-width kana": "ﾎﾞｰﾙ",
    "Korean": "공이 왼쪽으로 움직인다",
    "Thai": "ลูกบอลเคลื่อนที่ไปทางซ้าย",
    "Lao": "ລູກບານເຄື່ອນທີ່ໄປທາງຊ້າຍ",
    "Khmer": "បាល់រំកិលទៅខាងឆ្វេង",
    "Burmese": "ဘောလုံးသည်ဘယ်ဘက်သို့ရွေ့သည်",
    "Tibetan": "པོ་ལོ་གཡོན་ལ་འགུལ",
    "Russian": "Мяч катится влево",
    "Greek": "Η μπάλα κινείται αριστερά",
    "Arabic": "الكرة تتحرك إلى اليسار",
    "Arabic with vowels": "الكُرَةُ",
    "Persian": "توپ می‌رود",
    "Hebrew": "הכדור נע שמאלה",
    "Hindi": "गेंद बाईं ओर जाती है",
    "Tamil": "பந்து இடதுபுறம் நகர்கிறது",
    "Georgian": "ბურთი მოძრაობს",
    "Armenian": "Գնդակը շարժվում է",
    "Amharic": "ኳሱ ወደ ግራ",
    "Turkish": "İSTANBUL ışık",
    "German": "Straße ẞ",
    "Vietnamese": "quả bóng lăn sang trái",
    "emoji": "⚽➡️🏠",
    "mathematics": "x² + ½ ≤ 10₂",
    "punctuation": "?!",
    "mixed": "iPhone手机 costs ５００元",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_equals_itself_in_every_form_and_no_other_text(name: str) -> None:
    text = TEXTS[name]
    spellings = [
        text,
        f"  {text}\n",
        text.upper(),
        unicodedata.normalize("NFD", text),
        unicodedata.normalize("NFC", text),
    ]
    spellings += [
        text.replace(" ", "\u00a0"),
        "\ufeff" + text,
        text.translate({0x21 + n: 0xFF01 + n for n in range(94)}),
    ]
    other = TEXTS["Greek" if name != "Greek" else "Chinese"]
    for judge in (standard.free_form, standard.ocr):
        for spelling in spellings:
            assert judge(spelling, Truth(text)) == judge(text, Truth(spelling)) == 1.0, (judge, spelling)
        assert judge(other, Truth(text)) == 0.0
        assert judge("", Truth(text)) == judge(text, Truth("")) == 0.0


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if len(rouge_words(text)) > 3])
def test_a_text_with_a_part_missing_is_partly_right(name: str) -> None:
    words = written_words(TEXTS[name])
    part = ("" if " " not in TEXTS[name] else " ").join(words[:-1])
    assert 0.3 < standard.free_form(part, Truth(TEXTS[name])) < 1
    assert standard.ocr(part, Truth(TEXTS[name])) == pytest.approx(1 - 1 / len(words))


def test_words_are_parted_as_their_script_parts_them() -> None:
    assert rouge_words("Мяч, катится-влево!") == ["мяч", "катится", "влево"]
    assert rouge_words("小球 moves 2cm。向左") == ["小", "球", "moves", "2cm", "向", "左"]
    assert rouge_words("공이 왼쪽으로") == ["공이", "왼쪽으로"]
    assert rouge_words("เรือ") == ["เ", "รื", "อ"], "marks stay on their letter"
    assert rouge_words("ボール") == ["ボ", "ー", "ル"]
    assert rouge_words("a_b") == ["a", "b"], "as rouge-score"
    assert written_words("Red door, 你好。") == ["red", "door,", "你", "好", "。"]


def test_folding_keeps_what_changes_a_value() -> None:
    assert fold_forms("ﬁ Ａ ① ｶﾞ e\u0301 ㎝") == "fi A 1 ガ é cm"
    assert fold_forms("10² x₂ ½") == "10² x₂ ½"
    assert fold_forms("a\u00adb\u200bc\u200dd\ufe0f") == "ab cd"
    assert fold_case("STRASSE ΟΔΟΣ İ") == fold_case("straße οδος i")
    assert fold_number("−١٢٫٥") == "-12.5" and fold_number("２０％") == "20%"
    assert bare(" **\\boxed{\\text{B}}** ") == "B" and bare("(a) and (b)") == "(a) and (b)"
    assert bare("((x))") == "x" and bare("\\( 5 \\)") == "5" and bare("$5") == "$5" and bare("*a* *b*") == "*a* *b*"


def test_words_beyond_the_bound_count_as_errors_and_equal_texts_as_equal() -> None:
    size = overlap.MAX_WORDS
    words = [f"w{number}" for number in range(size + 1000)]
    assert overlap.word_error_rate(words, words) == 0.0 and overlap.rouge_mean(words, words) == 1.0
    assert overlap.word_error_rate(["x", *words[1:]], words) == pytest.approx(1001 / len(words))
    assert overlap.word_error_rate(words[:size], words) == pytest.approx(1000 / len(words))
    changed = ["x", *words[1:]]
    bigrams, unigrams, lcs = 1 - 1 / (len(words) - 1), 1 - 1 / len(words), (size - 1) / len(words)
    assert overlap.rouge_mean(changed, words) == pytest.approx((unigrams + bigrams + lcs) / 3)
