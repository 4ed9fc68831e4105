"""vLLM inside the training ranks: each rank holds a part of an engine, beside its part of the trainer.

    load_weights    takes the policy's tensors, one full tensor at a time on every rank; each worker keeps its shard
    stream          every engine answers its share of its replicas' prompts (``rollout/colocated/layout.py``)

A single process runs vLLM's ordinary in-process engine. Several processes use vLLM's ``external_launcher``: each engine
consists of consecutive ranks of the process group that exists already. Its tensor-parallel size may differ from the
trainer's. All ranks of one engine schedule the same requests in the same order, and so stay in step without
communicating about it.

On GPUs the engine gives its memory back to the trainer between rollouts. The levels and tags below are vLLM's:

    after the start and after each ``stream``    sleep(level=2)          drops weights and key-value cache
    load_weights                                 wake_up(["weights"])    makes room for the trainer's new weights
    stream                                       wake_up(["kv_cache"])
    awake                                        puts the sleep after a ``stream`` off until its own end

On GPUs each ``stream`` therefore needs a ``load_weights`` before it, except within ``awake``. The CPU build cannot
sleep; its key-value cache is small and stays. The engine has not run on a GPU yet; tests without one check the order of
these calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.data.media.preprocess import PreprocessSettings, pixel_limits
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.base import RolloutEngine, counts_of
from megatron_ktr.rollout.colocated.inputs import FEATURE_OPTIONS, engine_input
from megatron_ktr.rollout.colocated.layout import Share, require_vllm, share_groups, split_work
from megatron_ktr.rollout.colocated.responses import Answer, Asked, GroupCollector, GrowingResponse
from megatron_ktr.rollout.colocated.weights import load_weights, stored_names, without_encoder
from megatron_ktr.rollout.sampling import SamplingSettings, StopStrings, end_token_ids, sample_seed
from megatron_ktr.rollout.vllm.cpu import (
    EXECUTOR_IN_RANKS,
    WHOLE_PROMPTS,
    set_environment,
    start_vllm_on_cpu,
    stop_vllm_in_process,
)
from megatron_ktr.rollout.vllm.runner import require_first_runner
from megatron_ktr.rollout.vllm.sampling import LogprobsMode, logprobs_mode, sampling_values
from megatron_ktr.types import Prompt, RolloutGroup

if TYPE_CHECKING:
    from megatron_ktr.config.sections import DataSection, ModelSection, RolloutSection

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BATCHED_TOKENS = 8192
"""The token limit of one vLLM step. It is raised to the size of the largest medium, because vLLM encodes each medium in
one step."""


@dataclass(frozen=True)
class EngineSettings:
    """The settings of a colocated engine, apart from its model."""

    max_prompt_length: int
    max_response_length: int
    max_medium_tokens: int
    """Visual tokens of the largest image or video."""
    engine_size: int = 1
    """The number of ranks of one engine, which is vLLM's tensor-parallel size."""
    dtype: str = "float32"
    max_num_seqs: int = 256
    memory_share: float = 0.5
    """The share of a GPU's memory that the engine takes while it is awake."""
    kv_cache_bytes: int = 1 << 28
    """The size of the key-value cache on CPU."""
    is_eager: bool = False
    takes_features: bool = False
    """Whether media come as the trainer's vision features. The engine then has no vision encoder."""


