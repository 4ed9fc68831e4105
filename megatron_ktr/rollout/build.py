"""Builds the parts of a run that produce rollouts: the source of prompts, the engine that answers them, and its check.

This is one of the few places that read the whole ``Config``; the parts built here receive only their own settings. To
add an engine, write one module and one branch of ``build_sampler``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.config import Config
from megatron_ktr.config.filter_rules import draws_together, metric_of
from megatron_ktr.config.part_options import row_multiple
from megatron_ktr.config.sections import DataSection, RolloutSection
from megatron_ktr.config.view_registry import load_view
from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.lengths import record_lengths
from megatron_ktr.data.mixture import RecordSource
from megatron_ktr.data.order import LengthBuckets
from megatron_ktr.data.retirement import RetirementRule
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.source import DatasetSource, SupervisedSource
from megatron_ktr.data.template import PromptBuilder, VisualTokens
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.data.workers.cores import num_cores
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.distributed.agreement import gather_objects
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.platform import current
from megatron_ktr.distributed.rendezvous import read_number
from megatron_ktr.errors import UserError, same_on_every_rank
from megatron_ktr.objectives import build_objective
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rewards import DEFAULT_REWARDS, Rewarder
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.check.probes import probe_prompts
from megatron_ktr.rollout.check.sampler import (
    DEFAULT_LIMIT,
    MAX_TOKENS,
    SamplerCheck,
    trainer_logprobs,
    worst_of_replicas,
)
from megatron_ktr.rollout.filtering import FilterRule
from megatron_ktr.rollout.questions import read_questions, reward_options, rewards_of
from megatron_ktr.rollout.refill import FilteredSource
from megatron_ktr.rollout.replay import ReplaySource
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.second_prompt import SecondPrompt
from megatron_ktr.rollout.source import ReplicaSource, Sampler

_log = logging.getLogger(__name__)
BENCHMARK_PIXELS = 256 * 28 * 28
"""The most pixels of a frame that benchmarks show."""


def build_local_source(
    config: Config, *, ranks: ParallelGroups, tokenizer: Tokenizer, vocab_size: int
) -> DatasetSource | None:
    """The source from which the reading rank of each replica draws, according to ``config``; None on other ranks.

    ``vocab_size`` is the model's, not the tokenizer's. The model has more ids than its tokenizer knows, and recorded
    responses may contain them.
    """
    if not ranks.is_source:
        return None
    data, trainer = config.data, config.trainer
    questions = read_questions(config, tokenizer=tokenizer, vocab_size=vocab_size, is_spokesman=ranks.data_rank == 0)
    sources = _in_order_of_length(config, questions.sources, is_spokesman=ranks.data_rank == 0)
    dataset = PromptDataset.of_sources(
        sources,
        seed=trainer.seed,
        shuffle=data.shuffle_data,
        rank=ranks.data_rank,
        size=ranks.data_size,
        skips=SkipCounter(max_skip_share=data.max_skip_share),
    )
    if draws_together(config.rollout):
        dataset.draw_together(_retirement_of(config.rollout))
    dataset.count_too(questions.sources[0].loader.reader.counts)
    if (pool := worker_pool(data)) is not None:
        dataset.read_ahead(pool, prefetch_steps=data.prefetch_steps)
    if _shows_other_media(config):
        dataset.show_other_media()
    if questions.engine is not None:
        return ReplaySource(dataset, engine=questions.engine, second=_second_prompt(config))
    return SupervisedSource(dataset) if config.objective.is_supervised else DatasetSource(dataset)


def _in_order_of_length(
    config: Config, sources: tuple[RecordSource, ...], *, is_spokesman: bool
) -> tuple[RecordSource, ...]:
    """The sources, the only one of them with the lengths that ``--length-buckets`` orders its records by."""
    if not config.data.length_buckets:
        return sources
    (source,) = sources  # ``config/checks.py`` refuses several
    ranks_here = read_number("LOCAL_WORLD_SIZE", low=1, high=2**20, default=1)
    lengths = record_lengths(source, jobs=max(1, num_cores() // ranks_here), is_spokesman=is_spokesman)
    buckets = LengthBuckets(
        lengths,
        source.is_left_out,
        num_buckets=config.data.length_buckets,
        step_size=config.trainer.prompts_per_step,
    )
    return (replace(source, buckets=buckets),)


def _shows_other_media(config: Config) -> bool:
    """Whether some view of the objective shows the media of other questions."""
    objective = build_objective(config.objective, reward=config.reward, rollout=config.rollout)
    return any(load_view(view).needs_other_media for view in objective.views)


def require_same_questions(local: DatasetSource | None, *, ranks: ParallelGroups) -> None:
    """Compares what the replicas have read: a node may have an old copy of a file. Collective over the world.

    If they leave out different records, for instance because a node lacks some media, rank 0 says so.

    Raises:
        UserError: on every rank, if records or wordings differ, or what is left out where it must be the same.
    """
    first, *others = [one for one in gather_objects(_about(local), group=ranks.world) if one is not None]
    for replica, other in enumerate(others, start=1):
        parts = {"records": 0, "wordings": 1, "lengths of records": 5}
        what = next((name for name, part in parts.items() if other[part] != first[part]), "")
        if what:
            with same_on_every_rank():
                raise UserError(
                    f"data_path: the reading rank of replica {replica} found other {what} than that of replica 0: the "
                    "files differ between nodes, or were changed while they were read"
                )
        if other[2] != first[2] and first[4]:
            with same_on_every_rank():
                raise UserError(
                    f"data_path: replica {replica} leaves out other records than replica 0 and uses {other[3]}, not "
                    f"{first[3]}, but --filter-groups and --retire-above draw for all replicas together: are the same "
                    "media there on every node?"
                )
        if other[2] != first[2] and ranks.rank == 0:
            _log.warning(
                "data_path: replica %d leaves out other records than replica 0 and uses %d, not %d: are the same media "
                "there on every node?",
                replica,
                other[3],
                first[3],
            )


def _about(local: DatasetSource | None) -> tuple[str, str, str, int, bool, str] | None:
    """(digest of the records, of the wordings, of what is left out, number of prompts of an epoch, whether all replicas
    draw together, digest of the lengths) on reading ranks."""
    if local is None:
        return None
    data = local.dataset
    digests = data.records_digest, data.wording_digest, data.left_out_digest
    return *digests, data.num_kept, data.together is not None, data.lengths_digest


def _retirement_of(rollout: RolloutSection) -> RetirementRule | None:
    if rollout.retire_above is None:
        return None
    return RetirementRule(above=rollout.retire_above, num_epochs=rollout.retire_for, decay=rollout.retire_decay)


def replica_source(
    config: Config, local: DatasetSource | None, *, ranks: ParallelGroups, **options: Any
) -> ReplicaSource:
    """The source that the trainer draws from; ``options`` are those of ``ReplicaSource``."""
    rollout = config.rollout
    options |= {"ranks": ranks, "lag": rollout.lag, "samples_steps": config.samples}
    if not draws_together(rollout):
        return ReplicaSource(local, **options)
    # An interleaved pipeline needs a multiple of its stages of full micro-batches in every update (``step/plan.py``).
    stages = ranks.sizes.pipeline if (ranks.sizes.virtual_pipeline or 1) > 1 else 1
    unit = stages * config.trainer.micro_batch_groups * config.objective.mini_batches
    return FilteredSource(
        local,
        rule=FilterRule(
            rollout.filter_groups,
            metric=metric_of(rollout),
            low=rollout.filter_low,
            high=rollout.filter_high,
            min_spread=rollout.min_reward_spread,
            max_rounds=rollout.filter_max_rounds,
        ),
        groups_multiple=unit if stages > 1 else 1,
        **options,
    )


def worker_pool(data: DataSection) -> WorkerPool | None:
    """The processes that decode media beside this rank, according to the options; None if there are to be none."""
    num_workers = _num_data_workers(data)
    if not num_workers:
        return None
    return WorkerPool(
        num_workers,
        timeout_seconds=data.data_timeout_seconds,
        memory_bytes=round(data.data_worker_memory_gb * 1e9),
    )


def _num_data_workers(data: DataSection) -> int:
    """``--data-workers``, or its default, which leaves every rank of the node a core of its own."""
    if data.data_workers is not None:
        return data.data_workers
    if current().name == "cpu":
        return 0
    return min(4, num_cores() // read_number("LOCAL_WORLD_SIZE", low=1, high=2**20, default=1))


def build_sampler(config: Config, *, ranks: ParallelGroups, tokenizer: Tokenizer, media: MediaSpec) -> Sampler | None:
    """The engine that ``rollout.engine`` names, with the run's sampling settings and rewards.

    None on ranks that hold no engine, and in runs that sample nothing. (A supervised run samples for evaluation only.)
    """
    rollout = config.rollout
    if not config.has_engine:
        return None
    sampling = SamplingSettings(
        num_generations=rollout.num_generations,
        max_response_length=rollout.max_response_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
        seed=config.trainer.seed,
    )
    rewarder = Rewarder(reward_options(config))
    if ranks.is_source and config.samples:
        for given in config.data.sources:
            rewarder.prepare(rewards_of(config, given))
    with_rewards = _rewards_of(config, rewarder)
    # Engines are imported here, because only runs that use an engine need its package.
    if rollout.engine == "vllm_colocated":
        from megatron_ktr.rollout.colocated.engine import colocated_engine

        engine = colocated_engine(
            config.model,
            data=_shown_to_engine(config),
            rollout=rollout,
            ranks=ranks,
            tokenizer=tokenizer,
            media=media,
            sampling=sampling,
        )
        return with_rewards(engine)
    if not ranks.is_source:
        return None
    if rollout.engine == "vllm_server":
        from megatron_ktr.rollout.server.engine import server_engine

        engine = server_engine(
            config.model.model,
            rollout=rollout,
            run_dir=Path(config.trainer.run_dir),
            data_group=ranks.data,
            tokenizer=tokenizer,
            media=media,
            sampling=sampling,
            gap_limit=rollout.sampler_gap_limit or DEFAULT_LIMIT[config.model.params_dtype],
        )
        return with_rewards(engine)
    assert rollout.engine == "hf", f"--engine {rollout.engine} has no branch here"
    from megatron_ktr.policy.policy import DTYPES
    from megatron_ktr.rollout.hf import HFEngine

    dtype = DTYPES[config.model.params_dtype]
    engine = HFEngine(config.model.model, tokenizer=tokenizer, media=media, sampling=sampling, dtype=dtype)
    return with_rewards(engine)


def _shown_to_engine(config: Config) -> DataSection:
    """The data options with the largest videos that the engine will see, those of evaluation among them."""
    data = config.data
    if not config.evaluates:
        return data
    return replace(
        data,
        video_max_frames=max(data.video_max_frames, config.evaluation.eval_frames or 0),
        video_max_pixels=max(data.video_max_pixels, BENCHMARK_PIXELS if config.evaluation.eval_benchmark else 0),
    )


def _rewards_of(config: Config, rewarder: Rewarder) -> Callable[[RolloutEngine], Sampler]:
    """Adds the run's rewards to an engine, and those of the files that have their own."""
    sources, second = config.data.sources, _second_prompt(config)
    if len(sources) == 1:
        return partial(Sampler, rewards=rewards_of(config, sources[0]), rewarder=rewarder, second=second)
    return partial(
        Sampler,
        second=second,
        rewards=config.reward.reward_functions or DEFAULT_REWARDS,
        rewarder=rewarder,
        rewards_of_source={source.label: rewards_of(config, source) for source in sources},
    )


