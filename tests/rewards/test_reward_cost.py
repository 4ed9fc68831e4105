"""No text that a model can write keeps the ranks waiting: every reader of responses takes linear time."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from megatron_ktr.report.console import token_texts
from megatron_ktr.rewards import official, overlap, standard
from megatron_ktr.rewards.truth import Truth
from megatron_ktr.rollout.sampling import StopStrings
from tests.support.patience import PATIENCE_SECONDS

LENGTH = 200_000


def adversarial_texts(length: int = LENGTH) -> dict[str, str]:
    """What a model that degenerates might write, and what backtracking expressions and tables of pairs dislike."""
    draw = random.Random(0)
    repeated = {
        "blanks": " ",
        "line breaks": "\n",
        "wide blanks": "\u2003",
        "opened answers": "<answer>",
        "closed answers": "</answer>",
        "answers": "<answer></answer>",
        "closed thoughts": "</think> ",
        "restarts": "</think><answer>",
        "half tags": "<answer",
        "digits": "1",
        "digits then a letter": "1x",
        "thousands": "1,",
        "groups": "111,",
        "signs": "-",
        "points": ".",
        "exponents": "1e",
        "currency": "$",
        "fractions": "1/",
        "LaTeX fractions": "\\frac{",
        "superscripts": "²",
        "boxes": "\\boxed{",
        "opened brackets": "(",
        "closed brackets": ")",
        "brackets": "([{",
        "emphasis": "*",
        "quotes": "“",
        "letters": "A, ",
        "labels": "A. ",
        "lead-ins": "the answer is ",
        "and": " and ",
        "one long word": "y",
        "vowels": "a",
        "words": "a b ",
        "unordered marks": "\u0315\u0300",
        "half-width voicing marks": "\uff9e\u0300",
        "Tibetan marks": "\u0f73",
        "invisible characters": "\u200b\u200d",
        "Chinese": "小球向",
        "Thai": "ลู",
        "emoji": "⚽\ufe0f",
        "lone bytes": "\ufffd",
        "null": "\0",
        "dotted capital I": "İ",
    }
    texts = {name: (piece * length)[:length] for name, piece in repeated.items()}
    texts["expanding forms"] = "\ufdfa" * (length // 18)  # each is 18 characters in compatible form
    texts["nested brackets"] = "(" * (length // 2) + ")" * (length // 2)
    texts["nested boxes"] = "\\boxed{" * (length // 8) + "}" * (length // 8)
    texts["different words"] = " ".join(f"w{draw.randrange(10**6)}" for _ in range(length // 8))
    texts["short words"] = " ".join(draw.choices("abcdefgh", k=length // 2))
    texts["characters"] = "".join(chr(draw.randrange(0x4E00, 0x4E40)) for _ in range(length))
    return texts


READ_EVERYTHING = """
from megatron_ktr.rewards import load_reward
from megatron_ktr.rewards.protocols import PROTOCOLS
from tests.rewards.test_reward_cost import adversarial_texts

TRUTHS = {"multiple choice": "B", "numerical": "1", "OCR": "小球 red", "free-form": "小球 a red", "regression": "1",
    "temporal grounding": "1 to 2", "spatial grounding": "[1, 1, 2, 2]"}
for name, text in adversarial_texts().items():
    print(name, flush=True)
    whole, read = f"<think>{text}</think><answer>{text}</answer>", []
    for protocol in PROTOCOLS:
        accuracy, soft, form = (
            load_reward(part, protocol=protocol) for part in ("accuracy", "soft_choice", "format")
        )
        choice = {"problem_type": "multiple choice", "solution": "B"}
        for response in (text, "<answer>" + text, whole):
            PROTOCOLS[protocol].find_answer(response)
            assert form(response, choice) in (0.0, 1.0)
        assert 0.0 <= soft(whole, choice | {"options": ["A. red", "B. blue"]}) <= 1.0
        for kind, truth in TRUTHS.items():
            if (judge := PROTOCOLS[protocol].judges[kind]) not in read:  # protocols share some
                read.append(judge)
                assert 0.0 <= accuracy(whole, {"problem_type": kind, "solution": truth}) <= 1.0
"""


@pytest.mark.slow
def test_every_reward_reads_every_adversarial_text_of_200_000_characters() -> None:
    """Expressions that backtrack needed hours for one of these texts; all of them together take about a minute now. The
    limit is far from both, so that a busy machine passes."""
    done = subprocess.run(
        [sys.executable, "-c", READ_EVERYTHING], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]


def test_word_error_rate_and_rouge_never_compare_more_words_than_their_bound(monkeypatch) -> None:
    """Both compare every word with every other, so the product of the lengths they are given is what they cost."""
    sizes = []
    for measure, name in ((overlap.LCSseq, "similarity"), (overlap.Levenshtein, "distance")):
        monkeypatch.setattr(measure, name, lambda first, second: sizes.append(max(len(first), len(second))) or 0)
    truth = Truth(adversarial_texts()["different words"] * 3)
    for text in ("short words", "different words"):
        for judges in (official, standard):
            judges.free_form(adversarial_texts()[text], truth)
            judges.ocr(adversarial_texts()[text], truth)
    assert len(sizes) == 8 and max(sizes) == overlap.MAX_WORDS


class CountingDecoder:
    """A tokenizer of four-byte characters, one token a byte, that counts the tokens it is given."""

    def __init__(self) -> None:
        self.num_decoded = 0

    def __call__(self, token_ids) -> str:
        self.num_decoded += len(token_ids)
        return bytes(token_ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("name", ["letters", "characters of four bytes", "lone bytes", "beginnings of characters"])
def test_pieces_of_a_response_are_decoded_a_bounded_number_of_times(name: str) -> None:
    pieces = {
        "letters": b"ab",
        "characters of four bytes": "⚽😀".encode(),
        "lone bytes": b"\x80",
    }
    token_ids = list((pieces.get(name, b"\xf0\x9f") * 2002)[:2002])
    decoder = CountingDecoder()
    texts = token_texts(token_ids, decode=decoder)
    assert len(texts) == 2002
    if name in ("letters", "characters of four bytes"):
        assert "".join(texts) == bytes(token_ids).decode()
    # A piece is decoded with the one before it, at most eight tokens each, for each of its tokens.
    assert decoder.num_decoded <= 2002 * 3 * 8

    decoder = CountingDecoder()
    strings = StopStrings(("never",), decode=decoder, num_rows=1)
    assert not any(strings.completed_by(0, token) for token in token_ids)
    assert decoder.num_decoded <= 2002 * 3 * 8
    assert any(strings.completed_by(0, token) for token in b"  never"), "what follows is read again"
