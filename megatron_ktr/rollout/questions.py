"""Reads and checks all questions of a run before its model is built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from megatron_ktr.config import Config
from megatron_ktr.config.data_sources import DataSource, draws_of_weights
from megatron_ktr.config.filter_rules import parts_needed
from megatron_ktr.config.sections import DataSection
from megatron_ktr.data.frame_cache import FrameCache
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.preprocess import pixel_limits
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.media_reader import MediaReader
from megatron_ktr.data.mixture import RecordSource
from megatron_ktr.data.record_check import check_questions
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.data.records import describe_repeated_ids
from megatron_ktr.data.store.check import Clips, check_store, clips_of
from megatron_ktr.data.store.record_store import RecordRules, RecordStore, open_store
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.errors import UserError
from megatron_ktr.rewards import DEFAULT_REWARDS, RewardOptions, load_rewards, reads_solution
from megatron_ktr.rollout.replay import ReplayEngine, Required

_log = logging.getLogger(__name__)
MAX_DRAWS = 10**8
"""The most prompts in a round of a mixture by epochs, whose order is made at once, in about 60 bytes for each."""


@dataclass(frozen=True)
class Questions:
    """The files of a run with their records and loaders, and recorded responses, if any."""

    sources: tuple[RecordSource, ...]
    engine: ReplayEngine | None = None


def read_questions(config: Config, *, tokenizer: Tokenizer, vocab_size: int, is_spokesman: bool) -> Questions:
    """The records of ``data_path`` or ``replay_path``. Those that cannot be used are reported and left out.

    Raises:
        UserError: more than ``max_skip_share`` of the records of a file cannot be used, or a file as a whole cannot.
    """
    if config.objective.is_supervised and tokenizer.eos_token is None:
        raise UserError("model: the tokenizer has no end token, which given responses need (eos_token)")
    if _is_replay(config):
        return _read_replay(config, tokenizer=tokenizer, vocab_size=vocab_size, is_spokesman=is_spokesman)
    stores = [open_records(config, given, is_spokesman=is_spokesman) for given in config.data.sources]
    draws = draws_of(config.data.sources, [len(store) for store in stores])
    reader = media_reader(config.data)
    sources: list[RecordSource] = []
    for given, store, number in zip(config.data.sources, stores, draws, strict=True):
        loader = source_loader(config, given, tokenizer=tokenizer, reader=reader)
        if sources:  # one count for all
            loader.counts = sources[0].loader.counts
        left_out = _check(config, given, store, loader=loader, is_spokesman=is_spokesman)
        sources.append(
            RecordSource(store, loader, left_out, name=given.label, draws=number, rewards=given.reward_functions)
        )
    return Questions(tuple(sources))


def read_held_out_responses(config: Config, *, tokenizer: Tokenizer, is_spokesman: bool) -> tuple[RecordSource, ...]:
    """The records of ``eval_loss_data``, shown and checked as those of ``data_path`` are. Their loaders share no cache
    in memory with those of training, and count for themselves.

    Raises:
        UserError: a file is missing, or more than ``max_skip_share`` of its records cannot be used.
    """
    section, data = config.evaluation, config.data
    reader = media_reader(replace(data, media_cache_gb=0.0))
    sources = []
    for path in section.eval_loss_data:
        given = DataSource(path, media_root=section.eval_media_root or str(Path(path).parent))
        try:
            store = open_records(config, given, is_spokesman=is_spokesman)
            loader = source_loader(config, given, tokenizer=tokenizer, reader=reader)
            left_out = _check(config, given, store, loader=loader, is_spokesman=is_spokesman)
        except UserError as error:  # what is read alike is told of the option that names it
            text = str(error).replace("data_path:", "eval_loss_data:").replace("media_root:", "eval_media_root:", 1)
            raise UserError(text) from error
        sources.append(RecordSource(store, loader, left_out, name=Path(path).stem))
    return tuple(sources)


def prompt_loader(config: Config, *, tokenizer: Tokenizer) -> PromptLoader:
    """A loader that makes prompts of the records of the run's file, or of the first of a mixture."""
    file = str(config.rollout.replay_path) if _is_replay(config) else None
    return source_loader(config, DataSource(file) if file else config.data.sources[0], tokenizer=tokenizer)


def source_loader(
    config: Config, given: DataSource, *, tokenizer: Tokenizer, reader: MediaReader | None = None
) -> PromptLoader:
    """A loader that makes prompts of the records of one file according to the data options. ``reader`` holds the caches
    of media, which the loaders of a mixture share; None means caches of its own.

    Media lie below ``media_root``, by default in the folder of the file that names them. With ``original_compat`` every
    video lasts 1.0 s per temporal patch, for sampling and training alike. Media that cannot be used are then replaced
    by ``substitute_video`` and ``substitute_image``, if these are given.
    """
    data = config.data
    loader = PromptLoader.from_model(
        config.model.model,
        media_root=_media_root(config, given),
        sampling=FrameSampling(
            fps=data.video_fps,
            num_frames=data.video_num_frames,
            max_frames=data.video_max_frames,
            rule=data.frame_sampling,
        ),
        prompt_template=given.prompt_template or data.prompt_template,
        max_prompt_length=data.max_prompt_length,
        tokenizer=tokenizer,
        reader=reader or media_reader(data),
        substitutes={"video": data.substitute_video, "image": data.substitute_image},
        fixed_seconds_per_grid=config.objective.fixed_seconds_per_grid,
        **pixel_limits(data),
    )
    if data.chat_template is not None:
        loader.chat_template = str(tokenizer.chat_template)
    return loader


