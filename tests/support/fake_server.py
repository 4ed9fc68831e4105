"""A stand-in for ``vllm serve``: the routes training uses, in threads, with misbehaviour on demand.

Its responses are a function of prompt, seed and weights, so that tests see whether the right weights answered, and that
it does not matter which server did. ``hold`` keeps its answers back until the test has seen what it waits for; nothing
here takes a time that a test relies on. ``script`` holds what its next answers do; afterwards it behaves.

Where loading breaks off it is left as vLLM 0.32 is: layers half-filled, into which nothing can be loaded and with which
an answer ends the engine, until the layers are made whole, with whatever was in memory.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import random
import socket
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from safetensors import safe_open

from tests.support.ports import free_port
from tests.support.tiny import EOS_ID, FIRST_SPECIAL_ID

LOGPROB = -1.5
Answer = tuple[int, bytes] | Callable[[Any], None] | None
"""Status and body; or what writes onto the connection and then closes it; or nothing."""
RUBBISH = -999.0
"""Weights of layers that were made whole without being loaded."""


class FakeServer:
    """Listens on a port of its own from the start; ``kill`` breaks all connections, ``restart`` comes back empty."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self._num_allowed: float = math.inf
        """Answers it may still give."""
        self.script: deque[str] = deque()
        self.reload_status = 200
        self.facts: dict[str, Any] = {"max_model_len": 1000, "logprobs_mode": "raw_logprobs"}
        self.multimodal: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}
        self.normalises_pixels = False
        self.token = ""
        """What requests must carry, but for /health."""
        self.is_lying = False
        """Whether it reports that it has loaded weights, and loads none."""
        self.is_mute = False
        """Whether it takes requests and says nothing to them, as if its network were cut."""
        self.mute_at = ""
        """The route that makes it mute."""
        self.breaks_off_health = False
        """Whether it breaks connections that ask for its health while it is mute, so that nobody waits for a limit."""
        self.num_unwelcome = 0
        """Requests without the token."""
        self.control: list[str] = []
        """Control routes called, in order, with what they were told."""
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = self.num_answers = self.num_answers_before_reload = 0
        self._lock = threading.Condition()
        self._is_dead = threading.Event()
        self._forget()
        self._listen(free_port())  # nobody is given it while this server is dead

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def hold(self, *, after: int = 0) -> None:
        """Gives ``after`` more answers; further requests run until ``release``."""
        with self._lock:
            self._num_allowed = after

    def release(self) -> None:
        with self._lock:
            self._num_allowed = math.inf
            self._lock.notify_all()

    def kill(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in self._http.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._is_dead.set()
        self.release()

    def restart(self) -> None:
        """The same address, initial weights."""
        self._is_dead.clear()
        self._forget()
        self._listen(self.port)

    def _forget(self) -> None:
        self.version = "default"
        self.weights: float | None = None
        """First element of the first tensor it was given."""
        self.is_half_loaded = self.is_update_open = False
        self.paused = self.frozen = False
        """Whether new requests wait, and whether running ones do."""

    def _listen(self, port: int) -> None:
        self._http = self._bind(port)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _bind(self, port: int) -> Listener:
        return Listener((self.host, port), _handler(self))

    # --- routes -----------------------------------------------------------------------------------------------

    def answer(self, path: str, body: Any, headers: Mapping[str, str]) -> Answer:
        """What is sent; None drops the connection."""
        parts = urlsplit(path)
        if parts.path == self.mute_at:
            self.is_mute = True
        if self.is_mute:
            if not (self.breaks_off_health and parts.path == "/health"):
                self._is_dead.wait()
            return None
        if parts.path == "/health":
            return 200, b""
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            self.num_unwelcome += 1
            return 401, json.dumps({"error": {"message": f"not {headers.get('Authorization')}"}}).encode()
        if parts.path == "/inference/v1/generate":
            if "prompt_logprobs" in body["sampling_params"]:
                return self._tell_weights(body, headers["X-Request-Id"])
            return self._generate(body, headers["X-Request-Id"])
        if parts.path == "/is_paused":
            return _json({"is_paused": self.paused})
        if parts.path == "/weight_info":
            return _json({"weight_version": self.version})
        if parts.path == "/get_world_size":
            return _json({"world_size": 2})
        if parts.path == "/server_info":
            multimodal = {"mm_device_do_normalize": self.normalises_pixels, **self.multimodal}
            config = {"model_config": {**self.facts, "multimodal_config": multimodal}}
            return _json({"vllm_config": config, "vllm_env": self.environment})
        return self._control(parts.path, parse_qs(parts.query), body)

    def _control(self, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, bytes]:
        name = path.removeprefix("/")
        if name == "pause":
            mode = query["mode"][0]
            with self._lock:
                self.paused = True
                self.frozen = mode == "keep"
                if mode == "wait":
                    self._lock.wait_for(lambda: self.running == 0)
            self.control.append(f"pause {mode}")
        elif name == "resume":
            with self._lock:
                self.paused = self.frozen = False
                self._lock.notify_all()
            self.control.append(name)
        elif name == "update_weight_version":
            self.version = body["new_version"]
            self.control.append(f"version {self.version}")
        elif name == "collective_rpc":
            assert self.paused and body["method"] == "reload_weights"
            return self._reload(body["kwargs"]), b"{}"
        elif name in ("init_weight_transfer_engine", "update_weights"):
            self.control.append(f"{name} {json.dumps(body)}")
            if name == "update_weights" and (self.reload_status != 200 or self.is_half_loaded):
                self.is_half_loaded, self.is_update_open = True, False
                return max(self.reload_status, 500), b"{}"
        elif name in ("start_weight_update", "finish_weight_update", "shutdown_weight_transfer_engine"):
            self.control.append(name)
            if self.is_update_open != (name == "finish_weight_update"):
                return 500, b"{}"
            self.is_update_open = name == "start_weight_update"
            if name == "finish_weight_update":
                # What was sent from GPU to GPU is not seen here: weights of one label are the same on every server.
                self.weights = RUBBISH if self.is_half_loaded else float(zlib.crc32(self.version.encode()))
                self.is_half_loaded = False
        elif name.startswith("reset_"):
            self.control.append(name)
            return _json({"success": True})
        else:
            return 404, b"{}"
        return _json({})

    def _reload(self, options: dict[str, Any]) -> int:
        if options.get("weights_iterator") == []:
            self.control.append("reload nothing")
            if self.is_half_loaded:
                self.weights, self.is_half_loaded = RUBBISH, False
            return 200
        self.control.append("reload")
        self.num_answers_before_reload = self.num_answers
        if self.reload_status != 200 or self.is_half_loaded:
            self.is_half_loaded = True
            return max(self.reload_status, 500)
        if not self.is_lying:
            self.weights = _first_number(Path(options["weights_path"]))
        return 200

    def _tell_weights(self, body: Any, name: str) -> Answer:
        """Log-probs of the prompt's tokens, which differ with the weights."""
        with self._lock:
            self._lock.wait_for(lambda: not self.paused)
        rng = random.Random(f"log-probs {self.weights}")
        tokens = body["token_ids"]
        rows = [None, *({str(token): {"logprob": -1 - rng.random(), "rank": 1}} for token in tokens[1:])]
        choice = {"weight_versions": [{"version": self.version, "start": 0, "end": 1}]}
        return _json({"request_id": name, "choices": [choice], "prompt_logprobs": rows})

    def _generate(self, body: Any, name: str) -> Answer:
        with self._lock:
            self._lock.wait_for(lambda: not self.paused)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            act = self.script.popleft() if self.script else "well"
            version, weights = self.version, self.weights
        try:
            self.bodies.append(body)
            if act == "hang":
                self._is_dead.wait()
            with self._lock:
                self._lock.wait_for(lambda: self._num_allowed > 0 and not self.frozen)
                self._num_allowed -= 1
            if act == "drop":
                return None
            if act.isdigit():
                return int(act), json.dumps({"error": {"message": "scripted"}}).encode()
            answer = answer_to(body, weights=weights, versions=[version, self.version])
            answer["request_id"] = f"generate-tokens-{name}"
            self.num_answers += 1
            if act in ON_THE_WIRE:
                return ON_THE_WIRE[act]
            return MISBEHAVIOUR[act](answer) if act in MISBEHAVIOUR else _json(answer)
        finally:
            with self._lock:
                self.running -= 1
                self._lock.notify_all()


def answer_to(body: dict[str, Any], *, weights: float | None, versions: list[str]) -> dict[str, Any]:
    """The responses as a function of prompt, seeds and weights; mixed where the version changed meanwhile."""
    params = body["sampling_params"]
    choices = []
    for index in range(params["n"]):
        rng = random.Random(f"{body['token_ids']} {params['seed'] + index} {weights}")
        length = rng.randint(2, params["max_tokens"])
        tokens = [rng.randrange(1, FIRST_SPECIAL_ID) for _ in range(length)]
        is_finished = length < params["max_tokens"]
        if is_finished:
            tokens[-1] = params["stop_token_ids"][0]
        bounds = [0, length] if versions[0] == versions[1] else [0, 1, length]
        spans = [
            {"version": version, "start": start, "end": end}
            for version, start, end in zip(versions, bounds[:-1], bounds[1:], strict=False)
        ]
        choices.append(
            {
                "index": index,
                "token_ids": tokens,
                "logprobs": {"content": [{"token_id": token, "logprob": LOGPROB} for token in tokens]},
                "finish_reason": "stop" if is_finished else "length",
                "weight_versions": spans,
            }
        )
    return {"choices": choices, "usage": {"prompt_tokens": len(body["token_ids"])}}


def _edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], tuple[int, bytes]]:
    def act(answer: dict[str, Any]) -> tuple[int, bytes]:
        edit(answer)
        return _json(answer)

    return act


