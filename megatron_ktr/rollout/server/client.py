"""The client of one ``vllm serve`` process: the HTTP routes that training needs, and their errors.

The control routes exist only if the server was started with ``VLLM_SERVER_DEV_MODE=1``, and generation from token ids
only with ``--enable-scale-out``. This module reports failures; ``rollout/server/pool.py`` decides what follows from
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_ktr.rollout.vllm.runner import runner_named_by

CONTROL_SECONDS = 30.0
"""The time limit of routes that do no real work. It is generous, because the server's machine may be busy."""


class ServerProblem(Exception):
    """A server did not do what it was asked to do. The message says what happened instead."""


class Unreachable(ServerProblem):
    """No connection, or one that broke."""


class TimedOut(ServerProblem):
    """No answer in time."""


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

    def __init__(self, url: str, *, max_requests: int, timeout_seconds: float) -> None:
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        # 8 connections are left for control requests while generation uses all others. ``trust_env=False`` ignores the
        # environment's proxies, which are meant for the internet and not for the nodes of a cluster.
        limits = httpx.Limits(
            max_connections=max_requests + 8,
            max_keepalive_connections=max_requests + 8,
            # Servers close idle connections after 5 s. A request sent into one at that moment would be lost, so the
            # client closes them earlier.
            keepalive_expiry=2.0,
        )
        self._http = httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(self, body: bytes) -> bytes:
        """Sends a body made by ``wire.encode_request`` and returns the raw answer, for ``wire.read_answer``."""
        return await self._send("POST", "/inference/v1/generate", content=body, seconds=self.timeout_seconds)

    async def check_health(self) -> None:
        await self._send("GET", "/health")

    async def facts(self) -> ServerFacts:
        body = await self._send("GET", "/server_info?config_format=json", seconds=6 * CONTROL_SECONDS)
        try:
            return ServerFacts.read(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerProblem(f"unreadable /server_info ({error!r})") from None

    async def weight_version(self) -> str:
        """The label of the weights that the server samples from; "default" until a label is set."""
        return str(await self._json("GET", "/weight_info", key="weight_version"))

    async def set_weight_version(self, label: str) -> None:
        await self._send("POST", "/update_weight_version", {"new_version": label})

    async def world_size(self) -> int:
        """The server's number of workers: tensor x pipeline x data parallel."""
        return int(await self._json("GET", "/get_world_size", key="world_size"))

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
        if not await self._json("POST", "/reset_prefix_cache?reset_running_requests=true", key="success"):
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

    async def _json(self, method: str, path: str, *, key: str) -> Any:
        body = await self._send(method, path)
        try:
            return json.loads(body)[key]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerProblem(f"unreadable answer of {path} ({error!r})") from None

    async def _send(
        self,
        method: str,
        path: str,
        json: Mapping[str, Any] | None = None,
        *,
        content: bytes | None = None,
        seconds: float = CONTROL_SECONDS,
    ) -> bytes:
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            # This limits the whole exchange; httpx's own timeouts limit only the silence between two pieces of it.
            async with asyncio.timeout(seconds):
                answer = await self._http.request(method, path, json=json, content=content, headers=headers)
        except TimeoutError:
            raise TimedOut(f"no answer to {path} within {seconds:g} s") from None
        except httpx.HTTPError as error:
            raise Unreachable(f"{type(error).__name__} {error}".strip()) from None
        if answer.status_code == 200:
            return answer.content
        problem = f"{path} answered {answer.status_code}: {_message(answer.content)}"
        if answer.status_code in (400, 413, 422):
            raise Refused(problem)
        raise ServerProblem(f"{problem}{_advice(path, answer.status_code)}")


def _admits_no_pixels(multimodal: Mapping[str, Any]) -> bool:
    limits = multimodal.get("limit_per_prompt") or {}
    counts = [limit.get("count") if isinstance(limit, dict) else limit for limit in limits.values()]
    return bool(multimodal.get("enable_mm_embeds")) and bool(counts) and not any(counts)


def _message(body: bytes) -> str:
    """vLLM's error message, or else the start of the body."""
    try:
        found = json.loads(body)
        return str((found.get("error") or found).get("message") or found)[:300]
    except (ValueError, AttributeError):
        return body[:200].decode("utf-8", errors="replace")


def _advice(path: str, status: int) -> str:
    if path.startswith("/inference") and status in (403, 404):
        return "; start it with --enable-scale-out"
    return "; start it with VLLM_SERVER_DEV_MODE=1" if status in (404, 405) else ""
