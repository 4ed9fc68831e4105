"""Rewards against hand-worked values and against the rouge and WER definitions."""

from __future__ import annotations

import math
import sys

import pytest

from megatron_ktr.config.reward_section import RewardSection
from megatron_ktr.errors import UserError
from megatron_ktr.rewards import Rewarder, RewardOptions, load_reward
from megatron_ktr.rewards.accuracy import accuracy
from megatron_ktr.rewards.text import extract_answer, has_reasoning_format, parse_number
from megatron_ktr.types import Prompt, Rollout, RolloutGroup

REWARDER = Rewarder(RewardOptions(RewardSection(reward_workers=0)))


def answer(text: str) -> str:
    return f"<think>because</think><answer>{text}</answer>"


@pytest.mark.parametrize(
    ("kind", "given", "truth", "expected"),
    [
        ("multiple choice", "B", "<answer>B</answer>", 1.0),
        ("multiple choice", " (B). ", "<answer>B</answer>", 1.0),
        ("multiple choice", "b", "<answer>B</answer>", 0.0),
        ("multiple choice", "B and C", "<answer>B</answer>", 0.0),
        ("numerical", "3", "<answer>3</answer>", 1.0),
        ("numerical", "3.0", "<answer>3</answer>", 0.0),  # only one of the two has a decimal part
        ("numerical", "3.141", "<answer>3.14</answer>", 1.0),
        ("numerical", "3.15", "<answer>3.14</answer>", 0.0),
        ("numerical", "1,200", "<answer>1200.0</answer>", 1.0),  # ',' counts as a decimal part too
        ("numerical", "three", "<answer>3</answer>", 0.0),
        ("OCR", "the red door", "<answer>The red door</answer>", 1.0),
        ("numerical", "3.", "<answer>3.0</answer>", 1.0),
        ("numerical", "1e5", "<answer>100000</answer>", 1.0),
        ("OCR", "red\ndoor", "<answer>red door</answer>", 1.0),  # a line break is a word border
        ("OCR", "the red", "<answer>the red door</answer>", 2 / 3),  # one deletion in three words
        ("OCR", "a b c d e f g", "<answer>x</answer>", 0.0),  # WER 7, clipped
        ("regression", "8", "<answer>10</answer>", 0.8),
        ("regression", "30", "<answer>10</answer>", 0.0),
        ("regression", "0", "<answer>0</answer>", 1.0),
        ("regression", "1", "<answer>0</answer>", 0.0),
        # unigrams 2/3 & 2/2 -> F .8; bigrams 1/2 & 1/1 -> F 2/3; LCS as unigrams -> .8
        ("free-form", "red door", "<answer>the red door</answer>", (0.8 + 2 / 3 + 0.8) / 3),
        ("free-form", "doors", "<answer>door</answer>", 2 / 3),  # stemming; no bigram exists, so ROUGE-2 is 0
    ],
)
def test_accuracy_of_each_problem_type_is_the_hand_worked_value(kind, given, truth, expected) -> None:
    # 1e-9: a few double-precision operations on hand-worked fractions.
    assert math.isclose(accuracy(answer(given), solution=truth, problem_type=kind), expected, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("given", "truth", "expected"),
    [
        ("A, C", "<answer>A, C</answer>", 1.0),
        ("CA", "<answer>A, C</answer>", 1.0),
        ("(A) and (C).", "<answer>AC</answer>", 1.0),
        ("C", "<answer>A, C</answer>", 1 / 2),
        ("A, A", "<answer>A, B, D</answer>", 1 / 3),  # a set
        ("A, B", "<answer>A, C</answer>", 0.0),  # one wrong letter costs everything
        ("A, B, C, D", "<answer>A, C</answer>", 0.0),
        ("", "<answer>A</answer>", 0.0),
        ("A man", "<answer>A</answer>", 0.0),  # a word is no choice
        ("a", "<answer>A</answer>", 0.0),
        ("B", "<answer>B</answer>", 1.0),
    ],
)
def test_soft_choice_pays_the_share_of_right_letters_and_nothing_for_a_wrong_one(given, truth, expected) -> None:
    function = load_reward("soft_choice")
    record = {"solution": truth, "problem_type": "multiple choice"}
    assert function(answer(given), record) == pytest.approx(expected, abs=1e-9)  # one division
    assert function(given, record) == 0.0, "outside an answer block it is no answer"


