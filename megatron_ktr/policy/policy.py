"""The trained model behind four verbs: ``score``, ``update``, ``export`` and the state its checkpoint needs.

This file drives megatron-core: pipeline schedule, data-parallel gradients, optimizer. It knows no algorithm by
name: an objective turns scores into per-token streams, and the loss consumes the streams.

One micro-batch holds whole groups (a group is never split). The head runs on the last pipeline stage only, and there
on the predicting rows only; its outputs stay on that stage. Every rank runs every forward and backward, even if all
advantages of its micro-batch are zero: other ranks would otherwise wait for it for ever in a collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_ktr.batch.micro_batch import MicroBatch, Packed, UpdateResult, measures, ready
from megatron_ktr.config.part_options import PolicyOptions
from megatron_ktr.distributed.collectives import reduce_metrics
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.optimizer import build_optimizer, build_scheduler, freeze_parts, wrap_in_ddp
from megatron_ktr.distributed.platform import Platform
from megatron_ktr.distributed.replicas import ReplicaNumbers
from megatron_ktr.objectives.base import Objective
from megatron_ktr.ops.token_statistics import TokenStatistics
from megatron_ktr.policy.export import export_weights, save_export
from megatron_ktr.policy.finite import reason_before_step, require_finite_weights
from megatron_ktr.policy.guarded_step import guarded_step
from megatron_ktr.policy.offload import moments_on_device, moves
from megatron_ktr.policy.reference import ReferenceModel
from megatron_ktr.policy.roles import ModelRole
from megatron_ktr.policy.statistics import compared, comparing
from megatron_ktr.policy.vision import PolicyVision
from megatron_ktr.policy.vision_watch import media_pull, take_watched
from megatron_ktr.sums import Metrics
from megatron_ktr.types import BatchFacts, PackedBatch, Prompt, ScoredBatch, TokenScores
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.conversion import GatherTo, load_hf_weights, unwrap_model
from models.qwen2_5_vl.fp8 import drop_initial_values, pass_precision
from models.qwen2_5_vl.lora import LoraSettings, add_adapters
from models.qwen2_5_vl.model import Qwen2_5_VLModel, build_model

_log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Policy(ReplicaNumbers):
    """One rank's part of the policy model, its optimizer and schedule, and an optional frozen reference model.

    ``hf_dir`` gives sizes and initial weights. ``num_steps`` is the length of the learning-rate schedule, in
    what it counts (``config/schedule.py``).
    """

    def __init__(
        self, hf_dir: str | Path, *, options: PolicyOptions, ranks: ParallelGroups, platform: Platform, num_steps: int
    ) -> None:
        self.options = options
        self.ranks = ranks
        self.platform = platform
        self.hf_dir = Path(hf_dir)
        self.model_config = Qwen2_5_VLConfig.from_hf(self.hf_dir)
        self.dtype = DTYPES[options.model.params_dtype]
        self.temperature = options.temperature

        chunks = self._load_model(self.hf_dir)
        freeze_parts(chunks, options.model.freeze)
        self.lora = LoraSettings.of(options.model, seed=options.seed)
        if self.lora is not None:
            add_adapters(chunks, self.lora, ranks=ranks)
        drop_initial_values(p for chunk in chunks for p in chunk.parameters() if not p.requires_grad)
        self.transformer_config = get_model_config(chunks[0])
        self.chunks = wrap_in_ddp(
            chunks, config=self.transformer_config, optimizer=options.optimizer, parallel=options.parallel
        )
        self.optimizer = build_optimizer(
            self.chunks,
            section=options.optimizer,
            dtype=self.dtype,
            overlap_param_gather=options.parallel.overlap_param_gather,
        )
        self.scheduler = build_scheduler(self.optimizer, section=options.optimizer, length=num_steps)
        self._connect_schedule_hooks()
        self._is_gather_pending = options.parallel.overlap_param_gather
        self.reference: ReferenceModel | None = None
        self.vision = PolicyVision(
            self.bare_chunks[0].vision,
            parallel=options.parallel,
            ranks=ranks,
            hf_dir=self.hf_dir,
            device=platform.device,
        )

    def _load_model(self, hf_dir: Path) -> list[Qwen2_5_VLModel]:
        chunks = build_model(self.model_config, ranks=self.ranks, options=self.options.build, dtype=self.dtype)
        load_hf_weights(chunks, hf_dir, ranks=self.ranks)
        require_finite_weights(chunks, hf_dir=hf_dir, ranks=self.ranks)
        return chunks

    def _connect_schedule_hooks(self) -> None:
        config = self.transformer_config
        # Weak: a strong reference would make a cycle through C++ that leaks weights and the groups' threads. (Layers
        # hold this config; autograd nodes of the distributed optimizer's views of fp32 parameters hold the layers.)
        policy = weakref.proxy(self)

        def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
            # Our loss is already normalised by global counts, so the schedule's own token count is dropped.
            finalize_model_grads(model, None, **options)
            policy.vision.sum_gradients()

        config.finalize_model_grads_func = finalize
        config.grad_scale_func = lambda loss: policy.optimizer.scale_loss(loss)
        if self.options.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def add_reference(self, hf_dir: str | Path | None = None) -> None:
        """Adds the frozen model of the KL term, with the weights in ``hf_dir``, by default the initial ones."""
        if self.lora is not None and hf_dir is None:
            self.reference = ReferenceModel.without_adapters(self.bare_chunks)
        else:
            chunks = self._load_model(Path(hf_dir or self.hf_dir))
            offload_on = self.platform if self.options.model.offload_reference else None
            self.reference = ReferenceModel.copy(chunks, offload_on=offload_on)
        self.vision.add_reference(unwrap_model(self.reference.chunks[0]).vision, is_policy_copy=hf_dir is None)

    def score(
        self,
        batches: Sequence[Packed],
        *,
        model: ModelRole = ModelRole.POLICY,
        temperature: float | None = None,
        precision: str = "same",
    ) -> list[TokenStatistics | None]:
        """Log-prob and entropy of every response token, without gradient; None on every stage but the last.

        A batch given as a function is packed only when its turn comes, while the device works on the batch before it.
        ``temperature`` replaces the run's own. ``precision`` is that of the language model: same, bf16 or fp8.
        """

        def statistics(chunk: torch.nn.Module, _: Any, batch: PackedBatch, hidden_RD: Tensor) -> TokenStatistics:
            return unwrap_model(chunk).response_statistics(
                hidden_RD, batch, temperature=temperature or self.temperature
            )

        return self._forward_only(batches, batch_of=ready, finish=statistics, model=model, precision=precision)

    def hidden_rows(
        self, batches: Sequence[Packed], *, model: ModelRole = ModelRole.POLICY, precision: str = "same"
    ) -> list[Tensor | None]:
        """Hidden states [R, D] of the rows that predict the response tokens, without gradient; None on every stage but
        the last. The head does not run."""

        def rows(*found: Any) -> Tensor:
            return found[-1].clone()

        return self._forward_only(batches, batch_of=ready, finish=rows, model=model, precision=precision)

    def score_intact(
        self, items: Sequence[MicroBatch], *, objective: Objective
    ) -> list[tuple[MicroBatch, TokenScores] | None]:
        """An intact pass without gradient. For every micro-batch it returns all scores, and the micro-batch with what
        the pass found (later passes use that and do not compute it again); None on every stage but the last."""

        def scores_of(
            chunk: torch.nn.Module, item: MicroBatch, batch: PackedBatch, hidden_RD: Tensor
        ) -> tuple[MicroBatch, TokenScores]:
            statistics, item = compared(chunk, item, batch, hidden_RD, **options)
            return item, item.scores(statistics)

        with comparing(objective, self.reference, temperature=self.temperature) as options:
            return self._forward_only(items, batch_of=lambda item: item.batch, finish=scores_of)

    def _forward_only(
        self,
        items: Sequence[Any],
        *,
        batch_of: Callable[[Any], PackedBatch],
        finish: Callable[[torch.nn.Module, Any, PackedBatch, Tensor], Any],
        model: ModelRole = ModelRole.POLICY,
        precision: str = "same",
    ) -> list[Any]:
        """A forward pass without gradient. Returns ``finish(chunk, item, batch on the device, hidden_RD)`` for every
        item, or None on every stage but the last."""
        reference = self.reference if model is ModelRole.REFERENCE else None
        if model is ModelRole.REFERENCE and reference is None:
            raise ValueError("no reference model: call add_reference() first")
        chunks = self.chunks if reference is None else reference.chunks
        if reference is None or reference.is_policy:
            # Gathering cannot be left to the forward: a replica whose batch has no media would not gather the vision
            # encoder, and the others would wait for it for ever. (With gradient, the encoder always runs.)
            self.wait_for_parameters()

        def keep(
            item: Any, batch: PackedBatch, chunk: torch.nn.Module, hidden_RD: Tensor, non_loss_data: bool = True
        ) -> Any:
            return finish(chunk, item, batch, hidden_RD)

        if not items:
            return []
        # The interleaved schedule needs a multiple of the stages; results of the repeated last item are dropped below.
        num_missing = -len(items) % self.ranks.sizes.pipeline if len(chunks) > 1 else 0
        padded = [*items, *[items[-1]] * num_missing]
        in_use = reference.in_use() if reference else contextlib.nullcontext()
        precision_of = pass_precision(self.transformer_config, precision, section=self.options.model)
        with torch.no_grad(), precision_of, in_use:
            results = self._run(chunks, padded, batch_of=batch_of, finish=keep, forward_only=True, model=model)
        return list(results)[: len(items)] if results else [None] * len(items)

    def update(self, micro_batches: Sequence[MicroBatch], *, objective: Objective, facts: BatchFacts) -> UpdateResult:
        """One optimizer step: ``backward``, then clipping, optimizer and learning-rate schedule.

        If a number is not finite, no rank takes the step and nothing changes (``batch/skips.py``).
        """
        result = self.backward(micro_batches, objective=objective, facts=facts)
        if (skipped := reason_before_step(result, objective)) is not None:
            return dataclasses.replace(result, skip_reason=skipped, grad_norm=math.nan)
        if not result.has_gradient:
            return result
        moments: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.options.optimizer.offload_optimizer_states:
            moments = moments_on_device(self.optimizer, **moves(self.platform))
        with moments:
            outcome = guarded_step(self.optimizer, world=self.ranks.world, device=self.platform.device)
        if outcome.has_stepped:
            is_by_samples = self.options.optimizer.counts_samples
            num_samples = self.global_count(sum(len(item.groups) for item in micro_batches)) if is_by_samples else 1
            self.scheduler.step(increment=round(num_samples))
            self.vision.after_step()
        return dataclasses.replace(
            result,
            grad_norm=outcome.grad_norm,
            has_stepped=outcome.has_stepped,
            skip_reason=outcome.skip_reason,
        )

    def backward(self, micro_batches: Sequence[MicroBatch], *, objective: Objective, facts: BatchFacts) -> UpdateResult:
        """Runs the forward, chooses key tokens on the last stage, and runs the backward. Gradients are then reduced
        over all ranks; no optimizer step is taken."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss_of(
            item: MicroBatch, batch: PackedBatch, chunk: torch.nn.Module, hidden_RD: Tensor
        ) -> tuple[Tensor, Tensor, Any]:
            statistics, item = compared(chunk, item, batch, hidden_RD, **options)
            scores = item.scores(statistics)
            scored = ScoredBatch(batch, scores, item.groups)
            streams = objective.token_streams(scored, facts, selection=item.selection)
            loss, metrics = objective.loss(statistics, streams, scores)
            metrics.merge(measures(loss, scores, has_gradient=objective.any_gradient(streams, scores)))
            metrics.merge(media_pull(objective, streams, scores, groups=item.groups))
            no_tokens = torch.zeros((), dtype=torch.int, device=loss.device)
            return loss, no_tokens, (metrics, streams.detach(), scores.detach())

        with comparing(objective, self.reference, temperature=self.temperature) as options:
            outputs = self._run(
                self.chunks,
                micro_batches,
                batch_of=lambda item: item.batch,
                finish=loss_of,
                forward_only=False,
            )
        self._is_gather_pending = self.options.parallel.overlap_param_gather
        metrics = Metrics()
        # Tensor- and context-parallel ranks hold the same numbers; only one of them reports, so that none counts twice.
        speaks = self.ranks.tensor_rank == self.ranks.context_rank == 0
        for batch_metrics, _, _ in outputs if speaks else ():
            metrics.merge(batch_metrics)
        metrics.merge(self.vision.watch.take())
        # The one place where the host waits for what the update has computed.
        metrics = reduce_metrics(metrics, self.ranks.world)
        # The parts of the loss are already divided by global counts: they are added, not averaged.
        names = ("loss", "has_gradient", "num_not_finite")
        loss, has_gradient, num_not_finite = (metrics.pop_sum(name) for name in names)
        return UpdateResult(
            loss=loss,
            has_gradient=has_gradient > 0,
            metrics=metrics,
            num_not_finite=round(num_not_finite),
            watched=take_watched(metrics),
            streams=tuple(streams for _, streams, _ in outputs),
            scores=tuple(scores for _, _, scores in outputs),
        )

    @torch.no_grad()
    def prepare_vision(self, batches: Sequence[PackedBatch]) -> None:
        """Encodes the media of ``batches`` ahead of the passes without gradient that need their features."""
        self.wait_for_parameters()
        self.vision.prepare(batches)

    def vision_features(self, prompts: Sequence[Prompt]) -> list[tuple[Tensor, ...]] | None:
        """Features [visual tokens, D] of each prompt's media in order, from the current weights.

        Every rank calls it. The tensor ranks of the first pipeline stage encode together and each returns all features;
        other stages return None.
        """
        self.wait_for_parameters()
        return self.vision.features(prompts)

    def export(
        self,
        *,
        tensor_of: Callable[[Tensor], Tensor | None] | None = None,
        gather_to: GatherTo = "all",
        with_vision: bool = True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Streams the policy's weights (or ``tensor_of(parameter)``) as full tensors under HF names; adapters are
        merged.

        Collective: every rank exhausts it. ``gather_to`` "source" yields them on each replica's reading rank only.
        """
        self.wait_for_parameters()
        yield from export_weights(
            self.bare_chunks, ranks=self.ranks, tensor_of=tensor_of, gather_to=gather_to, with_vision=with_vision
        )

    def save_hf(self, directory: Path) -> None:
        """Writes a directory that transformers and vLLM load: the model with all other files of the initial model, or
        the adapters alone (``--lora-export adapter``)."""
        self.wait_for_parameters()
        only_adapters = self.options.model.lora_export == "adapter"
        save_export(
            self.bare_chunks,
            directory,
            ranks=self.ranks,
            hf_source_dir=self.hf_dir,
            lora=self.lora,
            only_adapters=only_adapters,
            chat_template=self.options.chat_template,
        )

    def wait_for_parameters(self) -> None:
        """Gathers all new weights now; collective. With overlapped gathering, a rank holds only its own shard of the
        new weights after an optimizer step, and the next forward would gather the rest module by module."""
        if self._is_gather_pending:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
            self._is_gather_pending = False

    @property
    def bare_chunks(self) -> list[Qwen2_5_VLModel]:
        return [unwrap_model(chunk) for chunk in self.chunks]

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _run(
        self,
        chunks: Sequence[torch.nn.Module],
        items: Sequence[Any],
        *,
        batch_of: Callable[[Any], PackedBatch],
        finish: Callable[..., Any],
        forward_only: bool,
        model: ModelRole = ModelRole.POLICY,
    ) -> list[Any]:
        """Runs megatron-core's schedule over ``items``. Returns ``finish``'s data by item on the last stage, else
        []."""
        if not items:
            raise ValueError("a step needs at least one micro-batch on every data-parallel rank")

        def forward_step(iterator: Iterator[Any], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
            item = next(iterator)
            batch = batch_of(item)
            if unwrap_model(chunk).pre_process:
                batch = self.vision.with_features(batch, model=model)
            batch = batch.to(self.platform.device)
            return chunk(batch), partial(finish, item, dataclasses.replace(batch, features_ED=None), chunk)

        iterators = [iter(items) for _ in chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(items),
            # The schedule does not read these two, because stages exchange shapes (variable_seq_lengths).
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
