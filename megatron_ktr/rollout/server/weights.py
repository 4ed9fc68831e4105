"""Sends new weights to servers through a directory that trainer and servers both see.

One rank streams the policy's tensors into safetensors files, with a few hundred megabytes in memory at a time. Each
server reads the files when its owner tells it to. The newest directory stays, for servers that come back later; older
ones are removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.files.hf_files import new_directory, write_shard
from megatron_ktr.rollout.server.client import ServerClient
from megatron_ktr.rollout.server.member import Give
from megatron_ktr.rollout.server.replicas import Replicas

SHARD_BYTES = 1 << 28
"""The most bytes of tensors in one file. A larger tensor gets a file of its own."""

Outcome = dict[str, str | None]
"""The problem of each server's update by address; None where the update worked."""
Failed = Callable[[str, str], None]
"""Is called with (address, problem) as soon as a server's update has failed."""


class StartUpdate(Protocol):
    """Starts ``ServerPool.update`` in the event loop of the pool."""

    def __call__(self, gives: Mapping[str, Give], failed: Failed | None = None) -> Future[Outcome]: ...


class WeightTransfer(Protocol):
    """How weights reach the servers. Every method is called on every reading rank, in the same order."""

    keeps_weights: bool
    """Whether a server that comes back between two updates can be given the current weights."""

    def send(self, named_tensors: Iterator[tuple[str, Tensor]], *, label: str, start: StartUpdate) -> Outcome:
        """Exhausts the iterator and gives the tensors to the servers that this rank owns."""
        ...

    def settle(self) -> None:
        """Removes what earlier updates left behind. It is called after all ranks have sent."""

    def close(self) -> None: ...


class DirectoryTransfer:
    """See the module's docstring. ``directory`` is made if it does not exist. Other files in it are left alone."""

    keeps_weights = True

    def __init__(self, directory: Path, *, owned_urls: list[str], replicas: Replicas) -> None:
        self.directory = directory.absolute()
        self.owned_urls = owned_urls
        self.replicas = replicas
        self._written: list[Path] = []

    def send(self, named_tensors: Iterator[tuple[str, Tensor]], *, label: str, start: StartUpdate) -> Outcome:
        path = self.directory / label
        problem = None
        if self.replicas.rank == 0:
            try:
                write_weights(path, named_tensors)
                self._written.append(path)
            except (UserError, OSError) as error:
                problem = UserError(f"--weight-directory: {error}")
        for _ in named_tensors:
            pass
        # All ranks wait here, so that no server is told to read before all files are written.
        self.replicas.raise_any(problem)

        async def give(client: ServerClient, broke_off: bool) -> None:
            if broke_off:
                await client.end_broken_reload()
            await client.reload_weights(str(path))

        return start(dict.fromkeys(self.owned_urls, give)).result()

    def settle(self) -> None:
        for path in self._written[:-1]:
            shutil.rmtree(path, ignore_errors=True)
        del self._written[:-1]

    def close(self) -> None:
        for path in self._written:
            shutil.rmtree(path, ignore_errors=True)
        self._written.clear()


def write_weights(directory: Path, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Writes safetensors files. ``directory`` appears under its name only when all files are complete.

    Raises:
        UserError: the directory cannot be written, or the disk is full.
    """
    with new_directory(directory, option="--weight-directory") as scratch:
        shard: list[tuple[str, Tensor]] = []
        num_bytes = num_shards = 0
        for name, tensor in named_tensors:
            if shard and num_bytes + tensor.nbytes > SHARD_BYTES:
                num_shards += 1
                write_shard(scratch / f"model-{num_shards:05d}.safetensors", shard)
                shard, num_bytes = [], 0
            shard.append((name, tensor))
            num_bytes += tensor.nbytes
        write_shard(scratch / f"model-{num_shards + 1:05d}.safetensors", shard)
