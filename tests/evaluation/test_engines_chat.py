"""The chat engine against a loopback server that throttles, fails, hangs, lies and echoes the key."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import pickle
import re
import socket
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.engines.base import AnswerSampling, EngineFailed
from megatron_ktr.evaluation.engines.build import EngineOptions, build_engine
from megatron_ktr.evaluation.engines.chat import ChatAnswers, ChatSettings, cut_at, read_reply
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.web.address import Address, ApiKey
from megatron_ktr.web.client import Patience, _retry_after
from tests.support.fake_chat import FakeChat, completion, error, parts_of
from tests.support.fuzzing import fuzzed
from tests.support.patience import PATIENCE_SECONDS
from tests.support.questions import DRAWN, GREEDY, question, video

KEY = "sk-Secret0123456789"
QUICK = Patience(max_retries=3, request_timeout=PATIENCE_SECONDS, first_pause=0.001)
BRIEF = Patience(max_retries=3, request_timeout=0.3, first_pause=0.001)
"""For what never answers."""


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    server = FakeChat()
    yield server
    server.close()


def engine(fake: FakeChat, *, key: str = "", **changes) -> ChatAnswers:
    chosen = ChatSettings(**{"patience": QUICK, **changes})
    return ChatAnswers(Address.read(fake.url), chosen, key=ApiKey(key) if key else None)


def ask(fake: FakeChat, *questions, **changes) -> dict[str, Answer | EngineFailed]:
    patience = changes.pop("patience", QUICK)
    asked = engine(fake, **changes)
    asked._web.patience = patience  # the engine itself has all the time that it needs to start
    try:
        return {found.key: answer for found, answer in asked.answer(iter(questions))}
    finally:
        asked.close()


def test_every_question_is_answered_and_no_more_are_open_than_wanted(fake):
    questions = [question(str(number), f"question {number}") for number in range(40)]
    answers = ask(fake, *questions, concurrency=5)
    assert {key: answer.text for key, answer in answers.items()} == {str(n): f"question {n}|0" for n in range(40)}
    assert fake.most_running <= 5
    assert (answers["0"].num_tokens, answers["0"].num_prompt_tokens) == (3, 10)


def test_no_more_questions_are_taken_than_are_open(fake):
    taken = 0

    def questions():
        nonlocal taken
        for number in range(12):
            taken += 1
            yield question(str(number))

    asked = engine(fake, concurrency=3)
    for place, _ in enumerate(asked.answer(questions())):
        assert taken <= place + 3 + 1
    asked.close()
    assert taken == 12


@pytest.mark.parametrize(
    "fault",
    [
        (429, error("slow down"), {"Retry-After": "0"}),
        (500, b"boom"),
        (503, b"<html>busy</html>"),
        "close",
        (200, b"<html>hello</html>"),
        (200, b""),
        (200, b"\xff\xfe{"),
        (200, b"[" * 100_000),
        (200, b"{}"),
        (200, b'{"choices": []}'),
        (200, error("upstream is away")),
        (200, completion(None)),
        (200, completion(5)),
        (200, b"x" * (40 << 20)),
        (200, gzip.compress(gzip.compress(b" " * (1 << 24), mtime=0), mtime=0), {"Content-Encoding": "gzip, gzip"}),
    ],
    ids=lambda fault: str(fault)[:40],
)
def test_a_fault_is_repeated_and_the_answer_is_that_of_the_server(fake, fault):
    fake.script.extend([fault, fault])
    answer = ask(fake, question("a"))["a"]
    assert isinstance(answer, Answer) and answer.text == "which colour came first|0" and not answer.problem
    assert len(fake.bodies) == 3


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_server_that_never_completes_its_reply_is_a_failure_in_time(fake, fault):
    fake.script.extend([fault] * 9)
    answer = ask(fake, question("a"), patience=BRIEF)["a"]
    assert isinstance(answer, EngineFailed)
    assert re.search(r"no answer after 4 attempts: no complete reply within 0.3 s \(--request-timeout\)", str(answer))


def test_what_fails_at_every_attempt_is_a_failure_and_never_an_empty_answer(fake):
    fake.script.extend([(500, b"boom")] * 4)
    answers = ask(fake, question("a"), question("b"), concurrency=1)
    assert isinstance(answers["a"], EngineFailed) and "4 attempts: status 500: boom" in str(answers["a"])
    assert answers["b"].text


def test_a_server_that_dies_gives_failures_for_all_questions(fake):
    fake.script.extend([None] + ["close"] * 1000)
    answers = ask(fake, *(question(str(number)) for number in range(5)), concurrency=1)
    assert [isinstance(answer, EngineFailed) for answer in answers.values()] == [False] + [True] * 4


def test_no_server_is_a_user_error_at_the_start():
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="no answer after 3 attempts"):
            ChatAnswers(
                Address.read(f"http://127.0.0.1:{taken.getsockname()[1]}"), ChatSettings(patience=QUICK), key=None
            )


def test_retry_after_is_obeyed_within_limits():
    assert _retry_after("7") == 7 and _retry_after("1e9") == 600
    assert 0 < _retry_after("Fri, 01 Jan 2100 00:00:00 GMT") <= 600
    assert [_retry_after(text) for text in ("", "soon", "-5", "nan", "Fri, 01 Jan 1999 00:00:00 GMT")] == [0] * 5


def test_frames_travel_as_pictures_in_order_before_the_text(fake):
    medium = video(6)
    answer = ask(fake, question("a", media=(medium,), system="Be brief."), frame_format="png")["a"]
    assert answer.text.endswith("|6") and answer.num_frames == 6
    body = fake.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    parts = parts_of(body)
    assert [part["type"] for part in parts] == ["image_url"] * 6 + ["text"]
    for part, frame_CHW in zip(parts, medium.frames_FCHW, strict=False):
        kind, _, data = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        shown_HWC = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert (shown_HWC == frame_CHW.permute(1, 2, 0).numpy()).all()


def test_a_video_travels_whole_or_not_at_all(fake):
    answer = ask(fake, question("a", media=(video(40),)), frames_as="video")["a"]
    assert answer.text.endswith("|40")
    assert fake.bodies[-1]["media_io_kwargs"] == {"video": {"num_frames": -1, "fps": pytest.approx(2 / 1.5)}}
    fake.obeys_media_options = False
    with pytest.raises(UserError, match="would drop frames"):
        ask(fake, question("b", media=(video(40),)), frames_as="video")
    fake.script.append((400, error("media_io_kwargs are disabled")))
    with pytest.raises(UserError, match="--trust-request-mm-kwargs"):
        ask(fake, question("c", media=(video(4),)), frames_as="video")
    fake.owned_by = "somebody"
    with pytest.raises(UserError, match="only vLLM"):
        engine(fake, frames_as="video")


def test_settings_are_sent_explicitly_and_extra_fields_to_servers_that_know_them(fake):
    sampling = AnswerSampling(9, 0.7, 0.8, 5, presence_penalty=0.4, frequency_penalty=0.2, stop=("</answer>",))
    fake.script.append((200, completion("<answer>A</answer> and more")))
    assert ask(fake, question("a", sampling=sampling))["a"].text == "<answer>A</answer>"
    body = fake.bodies[-1]
    expected = dict(temperature=0.7, top_p=0.8, top_k=5, min_p=0.0, repetition_penalty=1.0, max_tokens=9)
    expected |= dict(presence_penalty=0.4, frequency_penalty=0.2, stop=["</answer>"], include_stop_str_in_output=True)
    assert body.items() >= expected.items() and type(body["seed"]) is int
    fake.owned_by = "openai"
    ask(fake, question("b"), question("c", sampling=AnswerSampling()))
    assert set(fake.bodies[-1]) == {"model", "messages", "stream", "temperature", "top_p", "max_tokens", "seed"}
    with pytest.raises(UserError, match="no top-k"):
        ask(fake, question("d", sampling=DRAWN))


def test_a_server_that_wants_max_completion_tokens_gets_them(fake):
    fake.owned_by = "openai"
    refusal = error("'max_tokens' is not supported. Use 'max_completion_tokens' instead.", param="max_tokens")
    fake.script.append((400, refusal))
    answers = ask(fake, question("a"), question("b"), concurrency=1)
    assert all(isinstance(answer, Answer) and answer.text for answer in answers.values())
    assert [sorted(body.keys() & {"max_tokens", "max_completion_tokens"}) for body in fake.bodies] == [
        ["max_tokens"],
        ["max_completion_tokens"],
        ["max_completion_tokens"],
    ]


def test_a_setting_that_the_server_refuses_is_a_user_error_unless_it_is_left_to_the_server(fake):
    fake.owned_by = "openai"
    refusal = (400, error("Unsupported value: only the default (1)", param="temperature"))
    fake.script.append(refusal)
    with pytest.raises(UserError, match="does not take temperature 0.1.*--server-default temperature"):
        ask(fake, question("a", sampling=AnswerSampling()))
    asked = engine(fake, server_defaults=("temperature",))
    ((_, answer),) = asked.answer(iter([question("a", sampling=AnswerSampling())]))
    asked.close()
    assert answer.text and "temperature" not in fake.bodies[-1]
    assert asked.identity["server_defaults"] == "temperature"


def test_a_seed_that_the_server_refuses_is_left_out_with_a_note(fake, capsys):
    refusal = json.dumps({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}).encode()
    fake.script.append((422, refusal))
    answers = ask(fake, *(question(key, sampling=AnswerSampling()) for key in "ab"), concurrency=1)
    assert answers["a"].text and answers["b"].text
    assert ["seed" in body for body in fake.bodies] == [True, False, False]
    assert capsys.readouterr().err.count("takes no seed") == 1


@pytest.mark.parametrize(
    ("reply", "text", "is_finished"),
    [
        (completion("cut", reason="length"), "cut", False),
        (completion(None, reason="length"), "", False),
        (completion("so far", reason="content_filter"), "so far", True),
        (completion(None, reason="stop", refusal="I cannot"), "I cannot", True),
        (completion([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]), "in parts", True),
        (completion("lone \ud800 half"), "lone \ufffd half", True),
    ],
)
def test_what_a_reply_means(fake, reply, text, is_finished):
    fake.script.append((200, reply))
    answer = ask(fake, question("a"))["a"]
    assert (answer.text, answer.is_finished, answer.problem) == (text, is_finished, "")
    answer.text.encode("utf-8")


@pytest.mark.parametrize(
    ("message", "code", "problem"),
    [
        ("This model's maximum context length is 1024 tokens", "", "too long"),
        ("Too much", "context_length_exceeded", "too long"),
        ("Your prompt was filtered", "content_filter", "filter"),
    ],
)
def test_a_question_that_the_model_cannot_take_has_a_problem(fake, message, code, problem):
    fake.script.append((400, error(message, code=code)))
    answers = ask(fake, question("a"), question("b"), concurrency=1)
    assert problem in answers["a"].problem and message in answers["a"].problem
    assert answers["b"].text and not answers["b"].problem


def test_another_refusal_is_a_failure_and_is_not_repeated(fake):
    fake.script.append((413, b"too large"))
    answers = ask(fake, question("a"), question("b"), concurrency=1)
    assert isinstance(answers["a"], EngineFailed) and answers["b"].text
    assert len(fake.bodies) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_the_run_at_the_first_question(fake, status):
    fake.models_reply = (404, b"no such route")
    fake.script.extend([(status, error("no"))] * 9)
    with pytest.raises(UserError, match=f"status {status}"):
        ask(fake, *(question(str(number)) for number in range(9)), model="x", concurrency=1)
    assert len(fake.bodies) == 1


def test_the_model_is_found_or_asked_for(fake):
    fake.models = ("one", "two")
    with pytest.raises(UserError, match="which model.*one, two"):
        engine(fake)
    with pytest.raises(UserError, match="no model 'three'"):
        engine(fake, model="three")
    assert engine(fake, model="two").identity["root"] == "org/two"
    fake.models_reply = (200, b"<html>")
    assert engine(fake, model="three").identity["model"] == "three"
    with pytest.raises(UserError, match="lists no models"):
        engine(fake)


def test_the_key_is_sent_and_shown_nowhere(fake, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    fake.key = KEY
    monkeypatch.setenv("THE_KEY", KEY)
    options = EngineOptions(model=fake.url, api_key_env="THE_KEY", max_retries=0)
    asked = build_engine(options)
    fake.script.extend(
        ["echo key", "say key", (400, error(f"bad {KEY}")), (403, error(KEY)), (200, b"no: " + KEY.encode())]
    )
    answers = [answer for _, answer in asked.answer(question(key) for key in "abcdef")]
    said = [repr(options), repr(asked.identity), repr(vars(asked)), repr(asked._web._key), *map(repr, answers)]
    said += [str(answer) for answer in answers]
    asked.close()
    monkeypatch.setenv("THE_KEY", "sk-Wrong0123456789")
    with pytest.raises(UserError) as refused:
        build_engine(options)
    said += [str(refused.value), *capfd.readouterr(), caplog.text]
    assert "***" in "".join(said)
    assert not any("Secret" in text or "Wrong" in text for text in said)
    with pytest.raises(TypeError):
        pickle.dumps(ApiKey(KEY))


@pytest.mark.parametrize("value", ["", "two words", "hunter2\n", "schlüssel"])
def test_a_value_that_cannot_be_a_key_is_refused_without_being_shown(monkeypatch, value):
    monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(UserError) as refused:
        ApiKey.from_environment("THE_KEY")
    assert not value.strip() or value.strip() not in str(refused.value)


def test_a_key_in_place_of_the_variables_name_is_refused_without_being_shown():
    for wrong in (KEY, "Secret0123"):
        with pytest.raises(UserError) as refused:
            ApiKey.from_environment(wrong)
        assert "Secret" not in str(refused.value)
    with pytest.raises(UserError):
        EngineOptions(model="http://localhost:1", api_key_env=KEY)


@pytest.mark.parametrize(
    ("url", "api", "root"),
    [
        ("http://host:8000", "http://host:8000/v1", "http://host:8000"),
        ("http://host:8000/", "http://host:8000/v1", "http://host:8000"),
        ("https://host/v1/", "https://host/v1", "https://host"),
        ("https://host/v1beta/openai", "https://host/v1beta/openai", "https://host/v1beta/openai"),
        ("https://host/v1/chat/completions", "https://host/v1", "https://host"),
    ],
)
def test_addresses(url, api, root):
    found = Address.read(url)
    assert (found.api, found.root, found.is_loopback) == (api, root, False)
    assert Address.read("http://127.0.0.1:1").is_loopback and Address.read("http://localhost").is_loopback


@fuzzed(200)
@given(st.text(max_size=30) | st.text(max_size=20).map(lambda text: f"http://{text}"))
def test_any_text_is_an_address_or_a_user_error(text):
    try:
        Address.read(text)
    except UserError:
        pass


def test_an_address_with_a_password_is_refused_without_being_shown():
    for url in ("http://me:hunter2@host", "https://host/v1?key=hunter2"):
        with pytest.raises(UserError) as refused:
            Address.read(url)
        assert "hunter2" not in str(refused.value)
        with pytest.raises(UserError):  # so that nobody writes such options down
            EngineOptions(model=url)


def test_the_environments_proxies_are_not_used_for_this_machine(fake, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask(fake, question("a"))["a"].text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "usage", "finish_reason", "type", "text"]), inner
        )
    ),
    max_leaves=12,
)


@fuzzed(300)
@given(JSON)
def test_any_json_is_a_reply_or_a_value_error(value):
    for found in (value, {"choices": [value]}, {"choices": [{"message": value}], "usage": value}):
        try:
            reply = read_reply(json.dumps(found).encode())
        except ValueError:
            continue
        assert isinstance(reply.text, str) and reply.num_tokens >= 0


def test_a_text_is_cut_after_its_first_stop_string():
    assert cut_at("a</b>c</d>", ["</d>", "</b>"]) == ("a</b>", True)
    assert cut_at("abc", ["x"]) == ("abc", False) and cut_at("abc", ()) == ("abc", False)


def test_a_question_whose_places_and_media_differ_has_a_problem(fake):
    record = {"messages": [{"role": "user", "content": "<video> and <video>"}]}
    asked = question("a", media=(video(2),))
    answer = ask(fake, type(asked)("a", record, asked.media, GREEDY))["a"]
    assert "2 places for videos" in answer.problem and not fake.bodies


@pytest.mark.parametrize("key", ["B", "EMPTY", "token", "choices", "tiny"])
def test_a_key_that_is_a_word_changes_no_answer_and_no_name(fake, key):
    fake.key = key
    text = "<answer>B</answer> EMPTY token"
    fake.script += [(400, error("maximum context length: too many tokens")), (200, completion(text))]
    answers = ask(fake, question("a"), question("b"), key=key, concurrency=1)
    assert answers["a"].problem.startswith("too long for the server's model")
    assert (answers["b"].text, answers["b"].num_tokens) == (text, 3)
    assert engine(fake, key=key).identity["model"] == "tiny"


@pytest.mark.parametrize("size", [250, 299, 19_990])
def test_no_part_of_a_key_is_left_where_a_message_is_cut(fake, size):
    fake.script += [(500, b"x" * size + KEY.encode() + b"y" * 500)] * 4
    (answer,) = ask(fake, question("a"), key=KEY).values()
    assert "status 500" in str(answer) and "sk-S" not in str(answer)


def test_names_of_models_that_no_terminal_can_show_are_not_chosen(fake):
    cards = [{"id": "\x1b[2Jclear"}, {"id": "half \ud800"}, {"id": ""}, {"id": "tiny", "root": "\x1b[1m\ud800"}]
    fake.models_reply = (200, json.dumps({"data": [*cards, {"id": "tiny", "owned_by": ["vllm"]}]}).encode())
    identity = engine(fake).identity
    assert identity["model"] == "tiny" and all(text.isprintable() for text in identity.values())
    assert engine(fake, model="other").identity["model"] == "other"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "SOCKS"),
        ("HTTPS_PROXY", "what://127.0.0.1:1", "proxy settings"),
        ("SSL_CERT_FILE", "/no/such/file", "certificates"),
        ("SSL_CERT_FILE", __file__, "certificates"),
    ],
)
def test_an_environment_that_allows_no_connection_is_a_user_error(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        ChatAnswers(Address.read("https://example.invalid"), ChatSettings(patience=QUICK), key=None)


@pytest.mark.parametrize("url", ["http://h?", "http://h#", "http://h/v1?", "http://h/v1#x"])
def test_an_address_with_a_query_is_refused_even_if_it_is_empty(url):
    with pytest.raises(UserError, match="query"):
        Address.read(url)


def test_a_redirect_is_not_followed_and_named(fake):
    away = {"Location": f"http://elsewhere.invalid/{KEY}"}
    asked = engine(fake, key=KEY)
    fake.script.append((307, b"", away))
    with pytest.raises(UserError, match=r"it redirects to http://elsewhere.invalid/\*\*\* .redirects are not followed"):
        list(asked.answer(iter([question("a")])))
    asked.close()
    fake.models_reply = (301, b"")
    with pytest.raises(UserError, match="it redirects to nowhere"):
        engine(fake)