MISBEHAVIOUR: dict[str, Callable[[dict[str, Any]], tuple[int, bytes]]] = {
    "not json": lambda answer: (200, b"<html>proxy</html>"),
    "a list": lambda answer: (200, b"[1, 2]"),
    "half of it": lambda answer: (200, _json(answer)[1][:-20]),
    "no choices": _edited(lambda answer: answer.pop("choices")),
    "one response missing": _edited(lambda answer: answer["choices"].pop()),
    "no log-probs": _edited(lambda answer: answer["choices"][0].update(logprobs=None)),
    "a log-prob missing": _edited(lambda answer: answer["choices"][1]["logprobs"]["content"].pop()),
    "a log-prob of nan": _edited(lambda a: a["choices"][0]["logprobs"]["content"][0].update(logprob=float("nan"))),
    "no log-prob found": _edited(lambda a: a["choices"][0]["logprobs"]["content"][0].update(logprob=-9999.0)),
    "a token outside the vocabulary": _edited(
        lambda a: (
            a["choices"][0]["token_ids"].__setitem__(0, 5000),
            a["choices"][0]["logprobs"]["content"][0].update(token_id=5000),
        )
    ),
    "no tokens": _edited(lambda a: a["choices"][0].update(token_ids=[], logprobs={"content": []}, weight_versions=[])),
    "aborted": _edited(lambda answer: answer["choices"][1].update(finish_reason="abort")),
    "no versions": _edited(lambda answer: answer["choices"][1].update(weight_versions=None)),
    "another request": _edited(lambda answer: answer.update(request_id="generate-tokens-of-another")),
    "a response twice": _edited(lambda a: a["choices"].__setitem__(1, a["choices"][0])),
    "too many responses": _edited(lambda a: a["choices"].append({**a["choices"][0], "index": 3})),
    "a positive log-prob": _edited(lambda a: a["choices"][0]["logprobs"]["content"][0].update(logprob=0.5)),
    "a log-prob without end": lambda answer: (200, _json(answer)[1].replace(b"-1.5", b"1" + 400 * b"0", 1)),
    "log-probs in another order": _edited(lambda a: a["choices"][0]["logprobs"]["content"].append(0)),
    "tokens as text": _edited(lambda a: a["choices"][0].update(token_ids="abc")),
    "nested too deeply": lambda answer: (200, b"[" * 100_000 + answer["request_id"].encode()),
    "on after its end": _edited(
        lambda a: (
            a["choices"][0]["token_ids"].__setitem__(0, EOS_ID),
            a["choices"][0]["logprobs"]["content"][0].update(token_id=EOS_ID),
        )
    ),
    "another prompt": _edited(lambda answer: answer["usage"].update(prompt_tokens=1)),
}


