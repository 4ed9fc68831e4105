"""The built-in rewards against numbers worked out by hand, their options, and one verdict here and in evaluation."""

from __future__ import annotations

import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.config.checks import check
from megatron_ktr.config.sections import RewardSection
from megatron_ktr.data.records import check_record
from megatron_ktr.data.reward_checks import reward_checks
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.item import Item
from megatron_ktr.evaluation.judges import video_r1
from megatron_ktr.evaluation.protocols import judge_leniently, judge_strictly
from megatron_ktr.rewards import Rewarder, RewardInput, RewardOptions, load_reward, math_answers
from megatron_ktr.rewards.registry import BUILT_IN, reward_entry
from megatron_ktr.types import Prompt, Rollout, RolloutGroup


def value(name: str, *, tokens: tuple[int, ...] = (), text: str = "", max_length: int = 768, **options: object):
    given = RewardInput(text, token_ids=tokens)
    reward = load_reward(name, options=RewardOptions(RewardSection(**options), max_length))
    return reward.score_here([given])[0]


def test_lengths_and_repetitions_are_worth_what_the_formulas_say() -> None:
    buffered = {600: 0.0, 640: 0.0, 704: -0.5, 768: -1.0, 900: -1.0}  # L 768, C 128
    for length, expected in buffered.items():
        assert value("overlong", tokens=(1,) * length, overlong_buffer=128) == expected
    # L 100 is the longest response, and C a fifth of it.
    assert value("overlong", tokens=(1,) * 90, max_length=100) == -0.5
    assert value("overlong", tokens=(1,) * 45, overlong_length=50, overlong_buffer=10) == -0.5
    for tokens, expected in {
        (5, 5, 5, 5, 5): -0.75,
        (1, 2, 3, 4): 0.0,
        (1,): 0.0,
        (): 0.0,
        (1, 2, 1, 2): -1 / 3,
    }.items():
        assert value("repetition", tokens=tokens, repetition_ngram=2) == pytest.approx(expected, abs=1e-12)
    assert [value("length", tokens=(1,) * number) for number in (319, 320, 512, 513)] == [0, 1, 1, 0]


def test_tags_count_a_quarter_each_where_they_occur_once() -> None:
    plain, lines = "<think>x</think><answer>A</answer>", "<think>\nx\n</think>\n<answer>\nA\n</answer>"
    assert [value("tag_count", text=text) for text in (plain, lines, plain * 2, "<think></answer>", "")] == [
        1,
        1,
        0,
        0.5,
        0,
    ]
    assert [value("tag_count_lines", text=text) for text in (plain, lines, lines.replace("\n<a", "<a"))] == [0, 1, 0.5]


def test_every_built_in_reward_has_its_file_and_the_name_of_it() -> None:
    assert [reward_entry(name).name for name in BUILT_IN] == list(BUILT_IN)


QUESTIONS = [
    ("multiple choice", "<answer>B</answer>", ("B", "b", "C", "**B**")),
    ("numerical", "<answer>5</answer>", ("5", "5 cm", "6", "5.0")),
    ("OCR", "<answer>red door</answer>", ("red door", "the red door", "blue")),
    ("free-form", "<answer>red door</answer>", ("red door", "the red door")),
    ("math", "<answer>1/2</answer>", ("0.5", "\\frac{2}{4}", "\\frac{1}{3}", "the half")),
    ("temporal grounding", "from 4 to 10 seconds", ('{"time": [3.2, 8.5]}', "3.2-8.5", "00:04 to 00:10", "8 to 2")),
    ("spatial grounding", "[20, 20, 60, 60]", ('{"boxes": [10, 10, 50, 50]}', "[10, 10, 50, 50]", "[9, 9, 1, 1]")),
]


@pytest.mark.parametrize(("kind", "solution", "answers"), QUESTIONS, ids=[kind for kind, *_ in QUESTIONS])
def test_training_and_evaluation_give_one_verdict(kind: str, solution: str, answers: tuple[str, ...]) -> None:
    if kind == "math" and not math_answers.is_installed():
        pytest.skip("math-verify is not installed")
    options = ["A. red", "B. blue", "C. green"] if kind == "multiple choice" else []
    record = {"problem_type": kind, "solution": solution, "options": options}
    for answer in answers:
        for response in (
            f"<think>x</think><answer>{answer}</answer>",
            f"<answer>C</answer><answer>{answer}</answer>",
            answer,
        ):
            item = Item("responses", "1", record)
            for protocol, judge in {"strict": judge_strictly, "lenient": judge_leniently}.items():
                expected = load_reward("accuracy", protocol=protocol)(response, record)
                assert judge(item, response).score == expected, (protocol, response)
            if kind in ("math", "temporal grounding", "spatial grounding"):
                expected = load_reward("accuracy", protocol="official")(response, record)
                assert video_r1.judge(item, response).score == expected, response


