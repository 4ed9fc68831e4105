"""One server of a pool: what is known about it, and how it gets weights and shows them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_ktr.rollout.server.client import (
    Locked,
    Refused,
    ServerClient,
    ServerFacts,
    ServerProblem,
    TimedOut,
    Unreachable,
)
from megatron_ktr.rollout.server.fingerprint import Fingerprint, distance, probe_body, read_fingerprint
from megatron_ktr.rollout.server.wire import MalformedAnswer
from megatron_ktr.web.address import ApiKey

LOADING = "-loading"
"""The end of the label of a server that is loading weights, or in which loading broke off."""
Give = Callable[[ServerClient, bool], Awaitable[None]]
"""Makes one paused server load the weights of an update. The flag says whether an earlier update broke off in it."""
SILENCE = (TimedOut, Unreachable)
"""Problems of a server from which nothing came."""
_MOST_RESTS = 32
Found = TypeVar("Found")


class TakenOut(ServerProblem):
    """The request's server was taken out while the request ran."""


@dataclass(frozen=True)
class PoolSettings:
    """How the servers are asked."""

    urls: tuple[str, ...]
    """Their addresses, each once."""
    max_requests: int = 64
    max_retries: int = 4
    timeout_seconds: float = 600.0
    """How long to wait for the first server. The clients have their own time limits."""
    wait_seconds: float = 600.0
    """How long to wait for a server after the last one is gone, or for an answer that no server gives."""
    gap_limit: float = 0.05
    """Servers with the same weights give log-probs that differ by this much at most, in nats, on average."""
    in_flight_updates: bool = False
    backoff_seconds: float = 0.5
    probe_seconds: float = 2.0
    token: ApiKey | None = None
    """Is sent to every server with every request."""


