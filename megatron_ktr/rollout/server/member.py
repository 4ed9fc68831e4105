"""One server of a pool: what is known about it, and how it gets weights and shows them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from megatron_ktr.rollout.server.client import Locked, Refused, ServerClient, ServerFacts, ServerProblem
from megatron_ktr.rollout.server.fingerprint import Fingerprint, distance, probe_body, read_fingerprint
from megatron_ktr.rollout.server.wire import MalformedAnswer
from megatron_ktr.web.address import ApiKey

LOADING = "-loading"
"""The end of the label of a server that is loading weights, or in which loading broke off."""
Give = Callable[[ServerClient, bool], Awaitable[None]]
"""Makes one paused server load the weights of an update. The flag says whether an earlier update broke off in it."""
_MOST_RESTS = 32


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
    fingerprint: Fingerprint | None = None
    running: set[asyncio.Task[bytes]] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Is held while the server gets weights, or while it is decided whether the server is in."""

    @property
    def url(self) -> str:
        return self.client.url

    def failed(self, problem: Exception) -> None:
        self.last_error = str(problem)
        self.is_locked = isinstance(problem, Locked)

    def let_in(self) -> None:
        self.failures = self.missed_probes = self.num_broken_updates = self.rests = 0
        self.is_in = True

    def gap_problem(self, expected: Fingerprint | None, *, limit: float) -> str:
        """Says that it computes other log-probs than others with the same label; empty if it does not."""
        if expected is None or self.fingerprint is None:
            return ""
        gap = distance(self.fingerprint, expected)
        return "" if gap <= limit else f"its log-probs are {gap:.3g} nats from those of the same weights elsewhere"

    async def take_weights(self, label: str, give: Give, *, in_flight: bool) -> None:
        """Gives it weights. If this raises ServerProblem, the server stays paused, or under a label that nobody
        accepts, until an update succeeds. Afterwards ``fingerprint`` is that of the new weights."""
        client = self.client
        try:
            broke_off = (await client.weight_version()).endswith(LOADING)
            await client.pause(keep_requests=in_flight)
            await client.set_weight_version(f"{label}{LOADING}")
            await give(client, broke_off)
            await client.reset_caches()
            await client.set_weight_version(label)
            await client.resume()
            await self.look(label)
        except ServerProblem:
            self.num_broken_updates += 1
            self.rests = min(_MOST_RESTS, 2**self.num_broken_updates)
            raise

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
