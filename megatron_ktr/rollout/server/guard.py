"""Who may use a server: an ASGI middleware in front of all of vLLM's routes.

vLLM's own ``--api-key`` protects /v1, /v2, /inference and /cohere alone. The routes that change weights, pause the
engine or call methods of its workers (``/collective_rpc``) stay open. This middleware stands before every route:

    with a token       every request must carry it (``Authorization: Bearer``), else 401; /health alone is open
    without a token    the server listens on this machine alone (``serve.py`` sees to that), and requests that a browser
                       sends for a page are refused with 403: a page from anywhere could otherwise reach it, also
                       under a name of its own that leads to this machine

``serve.py`` names the place of the token in an environment variable, which the server's processes inherit; the token
itself is read by each of them. Nothing here imports torch or vLLM.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from megatron_ktr.errors import UserError
from megatron_ktr.web.address import ApiKey, is_loopback

SOURCE = "MEGATRON_KTR_SERVER_TOKEN_SOURCE"
"""Set by ``serve.py``: ``env NAME``, ``file PATH``, or nothing."""
PATH = "megatron_ktr.rollout.server.guard.Guard"
"""This middleware, for ``vllm serve --middleware``."""
OPEN_PATHS = ("/health",)
LEAST_CHARACTERS = 16
"""Of a token: with fewer it could be guessed."""
ENV_OPTION, FILE_OPTION = "--token-env", "--token-file"

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


def read_token(source: str) -> ApiKey | None:
    """The token at the place that ``SOURCE`` holds.

    Raises:
        UserError: there is none there, or it is too short.
    """
    kind, _, place = source.partition(" ")
    if not kind:
        return None
    if kind == "env":
        token, option = ApiKey.from_environment(place, option=ENV_OPTION), ENV_OPTION
    else:
        token, option = ApiKey.from_file(place, option=FILE_OPTION), FILE_OPTION
    if token.length < LEAST_CHARACTERS:
        raise UserError(f"{option}: the token has {token.length} characters, expected at least {LEAST_CHARACTERS}")
    return token


class Guard:
    """See the module's docstring. ``app`` is what answers the requests that may pass."""

    def __init__(self, app: App) -> None:
        self._app = app
        source = os.environ.get(SOURCE)
        self._token = read_token(source or "")
        self._is_local = source == ""
        """``serve.py`` has seen to it that only this machine reaches the server."""

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        status = 200 if scope["type"] == "lifespan" else self._status(scope)
        if status == 200:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send, status)

    def _status(self, scope: Message) -> int:
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        given = [value for name, value in headers if name == b"authorization"]
        if self._token is None:
            # A page whose name leads to this machine sends no Origin with what it reads, but its own name as the host.
            hosts = [value for name, value in headers if name == b"host"] if self._is_local else []
            is_page = any(name == b"origin" for name, _ in headers) or not all(map(_is_this_machine, hosts))
            return 403 if is_page else 200
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] in OPEN_PATHS:
            return 200
        return 200 if len(given) == 1 and self._token.is_in(given[0]) else 401


def _is_this_machine(host: str) -> bool:
    """Whether the value of a header ``Host`` is a name or an address of loopback."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


async def _refuse(send: Callable[[Message], Awaitable[None]], status: int) -> None:
    words = {401: "this server wants its token", 403: "this server takes no requests of web pages"}
    body = json.dumps({"error": {"message": words[status], "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    # The body of the request is not waited for.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
