"""vLLM in processes of its own, without a trainer: each process is one data-parallel group with its own GPUs.

    this process     prompts -> requests ----> offline_child.py, group 0 (tensor parallel over its GPUs)
                                         \\---> offline_child.py, group 1 ...
                     finished responses <----

A group keeps as many requests open as it is given (continuous batching), and a new request goes to the group with the
fewest. The two ends of a socket pair carry pickled messages:

    to the child     its settings (first); then a ``Request`` each
    from the child   ("ready",); then ("done", name, text, tokens, is finished), ("refused", name, why) or
                     ("lost", name, why); before it ends for a fault ("invalid", why) or ("failed", why)

A child ends when this end of its pair closes, which the system does however this process ends. vLLM's tensor-parallel
workers watch their parent, the child, in the same way. Without a GPU a group runs vLLM's CPU build. The paths for GPUs
are not yet run on a GPU.

Nothing here imports vLLM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.colocated.inputs import engine_input
from megatron_ktr.rollout.sampling import SamplingSettings, sample_seed
from megatron_ktr.rollout.vllm.sampling import sampling_values
from megatron_ktr.types import Prompt

CHILD = "megatron_ktr.rollout.vllm.offline_child"
END_SECONDS = 20.0
"""The time in which a child must end by itself, before it is killed."""
_LOOK_SECONDS = 0.5
"""Between two looks at whether the children are alive."""
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Those of torchrun. A child is no rank of anything, and vLLM would take them for its own."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class OfflineSettings:
    """What every group is told."""

    model_dir: str
    max_model_len: int
    dtype: str
    """vLLM's name, such as "bfloat16"."""
    tensor_parallel_size: int = 1
    data_parallel_size: int | None = None
    """The number of groups; None: as many as the GPUs at hand suffice for, and one on CPU."""
    max_num_seqs: int = 32
    """Requests that a group decodes together."""
    max_num_batched_tokens: int = 32768
    """Tokens of one step, and so of the largest medium, because vLLM encodes each medium in one step."""
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int = 1 << 30
    """On CPU."""
    is_eager: bool = False


@dataclass(frozen=True)
class Request:
    """One response to be sampled."""

    name: str
    input: Mapping[str, Any]
    """As ``vllm.LLM.generate`` takes it (``colocated/inputs.py``)."""
    values: Mapping[str, Any]
    """Of ``vllm.SamplingParams``."""
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """What became of one request: a response, or one of the two reasons why there is none."""

    name: str
    text: str = ""
    num_tokens: int = 0
    is_finished: bool = True
    refusal: str = ""
    """vLLM does not take the prompt."""
    failure: str = ""
    """vLLM gave up, or the process died."""


class OfflineEngine:
    """The groups of ``settings``. It starts them all, and returns when each has loaded the model.

    Raises:
        UserError: there are not enough GPUs, or vLLM does not start with these settings.
    """

    def __init__(self, settings: OfflineSettings, *, media: MediaSpec, end_token_ids: Sequence[int]) -> None:
        self._media = media
        self._end_token_ids = tuple(end_token_ids)
        devices = _devices_of_groups(settings)
        self._groups: list[_Group] = []
        self._lost: list[Finished] = []
        self.last_words = ""
        """Why the group that ended last did."""
        try:
            for number, visible in enumerate(devices):
                self._groups.append(_Group(number, settings, visible=visible, num_groups=len(devices)))
            for group in self._groups:
                group.wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def num_groups(self) -> int:
        """Groups that are alive."""
        return sum(group.is_alive for group in self._groups)

    def submit(self, name: str, prompt: Prompt, sampling: SamplingSettings) -> None:
        """Sends one request to the group with the fewest. Its name must be none of those that are open. If no group is
        left, the request has failed.

        Raises:
            UserError: vLLM does not sample at this temperature.
        """
        seed = sample_seed(seed=sampling.seed, step=0, identity=prompt.identity, sample=0)
        values = sampling_values(sampling, seed=seed, end_token_ids=self._end_token_ids, mode="raw_logprobs")
        values.pop("logprobs", None)
        request = Request(name, engine_input(prompt, media=self._media), values, sampling.stop)
        while alive := [group for group in self._groups if group.is_alive]:
            group = min(alive, key=lambda found: len(found.open))
            if group.send(request):
                return
            self._bury(group)
        self._lost.append(Finished(name, failure=self.last_words))

    def finished(self) -> list[Finished]:
        """Waits until something has finished and returns it. The open requests of a group that died are among it."""
        while not self._lost:
            alive = {group.connection: group for group in self._groups if group.is_alive}
            if not alive:
                return []
            found = []
            wait(list(alive), timeout=_LOOK_SECONDS)
            for group in alive.values():
                found += group.received()
                if not group.is_alive:
                    self._bury(group)
            if found:
                return found
        lost, self._lost = self._lost, []
        return lost

    def close(self) -> None:
        """Ends all groups, and waits until they have ended."""
        for group in self._groups:
            group.connection.close()
        for group in self._groups:
            group.end()

    def _bury(self, group: _Group) -> None:
        group.connection.close()
        self.last_words = group.last_words()
        self._lost += [Finished(name, failure=self.last_words) for name in group.open]
        group.open.clear()
        group.end()


