"""Requests to a server over HTTP, with retries.

Tried again, after a pause that doubles and has a random part: no connection or one that breaks, no complete reply in
time, status 408, 409, 425, 429 and 5xx, and replies that cannot be read. A server that says how long to wait
(Retry-After) is obeyed. Other statuses are refusals, which no repetition changes.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from megatron_ktr.errors import UserError, one_line
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.web import leaving
from megatron_ktr.web.address import Address, ApiKey
from megatron_ktr.web.reading import PLAIN, Unfit, no_cookies, read_bounded

_RETRIED = frozenset({408, 409, 425, 429})
_MOST_REPLY_BYTES = 1 << 25
_MOST_PAUSE_SECONDS = 60.0
_MOST_WAIT_SECONDS = 600.0
"""The longest Retry-After that is obeyed as it stands."""
Read = TypeVar("Read")


class Refusal(Exception):
    """The server rejects a request, and would again."""

    def __init__(self, status: int, message: str, *, said: str = "", param: str = "", code: str = "") -> None:
        super().__init__(f"status {status}: {message}")
        self.status, self.message = status, message
        self.said = said or message
        """The message before the key was hidden in it, to be searched and never shown."""
        self.param, self.code = param, code
        """The field and the code that an error of OpenAI's form names."""


class NoReply(Exception):
    """The server gave no usable reply in as many attempts as there may be."""


class Broken(Exception):
    """One attempt gave no usable reply."""

    def __init__(self, message: str, *, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Patience:
    """How long and how often a server is asked."""

    max_retries: int = 8
    request_timeout: float = 600.0
    """Seconds for one attempt, from the connection to the last byte of the reply."""
    first_pause: float = 1.0
    """Seconds before the first repetition."""

    def pause(self, attempt: int) -> float:
        """Seconds before repetition ``attempt`` (0, 1, ...): doubled each time, of which the half is random, so that
        requests that failed together do not come back together."""
        longest = min(_MOST_PAUSE_SECONDS, self.first_pause * 2**attempt)
        return longest * random.uniform(0.5, 1.0)


class Web:
    """One server. Its methods are called in one event loop."""

    def __init__(
        self,
        address: Address,
        *,
        key: ApiKey | None,
        patience: Patience,
        max_connections: int,
        timeout_option: str = "--request-timeout",
    ) -> None:
        """``timeout_option`` is named where a reply comes too late."""
        self.address, self.patience = address, patience
        self._timeout_option = timeout_option
        self._key = key
        limits = httpx.Limits(
            max_connections=max_connections + 2,
            max_keepalive_connections=max_connections,
            # A request that is sent into a connection that the server is just closing is lost.
            keepalive_expiry=2.0,
        )
        try:
            self._http = httpx.AsyncClient(
                timeout=None,
                limits=limits,
                # The environment's proxies are meant for the internet.
                trust_env=not address.is_loopback,
                headers=PLAIN | ({} if key is None else key.header),
                cookies=no_cookies(),
            )
        except (ValueError, httpx.InvalidURL) as error:
            raise UserError(f"the environment's proxy settings cannot be used ({type(error).__name__})") from None
        except ImportError:
            raise UserError(
                "the environment's proxy (ALL_PROXY, HTTPS_PROXY, HTTP_PROXY) is a SOCKS proxy, which needs "
                "pip install socksio"
            ) from None
        except OSError as error:
            raise UserError(
                f"the environment's certificates (SSL_CERT_FILE, SSL_CERT_DIR) cannot be read: {error.strerror}"
            ) from error

    async def close(self) -> None:
        await self._http.aclose()

    async def fetch(
        self, method: str, url: str, body: bytes | None, *, read: Callable[[bytes], Read], retries: int | None = None
    ) -> Read:
        """What ``read`` makes of the reply, after as many attempts as it takes. ``read`` raises ``ValueError`` for a
        reply that cannot be what was asked for. ``retries`` are at most those of ``Patience``.

        Raises:
            Refusal: the server rejects the request.
            NoReply: the attempts are used up.
            StepAbandoned: this process is asked to leave while it waits for the next attempt.
        """
        retries = min(self.patience.max_retries, self.patience.max_retries if retries is None else retries)
        problem = Broken("")
        for attempt in range(retries + 1):
            try:
                reply = await self._once(method, url, body)
                try:
                    return read(reply)
                except ValueError as error:
                    raise Broken(f"the reply cannot be read: {self._quoted(str(error))}") from None
            except Broken as error:
                problem = error
            if attempt < retries:
                seconds = max(problem.wait_seconds, self.patience.pause(attempt))
                await leaving.pause(seconds, waiting_for=f"{self.address.api}: {problem}")
        attempts = f"{retries + 1} attempts" if retries else "one attempt"
        raise NoReply(f"no answer after {attempts}: {problem}")

    async def _once(self, method: str, url: str, body: bytes | None) -> bytes:
        headers = {} if body is None else {"Content-Type": "application/json"}
        seconds = self.patience.request_timeout
        try:
            # This limits the whole exchange; httpx's own timeouts limit only the silence between two pieces of it.
            async with asyncio.timeout(seconds):
                async with self._http.stream(method, url, content=body, headers=headers) as reply:
                    content = await read_bounded(reply, most_bytes=_MOST_REPLY_BYTES)
        except TimeoutError:
            raise Broken(f"no complete reply within {seconds:g} s ({self._timeout_option})") from None
        except Unfit as error:
            raise Broken(self._quoted(str(error))) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise Broken(self._quoted(f"{type(error).__name__}: {error}")) from None
        if 200 <= reply.status_code < 300:
            return content
        said, param, code = _error_parts(content)
        if 300 <= reply.status_code < 400:
            said = f"it redirects to {reply.headers.get('location', 'nowhere')}"
        message = self._quoted(said) or self._quoted(reply.reason_phrase)
        if reply.status_code in _RETRIED or reply.status_code >= 500:
            wait = _retry_after(reply.headers.get("retry-after", ""))
            raise Broken(f"status {reply.status_code}: {message}", wait_seconds=wait)
        raise Refusal(reply.status_code, message, said=said, param=param, code=code)

    def cleaned(self, text: str) -> str:
        """``text`` of a model without the key and lone surrogates, which JSON can spell and no file can hold."""
        return _without_halves(text) if self._key is None else self._key.hide_in_answer(_without_halves(text))

    def _quoted(self, text: str) -> str:
        """The beginning of what a server says, for a message."""
        text = _without_halves(text)
        return one_line(text if self._key is None else self._key.hide(text))[:300]


def _without_halves(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _error_parts(body: bytes) -> tuple[str, str, str]:
    """(message, param, code) of an error of OpenAI's form; of anything else (all of it, "", "")."""
    text = body.decode("utf-8", errors="replace")
    try:
        found = parse_json(text)
        error = found.get("error", found)
        if isinstance(error, str):
            return error, "", ""
        message = error.get("message") or error.get("detail") or found
        return str(message), str(error.get("param") or ""), str(error.get("code") or error.get("type") or "")
    except (ValueError, AttributeError, TypeError):
        return text, "", ""


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header, which has a number or a date; 0 if it has neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _MOST_WAIT_SECONDS) if math.isfinite(seconds) else 0.0


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, Read]) -> Future[Read]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


REDIRECTED = " (redirects are not followed, because the key would go along: give the address that answers)"
