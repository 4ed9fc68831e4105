"""Times and boxes by hand, and readers that nothing a model writes can stop; mathematics that never ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ktr.rewards import Rewarder, load_reward, math_answers
from megatron_ktr.rewards.grounding import (
    box_overlap,
    find_last_answer,
    judge_box,
    judge_span,
    judge_span_officially,
    read_box,
    read_box_strictly,
    read_span,
    read_span_strictly,
    span_overlap,
)
from megatron_ktr.rewards.protocols import PROTOCOLS
from megatron_ktr.rewards.truth import Truth
from tests.support.fuzzing import fuzzed

PIECES = (
    *("from ", " to ", "-", "–", ":", ".", ",", "{", "}", "[", "]", "(", ")", '"time"', '"boxes"', " seconds", "秒"),
    *("<", "1e999", "```json", "```", "\n", "٣", "¾", "null", "true"),
)
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.integers(-5, 10**6).map(str), st.text(max_size=3)), max_size=25)


def test_overlaps_are_the_hand_worked_ones_and_symmetric() -> None:
    # 8.5 - 4 = 4.5 of 10 - 3.2 = 6.8; 30 x 30 of 2 x 40 x 40 - 30 x 30.
    assert span_overlap((3.2, 8.5), (4, 10)) == pytest.approx(0.661765, abs=1e-6) == span_overlap((4, 10), (3.2, 8.5))
    assert box_overlap((10, 10, 50, 50), (20, 20, 60, 60)) == pytest.approx(900 / 2300, abs=1e-12)
    assert span_overlap((4, 10), (4, 10)) == box_overlap((1, 2, 3, 4), (1, 2, 3, 4)) == 1.0
    assert (
        span_overlap((1, 2), (2, 3)) == span_overlap((2, 2), (2, 2)) == box_overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0
    )
    assert box_overlap((3, 3, 1, 1), (1, 1, 3, 3)) == 0.0, "two negative sides are no area"


@given(TEXTS)
@fuzzed(60)
def test_no_text_stops_a_reader_and_every_score_is_a_share(pieces: list[str]) -> None:
    text = "".join(pieces)
    for read in (read_span, read_span_strictly):
        found = read(text)
        assert found is None or (0 <= found[0] < found[1] < math.inf)
    for read in (read_box, read_box_strictly):
        box = read(text)
        assert box is None or (all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3])
    for judge, truth in ((judge_span, "1 to 2"), (judge_span_officially, "1 to 2"), (judge_box, "[1, 1, 2, 2]")):
        assert 0.0 <= judge(text, Truth(truth)) <= 1.0
        assert 0.0 <= judge(text, Truth(text)) <= 1.0


@given(st.floats(0, 1e4), st.floats(0.1, 1e4))
@fuzzed(50)
def test_a_span_is_read_as_it_was_written(start: float, length: float) -> None:
    start, end = round(start, 2), round(start + length, 2)
    for text in (f"from {start} to {end} seconds", f"{start}s-{end}s", f'{{"time": [{start}, {end}]}}'):
        assert read_span(text) == (start, end)
    minutes = f"{int(start) // 60:02}:{int(start) % 60:02} to {int(start) // 60 + 1:02}:{int(start) % 60:02}"
    assert read_span(minutes) == (int(start), int(start) + 60)


def test_the_official_protocol_reads_the_last_block_for_times_alone() -> None:
    response = "<think>x</think><answer>1 to 2</answer><answer>4 to 10</answer>"
    assert find_last_answer(response) == "4 to 10" and find_last_answer("<answer>4 to 10") == ""
    record = {"problem_type": "temporal grounding", "solution": "from 4 to 10 seconds"}
    assert [load_reward("accuracy", protocol=name)(response, record) for name in PROTOCOLS] == [1.0, 0.0, 0.0, 0.0]
    assert load_reward("temporal_iou")("<answer>4 to 10</answer>", record) == 1.0
    assert load_reward("temporal_iou")("<answer>4 to 10</answer>", {**record, "problem_type": "OCR"}) is None


def test_mathematics_that_never_ends_is_wrong_in_time_and_counted(monkeypatch) -> None:
    pytest.importorskip("math_verify")
    before = math_answers.counts().get("math", 0)
    rewarder = Rewarder()
    monkeypatch.setattr(math_answers, "CPU_SECONDS", 1)
    record = {"problem_type": "math", "solution": "3"}
    score = load_reward("accuracy")
    assert score("<answer>$9^{9^{9^9}}$</answer>", record) == 0.0
    assert score("<answer>$(x+1)^{2000}$</answer>", record) == 0.0
    assert math_answers.counts()["math"] == before + 2
    # The limit of processor time is far, and the process is killed by the clock.
    monkeypatch.setattr(math_answers, "CPU_SECONDS", 600)
    monkeypatch.setattr(math_answers, "KILL_SECONDS", 2.0)
    assert score("<answer>$10^{10^{10}}!$</answer>", record) == 0.0
    assert math_answers.counts()["math"] == before + 3
    assert rewarder.take_counts() == {"reward_timeouts/math": 3}
    assert Rewarder().take_counts() == {}, "what was lost before it was made is not its own"
    monkeypatch.undo()
    assert score("<answer>\\frac{6}{2}</answer>", record) == 1.0, "the next answer has a process again"
    assert load_reward("math")("<answer>3.0</answer>", {"problem_type": "OCR", "solution": "3"}) == 1.0
    assert load_reward("math")("<answer>3.0</answer>", {}) is None
