"""Answers of servers with anything in any place: each is read as what was asked for, or refused in one way."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ktr.rollout.server.client import ServerFacts, ServerProblem, _message
from megatron_ktr.rollout.server.fingerprint import TOKENS, probe_body, read_fingerprint
from megatron_ktr.rollout.server.wire import MalformedAnswer, most_answer_bytes, read_answer
from megatron_ktr.types import Prompt
from tests.rollout.test_server_pool import SAMPLING
from tests.support.fake_server import answer_to
from tests.support.fuzzing import fuzzed
from tests.support.tiny import EOS_ID

VOCAB = 256
PROMPT = Prompt("p", (10, 20, 30))
ASKED = {
    "token_ids": [10, 20, 30],
    "sampling_params": {"n": 3, "seed": 1, "max_tokens": 12, "stop_token_ids": [EOS_ID]},
}
GOOD = answer_to(ASKED, weights=1.0, versions=["a", "a"])
ROWS = [None, *({str(token): {"logprob": -1.0}} for token in TOKENS[1:])]
TOLD = {"choices": [{"weight_versions": [{"version": "a", "start": 0, "end": 1}]}], "prompt_logprobs": ROWS}
FACTS = {"vllm_config": {"model_config": {"max_model_len": 9, "logprobs_mode": "x", "multimodal_config": {}}}}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, -1, 2**63, 1e308, "a" * 1000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to every value in ``value``."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inside for place in places(one, (*path, key)))]


@st.composite
def altered(draw: Any, good: Any) -> bytes:
    """``good`` as JSON, with other values in one or two places, or cut off, or with other bytes."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(value)))
        new = draw(json_values)
        if not path:
            value = new
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = new
    body = json.dumps(value).encode()
    return draw(st.sampled_from([body, body, body, body[: len(body) // 2], b"\xff" + body, b"[" * 50_000 + body]))


def read(body: bytes) -> Any:
    options = dict(prompt=PROMPT, sampling=SAMPLING, mode="raw_logprobs", vocab_size=VOCAB, end_token_ids=[EOS_ID])
    return read_answer(body, **options)  # pyright: ignore[reportArgumentType]


@fuzzed(300)
@given(altered(GOOD))
@example(b"")
@example(json.dumps(GOOD).encode())
def test_an_answer_is_read_whole_or_refused(body: bytes) -> None:
    try:
        samples = read(body)
    except MalformedAnswer as error:
        assert len(str(error)) <= 300 and "\n" not in str(error)
        return
    assert len(samples) == SAMPLING.num_generations
    for sample in samples:
        assert 0 < len(sample.token_ids) <= SAMPLING.max_response_length
        assert all(type(token) is int and 0 <= token < VOCAB for token in sample.token_ids)
        assert EOS_ID not in sample.token_ids[:-1]
        assert (sample.finish_reason == "stop") == (sample.token_ids[-1] == EOS_ID)
        assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
        assert all(math.isfinite(value) and value < 1e-3 for value in sample.logprobs)
        assert sample.versions and all(isinstance(version, str) for version in sample.versions)


def test_a_log_prob_that_is_no_number_or_that_no_float_holds_is_refused() -> None:
    for value in (10**400, -(10**400), False, "-0.5", None, [], math.nan, -math.inf, 1):
        answer = copy.deepcopy(GOOD)
        answer["choices"][0]["logprobs"]["content"][0]["logprob"] = value
        with pytest.raises(MalformedAnswer):
            read(json.dumps(answer).encode())


@fuzzed(150)
@given(altered(TOLD))
@example(json.dumps(TOLD).encode())
def test_a_fingerprint_is_read_whole_or_refused(body: bytes) -> None:
    try:
        found = read_fingerprint(body, label="a")
    except MalformedAnswer:
        return
    assert len(found) == len(TOKENS) - 1 and all(math.isfinite(value) for value in found)


@fuzzed(150)
@given(altered(FACTS))
def test_settings_are_read_or_refused_by_errors_that_the_client_expects(body: bytes) -> None:
    try:
        found = ServerFacts.read(json.loads(body))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return
    assert isinstance(found.max_model_len, int)
    assert len(_message(body)) <= 300 and len(str(ServerProblem("x\n" * 10**5))) <= 600


def test_good_answers_fit_into_what_is_read() -> None:
    """vLLM's form of a token has a name, bytes and ranks beside what is used."""
    entry = {"token": "token_id:151935", "logprob": -11.123456789012345, "bytes": list(range(50)), "top_logprobs": []}
    entry |= {"token_id": 151935}
    num_tokens = SAMPLING.num_generations * SAMPLING.max_response_length
    assert num_tokens * len(json.dumps(entry)) < most_answer_bytes(SAMPLING) - (1 << 20)
    assert len(read(json.dumps(GOOD).encode())) == 3
    assert json.loads(probe_body())["token_ids"] == list(TOKENS)
    with pytest.raises(MalformedAnswer, match="expected b"):
        read_fingerprint(json.dumps(TOLD).encode(), label="b")