class ColocatedEngine(RolloutEngine):
    """This rank's part of the engines. It is collective: see the module's docstring and ``RolloutEngine``.

    ``stream`` must be exhausted on every rank. A group that the reading rank's own engine answers alone is yielded as
    soon as it is complete, other groups when every engine of the share group has finished. ``start`` is the function
    that builds the ``vllm.LLM`` from keyword options.
    """

    is_collective = True

    def __init__(
        self,
        model_dir: Path | str,
        *,
        ranks: ParallelGroups,
        tokenizer: Tokenizer,
        media: MediaSpec,
        sampling: SamplingSettings,
        settings: EngineSettings,
        start: Callable[..., Any] | None = None,
    ) -> None:
        self.tokenizer, self.media, self.sampling, self.settings = tokenizer, media, sampling, settings
        self.end_token_ids = end_token_ids(model_dir, tokenizer)
        self._ranks = ranks
        every_group = share_groups(ranks.sizes, world_size=ranks.world_size, engine_size=settings.engine_size)
        self._share = next(group for group in every_group if ranks.rank in group.ranks)
        self._engine = self._share.engine_of(ranks.rank)
        self._mode: LogprobsMode = logprobs_mode(sampling)
        self.runs_vision_encoder = not settings.takes_features
        names = stored_names(model_dir)
        self._weight_names = names if self.runs_vision_encoder else without_encoder(names)
        self._can_sleep = current().name != "cpu"
        self._asleep: set[str] = set()
        self._stays_awake = False
        self._process_group = _process_group([group.ranks for group in every_group], own=ranks)
        start = start or (start_vllm_on_gpu if self._can_sleep else start_vllm_on_cpu)
        try:
            self._llm = start(model_dir, **self._options())
        except ValueError as error:
            reason = str(error).partition(" [type=")[0]  # what follows is about pydantic
            raise UserError(
                f"vLLM does not start with this model and these options: {reason} (its max_model_len is "
                "--max-prompt-length + --max-response-length; memory: --rollout-memory-share, on CPU "
                "--rollout-kv-cache-gb)"
            ) from error
        self._sleep()

    @property
    def keeps_weights(self) -> bool:
        return not self._can_sleep

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        options: dict[str, Any] = {
            "dtype": settings.dtype,
            "tensor_parallel_size": settings.engine_size,
            "max_model_len": settings.max_prompt_length + settings.max_response_length,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": max(BATCHED_TOKENS, settings.max_medium_tokens),
            "enable_prefix_caching": True,
            "logprobs_mode": self._mode,
            # vLLM's own defaults: the generation config of published models sets a repetition penalty and more, which
            # would give another distribution than the trainer's.
            "generation_config": "vllm",
        }
        if self._ranks.world_size > 1:
            options["distributed_executor_backend"] = "external_launcher" if self._can_sleep else EXECUTOR_IN_RANKS
        if settings.engine_size > 1:
            # Every rank holds the whole encoder, and the media are divided among the ranks. The encoder's sizes then
            # need not be divisible by the engine's size.
            options["mm_encoder_tp_mode"] = "data"
        if settings.takes_features:
            options |= FEATURE_OPTIONS
        if self._can_sleep:
            options |= {"gpu_memory_utilization": settings.memory_share, "enforce_eager": settings.is_eager}
        else:
            options |= {"kv_cache_bytes": settings.kv_cache_bytes, **WHOLE_PROMPTS}
            options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], options["max_model_len"])
        return options

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Gives every full tensor to this rank's worker. It exhausts the iterator, unless it raises.

        Raises:
            UserError: a weight of the model is missing, or vLLM does not know a weight.
        """
        self._wake("weights")
        load_weights(self._llm, named_tensors, expected=self._weight_names)

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int = 0,
        sampling: SamplingSettings | None = None,
        counts: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, RolloutGroup]]:
        """See ``RolloutEngine``. Log-probs are None if ``sampling`` has a temperature, top-p or top-k for which the
        engine's log-probs mode gives no exact ones.

        Raises:
            UserError: a prompt and its longest response exceed the engine's length, or vLLM refuses a prompt.
        """
        sampling = sampling or self.sampling
        if "weights" in self._asleep:
            raise RuntimeError("the engine gave its weights' memory back after the last rollout: load_weights first")
        numbers = counts_of(prompts, counts=counts, sampling=sampling)
        asked_by_reader = self._asked_by_share(list(zip(prompts, numbers, strict=True)))
        everyone = [asked for found in asked_by_reader.values() for asked in found]
        own = GroupCollector(asked_by_reader, rank=self._ranks.rank)
        work = split_work(
            [len(prompt.token_ids) for prompt, _ in everyone],
            num_samples=[number for _, number in everyone],
            num_engines=self._share.num_engines,
            max_response_length=sampling.max_response_length,
        )
        answers: list[Answer] = []
        failure: Exception | None = None
        try:
            self._wake("kv_cache")
            shown = [prompt for prompt, _ in everyone]
            for answer in self._generate(shown, work[self._engine], step=step, sampling=sampling):
                answers.append(answer)
                yield from own.add(answer)
            if not self._stays_awake:
                self._sleep()
        except Exception as error:  # raised below, after the ranks that wait for these answers have been told
            failure = error
        for answer in self._answers_of_others(answers, failure):
            yield from own.add(answer)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """See ``RolloutEngine``. The engine sleeps when it ends, unless an answer failed."""
        self._stays_awake = True
        try:
            yield
        finally:
            self._stays_awake = False
        self._sleep()

    def close(self) -> None:
        """Ends this rank's engine. The trainer's process groups stay."""
        stop_vllm_in_process(self._llm)
        del self._llm

    def _generate(
        self, prompts: Sequence[Prompt], shares: Sequence[Share], *, step: int, sampling: SamplingSettings
    ) -> Iterator[Answer]:
        """Yields this engine's responses as they finish. Every rank of the engine submits the same requests in the same
        order and takes the same steps."""
        engine = self._llm.llm_engine
        running: dict[str, GrowingResponse] = {}
        try:
            for share in shares:
                running |= self._submit(prompts[share.prompt], share, step=step, sampling=sampling)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.request_id not in running:  # ended by a stop string
                        continue
                    response = running[output.request_id]
                    response.add(output.outputs[0])
                    if response.finish_reason is not None:
                        del running[output.request_id]
                        if not output.finished:
                            engine.abort_request([output.request_id])
                        yield response.prompt, response.sample, response.rollout(self.end_token_ids, self.tokenizer)
            if running:
                raise RuntimeError(f"vLLM dropped {len(running)} requests")
        finally:
            if running:
                engine.abort_request(list(running))

    def _submit(
        self, prompt: Prompt, share: Share, *, step: int, sampling: SamplingSettings
    ) -> dict[str, GrowingResponse]:
        """Submits one request for each sample of the share, and returns their responses by name of the request."""
        limit = self.settings.max_prompt_length + self.settings.max_response_length
        if len(prompt.token_ids) + sampling.max_response_length > limit:  # vLLM would cut the response short instead
            raise UserError(
                f"prompt {prompt.problem_id} has {len(prompt.token_ids)} tokens, its response may have "
                f"{sampling.max_response_length}: the engine's length is {limit} (--max-prompt-length + "
                "--max-response-length)"
            )
        requests = {}
        try:
            # Rendered once for all samples, because hashing and preparing the media is expensive.
            (request,) = self._llm.renderer.render_cmpl([engine_input(prompt, media=self.media)])
            for sample in share.samples:
                seed = sample_seed(seed=sampling.seed, step=step, identity=prompt.identity, sample=sample)
                name = f"{share.prompt}/{sample}"
                self._llm.llm_engine.add_request(name, dict(request), self._params(sampling, seed=seed))
                requests[name] = GrowingResponse(share.prompt, sample, stop=self._stop_strings(sampling))
        except ValueError as error:
            raise UserError(f"prompt {prompt.problem_id}: vLLM does not take it: {error}") from error
        return requests

    def _params(self, sampling: SamplingSettings, *, seed: int) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

        values = sampling_values(sampling, seed=seed, end_token_ids=self.end_token_ids, mode=self._mode)
        # Tokens are delivered one by one only if stop strings must be looked for.
        kind = RequestOutputKind.DELTA if sampling.stop else RequestOutputKind.FINAL_ONLY
        return SamplingParams(**values, flat_logprobs=True, output_kind=kind)

    def _stop_strings(self, sampling: SamplingSettings) -> StopStrings | None:
        if not sampling.stop:
            return None
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return StopStrings(sampling.stop, decode=decode, num_rows=1)

    def _asked_by_share(self, asked: list[Asked]) -> dict[int, list[Asked]]:
        """What the share group is asked, by reading rank. A rank knows only its own replica's prompts at first."""
        readers = self._share.reading_ranks
        if len(readers) == 1:
            return {readers[0]: asked}
        parts = self._gathered(asked if self._ranks.rank in readers else None)
        return {rank: parts[self._share.ranks.index(rank)] for rank in readers}

    def _answers_of_others(self, answers: list[Answer], failure: Exception | None) -> list[Answer]:
        """The answers of the other engines of the share group. A failure on one rank is raised on all of them."""
        speaks = self._share.is_first_of_engine(self._ranks.rank)
        problem = None if failure is None else (isinstance(failure, UserError), f"{type(failure).__name__}: {failure}")
        parts = self._gathered((answers if speaks else [], problem))
        if failure is not None:
            raise failure
        for rank, (_, found) in zip(self._share.ranks, parts, strict=True):
            if found is not None:
                is_users, text = found
                raise (UserError if is_users else RuntimeError)(f"the rollout engine failed on rank {rank}: {text}")
        size = self._share.engine_size
        return [answer for place, (found, _) in enumerate(parts) if place // size != self._engine for answer in found]

    def _gathered(self, value: Any) -> list[Any]:
        """The ``value`` of every rank of the share group, in the order of ranks."""
        if len(self._share.ranks) == 1:
            return [value]
        parts: list[Any] = [None] * len(self._share.ranks)
        torch.distributed.all_gather_object(parts, value, group=self._process_group)
        return parts

    def _wake(self, tag: str) -> None:
        if tag in self._asleep:
            # The trainer's allocator keeps unused memory in its cache; the engine needs that memory now.
            current().empty_cache()
            self._llm.wake_up(tags=[tag])
            self._asleep.discard(tag)

    def _sleep(self) -> None:
        if self._can_sleep:
            self._llm.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}


