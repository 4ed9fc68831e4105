"""Uses several servers as one: limits requests, retries them, and keeps track of servers and their weights.

A server is *in* while it answers and has the current weights. Requests go only to servers that are in.

    a request fails           it is sent again, after a pause that doubles, to the server with the fewest requests
    failures > max_retries    the server is taken out, and its requests are sent to other servers; the same happens if
                              it is not healthy, does not answer in time, or has old weights
    a server is out           it comes back once it is healthy *and* has the current weights; its owner gives them to it
                              if they are kept on disk
    a server says nothing     it is taken out after two checks of its health, also while it gets weights or comes back;
                              then nobody waits for it, as long as another one is in
    a request is refused      (status 400) others are asked: only if all refuse it, twice, the run ends with its name
    no server is left         the run waits (``wait_seconds``). ``StepAbandoned`` then names every server with its last
                              error; a request that has failed everywhere for as long raises it, too, and so does a
                              signal to leave that comes during such a wait

Weights have labels, and vLLM reports under which label each token was sampled. The first answer of a server that was
restarted or missed an update therefore shows it, even if the server seems healthy. While a server loads weights, it is
paused and has a label that no rank accepts. If the update fails half-way, the server stays in this state, so that it
never answers with weights that are neither old nor new. The server keeps this label after the run. It tells the next
update, by any run, that the last one broke off; that update first repairs the server.

A label can be wrong. After an update, and before a server comes back, it therefore computes the log-probs of a few
tokens, which must be those of the other servers (``fingerprint.py``).

Everything here runs in one asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from megatron_ktr.errors import StepAbandoned, UserError
from megatron_ktr.rollout.server.client import (
    Mistaken,
    Refused,
    ServerClient,
    ServerFacts,
    ServerProblem,
    TimedOut,
    Unreachable,
)
from megatron_ktr.rollout.server.fingerprint import Fingerprint
from megatron_ktr.rollout.server.member import SILENCE, Give, Member, PoolSettings, TakenOut
from megatron_ktr.rollout.server.versions import OldWeights, Versions
from megatron_ktr.rollout.server.wire import MalformedAnswer, Sample
from megatron_ktr.web import leaving

_REFUSALS = 2
"""How often every server must refuse a request: a sick one may refuse anything, once."""
logger = logging.getLogger(__name__)

COUNTS = ("retries", "resent", "taken_out", "malformed", "mixed_versions", "refused")


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
        self._servers = [Member(client) for client in clients]
        self._versions = Versions(in_flight_updates=settings.in_flight_updates)
        self._expected: Fingerprint | None = None
        self._gives: Mapping[str, Give] = {}
        self._owned: frozenset[str] = frozenset()
        self._is_updating = False
        self._changed = asyncio.Condition()
        self._watchers: list[asyncio.Task[None]] = []
        self._rescuing = asyncio.Lock()
        self._alone_since: float | None = None
        """When it was first seen that no server is in."""

    @property
    def max_model_len(self) -> int:
        """The smallest ``max_model_len`` of the servers seen so far."""
        return min(server.facts.max_model_len for server in self._servers if server.facts is not None)

    async def start(self) -> None:
        """Waits for the first server. Raises UserError if none comes, or if a server is not set up for training."""
        looks = 0
        deadline = time.monotonic() + self.settings.timeout_seconds
        while not await self._probe_all(to_the_last=True):  # at least one probe, so that an error can name a reason
            self._refuse_wrong()
            if time.monotonic() > deadline:
                raise UserError(f"--server-urls: no vLLM server answered: {self._errors()}")
            if looks % 30 == 0:
                logger.warning("waiting for a vLLM server: %s", self._errors())
            looks += 1
            await leaving.pause(self.settings.probe_seconds, waiting_for="for the first vLLM server")
        self._refuse_wrong()
        self._watchers = [asyncio.create_task(self._watch(server)) for server in self._servers]

    def _refuse_wrong(self) -> None:
        for server in self._servers:
            if server.facts is not None and (problem := self._check_facts(server.facts)):
                raise UserError(f"--server-urls: {server.url}: {problem}")
            if server.is_locked:
                raise UserError(f"--server-urls: {server.url}: {server.last_error}")

    async def close(self) -> None:
        """Cancels everything that still runs in this loop."""
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for server in self._servers:
            await server.client.close()

    # --- requests ---------------------------------------------------------------------------------------------

    async def ask(
        self,
        encode: Callable[[], bytes],
        *,
        read: Callable[[bytes], list[Sample]],
        name: str,
        most_bytes: int,
    ) -> list[Sample]:
        """The answer to one request, from any server. ``name`` names the request in error messages.

        ``encode`` runs once, in a thread, when a server has room. ``read`` may raise ``MalformedAnswer``. An answer has
        at most ``most_bytes``.

        Raises:
            UserError: every server refuses the request.
            StepAbandoned: no server answers it, or none is left.
        """
        tries, body, avoid = 0, None, Counter[str]()
        refused: Counter[str] = Counter()
        give_up_at = time.monotonic() + self.settings.wait_seconds
        while True:
            server = await self._acquire(avoid=avoid)
            try:
                if body is None:
                    body = await asyncio.to_thread(encode)
                    give_up_at = time.monotonic() + self.settings.wait_seconds
                samples = await self._attempt(server, body, read, most_bytes)
                for other in self._servers:  # what one server has answered was no invalid request
                    if other.url in refused:
                        await self._blame(other, Refused("it refuses what others take"))
                return samples
            except Refused as problem:
                self.counts["refused"] += 1
                refused[server.url] += 1
                if all(refused[other.url] >= _REFUSALS for other in self._servers if other.is_in):
                    raise UserError(f"{name}: {server.url}: {problem}") from None
                error = f"{server.url}: {problem}"
            except (ServerProblem, MalformedAnswer) as problem:
                self.counts["malformed"] += isinstance(problem, MalformedAnswer | Mistaken)
                await self._blame(server, problem)
                error = f"{server.url}: {problem}"
            finally:
                server.num_requests -= 1
                await self._notify()
            tries += 1
            # Another server is asked than the last one, and first those that have refused the request least often.
            avoid = refused + Counter([server.url])
            if tries > (self.settings.max_retries + 1) * len(self._servers) and time.monotonic() >= give_up_at:
                raise StepAbandoned(f"{name} failed {tries} times on the vLLM servers; the last time {error}")
            self.counts["retries"] += 1
            self.counts["resent"] += not server.is_in
            if server.is_in or tries > len(self._servers):
                seconds = self.settings.backoff_seconds * 2 ** min(tries - 1, 5)
                await leaving.pause(seconds, waiting_for=f"{name}: {error}")

    async def _attempt(
        self, server: Member, body: bytes, read: Callable[[bytes], list[Sample]], most_bytes: int
    ) -> list[Sample]:
        label = self._versions.current
        task = asyncio.create_task(server.client.generate(body, most_bytes=most_bytes))
        server.running.add(task)
        try:
            await asyncio.wait({task})
        finally:
            server.running.discard(task)
            task.cancel()
        if task.cancelled():
            raise TakenOut(server.last_error)
        samples = read(task.result())
        self.counts["mixed_versions"] += self._versions.num_mixed(samples, started_with=label)
        server.failures = 0
        return samples

    async def _acquire(self, *, avoid: Counter[str]) -> Member:
        """Reserves a place on a server that is in. Raises StepAbandoned if no server is in and none comes back."""
        while True:
            async with self._changed:
                while self._is_updating or not self._free():
                    if not self._is_updating and not self._is_any_in():
                        break
                    await self._changed.wait()
                else:
                    server = min(self._free(), key=lambda server: (avoid[server.url], server.num_requests))
                    server.num_requests += 1
                    return server
            await self._rescue()

    def _free(self) -> list[Member]:
        return [s for s in self._servers if s.is_in and s.num_requests < self.settings.max_requests]

    async def _rescue(self) -> None:
        """Is called when no server is in. Probes all servers until one is in again, or an update begins, which decides
        anew who is in. After ``wait_seconds`` it raises StepAbandoned, and when the run is asked to leave."""
        async with self._rescuing:  # one looks for all who wait
            while not self._is_updating and not await self._probe_all():
                now = time.monotonic()
                if self._alone_since is None:
                    self._alone_since = now
                    logger.warning(
                        "no vLLM server is left (%s): waiting for %g s at most",
                        self._errors(),
                        self.settings.wait_seconds,
                    )
                if now >= self._alone_since + self.settings.wait_seconds:
                    raise StepAbandoned(f"no vLLM server is left: {self._errors()}")
                await leaving.pause(
                    self.settings.probe_seconds, waiting_for=f"no vLLM server is left: {self._errors()}"
                )
            self._alone_since = None

    # --- membership -------------------------------------------------------------------------------------------

    async def _blame(self, server: Member, problem: Exception) -> None:
        if not server.is_in:
            return
        server.failures += 1
        server.failed(problem)
        is_dead = isinstance(problem, TimedOut | OldWeights) or server.failures > self.settings.max_retries
        server.is_silent = isinstance(problem, TimedOut)
        if not is_dead and isinstance(problem, Unreachable):
            try:
                await server.client.check_health()
            except ServerProblem:
                is_dead = server.is_silent = True
        if is_dead:
            self._take_out(server, str(problem))

    def _take_out(self, server: Member, reason: str) -> None:
        server.last_error = reason
        if not server.is_in:
            return
        server.is_in = False
        self.counts["taken_out"] += 1
        logger.warning("vLLM server %s is taken out: %s", server.url, reason)
        for task in server.running:
            task.cancel()

    async def _watch(self, server: Member) -> None:
        """Probes one server again and again while it is out, or has running requests. Each server has a watcher of its
        own, so that one that keeps silent does not keep the others waiting."""
        while True:
            await asyncio.sleep(self.settings.probe_seconds)
            if self._is_updating:
                continue
            server.rests = max(0, server.rests - 1)
            try:
                if not server.is_in:
                    await asyncio.wait({self._returning(server)})
                elif server.running and not await server.has_pulse():
                    server.is_silent = True
                    self._take_out(server, f"not healthy: {server.last_error}")
                    await self._notify()
            except Exception:  # whoever is not looked after would never come back
                logger.exception("looking after the vLLM server %s failed", server.url)

    async def _probe_all(self, *, to_the_last: bool = False) -> bool:
        """Takes back servers that can be in again. Returns once one is in, or an update begins, or all have been looked
        at; with ``to_the_last`` not before all have been. True if any server is in then."""
        pending = {self._returning(server) for server in self._servers if not server.is_in}
        while pending and (to_the_last or not (self._is_updating or self._is_any_in())):
            # It looks up now and then, because a watcher may have taken back a server that was looked at too early.
            _, pending = await asyncio.wait(
                pending, timeout=self.settings.probe_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        return self._is_any_in()

    def _is_any_in(self) -> bool:
        return any(server.is_in for server in self._servers)

    def _returning(self, server: Member) -> asyncio.Task[None]:
        """The attempt to take a server back that is under way, or a new one."""
        if server.returning is None or server.returning.done():
            server.returning = asyncio.create_task(self._try_return(server))
        return server.returning

    async def _try_return(self, server: Member) -> None:
        async with server.lock:
            if server.is_in or self._is_updating or server.rests:
                return
            try:
                returned = self._bring_back(server)
                label = await server.while_heard(returned, doing="it was taken back", settings=self.settings)
            except ServerProblem as problem:
                server.failed(problem)
                return
            except Exception:
                logger.exception("looking after the vLLM server %s failed", server.url)
                return
            if label == self._versions.current and not self._is_updating:
                server.let_in()
                await self._notify()

    async def _bring_back(self, server: Member) -> str | None:
        """The label of the weights that it was to have. Raises ServerProblem if it has not, or cannot be in."""
        await server.meet(self._check_facts)
        # Only now: an update does not wait for a silent server, and may have begun, or ended, since it was asked.
        if self._is_updating or (label := self._versions.current) is None:
            return None
        give = self._gives.get(server.url)
        await server.bring_up_to_date(
            label, give, expected=self._expected, is_outdated=lambda: self._is_updating, settings=self.settings
        )
        return label

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
        servers that come back later. ``failed`` is called as soon as a server has failed. Nobody waits for a server
        that kept silent when it was last probed, unless no other one is left.
        """
        self._is_updating = True
        self._versions.add(label)
        self._gives = gives if again else {}
        self._expected = None
        self._owned = frozenset(gives)
        can_spare = self._is_any_in()

        async def one(server: Member) -> str | None:
            try:
                # Asked before the lock, too: who tries to take a silent server back may hold it for long.
                server.refuse_silence(can_spare)
                async with server.lock:
                    server.refuse_silence(can_spare)
                    server.fingerprint = None
                    await server.client.check_health()
                    taken = server.take_weights(label, gives[server.url], settings=self.settings)
                    await server.while_heard(taken, doing="it was given weights", settings=self.settings)
            except Exception as problem:  # of a communicator, for example: this server alone has not the weights
                words = str(problem) if isinstance(problem, ServerProblem) else f"{type(problem).__name__}: {problem}"
                server.is_silent = isinstance(problem, SILENCE)
                if failed is not None:
                    failed(server.url, words)
                return words
            return None

        owned = [server for server in self._servers if server.url in gives]
        return dict(zip([s.url for s in owned], await asyncio.gather(*(one(s) for s in owned)), strict=True))

    @property
    def fingerprints(self) -> dict[str, Fingerprint]:
        """Those of the servers that this rank gave the weights of the last update."""
        owned = [server for server in self._servers if server.url in self._owned]
        return {server.url: server.fingerprint for server in owned if server.fingerprint is not None}

    async def adopt(self, outcome: Mapping[str, str | None], *, expected: Fingerprint | None = None) -> None:
        """Lets requests start again, on the servers whose owners report that they have the weights. ``expected`` is the
        fingerprint of these weights, which servers that come back must have."""
        self._expected = expected
        for server in self._servers:
            problem = outcome.get(server.url, "nobody gave it weights")
            if problem is not None:
                self._take_out(server, f"it did not take the new weights: {problem}")
            elif server.facts is not None and self._check_facts(server.facts) is None:
                server.let_in()
        self._is_updating = False
        await self._notify()
