"""The client of one ``vllm serve`` process: the HTTP routes that training needs, and their errors.

The control routes exist only if the server was started with ``VLLM_SERVER_DEV_MODE=1``, and generation from token ids
only with ``--enable-scale-out``. This module reports failures; ``rollout/server/pool.py`` decides what follows from
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from megatron_ktr.errors import one_line
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.rollout.vllm.runner import runner_named_by
from megatron_ktr.web.address import ApiKey
from megatron_ktr.web.reading import PLAIN, Unfit, no_cookies, read_bounded

CONTROL_SECONDS = 30.0
"""The time limit of routes that do no real work. It is generous, because the server's machine may be busy."""


TOKEN_ADVICE = (
    "the token: --server-token-env NAME or --server-token-file FILE, the one that the server was started with"
)
Kind = TypeVar("Kind", str, int, bool)
MOST_CONTROL_BYTES = 1 << 22
"""The largest answer of a control route. The settings of a server are the longest of them, with some 50 kB."""
_FORGETS = ((socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),)
"""Closing a connection drops what it has not delivered. By default the kernel goes on sending for minutes: a request to
load weights that was given up because the network was cut would arrive when the network is back, maybe after newer
weights did, and leave the old ones under the label of the new ones."""
_MOST_WORDS = 300
"""Characters of what a server says, in a message."""


