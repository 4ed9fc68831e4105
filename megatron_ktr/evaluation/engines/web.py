"""Requests to a server over HTTP, with retries: what ``chat.py`` and ``served.py`` share.

Tried again, after a pause that doubles and has a random part: no connection or one that breaks, no complete reply in
time, status 408, 409, 425, 429 and 5xx, and replies that cannot be read. A server that says how long to wait
(Retry-After) is obeyed. Other statuses are refusals, which no repetition changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import queue
import random
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from megatron_ktr.errors import UserError, one_line
from megatron_ktr.evaluation.engines.address import Address, ApiKey
from megatron_ktr.evaluation.engines.base import AnswerEngine, EngineFailed, Question
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.files.json_files import parse_json

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

    def __init__(self, address: Address, *, key: ApiKey | None, patience: Patience, max_connections: int) -> None:
        self.address, self.patience = address, patience
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
                # A reply that is unpacked can be a thousand times what was received, before anything looks at it.
                headers={"Accept-Encoding": "identity"} | ({} if key is None else key.header),
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
            ) from None

    async def close(self) -> None:
        await self._http.aclose()

    async def fetch(
        self, method: str, url: str, body: bytes | None, *, read: Callable[[bytes], Read], retries: int | None = None
    ) -> Read:
        """What ``read`` makes of the reply, after as many attempts as it takes. ``read`` raises ``ValueError`` for a
        reply that cannot be what was asked for. ``retries`` are at most those of ``Patience``.

        Raises:
            Refusal: the server rejects the request.
            EngineFailed: the attempts are used up.
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
                await asyncio.sleep(max(problem.wait_seconds, self.patience.pause(attempt)))
        attempts = f"{retries + 1} attempts" if retries else "one attempt"
        raise EngineFailed(f"no answer after {attempts}: {problem}")

    async def _once(self, method: str, url: str, body: bytes | None) -> bytes:
        headers = {} if body is None else {"Content-Type": "application/json"}
        seconds = self.patience.request_timeout
        try:
            # This limits the whole exchange; httpx's own timeouts limit only the silence between two pieces of it.
            async with asyncio.timeout(seconds):
                async with self._http.stream(method, url, content=body, headers=headers) as reply:
                    content = bytearray()
                    encoding = reply.headers.get("content-encoding", "identity")
                    if encoding.strip().lower() not in ("", "identity"):
                        raise Broken(self._quoted(f"a reply that is encoded as {encoding}, which was not asked for"))
                    async for piece in reply.aiter_raw():
                        content += piece
                        if len(content) > _MOST_REPLY_BYTES:
                            raise Broken(f"a reply of more than {_MOST_REPLY_BYTES} bytes")
        except TimeoutError:
            raise Broken(f"no complete reply within {seconds:g} s (--request-timeout)") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise Broken(self._quoted(f"{type(error).__name__}: {error}")) from None
        if 200 <= reply.status_code < 300:
            return bytes(content)
        said, param, code = _error_parts(bytes(content))
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


class WebAnswers(AnswerEngine):
    """Keeps ``capacity`` questions open at one server."""

    def __init__(self, web: Web, loop: Loop, *, capacity: int) -> None:
        self.capacity = capacity
        self._web, self._loop = web, loop
        self._has_answered = False
        """Whether the server has answered a question. Until then a refusal is about settings, not about a question."""

    @abstractmethod
    async def _ask(self, question: Question) -> Answer:
        """The answer to one question, without ``seconds``.

        Raises:
            EngineFailed: there is none.
            UserError: no question will be answered.
        """

    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, Answer | EngineFailed]]:
        """See ``AnswerEngine``.

        Raises:
            UserError: the server refuses all questions. Those that are open then are not answered.
        """
        done: queue.SimpleQueue[tuple[Question, Future[Answer]]] = queue.SimpleQueue()
        asked: set[Future[Answer]] = set()
        has_more = True
        try:
            while True:
                while has_more and len(asked) < self.capacity and done.empty():
                    question = next(questions, None)
                    if question is None:
                        has_more = False
                        break
                    future = self._loop.start(self._timed(question))
                    asked.add(future)
                    future.add_done_callback(lambda found, question=question: done.put((question, found)))
                if not asked:
                    return
                question, future = done.get()
                asked.discard(future)
                try:
                    answer: Answer | EngineFailed = future.result()
                except EngineFailed as error:
                    answer = error
                yield question, answer
        finally:
            for future in asked:
                future.cancel()

    def close(self) -> None:
        """See ``AnswerEngine``."""
        # All answers are there: a connection that cannot be closed in order is dropped with the loop.
        with contextlib.suppress(Exception):
            self._loop.start(self._web.close()).result(timeout=10)
        self._loop.close()

    async def _timed(self, question: Question) -> Answer:
        began = time.perf_counter()
        try:
            answer = await self._ask(question)
        except Refusal as error:
            answer = self._refused(error)
        self._has_answered = True
        return Answer(**{**vars(answer), "seconds": time.perf_counter() - began})

    def _refused(self, error: Refusal) -> Answer:
        """The answer to a question that is refused as too long or by a filter; raises for all others."""
        if (problem := problem_of(error)) is not None:
            return Answer("", problem=problem)
        is_first = not self._has_answered
        if error.status in (401, 402) or 300 <= error.status < 400 or (is_first and error.status in (403, 404)):
            raise UserError(f"{self._web.address.api} refuses the questions: {error}{_advice(error.status)}")
        raise EngineFailed(f"refused: {error}")


REDIRECTED = " (redirects are not followed, because the key would go along: give the address that answers)"
_TOO_LONG = (
    "context length",
    "context_length",
    "maximum model length",
    "max_model_len",
    "context window",
    "too many tokens",
)
_FILTERED = ("content_filter", "content_policy", "content management policy", "responsibleai")


def problem_of(error: Refusal) -> str | None:
    """Why the server cannot take this question, though it takes others; None if the refusal says something else."""
    if error.status not in (400, 413, 422):
        return None
    said = f"{error.code} {error.said}".lower()
    if any(words in said for words in _TOO_LONG):
        return f"too long for the server's model: {error.message}"
    if any(words in said for words in _FILTERED):
        return f"the server's filter refuses it: {error.message}"
    return None


def _advice(status: int) -> str:
    if 300 <= status < 400:
        return REDIRECTED
    if status in (401, 403):
        return " (the key: --api-key-env NAME)"
    return " (the address and the model's name: --server-url, --served-model)" if status == 404 else ""
