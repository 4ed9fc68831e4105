"""Servers that lie, stay paused, go away for good, or do anything at random: what is trained on stays right."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.errors import StepAbandoned, UserError
from megatron_ktr.rollout.server.client import ServerClient
from megatron_ktr.rollout.server.fingerprint import agreed
from megatron_ktr.rollout.server.pool import COUNTS
from megatron_ktr.types import RolloutGroup
from megatron_ktr.web import leaving
from megatron_ktr.web.address import ApiKey
from tests.rollout.test_server_pool import (
    counts,
    expected,
    in_background,
    make_engine,
    prompts,
    start,  # noqa: F401 - a fixture
    tensors,
)
from tests.support.fake_server import MISBEHAVIOUR, ON_THE_WIRE, FakeServer
from tests.support.patience import PATIENCE_SECONDS, wait_until

SEEDS = range(6)
"""The nightly mode of tests/faults has more."""
TOKEN = "a-token-of-enough-length"


@pytest.mark.parametrize("seed", SEEDS)
def test_random_faults_change_no_response(start, tmp_path, seed: int) -> None:  # noqa: F811
    """Five updates and batches on three servers, of which any may misbehave, refuse, load nothing, lie about weights,
    die and come back empty at any moment, as long as most of them agree. Every response is the one of a healthy
    server with the weights of its step, and none is missing or there twice."""
    rng = random.Random(seed)
    engine, servers = start(3, wait_seconds=PATIENCE_SECONDS, max_retries=1)
    acts = [*MISBEHAVIOUR, *ON_THE_WIRE, "drop", "500", "503", "400", "401"]
    for step in range(1, 6):
        for server in servers:
            server.script.extend(rng.sample(acts, rng.randrange(3)))
        victim = rng.choice(servers)
        kind = rng.choice(["none", "dies", "is restarted", "does not load", "lies"])
        victim.reload_status = 500 if kind == "does not load" else 200
        victim.is_lying = kind == "lies"
        if kind in ("dies", "is restarted"):
            victim.kill()
        if kind == "is restarted":
            victim.restart()
        engine.load_weights(tensors(float(step)))
        running = in_background(lambda step=step: engine.generate(prompts(8), step=step))
        if rng.random() < 0.5 and not victim._is_dead.is_set():
            victim.kill()
        assert running() == wanted(tmp_path, step), f"seed {seed}, step {step}, {kind}"
        if victim._is_dead.is_set():
            victim.restart()
        for server in servers:
            server.script.clear()
            server.reload_status, server.is_lying = 200, False


_WANTED: dict[int, list[RolloutGroup]] = {}


def wanted(folder: Path, step: int) -> list[RolloutGroup]:
    if step not in _WANTED:
        _WANTED[step] = expected(folder, 8, weights=float(step), step=step)
    return _WANTED[step]


def test_a_server_that_says_it_has_loaded_and_has_not_is_taken_out(start, tmp_path) -> None:  # noqa: F811
    """Its label is right. Only what it computes tells."""
    engine, (first, liar) = start(2)
    engine.load_weights(tensors(1.0))
    liar.is_lying = True
    engine.load_weights(tensors(2.0))
    assert liar.version == first.version and liar.weights == 1.0
    assert engine.generate(prompts(9)) == expected(tmp_path, 9, weights=2.0)
    assert liar.num_answers == 0 and counts(engine)["taken_out"] == 1
    liar.is_lying = False
    wait_until(lambda: engine.pool._servers[1].is_in)
    assert liar.weights == 2.0, "its weights were given to it again"


def test_two_servers_that_disagree_end_the_run(start) -> None:  # noqa: F811
    """Nobody can tell which of them is right, and half of the responses would be another policy's. (One that computes
    what it did before the update is known to be wrong.)"""
    engine, (_, liar) = start(2)
    engine.load_weights(tensors(1.0))
    liar.weights, liar.is_lying = 77.0, True
    with pytest.raises(StepAbandoned, match="the same label of weights and compute different log-probs"):
        engine.load_weights(tensors(2.0))
    assert agreed({"a": (0.0,), "b": (0.01,), "c": (1.0,)}, limit=0.02) == ["a", "b"]
    assert agreed({"a": (0.0,)}, limit=0.02) == ["a"] and agreed({}, limit=0.02) == []


def test_another_server_at_the_same_port_is_not_believed(start, tmp_path) -> None:  # noqa: F811
    """It has the right label, and another model's weights: they are given to it anew."""
    engine, (server, other) = start(2)
    engine.load_weights(tensors(1.0))
    label = server.version
    server.kill()
    engine.generate(prompts(4))
    server._forget()
    server.version, server.weights = label, 77.0
    server._is_dead.clear()
    server._listen(server.port)
    wait_until(lambda: engine.pool._servers[0].is_in)
    assert server.weights == 1.0
    assert engine.generate(prompts(8)) == expected(tmp_path, 8, weights=1.0)
    assert other.num_answers < 12, "both are asked"