class ServerProblem(Exception):
    """A server did not do what it was asked to do. The message says what happened instead, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message)[: 2 * _MOST_WORDS])


class Unreachable(ServerProblem):
    """No connection, or one that broke."""


class Mistaken(ServerProblem):
    """An answer to another request."""


class TimedOut(ServerProblem):
    """No answer in time."""


class Locked(ServerProblem):
    """The server wants another token (401, 403)."""


class Refused(ServerProblem):
    """The server rejected the request as invalid (400, 413, 422). Another server would reject it, too."""


@dataclass(frozen=True)
class ServerFacts:
    """The settings that a server reports (``/server_info``), as far as sampling depends on them."""

    max_model_len: int
    logprobs_mode: str
    normalises_pixels: bool
    """Whether the model normalises patches itself. It must not, because the trainer's patches are normalised already.
    """
    has_encoder: bool
    """False if the server was started to take features in place of pixels. Pixels would then crash its engine."""
    runner: str
    """The model runner that the server was told to use (``rollout/vllm/runner.py``)."""

    @classmethod
    def read(cls, info: Mapping[str, Any]) -> ServerFacts:
        model = info["vllm_config"]["model_config"]
        multimodal = model.get("multimodal_config") or {}
        return cls(
            max_model_len=int(model["max_model_len"]),
            logprobs_mode=str(model["logprobs_mode"]),
            normalises_pixels=bool(multimodal.get("mm_device_do_normalize", False)),
            has_encoder=not _admits_no_pixels(multimodal),
            runner=runner_named_by(info.get("vllm_env") or {}),
        )


class ServerClient:
    """Talks to the server at ``url``; every method raises ``ServerProblem`` or a subclass."""

    def __init__(self, url: str, *, max_requests: int, timeout_seconds: float, token: ApiKey | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.control_seconds = CONTROL_SECONDS
        self._token = token
        # 8 connections are left for control requests while generation uses all others. ``trust_env=False`` ignores the
        # environment's proxies, which are meant for the internet and not for the nodes of a cluster.
        limits = httpx.Limits(
            max_connections=max_requests + 8,
            max_keepalive_connections=max_requests + 8,
            # Servers close idle connections after 5 s. A request sent into one at that moment would be lost, so the
            # client closes them earlier.
            keepalive_expiry=2.0,
        )
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=None,
            transport=httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=_FORGETS),
            trust_env=False,
            # Another address would get the token.
            follow_redirects=False,
            headers=PLAIN | ({} if token is None else token.header),
            cookies=no_cookies(),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(self, body: bytes, *, most_bytes: int = MOST_CONTROL_BYTES) -> bytes:
        """Sends a body made by ``wire.encode_request`` and returns the raw answer, for ``wire.read_answer``.

        Raises:
            ServerProblem: also where the answer is not the one to this request. Every request has a random name, which
                vLLM repeats: a proxy may mix up answers, or keep one.
        """
        name = secrets.token_hex(8)
        answer = await self._send(
            "POST",
            "/inference/v1/generate",
            content=body,
            seconds=self.timeout_seconds,
            most_bytes=most_bytes,
            headers={"X-Request-Id": name},
        )
        if name.encode() not in answer:
            raise Mistaken("an answer without the name of the request: it answers another one")
        return answer

    async def check_health(self) -> None:
        await self._send("GET", "/health")

    async def facts(self) -> ServerFacts:
        body = await self._send("GET", "/server_info?config_format=json", seconds=6 * self.control_seconds)
        try:
            return ServerFacts.read(_parsed(body))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ServerProblem(f"unreadable /server_info ({error!r})") from None

    async def weight_version(self) -> str:
        """The label of the weights that the server samples from; "default" until a label is set."""
        return await self._json("GET", "/weight_info", key="weight_version", kind=str)

    async def set_weight_version(self, label: str) -> None:
        await self._send("POST", "/update_weight_version", {"new_version": label})

    async def world_size(self) -> int:
        """The server's number of workers: tensor x pipeline x data parallel."""
        number = await self._json("GET", "/get_world_size", key="world_size", kind=int)
        if not 0 < number < 2**16:
            raise ServerProblem(f"it reports {number} workers")
        return number

    async def is_paused(self) -> bool:
        return await self._json("GET", "/is_paused", key="is_paused", kind=bool)

    async def pause(self, *, keep_requests: bool) -> None:
        """Pauses sampling. With ``keep_requests`` the server stops at once and continues the running requests later;
        without, it first finishes the running requests of all clients."""
        mode = "keep" if keep_requests else "wait"
        await self._send("POST", f"/pause?mode={mode}", seconds=self.timeout_seconds)

    async def resume(self) -> None:
        await self._send("POST", "/resume")

    async def reload_weights(self, directory: str) -> None:
        """Makes the server's workers load safetensors from a directory, which they must see under the same path."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": directory}}
        await self._send("POST", "/collective_rpc", call, seconds=self.timeout_seconds)

    async def end_broken_reload(self) -> None:
        """Completes the layers that an interrupted reload has left half-filled, so that the next reload can begin.

        Before this call vLLM loads nothing into such layers, and computing with them crashes its engine. After it the
        layers hold arbitrary values. The call reloads an empty list of weights, which ends the open reload, or fails if
        that is impossible.
        """
        call = {"method": "reload_weights", "kwargs": {"weights_iterator": []}}
        await self._send("POST", "/collective_rpc", call, seconds=self.timeout_seconds)

    async def end_broken_update(self) -> None:
        """Does what ``end_broken_reload`` does, for weights that were sent tensor by tensor."""
        with contextlib.suppress(ServerProblem):  # refused if no update is open
            await self.finish_weight_update()
        await self.start_weight_update()
        await self.finish_weight_update()

    async def reset_caches(self) -> None:
        """Resets all caches computed with earlier weights. Running requests are computed again from their tokens."""
        await self._send("POST", "/reset_mm_cache")
        await self._send("POST", "/reset_encoder_cache")
        path = "/reset_prefix_cache?reset_running_requests=true"
        if not await self._json("POST", path, key="success", kind=bool):
            raise ServerProblem("its prefix cache could not be reset")

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        await self._post_long("/init_weight_transfer_engine", {"init_info": dict(init_info)})

    async def shutdown_weight_transfer_engine(self) -> None:
        await self._post_long("/shutdown_weight_transfer_engine")

    async def start_weight_update(self) -> None:
        await self._post_long("/start_weight_update")

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        await self._post_long("/update_weights", {"update_info": dict(update_info)})

    async def finish_weight_update(self) -> None:
        await self._post_long("/finish_weight_update")

    async def _post_long(self, path: str, json: Mapping[str, Any] | None = None) -> None:
        await self._send("POST", path, json, seconds=self.timeout_seconds)

    async def _json(self, method: str, path: str, *, key: str, kind: type[Kind]) -> Kind:
        body = await self._send(method, path)
        try:
            value = _parsed(body)[key]
        except (ValueError, LookupError, TypeError) as error:
            raise ServerProblem(f"unreadable answer of {path} ({error!r})") from None
        if type(value) is not kind:
            raise ServerProblem(f"unreadable answer of {path}: {key} is {value!r}")
        return value

    async def _send(
        self,
        method: str,
        path: str,
        json: Mapping[str, Any] | None = None,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float | None = None,
        most_bytes: int = MOST_CONTROL_BYTES,
    ) -> bytes:
        seconds = self.control_seconds if seconds is None else seconds
        sent = {**(headers or {}), **({} if content is None else {"Content-Type": "application/json"})}
        try:
            # This limits the whole exchange; httpx's own timeouts limit only the silence between two pieces of it.
            async with asyncio.timeout(seconds):
                async with self._http.stream(method, path, json=json, content=content, headers=sent) as answer:
                    body = await read_bounded(answer, most_bytes=most_bytes)
        except TimeoutError:
            raise TimedOut(f"no answer to {path} within {seconds:g} s") from None
        except Unfit as error:
            raise ServerProblem(self._hidden(f"{path}: {error}")) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise Unreachable(self._hidden(f"{type(error).__name__} {error}").strip()) from None
        status = answer.status_code
        if status == 200:
            return body
        problem = self._hidden(f"{path} answered {status}: {_message(body)}")
        if status == 401 or (status == 403 and not path.startswith("/inference")):
            raise Locked(f"{problem}; {TOKEN_ADVICE}")
        if status in (400, 413, 422):
            raise Refused(problem)
        raise ServerProblem(f"{problem}{_advice(path, status)}")

    def _hidden(self, text: str) -> str:
        return text if self._token is None else self._token.hide(text)


def _parsed(body: bytes) -> Any:
    return parse_json(body.decode("utf-8"))


def _admits_no_pixels(multimodal: Mapping[str, Any]) -> bool:
    limits = multimodal.get("limit_per_prompt") or {}
    counts = [limit.get("count") if isinstance(limit, dict) else limit for limit in limits.values()]
    return bool(multimodal.get("enable_mm_embeds")) and bool(counts) and not any(counts)


def _message(body: bytes) -> str:
    """vLLM's error message, or else the start of the body."""
    try:
        found = _parsed(body[:MOST_CONTROL_BYTES])
        return str((found.get("error") or found).get("message") or found)[:_MOST_WORDS]
    except (ValueError, AttributeError):
        return body[:_MOST_WORDS].decode("utf-8", errors="replace")


def _advice(path: str, status: int) -> str:
    if path.startswith("/inference") and status in (403, 404):
        return "; start it with --enable-scale-out"
    if 300 <= status < 400:
        return "; redirects are not followed: give the address that answers"
    return "; start it with VLLM_SERVER_DEV_MODE=1" if status in (404, 405) else ""