def start_vllm_on_gpu(model_dir: Path | str, **options: Any) -> Any:
    """A ``vllm.LLM`` in this process, with sleep mode. ``options`` are passed to it and override the defaults."""
    set_environment()
    from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]  # optional

    # Pixels are normalised in Hugging Face's processor; ``start_vllm_on_cpu`` says why.
    llm = LLM(str(model_dir), **{"enable_sleep_mode": True, "mm_device_do_normalize": False, **options})
    require_first_runner(llm)
    return llm


def colocated_engine(
    model: ModelSection,
    *,
    data: DataSection,
    rollout: RolloutSection,
    ranks: ParallelGroups,
    tokenizer: Tokenizer,
    media: MediaSpec,
    sampling: SamplingSettings,
) -> ColocatedEngine:
    """The engine that a run's options ask for; collective over the world.

    Raises:
        UserError: vLLM is not installed, or cannot serve this model with these options.
    """
    require_vllm()
    sizes = PreprocessSettings.from_model(model.model, **pixel_limits(data))
    num_grids = -(-data.video_max_frames // media.temporal_patch_size)
    largest = max(num_grids * sizes.max_frame_tokens("video"), sizes.max_frame_tokens("image"))
    settings = EngineSettings(
        max_prompt_length=data.max_prompt_length,
        max_response_length=rollout.max_response_length,
        max_medium_tokens=min(largest, data.max_prompt_length),
        engine_size=rollout.rollout_tensor_parallel_size,
        dtype=DTYPES[model.params_dtype],
        max_num_seqs=rollout.rollout_max_num_seqs,
        memory_share=rollout.rollout_memory_share,
        kv_cache_bytes=round(rollout.rollout_kv_cache_gb * 2**30),
        is_eager=rollout.rollout_eager,
        takes_features=rollout.share_vision_features,
    )
    return ColocatedEngine(
        model.model, ranks=ranks, tokenizer=tokenizer, media=media, sampling=sampling, settings=settings
    )


def _process_group(groups_of_ranks: Sequence[Sequence[int]], *, own: ParallelGroups) -> Any:
    """The process group of this rank's share group. Every rank takes part in making all groups, in the same order."""
    if len(groups_of_ranks) == 1:
        return own.world
    if len(groups_of_ranks) == own.data_size:
        return own.model
    made = [torch.distributed.new_group(list(ranks)) for ranks in groups_of_ranks]
    return next(group for group, ranks in zip(made, groups_of_ranks, strict=True) if own.rank in ranks)
