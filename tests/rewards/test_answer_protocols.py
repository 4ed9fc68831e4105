"""What every protocol says about every answer of docs/rewards.md, about published answers, and about hard cases."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction

import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.config.checks import check
from megatron_ktr.errors import UserError
from megatron_ktr.rewards import Rewarder, RewardOptions, load_reward
from megatron_ktr.rewards.accuracy import accuracy
from megatron_ktr.rewards.choices import label_of, labelled_options, named_labels
from megatron_ktr.rewards.protocols import PROTOCOLS
from megatron_ktr.types import Prompt, Rollout, RolloutGroup
from tests.support.paths import REPOSITORY
from tests.support.videos import SHARED_VIDEOS_VARIABLE, shared_data

PAGE = REPOSITORY / "docs" / "rewards.md"
OPTIONS = ("A. red", "B. blue", "C. red and blue")


def verdict(answer: str, solution, kind: str, protocol: str, *, options=OPTIONS) -> float:
    response = f"<think>x</think><answer>{answer}</answer>"
    return accuracy(response, solution=solution, problem_type=kind, options=options, protocol=PROTOCOLS[protocol])


def rows(first_heading: str) -> Iterator[list[str]]:
    """Cells of the page's table whose first heading is this."""
    table = PAGE.read_text(encoding="utf-8").split(f"\n| {first_heading} |")[-1].split("\n\n")[0].split("\n")[2:]
    return ([cell.strip() for cell in line.strip("|").split(" | ")] for line in table)


def text_of(cell: str) -> str:
    return "" if cell == "(empty)" else cell.strip("`")


VERDICTS = [row for row in rows("problem type") if len(row) == 6]
OTHERS = list(rows("type"))
RESPONSES = list(rows("response"))


def test_the_page_has_its_tables() -> None:
    assert len(VERDICTS) > 90 and {row[0] for row in VERDICTS + OTHERS} == set(PROTOCOLS["standard"].judges)
    assert len(RESPONSES) == 12


@pytest.mark.parametrize("row", VERDICTS, ids=lambda row: " ".join(row[:3]))
def test_every_verdict_of_the_page_is_what_the_protocols_give(row: list[str]) -> None:
    kind, solution, given = row[0], row[1], text_of(row[2])
    truth = f"<answer>{text_of(solution)}</answer>" if solution[0] in "`(" else json.loads(solution)
    for protocol, expected in {"official": row[3], "standard": row[4], "strict": row[4], "lenient": row[5]}.items():
        found = verdict(given, truth, kind, protocol)
        # Hand-worked fractions; the release adds 1e-9 to both sides of a relative difference.
        assert found == pytest.approx(float(Fraction(expected)), abs=1e-9), (protocol, row)


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: " ".join(row[:3]))
def test_every_time_box_and_formula_of_the_page_is_judged_as_it_says(row: list[str]) -> None:
    kind, truth, given = row[0], text_of(row[1]), text_of(row[2])
    if kind == "math":
        pytest.importorskip("math_verify")
    for protocol, expected in {"official": row[3], "strict": row[4], "standard": row[5], "lenient": row[5]}.items():
        for solution in (truth, f"<answer>{truth}</answer>"):
            # Hand-worked fractions of decimals that are not exact in binary.
            assert verdict(given, solution, kind, protocol) == pytest.approx(float(Fraction(expected)), abs=1e-9)


@pytest.mark.parametrize("row", RESPONSES, ids=lambda row: row[0])
def test_every_response_of_the_page_is_read_as_it_says(row: list[str]) -> None:
    response = text_of(row[0])
    record = {"solution": "<answer>B</answer>", "problem_type": "multiple choice", "options": list(OPTIONS)}
    found = [
        load_reward("accuracy", protocol=name)(response, record)
        for name in ("official", "strict", "standard", "lenient")
    ]
    found += [load_reward("format", protocol=name)(response, record) for name in ("standard", "official")]
    assert found == [float(cell) for cell in row[1:]]
    for name in ("strict", "lenient"):
        assert load_reward("format", protocol=name)(response, record) == found[4]


def test_official_verdicts_are_the_published_ones() -> None:
    """Responses of a released model with the release's own verdicts."""
    path = shared_data() / "qa" / "mmvu_responses_sample.jsonl"
    if not path.is_file():
        pytest.skip(f"no published answers here: set {SHARED_VIDEOS_VARIABLE}, or put them into {path}")
    for line in map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1]):
        for part, protocol in (("accuracy", "official"), ("format", "official"), ("accuracy", "standard")):
            found = load_reward(part, protocol=protocol)(line["model_output"], line["question"])
            assert found == line[part], (line["question"]["problem_id"], part, protocol)


# --- the release's own expressions, as it publishes them ----------------------------------------------------------

RELEASE_ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
RELEASE_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


def test_the_scanners_read_what_the_releases_expressions_read() -> None:
    draw = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "\u2003", "x", "<", ">", "B"]
    shapes = ["{}", "<think>{}</answer>", "<think>{}</think><answer>{}</answer>", "<think>{}</think>\n<answer>{}"]
    num_formats = 0
    for _ in range(20_000):
        inside = ["".join(draw.choices(pieces, k=draw.randrange(7))) for _ in range(2)]
        text = draw.choice(shapes).format(*inside)
        match = RELEASE_ANSWER.search(text)
        assert PROTOCOLS["official"].find_answer(text) == (match.group(1).strip() if match else ""), text
        found = PROTOCOLS["standard"].find_answer(text)
        assert found == (match.group(1).strip() if match else None), text
        has_format = RELEASE_FORMAT.fullmatch(text) is not None
        assert PROTOCOLS["official"].has_format(text) == has_format, text
        num_formats += has_format
    assert 1_000 < num_formats < 19_000, "both outcomes occur"


