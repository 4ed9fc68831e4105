"""The judge behind a chat server that throttles, fails, hangs and talks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_ktr.config.reward_section import RewardSection
from megatron_ktr.errors import StepAbandoned, UserError
from megatron_ktr.rewards import Rewarder, RewardOptions, judging, load_reward
from megatron_ktr.rewards.judging import read_score
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.second_prompt import Question
from megatron_ktr.rollout.source import Sampler
from megatron_ktr.types import Prompt, Rollout, RolloutGroup
from megatron_ktr.web import leaving
from tests.support.fake_chat import FakeChat, completion, error
from tests.support.patience import PATIENCE_SECONDS, wait_until

KEY = "sk-Secret0123456789"


@pytest.fixture
def server() -> Iterator[FakeChat]:
    fake = FakeChat(key=KEY)
    yield fake
    fake.close()


def judged(fake: FakeChat, *texts: str, monkeypatch: pytest.MonkeyPatch, **options: object):
    """(values, counts) of a group."""
    with contextlib.closing(asking(fake, monkeypatch=monkeypatch, **options)) as rewarder:
        return values_of(rewarder, *texts), rewarder.take_counts()


def asking(fake: FakeChat, *, monkeypatch: pytest.MonkeyPatch, **options: object) -> Rewarder:
    """One question is open at a time, so that the script's answers come in order."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    values = {"judge_url": fake.url, "judge_key_env": "JUDGE_KEY", "judge_concurrency": 1, "judge_retries": 1}
    values |= {"reward_on_error": "zero", "reward_timeout": PATIENCE_SECONDS}
    return Rewarder(RewardOptions(RewardSection(**{**values, **options})))


def values_of(rewarder: Rewarder, *texts: str) -> list[float]:
    record = {"problem": "Which colour?", "options": ["A. red", "B. blue"], "solution": "<answer>B</answer>"}
    group = RolloutGroup(Prompt("7", (1,), record=record), tuple(Rollout((3,), text=text) for text in texts))
    (found,) = rewarder.reward([group], names=["judge"])
    return [rollout.rewards["judge"] for rollout in found.rollouts]


def test_the_judge_sees_question_truth_and_answer_and_gives_a_number(server, monkeypatch) -> None:
    server.script.extend([(200, completion("1")), (200, completion(' {"score": 0.25} '))])
    values, counts = judged(server, "<think>secret</think><answer>blue</answer>", "no block", monkeypatch=monkeypatch)
    assert values == [1.0, 0.25] and {name for name in counts if name.endswith("/judge")} == {"reward_seconds/judge"}
    first, second = server.bodies
    assert first["temperature"] == 0 and first["model"] == "tiny" and first["max_tokens"] == 16
    asked = first["messages"][-1]["content"]
    assert "Which colour?\nA. red\nB. blue" in asked and "Right answer:\nB" in asked and "secret" not in asked
    assert asked.endswith("Student's answer:\nblue")
    assert second["messages"][-1]["content"].endswith("Student's answer:\nno block")


def test_a_judge_that_throttles_is_asked_again_and_one_that_fails_costs_its_response(server, monkeypatch) -> None:
    busy = (429, error("slow down"), {"Retry-After": "0"})
    server.script.extend([busy, (200, completion("1")), (200, completion("well, maybe")), (200, completion("7"))])
    server.script.extend([(400, error("no")), (200, completion("0.5"))])
    values, counts = judged(server, "a", "b", "c", "d", monkeypatch=monkeypatch)
    assert values == [1.0, 0.0, 0.0, 0.5] and not server.script and len(server.bodies) == 6
    assert counts["reward_errors/judge"] == 2 and "reward_timeouts/judge" not in counts


def test_a_judge_that_hangs_costs_its_response(server, monkeypatch) -> None:
    with contextlib.closing(asking(server, monkeypatch=monkeypatch)) as rewarder:
        rewarder.prepare(["judge"])
        web = judging._server(rewarder.options.section)._web
        patience = web.patience
        server.script.extend(["hang"] * 9)
        web.patience = dataclasses.replace(patience, request_timeout=0.3)  # what answers has far more
        assert values_of(rewarder, "a") == [0.0]
        server.script.clear()
        server.released.set()
        web.patience = patience
        # One for each question that was given up and may still arrive.
        server.script.extend([(200, completion("0.5"))] * 3)
        assert values_of(rewarder, "b") == [0.5]
        counts = rewarder.take_counts()
    assert counts["reward_timeouts/judge"] == 1 and "reward_errors/judge" not in counts


