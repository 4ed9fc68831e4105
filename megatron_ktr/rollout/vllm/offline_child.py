"""The process of one data-parallel group: ``python -m megatron_ktr.rollout.vllm.offline_child SOCKET``.

``offline.py`` starts it and describes the messages. Threads receive requests and prepare their media, while the main
thread takes vLLM's steps. When the socket closes the process ends.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.rollout.colocated.responses import GrowingResponse
from megatron_ktr.rollout.sampling import StopStrings, end_token_ids
from megatron_ktr.rollout.vllm.cpu import WHOLE_PROMPTS, set_environment, start_vllm_on_cpu
from megatron_ktr.rollout.vllm.offline import END_SECONDS, OfflineSettings, Request


class Receiver:
    """Receives requests in one thread, so that the other end never waits, and prepares their media in a second. Ends
    the process group if the other end stays closed."""

    def __init__(self, connection: Connection) -> None:
        self.inbox: queue.SimpleQueue[tuple[Request, Any] | None] = queue.SimpleQueue()
        """(request, what vLLM's renderer made of its input, or the exception it raised); None at the end."""
        self.llm: Any = None
        """Set before the first request is sent."""
        self._connection = connection
        self._raw: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for run in (self._receive, self._render):
            threading.Thread(target=run, daemon=True, name=run.__name__).start()

    def _receive(self) -> None:
        try:
            while True:
                self._raw.put(self._connection.recv())
        except (EOFError, OSError):
            self.inbox.put(None)
        # The main thread may be loading a model, or wait for a device for ever.
        threading.Event().wait(END_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def _render(self) -> None:
        while True:
            request = self._raw.get()
            self.inbox.put((request, self._rendered(request)))

    def _rendered(self, request: Request) -> Any:
        try:
            (rendered,) = self.llm.renderer.render_cmpl([dict(request.input)])
            return rendered
        except Exception as error:  # reported for this request by the main thread
            return error


def main() -> None:
    socket = int(sys.argv[1])
    os.set_inheritable(socket, False)  # or vLLM's workers would keep it open
    connection = Connection(socket)
    try:
        settings: OfflineSettings = connection.recv()
        receiver = Receiver(connection)
        try:
            receiver.llm = _start(settings)
        except ValueError as error:
            reason = str(error).partition(" [type=")[0]  # what follows is about pydantic
            connection.send(("invalid", " ".join(reason.split())))
            return
        tokenizer = load_tokenizer(settings.model_dir)
        group = _Group(receiver, connection, tokenizer=tokenizer, ends=end_token_ids(settings.model_dir, tokenizer))
        connection.send(("ready",))
        group.run()
        receiver.llm.llm_engine.engine_core.shutdown()
    except (BrokenPipeError, EOFError, ConnectionResetError):
        return
    except BaseException as error:
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))
        raise


class _Group:
    """vLLM's engine with the requests that are open."""

    def __init__(self, receiver: Receiver, connection: Connection, *, tokenizer: Tokenizer, ends: tuple[int, ...]):
        self._inbox = receiver.inbox
        self._engine = receiver.llm.llm_engine
        self._connection = connection
        self._tokenizer = tokenizer
        self._ends = ends
        self._open: dict[str, GrowingResponse] = {}

    def run(self) -> None:
        """Adds requests as they come, and takes steps while any is open, until the other end closes."""
        while True:
            while not (self._open and self._inbox.empty()):
                received = self._inbox.get()
                if received is None:
                    return
                self._add(*received)
            for output in self._engine.step():
                self._take(output)

    def _add(self, request: Request, rendered: Any) -> None:
        if isinstance(rendered, Exception):
            return self._give_up(request.name, rendered)
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

        # Tokens are delivered one by one only if stop strings must be looked for.
        kind = RequestOutputKind.DELTA if request.stop else RequestOutputKind.FINAL_ONLY
        stop = None
        if request.stop:
            decode = partial(self._tokenizer.decode, skip_special_tokens=True)
            stop = StopStrings(request.stop, decode=decode, num_rows=1)
        try:
            self._engine.add_request(request.name, rendered, SamplingParams(**request.values, output_kind=kind))
        except ValueError as error:
            return self._give_up(request.name, error)
        self._open[request.name] = GrowingResponse(0, 0, stop=stop)

    def _give_up(self, name: str, error: Exception) -> None:
        kind = "refused" if isinstance(error, ValueError) else "lost"
        self._connection.send((kind, name, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))

    def _take(self, output: Any) -> None:
        response = self._open.get(output.request_id)
        if response is None:  # ended by a stop string
            return
        response.add(output.outputs[0])
        if response.finish_reason is None:
            return
        del self._open[output.request_id]
        if not output.finished:
            self._engine.abort_request([output.request_id])
        try:
            rollout = response.rollout(self._ends, self._tokenizer)
        except RuntimeError as error:
            return self._give_up(output.request_id, error)
        found = (rollout.text, len(rollout.token_ids), rollout.is_finished)
        self._connection.send(("done", output.request_id, *found))


def _start(settings: OfflineSettings) -> Any:
    """The ``vllm.LLM`` of this process."""
    options: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enable_prefix_caching": True,
        # vLLM's own defaults: the generation config of published models sets a repetition penalty and more.
        "generation_config": "vllm",
    }
    if not torch.accelerator.is_available():
        # Without parts a step must have room for the longest prompt and response.
        options["max_num_batched_tokens"] = max(settings.max_num_batched_tokens, settings.max_model_len)
        return start_vllm_on_cpu(settings.model_dir, kv_cache_bytes=settings.kv_cache_bytes, **WHOLE_PROMPTS, **options)
    set_environment()
    from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

    if settings.tensor_parallel_size > 1:
        # Every GPU holds the whole encoder, and the media are divided among them, so that the encoder's sizes need not
        # be divisible by their number.
        options |= {"tensor_parallel_size": settings.tensor_parallel_size, "mm_encoder_tp_mode": "data"}
    return LLM(
        settings.model_dir,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.is_eager,
        disable_log_stats=True,
        # ``start_vllm_on_cpu`` says why.
        mm_device_do_normalize=False,
        **options,
    )


if __name__ == "__main__":
    try:
        main()
    finally:
        # Threads and exit handlers of libraries must not keep the process; workers end with it.
        sys.stderr.flush()
        os._exit(0 if sys.exc_info()[0] is None else 1)