# --- choices --------------------------------------------------------------------------------------------------


def test_more_than_26_options_have_labels_of_two_letters() -> None:
    assert [label_of(number) for number in (0, 25, 26, 27, 51, 52, 701, 702)] == [
        "A", "Z", "AA", "AB", "AZ", "BA", "ZZ", "AAA",
    ]  # fmt: skip
    options = [f"thing number {number}" for number in range(30)]
    for given, expected in (("AB", 1), ("(AB)", 1), ("ab", 1), ("thing number 27", 1), ("B", 0), ("A, B", 0)):
        assert verdict(given, "AB", "multiple choice", "lenient", options=options) == expected, given


@pytest.mark.parametrize(
    ("options", "given", "named"),
    [
        (["(a) red", "(b) blue"], "b", "B"),  # labels of the options may be small or bracketed
        (["1. red", "2. blue"], "2", "2"),
        (["1) red", "2) blue"], "blue", "2"),
        (["A red", "B blue"], "blue", "B"),
        (["A.M.", "P.M."], "P.M.", "B"),  # no labels, though the first looks like one
        (["A. 6.", "B. 4."], "4", "B"),
        (["A. 小球", "B. 大球"], "大球", "B"),
        (["A. A man", "B. A dog"], "A man", "A"),
        (["A. the same", "B. the same"], "the same", ""),
        (["A. x", "B. y"], "A. y", ""),
        (["A. x", "B. y"], "D", ""),
        (["A. x", "B. y"], "Ｂ．ｙ", "B"),
        ([], "c", "C"),
        ([], "(D) a dog", "D"),
        ([], "dog", ""),
    ],
)
def test_a_loosely_worded_answer_names_the_option(options: list[str], given: str, named: str) -> None:
    assert named_labels(given, labelled_options(options)) == frozenset([named] if named else []), given


# --- numbers --------------------------------------------------------------------------------------------------

MANY_NINES = "9" * 5_000
"""More digits than Python converts to an integer."""


@pytest.mark.parametrize("protocol", ["official", "standard", "lenient"])
def test_numbers_too_long_for_python_are_compared_without_an_error(protocol: str) -> None:
    assert verdict(MANY_NINES, MANY_NINES, "numerical", protocol) == 1
    assert verdict(MANY_NINES, "5", "numerical", protocol) == 0
    assert verdict(MANY_NINES, "5", "regression", protocol) == 0
    assert verdict("0" * 5_000 + "5", "5", "numerical", protocol) == 1
    assert verdict("1e" + MANY_NINES, "5", "regression", protocol) == 0
    assert verdict("5", 1e300, "regression", protocol) == pytest.approx(0, abs=1e-9)
    assert verdict("5", float("nan"), "numerical", protocol) == 0


# --- the option -----------------------------------------------------------------------------------------------


def test_the_protocol_is_an_option_and_reaches_the_rewards() -> None:
    record = {"solution": "<answer>B</answer>", "problem_type": "multiple choice", "options": list(OPTIONS)}
    group = RolloutGroup(Prompt("1", (1,), record=record), (Rollout((3,), text="the answer is blue"),))
    for protocol, expected in (("lenient", 1.0), ("standard", 0.0)):
        rewarded = (
            Rewarder(RewardOptions.of_protocol(protocol)).reward([group], names=["accuracy", "format"])[0].rollouts[0]
        )
        assert rewarded.rewards == {"accuracy": expected, "format": 0.0}
    values = {"model": "m", "engine": "hf", "data_path": "d"}
    assert config_from_values(values).reward.answer_protocol == "standard"
    assert config_from_values(values | {"answer_protocol": "official"}).reward.answer_protocol == "official"
    with pytest.raises(UserError, match="answer-protocol is not read by --engine replay"):
        check(config_from_values({"model": "m", "engine": "replay", "replay_path": "r", "answer_protocol": "official"}))


def test_lenient_reads_lead_ins_with_an_opener_chinese_ones_and_the_last_box_of_a_sentence():
    options = ["A. a cat", "B. a man", "C. so far", "D. thus"]
    right = {
        "B": ["So the answer is \\boxed{B}.", "Therefore, the final answer is: B", "答案是B", "正确答案为：B。"]
        + ["所以答案是 B", "It is \\boxed{\\text{B}} because \\frac{1}{2}", "\\boxed{A} no, \\boxed{B}"],
        "C": ["so far", "So the answer is so far"],
        "D": ["thus", "Thus the answer is thus"],
    }
    for truth, texts in right.items():
        for text in texts:
            assert verdict(text, truth, "multiple choice", "lenient", options=options) == 1.0, text
            assert verdict(text, truth, "multiple choice", "standard", options=options) == 0.0, text
    for text in (
        "so far",
        "Thusly B",
        "So the answer is Blue",
        "A cat so B",
        "答案",
        "\\boxed{}",
        "\\boxed{B} \\boxed{A}",
    ):
        assert verdict(text, "B", "multiple choice", "lenient", options=options) == 0.0, text
    assert verdict("It is \\boxed{5} metres.", "5", "numerical", "lenient") == 1.0