def test_a_judge_that_stops_the_run_says_why_without_its_key(server, monkeypatch) -> None:
    server.script.append("echo key")
    with pytest.raises(UserError, match="reward 'judge' failed for a response to problem 7: no answer") as stopped:
        judged(server, "a", monkeypatch=monkeypatch, reward_on_error="stop", judge_retries=0)
    assert "status 500" in str(stopped.value) and KEY not in str(stopped.value)
    with pytest.raises(UserError, match="--judge-model"):
        judged(server, "a", monkeypatch=monkeypatch, judge_model="other")
    server.key = "another"
    with pytest.raises(UserError, match="--judge-key-env NAME") as refused:
        judged(server, "a", monkeypatch=monkeypatch, judge_retries=2)
    assert KEY not in str(refused.value)
    options = RewardOptions(RewardSection(judge_url="http://127.0.0.1:9", judge_retries=0))
    with pytest.raises(UserError, match="http://127.0.0.1:9/v1: no answer after one attempt"):
        Rewarder(options).prepare(["accuracy", "judge"])


@pytest.mark.parametrize("error_of_run", [KeyboardInterrupt, UserError])
def test_a_run_that_ends_waits_for_no_judge_that_throttles(server, error_of_run: type[BaseException]) -> None:
    server.key = ""
    server.script.extend([(429, error("slow down"), {"Retry-After": "5"})] * 9)

    class Engine(RolloutEngine):
        def load_weights(self, named_tensors) -> None:
            """It has none."""

        def stream(self, prompts, *, step=0, sampling=None, counts=None):
            yield 0, RolloutGroup(prompts[0], (Rollout((3,), text="a"),))
            wait_until(lambda: bool(server.bodies))
            raise error_of_run("the user's ctrl-C, or another error")

    rewarder = Rewarder(RewardOptions(RewardSection(judge_url=server.url, reward_on_error="zero")))
    sampler = Sampler(Engine(), rewards=("judge",), rewarder=rewarder)
    group = RolloutGroup(Prompt("7", (1,), record={"problem": "Q", "solution": "b"}), ())
    with pytest.raises(error_of_run):
        sampler.answer([Question(group)], step=1)
    assert len(server.bodies) == 1, "the judge was asked again, after the time that it had named"


def test_an_address_or_a_key_that_cannot_work_is_refused_before_anything_is_asked(monkeypatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    for values, words in (
        ({"judge_url": "ftp://x"}, "--judge-url: expected a URL"),
        ({"judge_url": f"user:{KEY}@x:80"}, "--judge-url: expected a URL"),
        ({"judge_url": "http://user:word@x"}, "--judge-url: .*keys: --judge-key-env NAME"),
        ({"judge_url": "http://x", "judge_key_env": "JUDGE_KEY"}, "--judge-key-env: .* is not set"),
        ({"judge_url": "http://x", "judge_key_env": KEY}, "--judge-key-env takes the NAME"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            load_reward("judge", options=RewardOptions(RewardSection(**values)))
        assert KEY not in str(refused.value)


def test_only_a_number_from_0_to_1_is_a_score() -> None:
    assert [read_score(text) for text in ("0", " 1.0\n", "0.5", '{"score": 1}', '{"score": "0.5"}')] == [
        0,
        1,
        0.5,
        1,
        0.5,
    ]
    for text in ("", "yes", "-1", "1.01", "nan", "inf", "{}", "[1]", '{"score": true}', "{", "1/2", "1e999"):
        with pytest.raises(ValueError, match="expected a number from 0 to 1|Expecting"):
            read_score(text)


def test_a_run_that_is_asked_to_leave_waits_for_no_judge_that_throttles(server) -> None:
    """The step is given up rather than rewarded by nobody, and its pause of ten minutes with it."""
    server.key = ""
    server.script.extend([(429, error("slow down"), {"Retry-After": "600"})] * 9)
    rewarder = Rewarder(RewardOptions(RewardSection(judge_url=server.url, reward_on_error="zero")))
    group = RolloutGroup(Prompt("7", (1,), record={"solution": "B"}), (Rollout((3,), text="a"),))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(rewarder.reward, [group], names=["judge"])
        wait_until(lambda: bool(server.bodies))
        leaving.ask_to_leave("SIGTERM")
        try:
            with pytest.raises(StepAbandoned, match="SIGTERM while waiting: .*status 429") as left:
                found.result(PATIENCE_SECONDS)
        finally:
            leaving.forget()
    assert left.value.asked_by == "SIGTERM"
    rewarder.close()
