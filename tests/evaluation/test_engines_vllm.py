"""vLLM's engines of evaluation, on CPU: processes of our own, and a server asked in both ways. The measure is the
Hugging Face engine: the same greedy answers about the same videos."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from megatron_ktr.distributed import platform
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.engines.base import AnswerEngine, EngineFailed, Question
from megatron_ktr.evaluation.engines.build import EngineOptions, build_engine
from megatron_ktr.evaluation.item import Answer
from tests.support.paths import REPOSITORY
from tests.support.patience import wait_until
from tests.support.questions import DRAWN, GREEDY, question, video

pytestmark = [
    *(pytest.mark.vllm, pytest.mark.slow),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the vLLM environment only"),
]

CONTEXT = 256


def questions() -> list[Question]:
    """Of different lengths and timings; one stops at a character, one does not fit."""
    asked = [
        question(str(number), text, media=(video(2 + 2 * (number % 3), seed=number),))
        for number, text in enumerate(["which colour came first", "how many are there", "which letter is red"] * 3)
    ]
    asked.append(question("text", "which letter is red", system="which letter"))
    asked.append(question("long", "which letter is red " * 200))
    asked.append(question("drawn", media=(video(4, seed=50),), sampling=DRAWN))
    return asked


def answers(engine: AnswerEngine, asked: list[Question]) -> dict[str, Answer | EngineFailed]:
    return {found.key: answer for found, answer in engine.answer(iter(asked))}


@pytest.fixture(scope="module")
def expected(model_dir) -> dict[str, Answer]:
    platform.start("cpu")
    engine = build_engine(EngineOptions(model=str(model_dir), engine="hf", max_model_len=CONTEXT))
    found = answers(engine, questions())
    engine.close()
    assert len({answer.text for answer in found.values()}) > 8 and "no room" in found["long"].problem
    return found


def same(found: dict[str, Answer | EngineFailed], expected: dict[str, Answer]) -> None:
    """Texts, tokens, frames and problems. What is drawn is drawn by other generators."""
    assert found.keys() == expected.keys()
    for key in expected.keys() - {"drawn"}:
        assert replace(found[key], seconds=0.0) == replace(expected[key], seconds=0.0), key


def test_processes_answer_as_hugging_face_does_and_the_open_questions_of_a_killed_one_have_failed(model_dir, expected):
    options = EngineOptions(model=str(model_dir), engine="vllm", max_model_len=CONTEXT, kv_cache_gb=0.05)
    engine = build_engine(replace(options, data_parallel_size=2, concurrency=2))
    processes = [psutil.Process(group.process.pid) for group in engine._engine._groups]
    try:
        assert engine.capacity == 4
        found = answers(engine, questions())
        same(found, expected)
        stop = next(character for character in found["0"].text if character.isascii())
        ((_, stopped),) = engine.answer(iter([replace(questions()[0], sampling=replace(GREEDY, stop=(stop,)))]))
        # The token that completes the string may have more characters.
        assert stop in stopped.text and stopped.is_finished and stopped.num_tokens < found["0"].num_tokens
        assert found["0"].text.startswith(stopped.text)
        alone = {asked.key: answers(engine, [asked])[asked.key].text for asked in questions()[-1:]}
        assert alone == {"drawn": found["drawn"].text}

        def killing() -> Iterator[Question]:
            for number, asked in enumerate(questions()[:9]):
                if number == 3:  # two are open in the first process, one in the second
                    processes[0].kill()
                    wait_until(lambda: processes[0].status() == psutil.STATUS_ZOMBIE)
                yield asked

        found = answers(engine, []) | {asked.key: answer for asked, answer in engine.answer(killing())}
        failed = {key for key, answer in found.items() if isinstance(answer, EngineFailed)}
        assert 1 <= len(failed) <= 2
        said = [str(found[key]) for key in failed]
        assert all("vLLM process 0" in text and "killed by SIGKILL" in text for text in said), said
        for key in found.keys() - failed:
            assert found[key].text == expected[key].text
        processes[1].kill()
        with pytest.raises(UserError, match="every vLLM process has ended.*vLLM process 1"):
            answers(engine, questions())
    finally:
        engine.close()
    assert not any(process.is_running() for process in processes)


def test_no_process_is_left_when_the_one_that_started_it_is_killed(model_dir):
    script = f"""
import sys
from megatron_ktr.rollout.vllm.offline import OfflineSettings, _Group
group = _Group(0, OfflineSettings({str(model_dir)!r}, max_model_len=128, dtype="float32"), visible=None, num_groups=1)
print(group.process.pid, flush=True)
group.wait_until_ready()
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_settings_that_vllm_refuses_are_a_user_error(model_dir):
    options = EngineOptions(model=str(model_dir), engine="vllm", max_model_len=CONTEXT, kv_cache_gb=1e-6)
    with pytest.raises(UserError, match="vLLM does not start.*--kv-cache-gb"):
        build_engine(options)
    with pytest.raises(UserError, match="--tensor-parallel-size 2 needs 2 GPUs"):
        build_engine(replace(options, tensor_parallel_size=2))


def test_a_server_that_takes_token_ids_answers_as_hugging_face_does(model_dir, served, expected):
    engine = build_engine(EngineOptions(model=str(model_dir), server_url=served, max_model_len=CONTEXT))
    assert engine.identity["engine"] == "server" and "served" not in engine.identity["weights"]
    try:
        same(answers(engine, questions()), expected)
    finally:
        engine.close()


def test_a_chat_server_that_is_sent_whole_videos_answers_as_hugging_face_does(served, expected):
    """40 frames: vLLM alone would show the model 32 of them, and another time between two."""
    asked = [*questions()[:9], question("forty", media=(video(40, height=28, width=28, seed=9),))]
    options = EngineOptions(model=served, frames_as="video", frame_format="png")
    engine = build_engine(options)
    found = answers(engine, asked)
    engine.close()
    num_words = 0
    for key in found.keys() - {"forty"}:
        # The server makes text token by token, in which lone bytes, of which this model writes many, read differently.
        ours, theirs = (re.findall("[a-z]{2,}", answer.text) for answer in (found[key], expected[key]))
        assert ours == theirs, key
        assert replace(found[key], seconds=0.0, text="") == replace(expected[key], seconds=0.0, text=""), key
        num_words += len(ours)
    assert num_words > 8
    assert found["forty"].num_prompt_tokens > 20
    engine = build_engine(replace(options, frames_as="images"))
    pictures = answers(engine, asked[:2])
    engine.close()
    assert all(answer.text and not answer.problem for answer in pictures.values())