@dataclass(eq=False)
class Member:
    """A server, as this rank sees it."""

    client: ServerClient
    is_in: bool = False
    facts: ServerFacts | None = None
    num_requests: int = 0
    failures: int = 0
    """The number of failures in a row."""
    missed_probes: int = 0
    num_broken_updates: int = 0
    """How often in a row it did not take weights."""
    rests: int = 0
    """Probes to leave out: loading weights in vain, again and again, would keep the others from their work."""
    last_error: str = "never answered"
    is_locked: bool = False
    """Whether the last error is a refused token."""
    is_silent: bool = False
    """Whether nothing came from it when it was asked last. Nobody can tell how long its next answer would take."""
    fingerprint: Fingerprint | None = None
    running: set[asyncio.Task[bytes]] = field(default_factory=set)
    returning: asyncio.Task[None] | None = None
    """The last attempt to take the server back."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Is held while the server gets weights, or while it is decided whether the server is in."""

    @property
    def url(self) -> str:
        return self.client.url

    def failed(self, problem: Exception) -> None:
        self.last_error = str(problem)
        self.is_locked = isinstance(problem, Locked)
        self.is_silent = isinstance(problem, SILENCE)

    def let_in(self) -> None:
        self.failures = self.missed_probes = self.num_broken_updates = self.rests = 0
        self.is_in, self.is_silent = True, False

    def refuse_silence(self, can_spare: bool) -> None:
        """Raises ServerProblem if the server is silent and out, and the run can do without it."""
        if can_spare and self.is_silent and not self.is_in:
            raise Unreachable(self.last_error)

    async def has_pulse(self) -> bool:
        """Checks its health. False after two failures in a row, and ``last_error`` then says what is wrong. If its
        machine vanishes, the connections would show it only after many minutes."""
        try:
            await self.client.check_health()
            self.missed_probes = 0
        except ServerProblem as problem:
            self.missed_probes += 1
            self.last_error = str(problem)
        return self.missed_probes < 2

    async def meet(self, check_facts: Callable[[ServerFacts], str | None]) -> None:
        """Raises ServerProblem if it is not healthy, or not set up for the run. Its settings are asked for once."""
        await self.client.check_health()
        self.is_silent = False
        if self.facts is None:
            self.facts = await self.client.facts()
        if problem := check_facts(self.facts):
            raise ServerProblem(problem)

    async def bring_up_to_date(
        self,
        label: str,
        give: Give | None,
        *,
        expected: Fingerprint | None,
        is_outdated: Callable[[], bool],
        settings: PoolSettings,
    ) -> None:
        """Makes sure that a server which is out has the weights of ``label`` and samples. ``give`` gives them to it;
        None if they are not kept. ``expected`` is their fingerprint. Once ``is_outdated`` it loads nothing: the next
        update has newer ones for it, and would have to wait. Raises ServerProblem if it has not the weights."""
        found = await self.client.weight_version()
        problem = "" if found == label else f"it has weights {found}, expected {label}"
        if not problem and await self.client.is_paused():
            problem = "it is paused"  # an update broke off just before its end
        if not problem:
            await self.look(label)
            problem = self.gap_problem(expected, limit=settings.gap_limit)
        if not problem:
            return
        if give is None:
            raise ServerProblem(f"{problem}; waiting for the next update")
        if is_outdated():
            return
        await self.take_weights(label, give, settings=settings)
        if problem := self.gap_problem(expected, limit=settings.gap_limit):
            self.rests = 2
            raise ServerProblem(problem)

    def gap_problem(self, expected: Fingerprint | None, *, limit: float) -> str:
        """Says that it computes other log-probs than others with the same label; empty if it does not."""
        if expected is None or self.fingerprint is None:
            return ""
        gap = distance(self.fingerprint, expected)
        return "" if gap <= limit else f"its log-probs are {gap:.3g} nats from those of the same weights elsewhere"

    async def take_weights(self, label: str, give: Give, *, settings: PoolSettings) -> None:
        """Gives it weights. If this raises ServerProblem, the server stays paused, or under a label that nobody
        accepts, until an update succeeds. Afterwards ``fingerprint`` is that of the new weights."""
        try:
            await self._take(label, give, in_flight=settings.in_flight_updates)
        except (ServerProblem, asyncio.CancelledError):  # it is cancelled when the server says nothing any more
            self.num_broken_updates += 1
            self.rests = min(_MOST_RESTS, 2**self.num_broken_updates)
            raise

    async def _take(self, label: str, give: Give, *, in_flight: bool) -> None:
        client = self.client
        broke_off = (await client.weight_version()).endswith(LOADING)
        await client.pause(keep_requests=in_flight)
        await client.set_weight_version(f"{label}{LOADING}")
        await give(client, broke_off)
        await client.reset_caches()
        await client.set_weight_version(label)
        await client.resume()
        await self.look(label)

    async def while_heard(self, work: Coroutine[Any, Any, Found], *, doing: str, settings: PoolSettings) -> Found:
        """The result of ``work`` with this server, which is cancelled when the server is not healthy any more.
        Draining, loading, the transfer and long answers may take their time, and a machine that vanished meanwhile
        would be waited for as long. Raises Unreachable then; ``doing`` names the work in its message."""
        working = asyncio.create_task(work)
        silence = asyncio.create_task(self._find_silence(settings.probe_seconds))
        try:
            await asyncio.wait({working, silence}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Unreachable(f"not healthy while {doing}: {self.last_error}")
            return await working
        finally:
            working.cancel()
            silence.cancel()
            await asyncio.gather(working, silence, return_exceptions=True)

    async def _find_silence(self, pause_seconds: float) -> None:
        """Returns when the server is not healthy any more."""
        self.missed_probes = 0
        await asyncio.sleep(pause_seconds)
        while await self.has_pulse():
            await asyncio.sleep(pause_seconds)

    async def look(self, label: str) -> None:
        """Finds ``fingerprint``; None if the server refuses to tell.

        Raises:
            ServerProblem: it does not answer, or computes with other weights than it says.
        """
        try:
            answer = await self.client.generate(probe_body())
            self.fingerprint = read_fingerprint(answer, label=label)
        except Refused:
            self.fingerprint = None
        except MalformedAnswer as problem:
            raise ServerProblem(str(problem)) from None
