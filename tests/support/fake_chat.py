"""A stand-in for a server with OpenAI's chat API, in threads, with misbehaviour on demand.

``script`` holds what its next completions do; afterwards it behaves. Its answer names the question's text and the
number of pictures, so that tests see what arrived.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeChat:
    """Listens on a port of its own until ``close``."""

    def __init__(self, *, owned_by: str = "vllm", models: tuple[str, ...] = ("tiny",), key: str = "") -> None:
        self.script: deque[Any] = deque()
        self.models_reply: tuple[int, bytes] | None = None
        self.bodies: list[dict[str, Any]] = []
        self.most_running = self.running = 0
        self.owned_by, self.models, self.key = owned_by, models, key
        self.obeys_media_options = True
        self.lock = threading.Lock()
        self.released = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()


def completion(text: Any, *, reason: str = "stop", prompt_tokens: int = 7, **message: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 3, "prompt_tokens": prompt_tokens}}).encode()


def error(message: str, **fields: str) -> bytes:
    return json.dumps({"error": {"message": message, **fields}}).encode()


def parts_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of the last message."""
    content = body["messages"][-1]["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _answer(fake: FakeChat, body: dict[str, Any]) -> bytes:
    parts = parts_of(body)
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    num_frames = sum(part["type"] == "image_url" for part in parts)
    for part in parts:
        if part["type"] == "video_url":
            frames = part["video_url"]["url"].count(",")
            limit = body.get("media_io_kwargs", {}).get("video", {}).get("num_frames", 32)
            if not fake.obeys_media_options:
                limit = 32
            num_frames += frames if limit == -1 else min(frames, limit)
    return completion(f"{text}|{num_frames}", prompt_tokens=10 + num_frames)


def _handler(fake: FakeChat) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            if not self._is_admitted():
                return
            cards = [{"id": name, "owned_by": fake.owned_by, "root": f"org/{name}"} for name in fake.models]
            self._send(*(fake.models_reply or (200, json.dumps({"data": cards}).encode())))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._is_admitted():
                return
            with fake.lock:
                fake.bodies.append(body)
                fake.running += 1
                fake.most_running = max(fake.most_running, fake.running)
                act = fake.script.popleft() if fake.script else None
            try:
                self._act(act, body)
            finally:
                with fake.lock:
                    fake.running -= 1

        def _act(self, act: Any, body: dict[str, Any]) -> None:
            if act == "close":
                # Zero linger: the connection is reset, as by a process that died.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif act == "hang":
                fake.released.wait()
                self.close_connection = True
            elif act == "drip":
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                while not fake.released.wait(0.05):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                self.close_connection = True
            elif act == "echo key":
                self._send(500, self.headers.get("Authorization", "").encode())
            elif act == "say key":
                self._send(200, completion(self.headers.get("Authorization", "")))
            elif callable(act):
                self._send(*act(body))
            elif act is not None:
                self._send(*act)
            else:
                self._send(200, _answer(fake, body))

        def _is_admitted(self) -> bool:
            if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                self._send(401, error(f"Incorrect key: {self.headers.get('Authorization')}"))
                return False
            return True

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # the client has given up
                self.close_connection = True

    return Handler