def test_soft_choice_is_the_accuracy_of_every_other_problem_type() -> None:
    for kind, given, truth in (("numerical", "3.141", "3.14"), ("regression", "8", "10"), ("OCR", "the red", "red")):
        record = {"solution": truth, "problem_type": kind}
        expected = accuracy(answer(given), solution=truth, problem_type=kind)
        assert load_reward("soft_choice")(answer(given), record) == expected
    with pytest.raises(UserError, match="problem_type 'multi choice' is unknown"):
        load_reward("soft_choice")(answer("A"), {"solution": "A", "problem_type": "multi choice"})


def test_first_answer_block_counts_and_missing_one_gives_zero() -> None:
    assert extract_answer("<answer> A </answer> then <answer>B</answer>") == "A"
    assert accuracy("the answer is B", solution="<answer>B</answer>", problem_type="multiple choice") == 0.0
    assert accuracy(answer("B"), solution="B", problem_type="multiple choice") == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>\n<answer>C</answer>", True),
        ("<think>a</think><answer>C</answer> and more", False),
        ("so <think>a</think><answer>C</answer>", False),
        ("<answer>C</answer>", False),
        ("<think>a</think>", False),
        ("<think>a</think><answer>B</answer><answer>C</answer>", False),
        ("<think>a</think> b </think><answer>C</answer>", False),
    ],
)
def test_format_is_the_whole_response(text: str, expected: bool) -> None:
    assert has_reasoning_format(text) is expected


def test_numbers_are_whole_texts() -> None:
    assert parse_number("$1,234.50") == 1234.5
    assert parse_number("-3%") == -3.0
    assert parse_number("3 apples") is None
    assert parse_number(None) is None


def shouting(response: str, record: dict) -> float:
    return float(response.isupper())


def test_own_reward_function_is_loaded_by_module_and_name() -> None:
    prompt = Prompt("1", (1, 2), record={"solution": "<answer>A</answer>", "problem_type": "multiple choice"})
    group = RolloutGroup(prompt, (Rollout((3,), text=answer("A")), Rollout((3,), text="ABC")))
    names = ["accuracy", "format", f"{__name__}:shouting"]
    first, second = REWARDER.reward([group], names=names)[0].rollouts
    assert first.rewards == {"accuracy": 1.0, "format": 1.0, "shouting": 0.0} and first.reward == 2.0
    assert second.rewards == {"accuracy": 0.0, "format": 0.0, "shouting": 1.0}


def broken(response: str, record: dict) -> float:
    return float("nan")


def test_two_parts_of_one_name_and_a_reward_that_is_no_number_are_refused() -> None:
    group = RolloutGroup(Prompt("7", (1,)), (Rollout((3,), text="x"),))
    with pytest.raises(UserError, match="two parts are called 'shouting'"):
        REWARDER.reward([group], names=[f"{__name__}:shouting", f"{__name__}:shouting"])
    with pytest.raises(UserError, match="'broken' gave nan for a response to problem 7"):
        REWARDER.reward([group], names=[f"{__name__}:broken"])


def leaving(response: str, record: dict) -> float:
    sys.exit(0)


def endless(response: str, record: dict) -> int:
    return 10**400


def test_a_reward_that_leaves_or_overflows_is_the_users_error_and_ours_is_not() -> None:
    group = RolloutGroup(Prompt("7", (1,)), (Rollout((3,), text="x"),))
    with pytest.raises(UserError, match="'leaving' failed for a response to problem 7: SystemExit: 0"):
        REWARDER.reward([group], names=[f"{__name__}:leaving"])
    with pytest.raises(UserError, match="'endless' gave 1000.* expected a finite number"):
        REWARDER.reward([group], names=[f"{__name__}:endless"])
    with pytest.raises(KeyError, match="solution"):  # a record that the checks before a run would have refused
        REWARDER.reward([group], names=["accuracy"])


def test_unknown_names_are_user_errors() -> None:
    with pytest.raises(UserError, match="accuracy"):
        load_reward("acuracy")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_reward("no_such_module:f")
    with pytest.raises(UserError, match="multiple choice"):
        accuracy(answer("A"), solution="A", problem_type="multi choice")