class _Group:
    """One child as this process sees it."""

    def __init__(self, number: int, settings: OfflineSettings, *, visible: str | None, num_groups: int) -> None:
        self.number = number
        self.open: set[str] = set()
        self.is_alive = True
        self._reason = ""
        self._log = tempfile.TemporaryFile()
        ours, theirs = socket.socketpair()
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        if visible is not None:
            environment[_VISIBLE] = visible
        else:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_groups)))
        try:
            # A session of its own: ctrl-C does not reach it, and killing its process group takes its workers along.
            self.process = subprocess.Popen(
                [sys.executable, "-m", CHILD, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
                start_new_session=True,
            )
        finally:
            theirs.close()
            self.connection = Connection(ours.detach())
        self._name = f"vLLM process {number} (process id {self.process.pid})"
        self.send(settings)

    def wait_until_ready(self) -> None:
        while not self.connection.poll(_LOOK_SECONDS):
            if self.process.poll() is not None:
                break
        kind, *rest = self._next()
        if kind == "invalid":
            raise UserError(
                f"vLLM does not start with this model and these options: {rest[0]} (--max-model-len, --dtype, "
                "--tensor-parallel-size; memory: --gpu-memory-utilization, on CPU --kv-cache-gb)"
            )
        if kind != "ready":
            self._reason = self._reason or rest[0]
            raise UserError(f"vLLM does not start: {self.last_words()}")

    def send(self, message: Any) -> bool:
        """Whether the child took it."""
        try:
            self.connection.send(message)
        except OSError:
            self.is_alive = False
            return False
        if isinstance(message, Request):
            self.open.add(message.name)
        return True

    def received(self) -> list[Finished]:
        """Everything that the child has sent."""
        found = []
        # Asked before its messages are read, so that none of a child that has ended is missed.
        has_ended = self.process.poll() is not None
        while self.is_alive and self.connection.poll():
            kind, *rest = self._next()
            if kind == "failed":
                self.is_alive = False
                self._reason = self._reason or rest[0]
                break
            name = rest[0]
            self.open.discard(name)
            if kind == "done":
                text, num_tokens, is_finished = rest[1:]
                found.append(Finished(name, text, num_tokens, is_finished))
            else:
                found.append(Finished(name, refusal=rest[1]) if kind == "refused" else Finished(name, failure=rest[1]))
        self.is_alive = self.is_alive and not has_ended
        return found

    def last_words(self) -> str:
        """Which child it is and why it ended: its own account, or its exit code and the end of its log. The child must
        be ending."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # so that its exit code is known
            self.process.wait(timeout=END_SECONDS)
        reason = self._reason.strip().splitlines()[-1:] or self._end_of_log()
        code = self.process.poll()
        how = "ended" if code is None or code >= 0 else f"was killed by {_signal_name(-code)}"
        return f"{self._name} {how}: {reason[0] if reason else 'it said nothing'}"

    def end(self) -> None:
        """Gives the child some time to end by itself, then kills what is left of it and of its workers."""
        self.is_alive = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=END_SECONDS)
        # Also if the child has ended: its workers have its number as that of their process group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _next(self) -> tuple[Any, ...]:
        """The next message; ("failed", "") if the child is gone."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.is_alive = False
            return "failed", ""

    def _end_of_log(self) -> list[str]:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4000))
        lines = self._log.read().decode("utf-8", errors="replace").strip().splitlines()
        return lines[-1:]


def _devices_of_groups(settings: OfflineSettings) -> list[str | None]:
    """The GPUs of each group, as the environment variable lists them; [None, ...] on CPU."""
    size, wanted = settings.tensor_parallel_size, settings.data_parallel_size
    num_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if not num_devices:
        if size > 1:
            raise UserError(f"--tensor-parallel-size {size} needs {size} GPUs; on CPU it is 1")
        return [None] * (wanted or 1)
    names = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    names = names or [str(number) for number in range(num_devices)]
    number = wanted or num_devices // size
    if not number or number * size > num_devices:
        raise UserError(
            f"--tensor-parallel-size {size} x --data-parallel-size {wanted or 1} needs {size * (wanted or 1)} GPUs, "
            f"found {num_devices}"
        )
    return [",".join(names[group * size : (group + 1) * size]) for group in range(number)]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
