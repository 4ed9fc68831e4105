"""What published harnesses and our protocols say about answers, by tables that were worked by hand from their code."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.evaluation.commands.score_responses import iter_verdicts
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import mmmu, mvbench, tempcompass, video_holmes, video_r1, videomme, vsibench
from megatron_ktr.evaluation.judges.reading import without_reasoning
from megatron_ktr.evaluation.protocols import has_format, judge_all, mean_relative_accuracy
from megatron_ktr.evaluation.registry import BENCHMARKS, load_benchmark
from tests.support.fuzzing import fuzzed
from tests.support.videos import SHARED_VIDEOS_VARIABLE, shared_data

TEXTS = {"A": "A dog", "B": "A man", "C": "A cat", "D": "The CIA"}
OPTIONS = [f"{letter}. {text}" for letter, text in TEXTS.items()]
ALL_JUDGES = {
    (name, protocol): judge
    for name in BENCHMARKS
    for protocol, judge in {"official": load_benchmark(name).official, **load_benchmark(name).other_judges}.items()
}


def choice(solution: str = "B", options: list[str] = OPTIONS, **facts: object) -> Item:
    record = {
        "problem_type": "multiple choice",
        "solution": f"<answer>{solution}</answer>",
        "options": options,
        **facts,
    }
    task = str(facts.get("task") or "")
    return Item("made_up", "1", record, {"task": task} if task else {})


def number(solution: str, kind: str = "regression") -> Item:
    return Item("made_up", "1", {"problem_type": kind, "solution": solution, "options": []})


# One answer, all harnesses: the matchers on the text as it is, with B as the right letter.
MATCHERS = {
    "video_r1": lambda text: video_r1.judge(choice(), text).score == 1,
    "holmes": lambda text: video_holmes.judge(choice(), text).score == 1,
    "mmmu": lambda text: mmmu.multi_choice_letter(text, TEXTS) == "B",
    "videomme": lambda text: videomme.first_capital(text) == "B",
    "videomme_lmms": lambda text: videomme.first_capital(text, phrases=videomme.LMMS_EVAL_PHRASES) == "B",
    "mvbench": lambda text: mvbench.is_same_first_word(text, "B"),
    "mvbench_lmms": lambda text: mvbench.lmms_eval_reading(text) == "B",
    "tempcompass": lambda text: tempcompass.multi_choice(text, "B. A man"),
}
DIFFERENCES = {
    # text                 R1 Ho MM ME ml MV vl TC ("-": no rule applies)
    "<answer>B</answer>": "1  1  0  1  1  0  1  -",
    "B                  ": "1  1  1  1  1  1  1  1",
    "B. A man           ": "0  0  1  1  1  1  1  1",
    "(B)                ": "0  1  1  1  1  1  1  -",
    "Answer: B          ": "0  0  1  1  0  0  1  -",
    "                   ": "0  0  0  0  0  1  0  -",
}


@pytest.mark.parametrize("text", DIFFERENCES)
def test_harnesses_differ_on_one_answer_as_worked_by_hand(text: str) -> None:
    found = [matcher(text.strip()) for matcher in MATCHERS.values()]
    shown = ["-" if verdict is None else str(int(verdict)) for verdict in found]
    assert dict(zip(MATCHERS, shown, strict=True)) == dict(zip(MATCHERS, DIFFERENCES[text].split(), strict=True))


RESPONSES = [
    # response, then for official (Video-R1), strict and lenient: score, answer
    ("<think>x</think><answer>B</answer>", (1, "B"), (1, "B"), (1, "B")),
    ("<think>x</think><answer> B\n</answer>", (1, "B"), (1, "B"), (1, "B")),
    ("<think>x</think><answer>C</answer>", (0, "C"), (0, "C"), (0, "C")),
    ("<answer>B</answer> or <answer>C</answer>", (1, "B"), (0, None), (1, "B")),
    ("<answer>C</answer> or <answer>B</answer>", (0, "C"), (0, None), (0, "C")),
    ("<answer><answer>B</answer></answer>", (0, "<answer>B"), (0, None), (0, None)),
    ("<answer></answer>", (0, None), (0, None), (0, None)),
    ("", (0, None), (0, None), (0, None)),
    ("B", (1, "B"), (0, None), (1, "B")),
    ("B\n", (1, "B"), (0, None), (1, "B")),
    ("B.", (0, None), (0, None), (1, "B")),
    ("(B)", (0, None), (0, None), (1, "B")),
    ("**B**", (0, None), (0, None), (1, "B")),
    ("B. A man", (0, None), (0, None), (1, "B")),
    ("\\boxed{B}", (0, None), (0, None), (1, "B")),
    ("A man", (0, None), (0, None), (1, "B")),
    ("b", (0, None), (0, None), (1, "B")),
    ("First A, then more.\n\nThe answer is (B).", (0, None), (0, None), (1, "B")),
    ("I think it is a man, or else a dog, so who knows.", (0, None), (0, None), (0, None)),
    ("<answer>B.</answer>", (0, "B."), (1, "B"), (1, "B")),
    ("<answer>(B)</answer>", (0, "(B)"), (1, "B"), (1, "B")),
    ("<answer>**B**</answer>", (0, "**B**"), (1, "B"), (1, "B")),
    ("<answer>\\boxed{B}</answer>", (0, "\\boxed{B}"), (1, "B"), (1, "B")),
    ("<answer>$\\boxed{\\text{B}}$</answer>", (0, "$\\boxed{\\text{B}}$"), (1, "B"), (1, "B")),
    ("<answer>Ｂ</answer>", (0, "Ｂ"), (1, "B"), (1, "B")),
    ("<answer>B。</answer>", (0, "B。"), (1, "B"), (1, "B")),
    ("<answer>答案是B</answer>", (0, "答案是B"), (0, None), (1, "B")),
    ("<answer>b</answer>", (0, "b"), (0, None), (1, "B")),
    ("<answer>B. A man</answer>", (0, "B. A man"), (0, None), (1, "B")),
    ("<answer>A. A man</answer>", (0, "A. A man"), (0, None), (0, None)),
    ("<answer>A man</answer>", (0, "A man"), (0, None), (1, "B")),
    ("<answer>A and B</answer>", (0, "A and B"), (0, "A,B"), (0, "A,B")),
    ("<answer>A or B</answer>", (0, "A or B"), (0, None), (0, None)),
    ("<ANSWER>B</ANSWER>", (0, None), (0, None), (1, "B")),
    ("<answer>B", (0, None), (0, None), (1, "B")),
]


@pytest.mark.parametrize("row", RESPONSES, ids=lambda row: repr(row[0]))
def test_protocols_read_a_response_as_worked_by_hand(row: tuple) -> None:
    response, *expected = row
    verdicts = judge_all(load_benchmark("mmvu"), choice(), response)
    assert [(verdicts[name].score, verdicts[name].answer) for name in ("official", "strict", "lenient")] == expected


NUMBERS = [
    # truth, answer, then official, strict, lenient for numerical and the same for regression
    ("5", "5", (1, 1, 1), (1, 1, 1)),
    ("5", "5.0", (0, 0, 1), (1, 1, 1)),
    ("5", "5 cm", (0, 0, 1), (0, 0, 1)),
    ("5", "about 5", (0, 0, 1), (0, 0, 1)),
    ("5", "$5$", (0, 1, 1), (0, 1, 1)),
    ("5", "\\boxed{5}", (0, 1, 1), (0, 1, 1)),
    ("5", "５", (1, 1, 1), (1, 1, 1)),
    ("1,200", "1200", (0, 0, 1), (1, 1, 1)),
    ("0.5", "1/2", (0, 0, 1), (0, 0, 1)),
    ("2", "1", (0, 0, 0), (0, 0, 0)),  # an error of one half is on the first border
    ("2", "1.5", (0, 0, 0), (0.5, 0.5, 0.5)),  # 25 %: 0.50 ... 0.70, the border at 0.75 does not count
    ("100", "104", (0, 0, 0), (1, 1, 1)),
    ("0", "0", (1, 1, 1), (1, 1, 1)),
    ("0", "0.1", (0, 0, 0), (0, 0, 0)),
    ("5", "nan", (0, 0, 0), (0, 0, 0)),
    ("5", "inf", (0, 0, 0), (0, 0, 0)),
    ("5", "five", (0, 0, 0), (0, 0, 0)),
]


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: f"{row[1]} for {row[0]}")
def test_numbers_are_judged_as_worked_by_hand(row: tuple) -> None:
    truth, answer, *expected = row
    for kind, scores in zip(("numerical", "regression"), expected, strict=True):
        verdicts = judge_all(load_benchmark("mmvu"), number(truth, kind), f"<answer>{answer}</answer>")
        assert tuple(verdicts[name].score for name in ("official", "strict", "lenient")) == pytest.approx(scores), kind


def test_only_our_protocols_judge_words() -> None:
    for kind in ("OCR", "free-form"):
        verdicts = judge_all(load_benchmark("mmvu"), number("a red ball", kind), "<answer>A red ball</answer>")
        assert [verdicts[name].score for name in ("official", "strict", "lenient")] == [0, 1, 1]


# Each harness' slips.


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        *(("B", "B"), ("B. A man", "A"), ("Answer: C", "A"), ("(C)", "C"), ("The answer is B", "B")),
        *(("BOTH C", "B"), ("D. CIA", "A"), ("c", None), ("", None), ("F: x", "F"), ("[E]", "E"), ("G", None)),
        *(("<answer>C</answer><answer> D </answer>", "D"), ("<answer>B</answer> A man", "B"), ("A man came", "A")),
        ("<answer>D</answer><answer>A", "D"),
    ],
)
def test_holmes_takes_the_first_letter_of_the_alphabet(response: str, letter: str | None) -> None:
    verdict = video_holmes.judge(choice("C"), response)
    assert (verdict.answer, verdict.score) == (letter, float(letter == "C"))


@given(st.lists(st.sampled_from(["<answer>", "</answer>", " ", "\n", "A", "B:", "x"]), max_size=12).map("".join))
@fuzzed(200)
def test_blocks_are_those_of_the_harnesses_expressions(response: str) -> None:
    found = re.findall(r"<answer>\s*(.*?)\s*</answer>", response, re.DOTALL)
    assert video_holmes.find_answer(response) == (found[-1] if found else response)
    first = re.search(r"<answer>\s*(.*?)\s*</answer>", response, re.DOTALL)
    assert video_r1.find_answer(response) == (first.group(1).strip() if first else "") or response


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(("Because B", "B"), ("Answer: C", "C"), ("All of them, D", "A"), ("The best option is C", "C")),
        *(("Best answer: C", "B"), ("c", None), ("", None), ("E", None), ("one two three four five six A", "A")),
    ],
)
def test_videomme_takes_the_first_capital(answer: str, letter: str | None) -> None:
    assert videomme.first_capital(answer) == letter


def test_mvbench_accepts_empty_answers_and_brackets() -> None:
    for answer, expected in {"": 1, ")": 1, "(": 1, "(B) A man": 1, "b": 1, "B. x": 1, "(C)": 0, "Best": 0}.items():
        assert mvbench.is_same_first_word(answer, "B") == expected, answer
    assert mvbench.judge(choice(), "<answer></answer>").score == 1
    for answer, expected in {"a cat": "A", "b. x": "B", "cat": "cat", "(D)": "D", "it's C!": "C", "1,2 E": "E"}.items():
        assert mvbench.lmms_eval_reading(answer) == expected, answer


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(
            ("B", "B"),
            ("B.", "B"),
            ("A. no. B. yes", "B"),
            ("C: or A.", "C"),
            ("(A) or (C)", "C"),
            ("A then B here", "B"),
        ),
        *(("in the U.S.A. it is so", "A"), ("nothing", None), ("one of the five is surely a cat there", "C")),
        *(("it is a cat", None), ("the first was a man, but then it was a dog", "A")),
    ],
)
def test_mmmu_takes_the_last_candidate_of_the_first_form(answer: str, letter: str | None) -> None:
    assert mmmu.multi_choice_letter(answer, TEXTS) == letter


@pytest.mark.parametrize(
    ("answer", "truth", "is_right"),
    [
        *(("The answer is 12.97 g", "12.97", 1), ("12.971", "12.97", 1), ("x = 4", "4", 1), ("1,200", "1200", 1)),
        *(("The total is 5, so 4", "4", 1), ("The total is 4, so 5", "4", 0), ("It is a circle.", "circle", 1)),
        *(
            ("3e2", "300", 1),
            ("4\n5", "4", 1),
            ("five", "5", 0),
            ("the letter is c", "C", 1),
            ("a cat", "C", 1),
            ("on top", "C", 0),
        ),
    ],
)
def test_mmmu_reads_open_answers(answer: str, truth: str, is_right: int) -> None:
    assert mmmu.is_open_right(answer, truth) == is_right


def test_tempcompass_rules_by_task() -> None:
    for answer, expected in {"B. A man": 1, "B": 1, "C": 0, "B) x": 1, "C. A man": 0, "B:": None, "b": None}.items():
        assert tempcompass.multi_choice(answer, "B. A man") == expected, answer
    for answer, expected in {"Yes, it is": 1, "nothing": 0, "No.": 0, "It is": None}.items():
        assert tempcompass.yes_no(answer, "yes") == expected, answer
    lines = ["Caption A: One runs.", "Caption B: One sits."]
    for answer, expected in {
        **{"Caption B: One sits.": 1, "One sits.": 1, "Caption B": 1, "Caption B.": 1, "Caption A": 0, "B": None},
        **{"(B) One sits.": 1, "One runs.": 0, "": None},
    }.items():
        assert tempcompass.caption_matching(answer, lines, lines[1]) == expected, answer


def test_tempcompass_reads_a_letter_as_the_option_that_we_showed() -> None:
    yes_no = choice("A", ["A. yes", "B. no"], task="yes_no")
    caption = choice(
        "B",
        ["A. One runs.", "B. One sits."],
        task="caption_matching",
        published_options=["Option 1: One runs.", "Option 2: One sits."],
    )
    for item, answers in (
        (yes_no, {"A": 1, "B": 0, "Yes": 1, "no": 0, "maybe": 0}),
        (caption, {"B": 1, "A": 0, "Option 2": 1, "One sits.": 1, "2": 0}),
    ):
        for answer, expected in answers.items():
            assert tempcompass.judge(item, f"<think>x</think><answer>{answer}</answer>").score == expected, answer


def test_borders_of_mean_relative_accuracy() -> None:
    assert video_r1.mean_relative_accuracy(0.5, 1.0) == 0 and vsibench.mean_relative_accuracy(0.5, 1.0) == 0.1
    assert mean_relative_accuracy(0.5, 1.0) == 0 and mean_relative_accuracy(0.5001, 1.0) == 0.1
    assert mean_relative_accuracy(1.05, 1.0) == mean_relative_accuracy(0.95, 1.0) == 0.9, "in exact arithmetic"
    assert mean_relative_accuracy(-2.0, -2.0) == mean_relative_accuracy(0.0, -0.0) == 1
    assert (
        mean_relative_accuracy(None, 1.0) == mean_relative_accuracy(1.0, None) == mean_relative_accuracy(0.1, 0.0) == 0
    )
    assert video_r1.mean_relative_accuracy(1e300, 2.0) == video_r1.mean_relative_accuracy(float("nan"), 2.0) == 0


def test_vsibench_takes_the_first_word() -> None:
    for answer, expected in {"B": 1, "b.": 1, "B) x": 0, "(B)": 0, "B because": 1, "B\nbecause": 0}.items():
        assert vsibench.judge(choice(), answer).score == expected, answer
    for answer, expected in {"4": 1, "4.": 1, "4 m": 1, "2": 0.1, "four": 0, "nan": 0, "": 0}.items():
        assert vsibench.judge(number("4"), answer).score == pytest.approx(expected), answer


def test_rules_for_short_answers_see_the_answer_without_its_reasoning() -> None:
    for response, expected in {
        "<think>A</think> <answer> B </answer>": "B",
        "Say A. \\boxed{ B }.": "B",
        "\\boxed{B": "\\boxed{B",
        "<think>A</think> B": "<think>A</think> B",
    }.items():
        assert without_reasoning(response) == expected


PIECES = ["<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "}", "B", "A.", "yes", "Option 1: ", "1e999"]
PIECES += ["-", "0", ",", ".", " ", "\n", "٣", "½"]
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=10).map("".join))


@given(texts, st.sampled_from(sorted(BENCHMARKS)), st.sampled_from(["choice", "regression", "numerical", "free-form"]))
@fuzzed(300)
def test_no_response_breaks_a_judge(response: str, name: str, kind: str) -> None:
    item = choice() if kind == "choice" else number("12.5", kind)
    for verdict in judge_all(load_benchmark(name), item, response).values():
        assert 0 <= verdict.score <= 1
        assert verdict.answer is None or isinstance(verdict.answer, str)


def test_long_responses_are_judged_in_linear_time_without_recursion() -> None:
    for response in ("<answer>" * 20_000, "9" * 20_000, "((((" * 20_000, "A. " * 20_000):
        for item in (choice(), number("5")):
            for (name, protocol), judge in ALL_JUDGES.items():
                assert 0 <= judge(item, response).score <= 1, (name, protocol)


def test_published_verdicts_are_reproduced() -> None:
    path = shared_data() / "qa" / "mmvu_responses_sample.jsonl"
    if not path.is_file():
        pytest.skip(f"no published answers here: set {SHARED_VIDEOS_VARIABLE}, or put them into {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [(verdict.score, float(is_formatted)) for verdict, is_formatted in iter_verdicts(path, "official")]
    assert found == [(row["accuracy"], row["format"]) for row in rows]
    assert sum(score for score, _ in found) == 43
    assert [has_format(row["model_output"] + "!") for row in rows] == [False] * len(rows)
