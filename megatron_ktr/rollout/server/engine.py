"""Rollout by ``vllm serve`` processes on other GPUs or nodes, with prompts sent over HTTP and weights in versions.

The reading rank of every replica talks to all servers, from one asyncio loop in a thread. It sends each request to the
server with the fewest requests; ``rollout/server/pool.py`` has the rules for retries and for servers that leave and
come back. A request is one prompt with all its responses, so that its media are sent and encoded only once
(``rollout/server/wire.py``).

Each server has one owner among the reading ranks, which gives it every new version of the weights
(``rollout/server/weights.py``, ``rollout/server/broadcast.py``). The owners then tell the other ranks which servers
have it. Before an update a server finishes its running requests, those of all replicas, so that no response mixes two
versions. With ``in_flight_updates`` it only pauses them, and mixed responses are counted.

docs/rollouts.md says how to start servers. On a machine without GPU, use
``python -m megatron_ktr.rollout.server.serve``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import shutil
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import AutoConfig

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.config.sections import RolloutSection
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import StepAbandoned, UserError
from megatron_ktr.files.hf_model import reading_model
from megatron_ktr.rollout.base import RolloutEngine, counts_of
from megatron_ktr.rollout.sampling import SamplingSettings, StopStrings, end_token_ids
from megatron_ktr.rollout.server.client import ServerClient, ServerFacts
from megatron_ktr.rollout.server.fingerprint import Fingerprint, agreed
from megatron_ktr.rollout.server.member import Give, PoolSettings
from megatron_ktr.rollout.server.pool import COUNTS, ServerPool
from megatron_ktr.rollout.server.replicas import Replicas
from megatron_ktr.rollout.server.weights import DirectoryTransfer, Failed, Outcome, WeightTransfer
from megatron_ktr.rollout.server.wire import Sample, check_length, encode_request, most_answer_bytes, read_answer
from megatron_ktr.rollout.vllm.sampling import LogprobsMode, logprobs_mode, records_logprobs, rollout_of
from megatron_ktr.types import Prompt, RolloutGroup
from megatron_ktr.web.address import Address, ApiKey

_ENCODERS = 2
"""Threads that encode requests. More would only take turns at Python's lock."""
logger = logging.getLogger(__name__)