def test_solutions_that_no_answer_could_meet_are_found_before_training() -> None:
    def problem(names: tuple[str, ...], **fields: object) -> str:
        record = check_record({"problem": "Q?", "solution": "1", **fields}, number=1)
        for find in reward_checks(names):
            try:
                find(record)
            except ValueError as error:
                return str(error)
        return ""

    span, box = {"problem_type": "temporal grounding"}, {"problem_type": "spatial grounding", "box_size": [640, 360]}
    for names in (("accuracy",), ("temporal_iou", "box_iou", "format")):
        assert problem(names, **span, solution="from 3.2 to 8.5 seconds") == ""
        assert "such as 'from 3.2 to 8.5 seconds', got '8 to 3'" in problem(names, **span, solution="8 to 3")
        assert problem(names, **box, solution='{"boxes": [1, 2, 3, 4]}') == ""
        assert "such as {" in problem(names, **box, solution="left")
        assert "box_size: [width, height]" in problem(names, **box | {"box_size": [1.5, 2]}, solution="[1, 2, 3, 4]")
    assert problem(("format",), **span, solution="8 to 3") == ""


def test_mathematics_without_its_package_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "is_installed", lambda: False)
    with pytest.raises(
        UserError, match="--reward-functions math needs math-verify, which is not installed: pip install"
    ):
        load_reward("math")
    record = check_record({"problem": "Q?", "solution": "1", "problem_type": "math"}, number=1)
    with pytest.raises(ValueError, match="the reward accuracy needs math-verify for problem_type 'math'"):
        reward_checks(["accuracy"])[0](record)


OVERLONG, OWN = ("accuracy", "overlong"), ("accuracy", "module:function")
REPLAYED = {"engine": "replay", "data_path": None, "replay_path": "rollouts.jsonl"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reward_weights": ("style=2",)}, "'style' is none of the reward parts accuracy, format"),
        ({"reward_weights": ("format",)}, "expected name=number, got 'format'"),
        ({"reward_weights": ("format=nan",)}, "expected name=number"),
        ({"reward_weights": ("format=1", "format=2")}, "names 'format' twice"),
        ({"reward_workers": 4}, "there are no own reward functions"),
        ({"overlong_buffer": 64}, "--overlong-buffer is not read without overlong among --reward-functions"),
        ({"judge_url": "http://x"}, "--judge-url is not read without judge"),
        ({"reward_functions": ("accuracy", "judge")}, "needs --judge-url"),
        ({"reward_functions": OVERLONG, "overlong_length": 100, "overlong_buffer": 200}, "exceeds the 100 tokens"),
        ({"reward_functions": OVERLONG, "overlong_length": 9000}, "which --max-response-length 768"),
        ({"reward_functions": OWN, "reward_workers": 0, "reward_timeout": 5.0}, "needs --reward-workers"),
        ({"reward_timeout": 5.0}, "--reward-timeout is not read: there is neither"),
        ({"reward_on_error": "skip_group", "advantage": "batch"}, "--advantage batch does not pass over"),
        ({**REPLAYED, "reward_on_error": "zero"}, "--reward-on-error is not read by --engine replay"),
    ],
)
def test_options_that_would_change_nothing_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(config_from_values({"model": "m", "engine": "hf", "data_path": "d", **change}))


def test_weights_and_options_that_fit_are_accepted() -> None:
    values = {
        "reward_functions": ("accuracy", "format", "overlong", "mine:style"),
        "reward_weights": ("format=0.5", "style=-1"),
        "overlong_buffer": 128,
        "reward_workers": 2,
        "reward_on_error": "skip_group",
    }
    config = config_from_values({"model": "m", "engine": "hf", "data_path": "d", **values})
    check(config)
    assert config.reward.weights == {"format": 0.5, "style": -1.0}
    # The judge reads the timeout, whoever runs the user's own function.
    values = {"reward_functions": (*OWN, "judge"), "judge_url": "http://x", "reward_workers": 0, "reward_timeout": 5.0}
    check(config_from_values({"model": "m", "engine": "hf", "data_path": "d", "length_bonus": 0.0, **values}))


def test_a_response_without_weights_is_worth_the_plain_sum() -> None:
    group = RolloutGroup(
        Prompt("1", (1,), record={"solution": "B", "problem_type": "multiple choice"}),
        (Rollout((3,), text="<think>x</think><answer>B</answer>"), Rollout((3,), text="<answer>B</answer>")),
    )
    first, second = Rewarder().reward([group], names=("accuracy", "format"))[0].rollouts
    assert (first.reward, second.reward) == (2.0, 1.0) and first.reward_weights == {}
    assert Rollout((3,), rewards={"a": 0.1, "b": 0.2, "c": 0.3}).reward == 0.1 + 0.2 + 0.3