def test_a_server_left_paused_at_the_very_end_of_an_update_is_resumed(start, tmp_path) -> None:  # noqa: F811
    """It is healthy and has the right label. A request to it would wait for ever."""
    engine, (server, _) = start(2)
    engine.load_weights(tensors(1.0))
    server.kill()
    engine.generate(prompts(4))
    server.restart()
    server.version, server.weights, server.paused = f"{engine.replicas.run}-1", 1.0, True
    wait_until(lambda: engine.pool._servers[0].is_in)
    assert not server.paused
    assert engine.generate(prompts(8)) == expected(tmp_path, 8, weights=1.0)


def test_a_run_without_servers_waits_for_one(start, tmp_path) -> None:  # noqa: F811
    engine, servers = start(2, wait_seconds=PATIENCE_SECONDS)
    engine.load_weights(tensors(1.0))
    for server in servers:
        server.kill()
    result = in_background(lambda: engine.generate(prompts(4)))
    wait_until(lambda: engine.pool._alone_since is not None)
    servers[1].restart()
    assert result() == expected(tmp_path, 4, weights=1.0)
    # Weights that nobody takes now are given to whoever comes back.
    servers[1].kill()
    engine.load_weights(tensors(2.0))
    result = in_background(lambda: engine.generate(prompts(4)))
    servers[0].restart()
    assert result() == expected(tmp_path, 4, weights=2.0)


def test_a_run_that_is_asked_to_leave_does_not_wait_for_servers(start) -> None:  # noqa: F811
    engine, (server,) = start(1, wait_seconds=PATIENCE_SECONDS)
    server.kill()
    failed = in_background(lambda: pytest.raises(StepAbandoned, engine.generate, prompts(4)))
    wait_until(lambda: engine.pool._alone_since is not None)
    leaving.ask_to_leave("SIGTERM")
    try:
        error = failed().value
    finally:
        leaving.forget()
    assert error.asked_by == "SIGTERM" and "no vLLM server is left" in str(error) and server.url in str(error)


def test_an_update_waits_neither_for_a_silent_server_nor_for_who_looks_after_it(start, tmp_path) -> None:  # noqa: F811
    """Its network is cut: requests go out, and nothing comes back. The others get their weights, and come back
    themselves, while somebody still waits for its answer."""
    engine, (mute, well) = start(2, wait_seconds=PATIENCE_SECONDS)
    engine.load_weights(tensors(1.0))
    mute.mute_at = "/inference/v1/generate"
    silent = engine.pool._servers[0]
    silent.client.timeout_seconds = silent.client.control_seconds = 0.2
    assert engine.generate(prompts(6)) == expected(tmp_path, 6, weights=1.0)
    silent.client.control_seconds, before = PATIENCE_SECONDS, silent.returning
    wait_until(lambda: silent.returning is not before and silent.lock.locked())
    engine.load_weights(tensors(2.0))
    assert silent.lock.locked() and well.weights == 2.0 and mute.weights == 1.0
    assert engine.generate(prompts(6)) == expected(tmp_path, 6, weights=2.0)
    well.kill()
    result = in_background(lambda: engine.generate(prompts(6)))
    wait_until(lambda: not engine.pool._servers[1].is_in)
    well.restart()
    assert result() == expected(tmp_path, 6, weights=2.0) and silent.lock.locked()


@pytest.mark.parametrize("route", ["/pause", "/collective_rpc", "/resume"])
def test_a_server_that_vanishes_in_an_update_does_not_hold_it_up(
    start,  # noqa: F811
    tmp_path,
    caplog,
    route: str,
) -> None:
    """Draining and loading may take as long as a request, so only its health tells. When it is back it gets the
    weights, wherever the update broke off."""
    engine, (mute, well) = start(2, wait_seconds=PATIENCE_SECONDS)
    engine.load_weights(tensors(1.0))
    mute.mute_at, mute.breaks_off_health = route, True
    engine.load_weights(tensors(2.0))
    assert well.weights == 2.0 and counts(engine) == {"taken_out": 1}
    assert "not healthy while it was given weights" in caplog.text, "nobody has waited for its answer"
    assert engine.generate(prompts(6)) == expected(tmp_path, 6, weights=2.0) and not mute.num_answers
    mute.mute_at, mute.is_mute = "", False
    wait_until(lambda: engine.pool._servers[0].is_in)
    assert mute.weights == 2.0 and not mute.paused
    assert engine.generate(prompts(12)) == expected(tmp_path, 12, weights=2.0)


@pytest.mark.parametrize("route", ["/server_info", "/inference/v1/generate"])
def test_a_server_that_vanishes_on_its_way_back_does_not_hold_an_update_up(start, tmp_path, route: str) -> None:  # noqa: F811
    """It is healthy again, and is cut off once more before it has told its settings or computed log-probs."""
    engine, (mute, well) = start(2, wait_seconds=PATIENCE_SECONDS)
    engine.load_weights(tensors(1.0))
    server = engine.pool._servers[0]
    server.client.timeout_seconds = server.client.control_seconds = 9 * PATIENCE_SECONDS
    mute.is_mute = mute.breaks_off_health = True
    assert engine.generate(prompts(6)) == expected(tmp_path, 6, weights=1.0)
    server.facts, mute.mute_at, mute.is_mute = None, route, False
    wait_until(lambda: mute.is_mute)
    wait_until(lambda: server.is_silent)
    engine.load_weights(tensors(2.0))
    assert well.weights == 2.0 and mute.weights == 1.0
    mute.mute_at, mute.is_mute = "", False
    wait_until(lambda: server.is_in)
    assert mute.weights == 2.0


