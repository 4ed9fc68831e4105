"""How many answers a question gets, and which of them counts."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from megatron_ktr.evaluation.asking.scaling import Ask, Voting, frames_of, known_rounds, outcome_of, sampling_of
from megatron_ktr.evaluation.engines.base import AnswerSampling
from megatron_ktr.evaluation.item import Answer, Condition, Item, Verdict

ITEM = Item("own", "1", {})
VOTES = Condition(16, scaling="votes:4")
DENSE = Condition(128, scaling="sparse_to_dense")
SAMPLING = AnswerSampling(max_tokens=7, temperature=0.1, top_p=0.001)


def judge(item: Item, text: str) -> Mapping[str, Verdict]:
    """Lenient reads every letter, strict capitals alone; "C" is right."""
    lenient = text.upper() if text.isalpha() else None
    strict = text if text.isupper() else None
    return {name: Verdict(float(read == "C"), read) for name, read in (("lenient", lenient), ("strict", strict))}


def asked(condition: Condition, rounds: list[str]):
    """(rounds that are known to be needed, outcome) where the answers are one character each; "!" is a problem."""

    def answer_to(ask: Ask) -> Answer | None:
        if ask.round >= len(rounds) or ask.vote >= len(rounds[ask.round]):
            return None
        text = rounds[ask.round][ask.vote]
        return Answer("", problem="no file") if text == "!" else Answer(text, num_tokens=1)

    known = known_rounds(ITEM, condition, answer_to=answer_to, judge=judge)
    outcome = outcome_of(ITEM, condition, answer_to=answer_to, judge=judge, has_format=str.isalpha)
    return len(known), outcome


@pytest.mark.parametrize(
    "answers, lenient, strict, text",
    [
        ("CCBB", "C", "C", "C"),  # a tie goes to what was seen first
        ("BCCB", "B", "B", "B"),
        ("bCCb", "B", "C", "b"),  # every protocol has its own vote
        ("?CB?", "C", "C", "C"),  # what is not read does not vote
        ("????", None, None, "?"),
        ("aBcC", "C", "B", "c"),
    ],
)
def test_the_majority_is_each_protocols_own(answers, lenient, strict, text):
    _, outcome = asked(VOTES, [answers])
    assert outcome is not None and outcome.text == text
    assert (outcome.verdicts["lenient"].answer, outcome.verdicts["strict"].answer) == (lenient, strict)
    assert len(outcome.answers) == 4


@pytest.mark.parametrize(
    "rounds, num_known",
    [
        ([], 1),
        (["CCCC"], 1),
        (["CCCCC"], 1),
        (["cCCCC"], 1),  # one letter, as the deciding protocol reads it
        (["CCCCB"], 2),
        (["?????"], 2),  # nothing that agrees
        (["CCCC!"], 1),
        (["CCCCB", "BBBBB"], 2),
        (["CCCCB", "BBBBC"], 3),
        (["CCCCB", "BBBBC", "BBBBC"], 3),
    ],
)
def test_a_further_round_is_asked_only_while_answers_do_not_agree(rounds, num_known):
    assert asked(DENSE, rounds)[0] == num_known


def test_the_last_round_votes_and_all_rounds_cost():
    _, outcome = asked(DENSE, ["CCCCB", "BBBCC"])
    assert outcome is None, "the third round is needed and missing"
    _, outcome = asked(DENSE, ["CCCCB", "BBBCC", "ABBAC"])
    assert outcome is not None and outcome.verdicts["lenient"].answer == "A" and len(outcome.answers) == 15
    _, outcome = asked(DENSE, ["CCCC!"])
    assert outcome is not None and outcome.problem == "no file" and outcome.verdicts["lenient"].score == 0


def test_sparse_to_dense_is_sampled_as_published():
    asks = [Ask(ITEM, DENSE, round=1, vote=vote) for vote in range(5)]
    found = [sampling_of(ask, SAMPLING, Voting()) for ask in asks]
    assert [(one.temperature, one.top_p) for one in found] == [
        (0.8, 0.7),
        (0.95, 0.75),
        (1.1, 0.8),
        (1.25, 0.85),
        (1.4, 0.9),
    ]
    assert {one.max_tokens for one in found} == {7} and {frames_of(ask) for ask in asks} == {64}
    vote = sampling_of(Ask(ITEM, VOTES, vote=1), SAMPLING, Voting(0.5, 0.9))
    assert (vote.temperature, vote.top_p) == (0.5, 0.9)
    assert sampling_of(Ask(ITEM, Condition(16)), SAMPLING, Voting()) == SAMPLING