def _is_replay(config: Config) -> bool:
    return not config.objective.is_supervised and config.rollout.engine == "replay"


def _media_root(config: Config, given: DataSource) -> Path:
    return Path(given.media_root or config.data.media_root or Path(given.path).parent)


def _read_replay(config: Config, *, tokenizer: Tokenizer, vocab_size: int, is_spokesman: bool) -> Questions:
    problems = RecordProblems("replay_path", Path(str(config.rollout.replay_path)))
    engine = _replay_engine(config, tokenizer=tokenizer, vocab_size=vocab_size, problems=problems)
    loader = prompt_loader(config, tokenizer=tokenizer)
    check_questions(engine.records, problems=problems, loader=loader)
    left_out = problems.settle(len(engine.records), max_share=config.data.max_skip_share, is_spokesman=is_spokesman)
    if is_spokesman:
        _note_clips(clips_of(engine.records), problems=problems)
        if found := describe_repeated_ids(engine.records):
            _log.warning("%s: %s: %s", problems.option, problems.path, found)
    return Questions((RecordSource(engine.records, loader, left_out),), engine)


def open_records(config: Config, given: DataSource, *, is_spokesman: bool) -> RecordStore:
    """The records of one question file that the run is to draw from, not yet checked."""
    is_supervised = config.objective.is_supervised
    rules = RecordRules(
        problem_types=config.data.problem_types,
        needs_solution=not is_supervised,
        needs_reply=is_supervised,
        ignored=config.data.ignore_fields,
    )
    return open_store(given.path, rules, directory=config.data.record_store_dir, show_progress=is_spokesman)


def _check(
    config: Config, given: DataSource, store: RecordStore, *, loader: PromptLoader, is_spokesman: bool
) -> frozenset[int]:
    """The places of the records that cannot be used."""
    command = f"python tools/prepare_dataset.py validate {given.path} --media-root {_media_root(config, given)}"
    problems = RecordProblems("data_path", Path(given.path), remedy=f"all of them: {command}")
    names = () if config.objective.is_supervised else rewards_of(config, given)
    # Raises UserError for an unknown name. Users' own are loaded once, by ``run/preflight.py``.
    load_rewards([name for name in names if ":" not in name], options=reward_options(config))
    clips = check_store(
        store,
        problems=problems,
        loader=loader,
        rewards=[name for name in names if reads_solution(name)],
        is_spokesman=is_spokesman,
    )
    left_out = problems.settle(len(store), max_share=config.data.max_skip_share, is_spokesman=is_spokesman)
    if is_spokesman:
        _note_clips(clips, problems=problems)
        if found := store.describe_repeated_ids():
            _log.warning("data_path: %s: %s", given.path, found)
    return left_out


def rewards_of(config: Config, given: DataSource) -> tuple[str, ...]:
    """The reward parts of the responses to the questions of one file."""
    return given.reward_functions or config.reward.reward_functions or DEFAULT_REWARDS


def reward_options(config: Config) -> RewardOptions:
    """What the rewards of the run read of its options."""
    return RewardOptions(config.reward, config.rollout.max_response_length)


def draws_of(sources: Sequence[DataSource], num_records: Sequence[int]) -> Sequence[int]:
    """How often each file is drawn in a period: by its weight, or ``epochs`` times its records, rounded."""
    if sources[0].weight is not None:
        return draws_of_weights([source.weight or 0.0 for source in sources])
    draws = [
        max(1, round(Fraction(repr(float(source.epochs or 1.0))) * number))
        for source, number in zip(sources, num_records, strict=True)
    ]
    if len(draws) > 1 and sum(draws) > MAX_DRAWS:
        raise UserError(
            f"data_path: one round of the mixture has {sum(draws)} prompts, at most {MAX_DRAWS} are possible: give its "
            "files fewer epochs (their proportions decide what is drawn)"
        )
    return draws


def media_reader(data: DataSection) -> MediaReader:
    """The caches of media that the options ask for."""
    disk = None
    if data.frame_cache_dir is not None:
        disk = FrameCache(data.frame_cache_dir, max_bytes=round(data.frame_cache_gb * 1e9))
    return MediaReader(memory_bytes=round(data.media_cache_gb * 1e9), disk=disk)


def _replay_engine(config: Config, *, tokenizer: Tokenizer, vocab_size: int, problems: RecordProblems) -> ReplayEngine:
    needed = {part: f"{why}: record it" for part, why in parts_needed(config.rollout).items()}
    for bonus, value in (
        ("--temporal-bonus", config.rollout.temporal_bonus),
        ("--length-bonus", config.reward.length_bonus),
    ):
        if value:
            what = bonus.removeprefix("--").replace("-", " ")
            needed["accuracy"] = f"the {what} goes to correct responses: record it, or set {bonus} 0"
    return ReplayEngine(
        problems.path,
        tokenizer=tokenizer,
        num_generations=config.rollout.num_generations,
        vocab_size=vocab_size,
        required=Required(
            rewards=needed,
            num_shuffled=config.rollout.num_shuffled,
            logprobs=config.objective.importance_sampling != "none" or bool(config.objective.importance_mask),
        ),
        ignored=config.data.ignore_fields,
        problems=problems,
    )


def _note_clips(clips: Clips, *, problems: RecordProblems) -> None:
    """Warns if records show only a clip of a video, because data sets differ in the meaning of 'start' and 'end'."""
    if clips.num_records:
        _log.warning(
            "%s: %s, %d records show only the clip from their 'start' to their 'end' (first: record %d); where these "
            "are the answer: --ignore-fields start,end",
            problems.option,
            problems.path,
            clips.num_records,
            clips.first_number,
        )