def _said(head: str, *, body: bytes = b"", again: bytes = b"") -> Callable[[Any], None]:
    """Writes onto the connection as it is; ``again`` for ever, until the client has had enough."""

    def write(handler: Any) -> None:
        handler.wfile.write(head.replace("\n", "\r\n").encode() + body)
        while again:
            handler.wfile.write(again)

    return write


_LAST = "Connection: close\n"
"""Of replies that are whole: a client would else send its next request into a connection that is just being closed."""

ON_THE_WIRE: dict[str, Callable[[Any], None]] = {
    "garbage": _said("hello\nworld\n\n"),
    "endless headers": _said("HTTP/1.1 200 OK\n", again=b"X-Header: " + 1000 * b"x" + b"\r\n"),
    "an endless header": _said("HTTP/1.1 200 OK\nX-Header: ", again=1000 * b"x"),
    "an endless reply": _said("HTTP/1.1 200 OK\nContent-Type: application/json\n\n", again=bytes(1 << 16)),
    "endless chunks": _said("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n", again=b"ff\r\n" + bytes(255) + b"\r\n"),
    "too long a length": _said(f"HTTP/1.1 200 OK\nContent-Length: {10**30}\n\n"),
    "two lengths": _said("HTTP/1.1 200 OK\nContent-Length: 5\nContent-Length: 6\n\nhello!"),
    "half closed": _said("HTTP/1.1 200 OK\nContent-Length: 500\n\n{"),
    "packed": _said("HTTP/1.1 200 OK\nContent-Encoding: gzip\n\n", body=gzip.compress(bytes(1 << 20))),
    "a redirect": _said(f"HTTP/1.1 307 Away\nLocation: http://127.0.0.1:9/\n{_LAST}Content-Length: 0\n\n"),
    "cookies": _said("HTTP/1.1 500 No\n" + 100 * "Set-Cookie: a=b\n" + f"{_LAST}Content-Length: 0\n\n"),
}
"""Misbehaviour below the answer: what is written onto the connection, which is then closed."""


def _json(value: Any) -> tuple[int, bytes]:
    return 200, json.dumps(value).encode()


def _first_number(directory: Path) -> float:
    with safe_open(sorted(directory.glob("*.safetensors"))[0], framework="pt") as file:
        return float(file.get_tensor(sorted(file.keys())[0]).flatten()[0])


class Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what this server is for."""


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802
            self._respond(None)

        def do_POST(self) -> None:  # noqa: N802
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._respond(json.loads(raw) if raw else None)

        def _respond(self, body: Any) -> None:
            found = server.answer(self.path, body, self.headers)
            if callable(found):
                self.close_connection = True
                with contextlib.suppress(OSError):
                    found(self)
                return
            if found is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, content = found
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler
