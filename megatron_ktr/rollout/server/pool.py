"""Uses several servers as one: limits requests, retries them, and keeps track of servers and their weights.

A server is *in* while it answers and has the current weights. Requests go only to servers that are in.

    a request fails           it is sent again, after a pause that doubles, to the server with the fewest requests
    failures > max_retries    the server is taken out, and its requests are sent to other servers; the same happens if
                              it is not healthy, does not answer in time, or has old weights
    a server is out           it comes back once it is healthy *and* has the current weights; its owner gives them to it
                              if they are kept on disk
    no server is left         ``UserError`` names every server with its last error; a request that has failed everywhere
                              raises it, too

Weights have labels, and vLLM reports under which label each token was sampled. The first answer of a server that was
restarted or missed an update therefore shows it, even if the server seems healthy. While a server loads weights, it is
paused and has a label that no rank accepts. If the update fails half-way, the server stays in this state, so that it
never answers with weights that are neither old nor new. The server keeps this label after the run. It tells the next
update, by any run, that the last one broke off; that update first repairs the server.

Everything here runs in one asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ktr.errors import UserError
from megatron_ktr.rollout.server.client import Refused, ServerClient, ServerFacts, ServerProblem, TimedOut, Unreachable
from megatron_ktr.rollout.server.wire import MalformedAnswer, Sample

logger = logging.getLogger(__name__)

COUNTS = ("retries", "resent", "taken_out", "malformed", "mixed_versions")
LOADING = "-loading"
"""The end of the label of a server that is loading weights, or in which loading broke off."""
Give = Callable[[ServerClient, bool], Awaitable[None]]
"""Makes one paused server load the weights of an update. The flag says whether an earlier update broke off in it."""


class OldWeights(ServerProblem):
    """An answer was sampled from other weights than the current ones."""


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
    in_flight_updates: bool = False
    backoff_seconds: float = 0.5
    probe_seconds: float = 2.0


@dataclass(eq=False)
class _Server:
    client: ServerClient
    is_in: bool = False
    facts: ServerFacts | None = None
    num_requests: int = 0
    failures: int = 0
    """The number of failures in a row."""
    missed_probes: int = 0
    last_error: str = "never answered"
    running: set[asyncio.Task[bytes]] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Is held while the server gets weights, or while it is decided whether the server is in."""

    @property
    def url(self) -> str:
        return self.client.url


