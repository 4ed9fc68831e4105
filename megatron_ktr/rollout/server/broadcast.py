"""Sends new weights to servers from GPU to GPU with vLLM's own packed weight transfer, without files or host copies.

Each rank that owns servers has one communicator per server. The rank is its sender (rank 0), and the server's workers
are its other ranks. An update runs as follows, for all servers at the same time:

    /start_weight_update
    for every few hundred megabytes:   /update_weights announces a chunk of tensors; the sender broadcasts their bytes,
                                       one tensor after the other, in a single collective
    /finish_weight_update

vLLM's receiver (``packed_nccl_broadcast_consumer``) divides the announced bytes into buffers of a fixed size, which it
is told when it joins. It is told the size of our chunks, so that each chunk is one buffer. The receiver views the bytes
as tensors without moving them. A chunk therefore holds tensors of one type only; a tensor of another type might start
at an address that is not aligned for it.

The communicator is made at the first update, and made anew after a server has failed. A server that fails while tensors
are being sent can leave the sender waiting in a collective that nobody else will enter. After the timeout the run stops
with an error, and can be resumed from its checkpoint. A server that comes back between two updates waits for the next
one, because only the trainer has the weights.

This needs vLLM in the training environment, for its communicator. It has not run on GPUs yet; tests replace the
communicator and the server by stand-ins.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import StepAbandoned, UserError
from megatron_ktr.rollout.server.client import ServerClient, ServerProblem
from megatron_ktr.rollout.server.member import Give
from megatron_ktr.rollout.server.weights import Outcome, StartUpdate

CHUNK_BYTES = 1 << 28
"""The most bytes of tensors that are announced and sent together. A larger tensor is sent alone. Sender and receiver
each need this much device memory during the transfer."""


class Communicator(Protocol):
    """The part of vLLM's ``PyNcclCommunicator`` that is used here."""

    def broadcast(self, tensor: Tensor, src: int) -> None: ...


Connect = Callable[[str, int, int], Communicator]
"""Takes (address, port, world size), waits for the server's workers, and returns the communicator with this process as
rank 0."""


class _Feed:
    """One update of one server. The main thread announces tensors; the server's coroutine tells the server. It may fail
    at any moment, also between two chunks: the watch on silent servers ends it wherever it is."""

    def __init__(self) -> None:
        self.begun: Future[None] = Future()
        """Done once the server waits for tensors."""
        self._chunks: asyncio.Queue[tuple[dict[str, Any] | None, Future[None]]] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._told: list[Future[None]] = [self.begun]
        self._problem: str | None = None

    def tell(self, update_info: dict[str, Any] | None) -> Future[None]:
        """Announces a chunk; None announces the end. Call it only after ``begun``. The future is done once the server
        has taken the chunk; after ``fail`` it has failed at once."""
        assert self._loop is not None
        done: Future[None] = Future()
        with self._lock:
            if self._problem is not None:
                done.set_exception(ServerProblem(self._problem))
                return done
            self._told.append(done)
        self._loop.call_soon_threadsafe(self._chunks.put_nowait, (update_info, done))
        return done

    @property
    def has_failed(self) -> bool:
        return self._problem is not None

    def fail(self, problem: str) -> None:
        with self._lock:  # whoever is told later, fails in ``tell``
            self._problem = problem
        for done in self._told:
            if not done.done():
                done.set_exception(ServerProblem(problem))

    async def run(self, client: ServerClient) -> None:
        self._loop = asyncio.get_running_loop()
        await client.start_weight_update()
        self.begun.set_result(None)
        while True:
            update_info, done = await self._chunks.get()
            if update_info is None:
                break
            await client.update_weights(update_info)
            done.set_result(None)
        await client.finish_weight_update()
        done.set_result(None)