@pytest.mark.parametrize("route", ["/health", "/weight_info"])
def test_a_server_on_its_way_back_gets_no_weights_during_an_update_nor_under_an_older_label(
    start,  # noqa: F811
    route: str,
) -> None:
    """The update begins while the restarted server is about to answer. It does not wait for its health, which is
    silence until now, and the server's answer comes in the middle of it."""
    engine, (late, well) = start(2, wait_seconds=PATIENCE_SECONDS)
    engine.load_weights(tensors(1.0))
    late.kill()
    engine.generate(prompts(4))
    late.control.clear()
    server, in_the_middle, told = engine.pool._servers[0], threading.Event(), []

    def answer_late(path: str, body: Any, headers: Any, answer: Callable[..., Any] = late.answer) -> Any:
        if path == route:
            asked.append(server.returning)
            in_the_middle.wait(PATIENCE_SECONDS)
        return answer(path, body, headers)

    def load(path: str, body: Any, headers: Any, answer: Callable[..., Any] = well.answer) -> Any:
        if path == "/collective_rpc":
            in_the_middle.set()
            wait_until(asked[0].done)
            told.extend(late.control)
        return answer(path, body, headers)

    asked: list[asyncio.Task[None]] = []
    late.answer, well.answer = answer_late, load
    late.restart()
    wait_until(lambda: bool(asked))
    engine.load_weights(tensors(2.0))
    wait_until(lambda: server.is_in)
    assert not told or route != "/health", "whoever is silent has no part in the update"
    new = f"{engine.replicas.run}-2"
    assert [call for call in late.control if "version" in call] == [f"version {new}-loading", f"version {new}"]
    assert late.weights == 2.0


def test_a_request_that_was_given_up_is_not_delivered_later() -> None:
    """A machine takes part of it, and no more. Should the kernel keep the rest and go on trying, a reload of old
    weights could arrive after one of new weights."""

    async def give_up(listener: socket.socket) -> socket.socket:
        port = listener.getsockname()[1]
        client = ServerClient(f"http://127.0.0.1:{port}", max_requests=1, timeout_seconds=PATIENCE_SECONDS)
        request = asyncio.create_task(client.generate(b"x" * (1 << 18)))
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        connection.setblocking(True)
        await asyncio.to_thread(connection.recv, 1, socket.MSG_PEEK)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await client.close()
        return connection

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        with asyncio.run(give_up(listener)) as connection, pytest.raises(ConnectionResetError):
            while connection.recv(1 << 16):
                pass


def test_the_token_is_sent_everywhere_and_a_wrong_one_ends_the_run_at_the_start(tmp_path) -> None:
    server = FakeServer()
    server.token = TOKEN
    with pytest.raises(UserError, match=r"--server-urls: http.*answered 401.*--server-token-env"):
        make_engine([server], tmp_path)
    assert server.num_unwelcome == 1, "it is not asked again"
    with pytest.raises(UserError) as refused:
        make_engine([server], tmp_path, token=ApiKey("another-token-of-length"))
    assert "another-token" not in str(refused.value) and "not Bearer ***" in str(refused.value)
    before = server.num_unwelcome
    engine = make_engine([server], tmp_path, token=ApiKey(TOKEN))
    engine.load_weights(tensors(1.0))
    assert len(engine.generate(prompts(3))) == 3 and server.num_unwelcome == before
    assert TOKEN not in repr(engine.pool.settings)
    engine.close()
    server.kill()


def test_many_failures_leave_nothing_behind(start, tmp_path) -> None:  # noqa: F811
    """A thousand bad answers, of every kind, keep no object, no task and no connection."""
    engine, (server,) = start(1, backoff_seconds=0.0, wait_seconds=PATIENCE_SECONDS, max_retries=10**6)
    acts = ["cookies", "500", "garbage", "not json", "drop", "a redirect", "another request", "half closed"]

    def fail(number: int) -> None:
        server.script.extend(acts[index % len(acts)] for index in range(number))
        assert len(engine.generate(prompts(1))) == 1
        server.bodies.clear()
        server._http.connections.clear()

    fail(80)
    gc.collect()
    threads, objects = threading.active_count(), len(gc.get_objects())
    fail(1000)
    gc.collect()
    # One object for each failure would be a thousand.
    assert len(gc.get_objects()) < objects + 500 and threading.active_count() <= threads + 2
    assert len(engine.counts) == len(COUNTS) and not engine.pool._servers[0].running
    assert (
        engine.counts["server/retries"] >= 1080
    )  # a busy machine adds some, of connections that were closed meanwhile