class ServerPool:
    """The servers of a run. Call ``start`` once, then ``ask`` any number of times, also concurrently. ``update`` and
    ``adopt`` give the servers new weights.

    ``check_facts`` returns what is wrong with a server's settings, or None.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        *,
        settings: PoolSettings,
        check_facts: Callable[[ServerFacts], str | None] = lambda facts: None,
    ) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self._check_facts = check_facts
        self._servers = [_Server(client) for client in clients]
        self._label: str | None = None
        self._labels: set[str] = set()
        self._gives: Mapping[str, Give] = {}
        self._is_updating = False
        self._changed = asyncio.Condition()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def max_model_len(self) -> int:
        """The smallest ``max_model_len`` of the servers seen so far."""
        return min(server.facts.max_model_len for server in self._servers if server.facts is not None)

    async def start(self) -> None:
        """Waits for the first server. Raises UserError if none comes, or if a server is not set up for training."""
        looks = 0
        deadline = time.monotonic() + self.settings.timeout_seconds
        while not await self._probe_all():  # at least one probe, so that an error message can name a reason
            self._refuse_wrong()
            if time.monotonic() > deadline:
                raise UserError(f"--server-urls: no vLLM server answered: {self._errors()}")
            if looks % 30 == 0:
                logger.warning("waiting for a vLLM server: %s", self._errors())
            looks += 1
            await asyncio.sleep(self.settings.probe_seconds)
        self._refuse_wrong()
        self._watcher = asyncio.create_task(self._watch())

    def _refuse_wrong(self) -> None:
        for server in self._servers:
            if server.facts is not None and (problem := self._check_facts(server.facts)):
                raise UserError(f"--server-urls: {server.url}: {problem}")

    async def close(self) -> None:
        """Cancels everything that still runs in this loop."""
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for server in self._servers:
            await server.client.close()

    # --- requests ---------------------------------------------------------------------------------------------

    async def ask(self, encode: Callable[[], bytes], *, read: Callable[[bytes], list[Sample]], name: str) -> list:
        """The answer to one request, from any server. ``name`` names the request in error messages.

        ``encode`` runs once, in a thread, when a server has room. ``read`` may raise ``MalformedAnswer``.
        """
        tries, body, last = 0, None, None
        while True:
            server = last = await self._acquire(avoid=last)
            try:
                if body is None:
                    body = await asyncio.to_thread(encode)
                return await self._attempt(server, body, read)
            except Refused as problem:
                raise UserError(f"{name}: {server.url}: {problem}") from None
            except (ServerProblem, MalformedAnswer) as problem:
                self.counts["malformed"] += isinstance(problem, MalformedAnswer)
                await self._blame(server, problem)
                error = f"{server.url}: {problem}"
            finally:
                server.num_requests -= 1
                await self._notify()
            tries += 1
            if tries > (self.settings.max_retries + 1) * len(self._servers):
                raise UserError(f"{name} failed {tries} times on the vLLM servers; the last time {error}")
            self.counts["retries"] += 1
            if server.is_in:
                await asyncio.sleep(self.settings.backoff_seconds * 2 ** min(tries - 1, 5))
            else:
                self.counts["resent"] += 1

    async def _attempt(self, server: _Server, body: bytes, read: Callable[[bytes], list[Sample]]) -> list[Sample]:
        label = self._label
        task = asyncio.create_task(server.client.generate(body))
        server.running.add(task)
        try:
            await asyncio.wait({task})
        finally:
            server.running.discard(task)
            task.cancel()
        if task.cancelled():
            raise TakenOut(server.last_error)
        samples = read(task.result())
        self._check_versions(samples, started_with=label)
        server.failures = 0
        return samples

    def _check_versions(self, samples: Sequence[Sample], *, started_with: str | None) -> None:
        """Raises OldWeights unless the responses were sampled from weights that are allowed.

        With ``in_flight_updates`` a response may mix versions of this run, and such responses are counted. Without,
        every response must have a single version: the one when the request started, or the current one.
        """
        if started_with is None:
            return
        mixed = [sample.versions for sample in samples if len(set(sample.versions)) > 1]
        for versions in (sample.versions for sample in samples):
            known = self._labels if self.settings.in_flight_updates else {started_with, self._label}
            is_mixed = len(set(versions)) > 1
            if not set(versions) <= known or (is_mixed and not self.settings.in_flight_updates):
                raise OldWeights(f"a response sampled from weights {', '.join(versions)}, expected {started_with}")
        self.counts["mixed_versions"] += len(mixed)

    async def _acquire(self, *, avoid: _Server | None) -> _Server:
        """Reserves a place on a server that is in. Raises UserError if no server is in and none comes back."""
        while True:
            async with self._changed:
                while self._is_updating or not self._free():
                    if not self._is_updating and not any(server.is_in for server in self._servers):
                        break
                    await self._changed.wait()
                else:
                    server = min(self._free(), key=lambda server: (server is avoid, server.num_requests))
                    server.num_requests += 1
                    return server
            await self._rescue()

    def _free(self) -> list[_Server]:
        return [s for s in self._servers if s.is_in and s.num_requests < self.settings.max_requests]

    async def _rescue(self) -> None:
        """Is called when no server is in. It probes all servers a few more times and then raises UserError."""
        for look in range(self.settings.max_retries + 1):
            if any(server.is_in for server in self._servers) or await self._probe_all():
                return
            if look < self.settings.max_retries:
                await asyncio.sleep(self.settings.probe_seconds)
        raise UserError(f"no vLLM server is left: {self._errors()}")

    # --- membership -------------------------------------------------------------------------------------------

    async def _blame(self, server: _Server, problem: Exception) -> None:
        if not server.is_in:
            return
        server.failures += 1
        server.last_error = str(problem)
        is_dead = isinstance(problem, TimedOut | OldWeights) or server.failures > self.settings.max_retries
        if not is_dead and isinstance(problem, Unreachable):
            try:
                await server.client.check_health()
            except ServerProblem:
                is_dead = True
        if is_dead:
            self._take_out(server, str(problem))

    def _take_out(self, server: _Server, reason: str) -> None:
        server.last_error = reason
        if not server.is_in:
            return
        server.is_in = False
        self.counts["taken_out"] += 1
        logger.warning("vLLM server %s is taken out: %s", server.url, reason)
        for task in server.running:
            task.cancel()

    async def _watch(self) -> None:
        """Probes the servers that are out, and those that are in and have running requests, again and again."""
        while True:
            await asyncio.sleep(self.settings.probe_seconds)
            if not self._is_updating:
                await self._probe_all()
                await asyncio.gather(*(self._feel_pulse(s) for s in self._servers if s.is_in and s.running))

    async def _feel_pulse(self, server: _Server) -> None:
        """Checks the health of a server with running requests. If its machine vanishes, the connections would show it
        only after many minutes."""
        try:
            await server.client.check_health()
            server.missed_probes = 0
        except ServerProblem as problem:
            server.missed_probes += 1
            if server.missed_probes > 1:
                self._take_out(server, f"not healthy: {problem}")
                await self._notify()

    async def _probe_all(self) -> bool:
        """Takes back all servers that can be in again. True if any server is in afterwards."""
        await asyncio.gather(*(self._try_return(server) for server in self._servers))
        await self._notify()
        return any(server.is_in for server in self._servers)

    async def _try_return(self, server: _Server) -> None:
        async with server.lock:
            if server.is_in or self._is_updating:
                return
            label = self._label
            try:
                await server.client.check_health()
                if server.facts is None:
                    server.facts = await server.client.facts()
                if problem := self._check_facts(server.facts):
                    raise ServerProblem(problem)
                if label is not None and (found := await server.client.weight_version()) != label:
                    give = self._gives.get(server.url)
                    if give is None:
                        raise ServerProblem(f"it has weights {found}, expected {label}; waiting for the next update")
                    await self._give(server, label, give)
            except ServerProblem as problem:
                server.last_error = str(problem)
                return
            if label == self._label and not self._is_updating:
                server.failures = server.missed_probes = 0
                server.is_in = True

    def _errors(self) -> str:
        return "; ".join(f"{server.url}: {server.last_error}" for server in self._servers if not server.is_in)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # --- weights ----------------------------------------------------------------------------------------------

    async def update(
        self,
        label: str,
        gives: Mapping[str, Give],
        *,
        again: bool,
        failed: Callable[[str, str], None] | None = None,
    ) -> dict[str, str | None]:
        """Gives new weights to the servers in ``gives``, all at the same time. Returns the problem of each server by
        address; None where it worked.

        No request starts before ``adopt`` says which servers have the weights. With ``again``, ``gives`` is kept for
        servers that come back later. ``failed`` is called as soon as a server has failed.
        """
        self._is_updating = True
        self._label = label
        self._labels.add(label)
        self._gives = gives if again else {}

        async def one(server: _Server) -> str | None:
            async with server.lock:
                try:
                    await server.client.check_health()
                    await self._give(server, label, gives[server.url])
                except ServerProblem as problem:
                    if failed is not None:
                        failed(server.url, str(problem))
                    return str(problem)
            return None

        owned = [server for server in self._servers if server.url in gives]
        return dict(zip([s.url for s in owned], await asyncio.gather(*(one(s) for s in owned)), strict=True))

    async def adopt(self, outcome: Mapping[str, str | None]) -> None:
        """Lets requests start again, on the servers whose owners report that they have the weights."""
        for server in self._servers:
            problem = outcome.get(server.url, "nobody gave it weights")
            if problem is not None:
                self._take_out(server, f"it did not take the new weights: {problem}")
            elif server.facts is not None and self._check_facts(server.facts) is None:
                server.failures = server.missed_probes = 0
                server.is_in = True
        self._is_updating = False
        await self._notify()

    async def _give(self, server: _Server, label: str, give: Give) -> None:
        """Gives weights to one server. If it raises ServerProblem, the server stays paused until an update succeeds."""
        client = server.client
        broke_off = (await client.weight_version()).endswith(LOADING)
        await client.pause(keep_requests=self.settings.in_flight_updates)
        await client.set_weight_version(f"{label}{LOADING}")
        await give(client, broke_off)
        await client.reset_caches()
        await client.set_weight_version(label)
        await client.resume()