def _second_prompt(config: Config) -> SecondPrompt | None:
    """What is asked a second time according to the options; None if nothing is."""
    rollout = config.rollout
    if not rollout.num_shuffled or config.objective.is_supervised:
        return None
    return SecondPrompt(rollout.num_generations, rollout.num_shuffled, seed=config.trainer.seed)


def build_sampler_check(
    config: Config,
    *,
    policy: Policy,
    source: ReplicaSource,
    media: MediaSpec,
    tokenizer: Tokenizer,
    send_weights: Callable[[], None],
) -> SamplerCheck | None:
    """The check that this run's engine and its policy give the same log-probs.

    None if nothing is sampled, if the check is off, or if all of its prompts exceed the run's ``max_prompt_length``.
    Prompts of the check that are left out for their length are named on the console.
    """
    rollout = config.rollout
    if not (rollout.check_sampler and source.has_engine):
        return None
    builder = PromptBuilder(
        tokenizer,
        visual_tokens=VisualTokens.from_model(config.model.model, tokenizer),
        merge_size=media.merge_size,
    )
    max_length = config.data.max_prompt_length
    make = partial(
        probe_prompts,
        builder,
        media=media,
        video_max_pixels=config.data.video_max_pixels,
        seconds_per_grid=config.objective.fixed_seconds_per_grid,
    )
    prompts = make(max_prompt_length=max_length)
    if (left_out := [name for name in make() if name not in prompts]) and policy.ranks.rank == 0:
        what = f"not compared for {', '.join(left_out)}" if prompts else "not compared at all"
        print(f"sampler and trainer are {what}: such prompts exceed --max-prompt-length {max_length}", flush=True)
    if not prompts:
        return None
    return SamplerCheck(
        prompts=prompts,
        sampling=SamplingSettings(
            num_generations=min(2, rollout.num_generations),
            max_response_length=min(MAX_TOKENS, rollout.max_response_length),
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=config.trainer.seed,
        ),
        limit=rollout.sampler_gap_limit or DEFAULT_LIMIT[config.model.params_dtype],
        sample=lambda prompts, sampling: source.sample(prompts, sampling=sampling),
        score=partial(
            trainer_logprobs,
            policy=policy,
            media=media,
            pad_to_multiple=row_multiple(config),
        ),
        send_weights=send_weights,
        worst=partial(worst_of_replicas, ranks=policy.ranks),
    )