class BroadcastTransfer:
    """See the module's docstring. ``connect`` is for tests; the default makes vLLM's communicator."""

    keeps_weights = False

    def __init__(
        self,
        *,
        owned_urls: Sequence[str],
        timeout_seconds: float,
        connect: Connect | None = None,
    ) -> None:
        self.owned_urls = list(owned_urls)
        self.timeout_seconds = timeout_seconds
        self._connect = connect or vllm_connect()
        self._communicators: dict[str, Communicator] = {}

    def send(self, named_tensors: Iterator[tuple[str, Tensor]], *, label: str, start: StartUpdate) -> Outcome:
        feeds = {url: _Feed() for url in self.owned_urls}

        def give_to(url: str) -> Give:
            async def give(client: ServerClient, broke_off: bool) -> None:
                if broke_off:
                    await client.end_broken_update()
                await self._join(url, client)
                await feeds[url].run(client)

            return give

        update = start({url: give_to(url) for url in feeds}, lambda url, problem: feeds[url].fail(problem))
        live = self._succeeded({url: feed.begun for url, feed in feeds.items()}, label)
        for chunk in _chunks(named_tensors):
            update_info = {
                "names": [name for name, _ in chunk],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
                "shapes": [list(tensor.shape) for _, tensor in chunk],
            }
            told = {url: feeds[url].tell(update_info) for url in live}
            packed = _packed([tensor for _, tensor in chunk])
            for url in live:
                if not feeds[url].has_failed:  # nobody would enter the collective
                    self._communicators[url].broadcast(packed, src=0)
            current().synchronize()
            live = self._succeeded(told, label)
        self._succeeded({url: feeds[url].tell(None) for url in live}, label)
        outcome = update.result()
        for url, problem in outcome.items():
            if problem is not None:
                self._communicators.pop(url, None)
        return outcome

    def settle(self) -> None:
        """Nothing stays behind."""

    def close(self) -> None:
        self._communicators.clear()

    async def _join(self, url: str, client: ServerClient) -> None:
        """Makes the communicator with the server's workers, unless there is one already."""
        if url in self._communicators:
            return
        with contextlib.suppress(ServerProblem):  # what an earlier run, or a failed update, left there
            await client.shutdown_weight_transfer_engine()
        address = _reachable_address(url)
        port = _free_port(address)
        world_size = 1 + await client.world_size()
        init_info: dict[str, Any] = {"master_address": address, "master_port": port}
        init_info |= {"rank_offset": 1, "world_size": world_size}
        init_info |= {"packed": True, "packed_buffer_size_bytes": CHUNK_BYTES}
        # Both sides wait for each other.
        connecting = asyncio.to_thread(self._connect, address, port, world_size)
        self._communicators[url], _ = await asyncio.gather(connecting, client.init_weight_transfer_engine(init_info))

    def _succeeded(self, futures: dict[str, Future[None]], label: str) -> list[str]:
        """The servers whose futures succeeded. Raises StepAbandoned if a future is not done in time."""
        deadline = 2 * self.timeout_seconds  # a server first finishes its requests, which may take one timeout
        late = wait(futures.values(), timeout=deadline).not_done
        if late:
            urls = ", ".join(url for url, future in futures.items() if future in late)
            raise StepAbandoned(f"weights {label} did not arrive within {deadline:g} s at {urls}; resume the run")
        return [url for url, future in futures.items() if future.exception() is None]


def _chunks(named_tensors: Iterator[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    num_bytes = 0
    for name, tensor in named_tensors:
        if chunk and (num_bytes + tensor.nbytes > CHUNK_BYTES or tensor.dtype != chunk[-1][1].dtype):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append((name, tensor))
        num_bytes += tensor.nbytes
    if chunk:
        yield chunk


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """uint8 [sum of bytes]: the bytes of all contiguous tensors, one tensor after the other."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


class _OnCurrentStream:
    """vLLM's communicator, used on the trainer's current stream. By default it would set a new stream for the calling
    thread, and the trainer would then continue on that stream."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self._communicator.broadcast(tensor, src=src, stream=current().stream())


def vllm_connect() -> Connect:
    """The function that makes vLLM's communicator on this rank's device. Raises UserError if vLLM is not installed."""
    try:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional
    except ImportError:
        raise UserError(
            "--weight-transfer: sending weights from GPU to GPU needs vLLM in the training environment (the extra "
            "'vllm'); install it, or choose --weight-transfer directory"
        ) from None
    device = current().device

    def connect(address: str, port: int, world_size: int) -> Communicator:
        return _OnCurrentStream(stateless_init_process_group(address, port, 0, world_size, device))

    return connect


def _reachable_address(url: str) -> str:
    """This machine's address on the network interface that leads to ``url``. Nothing is sent."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