class ServerEngine(RolloutEngine):
    """Generates with the servers that ``settings`` names. Every reading rank makes one, gives it weights and closes it
    together with the others.

    Raises:
        UserError: no server answers, or a server is not set up for training.
    """

    takes_more = True

    def __init__(
        self,
        model_dir: Path | str,
        *,
        tokenizer: Tokenizer,
        media: MediaSpec,
        sampling: SamplingSettings,
        transfer: WeightTransfer,
        replicas: Replicas,
        settings: PoolSettings,
        runs_vision_encoder: bool = True,
    ) -> None:
        self.runs_vision_encoder = runs_vision_encoder
        self.tokenizer = tokenizer
        self.media = media
        self.sampling = sampling
        self.transfer = transfer
        self.replicas = replicas
        self.mode: LogprobsMode = logprobs_mode(sampling)
        self._runner = ""  # the model runner of the first server that reports one (rollout/vllm/runner.py)
        self.end_token_ids = end_token_ids(model_dir, tokenizer)
        with reading_model(model_dir):
            self.vocab_size = AutoConfig.from_pretrained(model_dir).get_text_config().vocab_size
        self._num_updates = 0
        self._fingerprints: dict[str, Fingerprint] = {}
        """Those of the servers after the last update, the same on all ranks."""
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(_ENCODERS, thread_name_prefix="requests"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm servers", daemon=True)
        self._thread.start()
        self.pool = self._run(self._make_pool(settings)).result()
        try:
            self._run(self.pool.start()).result()
        except UserError:
            self.close()
            raise

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int = 0,
        sampling: SamplingSettings | None = None,
        counts: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """Yields groups as servers finish them. The responses to a prompt depend neither on the server nor on the other
        prompts."""
        sampling = sampling or self.sampling
        if not records_logprobs(sampling, mode=self.mode) and records_logprobs(sampling, mode=logprobs_mode(sampling)):
            raise UserError(f"the servers' --logprobs-mode {self.mode} gives no log-probs at {sampling.temperature:g}")
        numbers = counts_of(prompts, counts=counts, sampling=sampling)
        for prompt in prompts:
            check_length(prompt, sampling=sampling, max_model_len=self.pool.max_model_len)
        found: queue.SimpleQueue[Future[tuple[int, RolloutGroup]]] = queue.SimpleQueue()
        asked = [
            self._run(self._answer(index, prompt, step=step, sampling=replace(sampling, num_generations=number)))
            for index, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
        ]
        for future in asked:
            future.add_done_callback(found.put)
        try:
            for _ in prompts:
                yield found.get().result()
        finally:
            for future in asked:
                future.cancel()

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Gives the servers new weights under a new label.

        Raises:
            UserError: the weights could not be written.
            StepAbandoned: no server has the weights, and none can be given them later. Both are raised on every rank.
        """
        self._num_updates += 1
        label = f"{self.replicas.run}-{self._num_updates}"

        def start(gives: Mapping[str, Give], failed: Failed | None = None) -> Future[Outcome]:
            return self._run(self.pool.update(label, gives, again=self.transfer.keeps_weights, failed=failed))

        outcome: Outcome = {}
        problem = None
        try:
            outcome = self.transfer.send(named_tensors, label=label, start=start)
        except UserError as error:
            problem = error
        for _ in named_tensors:  # other ranks gather every tensor together with this one, before they learn of it
            pass
        self.replicas.raise_any(problem)
        found: dict[str, Fingerprint] = {}
        for part, fingerprints in self.replicas.gather((outcome, self.pool.fingerprints)):
            outcome = outcome | part
            found |= fingerprints
        found = {url: one for url, one in sorted(found.items()) if outcome.get(url) is None}
        near = agreed(found, before=self._fingerprints, limit=self.pool.settings.gap_limit)
        self._fingerprints = found
        expected = found[near[0]] if near else None
        outcome |= {url: _other_weights(found, near) for url in found if near is None or url not in near}
        self._run(self.pool.adopt(outcome, expected=expected)).result()
        self.transfer.settle()
        if any(found is None for found in outcome.values()):
            return
        errors = "; ".join(f"{url}: {found}" for url, found in outcome.items())
        can_wait = self.transfer.keeps_weights and self.pool.settings.wait_seconds > 0
        if not can_wait or (found and near is None):
            raise StepAbandoned(f"no vLLM server took the new weights: {errors}")
        # Servers that come back are given the weights; who asks for responses waits for them.
        logger.warning("no vLLM server took the new weights: %s", errors)

    @property
    def counts(self) -> Mapping[str, int]:
        """The counts of the pool, as server/retries and so on (docs/rollouts.md)."""
        return {f"server/{name}": self.pool.counts[name] for name in COUNTS}

    def close(self) -> None:
        """Closes the connections. The servers keep running."""
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                self._run(self.pool.close()).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self.transfer.close()

    async def _answer(
        self, index: int, prompt: Prompt, *, step: int, sampling: SamplingSettings
    ) -> tuple[int, RolloutGroup]:
        samples = await self.pool.ask(
            partial(
                encode_request,
                prompt,
                step=step,
                sampling=sampling,
                mode=self.mode,
                media=self.media,
                end_token_ids=self.end_token_ids,
            ),
            read=partial(
                read_answer,
                prompt=prompt,
                sampling=sampling,
                mode=self.mode,
                vocab_size=self.vocab_size,
                end_token_ids=self.end_token_ids,
            ),
            name=f"prompt {prompt.problem_id}",
            most_bytes=most_answer_bytes(sampling),
        )
        rollouts = tuple(
            rollout_of(
                sample.token_ids,
                sample.logprobs,
                finish_reason=sample.finish_reason,
                end_token_ids=self.end_token_ids,
                tokenizer=self.tokenizer,
            )
            for sample in (until_stop(sample, sampling.stop, tokenizer=self.tokenizer) for sample in samples)
        )
        return index, RolloutGroup(prompt=prompt, rollouts=rollouts)

    async def _make_pool(self, settings: PoolSettings) -> ServerPool:
        clients = [
            ServerClient(
                url,
                max_requests=settings.max_requests,
                timeout_seconds=settings.timeout_seconds,
                token=settings.token,
            )
            for url in settings.urls
        ]
        return ServerPool(clients, settings=settings, check_facts=self._problem_with)

    def _problem_with(self, facts: ServerFacts) -> str | None:
        """Says which setting of a server would make its responses or log-probs wrong for the trainer; None if all are
        right."""
        if facts.logprobs_mode != self.mode:
            return f"it was started with --logprobs-mode {facts.logprobs_mode}; this run needs {self.mode}"
        if facts.normalises_pixels:
            return "it normalises pixels that are normalised already; start it with --no-mm-device-do-normalize"
        if self.runs_vision_encoder and not facts.has_encoder:
            return "it has no vision encoder: start it without --limit-mm-per-prompt, or use --share-vision-features"
        self._runner = self._runner or facts.runner
        if facts.runner != self._runner:
            return (
                f"its model runner is {facts.runner}, another server's {self._runner}: the same seed would give other "
                "responses, depending on who answers; start all with VLLM_USE_V2_MODEL_RUNNER=0"
            )
        return None

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _other_weights(found: Mapping[str, Fingerprint], near: Sequence[str] | None) -> str:
    if near is None:
        return f"the servers {', '.join(found)} have the same label of weights and compute different log-probs"
    return f"it computes other log-probs than {near[0]}, which has the same label of weights"


def until_stop(sample: Sample, stop: Sequence[str], *, tokenizer: Tokenizer) -> Sample:
    """``sample`` up to the token that completes a stop string.

    Servers do not stop there but sample on. Their own stop strings need their detokenizer, which fails on ids that the
    model has and its tokenizer does not know, and such a failure ends the server.
    """
    if not stop:
        return sample
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    strings = StopStrings(stop, decode=decode, num_rows=1)
    for length, token_id in enumerate(sample.token_ids, start=1):
        if strings.completed_by(0, token_id):
            logprobs = None if sample.logprobs is None else sample.logprobs[:length]
            return replace(sample, token_ids=sample.token_ids[:length], logprobs=logprobs, finish_reason="stop")
    return sample


def server_engine(
    model_dir: str,
    *,
    rollout: RolloutSection,
    run_dir: Path,
    data_group: ProcessGroup | None,
    tokenizer: Tokenizer,
    media: MediaSpec,
    sampling: SamplingSettings,
    gap_limit: float,
) -> ServerEngine:
    """The engine that ``rollout`` describes, for a reading rank; ``data_group`` is the process group of all reading
    ranks. Weights that are sent through files lie below ``run_dir``, unless an option names another directory.
    ``gap_limit`` is that of log-probs of the same weights, in nats."""
    replicas = Replicas(data_group)
    token = server_token(rollout)
    urls = list(dict.fromkeys(url.rstrip("/") for url in rollout.server_urls))
    if token is None and (open_urls := [url for url in urls if not Address.read(url, **_URL_WORDS).is_loopback]):
        logger.warning(
            "--server-urls: no token is sent to %s: whoever reaches a server that wants none can change its weights "
            "(docs/security.md)",
            ", ".join(open_urls),
        )
    owned_urls = replicas.own(urls)
    transfer: WeightTransfer
    if rollout.weight_transfer == "directory" or (rollout.weight_transfer == "auto" and current().name == "cpu"):
        directory = Path(rollout.weight_directory or run_dir / "server_weights")
        if replicas.rank == 0 and rollout.weight_directory is None:
            shutil.rmtree(directory, ignore_errors=True)  # left behind by a run that was cut off
        transfer = DirectoryTransfer(directory, owned_urls=owned_urls, replicas=replicas)
    else:
        from megatron_ktr.rollout.server.broadcast import BroadcastTransfer

        transfer = BroadcastTransfer(owned_urls=owned_urls, timeout_seconds=rollout.server_timeout_seconds)
    return ServerEngine(
        model_dir,
        tokenizer=tokenizer,
        media=media,
        sampling=sampling,
        transfer=transfer,
        replicas=replicas,
        settings=PoolSettings(
            urls=tuple(urls),
            max_requests=rollout.server_max_requests,
            max_retries=rollout.server_max_retries,
            timeout_seconds=rollout.server_timeout_seconds,
            wait_seconds=60 * rollout.server_wait_minutes,
            gap_limit=gap_limit,
            in_flight_updates=rollout.in_flight_updates,
            token=token,
        ),
        runs_vision_encoder=not rollout.share_vision_features,
    )


_URL_WORDS = {"option": "--server-urls", "key_option": "--server-token-env"}


def server_token(rollout: RolloutSection) -> ApiKey | None:
    """The token that the options name; None if they name none. Raises ``UserError`` if there is none at that place, or
    an address of a server cannot be used."""
    for url in rollout.server_urls:
        Address.read(url, **_URL_WORDS)
    if rollout.server_token_env is not None:
        return ApiKey.from_environment(rollout.server_token_env, option="--server-token-env")
    if rollout.server_token_file is not None:
        return ApiKey.from_file(rollout.server_token_file, option="--server-token-file")
    return None
