"""Reads and checks all questions of a run before its model is built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config import Config
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.preprocess import pixel_limits
from megatron_ktr.data.media.request import SYNONYMS
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.record_check import check_questions
from megatron_ktr.data.record_problems import RecordProblems
from megatron_ktr.data.records import Record, describe_repeated_ids, read_records
from megatron_ktr.data.reward_checks import reward_checks
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.errors import UserError
from megatron_ktr.rewards import DEFAULT_REWARDS
from megatron_ktr.rollout.replay import ReplayEngine, Required

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """The records of a run, the loader that makes prompts of them, and their recorded responses, if any."""

    records: Sequence[Record]
    loader: PromptLoader
    left_out: frozenset[int]
    """Indices of records that cannot be used."""
    engine: ReplayEngine | None = None


def read_questions(config: Config, *, tokenizer: Tokenizer, vocab_size: int, is_spokesman: bool) -> Questions:
    """The records of ``data_path`` or ``replay_path``. Those that cannot be used are reported and left out.

    Raises:
        UserError: more than ``max_skip_share`` of the records cannot be used, or the file as a whole cannot.
    """
    data = config.data
    is_supervised = config.objective.is_supervised
    if is_supervised and tokenizer.eos_token is None:
        raise UserError("model: the tokenizer has no end token, which given responses need (eos_token)")
    engine = None
    if not is_supervised and config.rollout.engine == "replay":
        problems = RecordProblems("replay_path", Path(str(config.rollout.replay_path)))
        engine = _replay_engine(config, tokenizer=tokenizer, vocab_size=vocab_size, problems=problems)
        records, checks = engine.records, []
    else:
        problems = RecordProblems("data_path", Path(str(data.data_path)))
        records = read_records(
            problems.path,
            problem_types=data.problem_types,
            needs_solution=not is_supervised,
            needs_reply=is_supervised,
            ignored=data.ignore_fields,
            problems=problems,
        )
        checks = [] if is_supervised else reward_checks(config.reward.reward_functions or DEFAULT_REWARDS)
    loader = prompt_loader(config, tokenizer=tokenizer)
    check_questions(records, problems=problems, loader=loader, checks=checks)
    left_out = problems.settle(len(records), max_share=data.max_skip_share, is_spokesman=is_spokesman)
    if is_spokesman:
        _note_clips(records, problems=problems)
        if found := describe_repeated_ids(records):
            _log.warning("%s: %s: %s", problems.option, problems.path, found)
    return Questions(records, loader, left_out, engine)


def prompt_loader(config: Config, *, tokenizer: Tokenizer) -> PromptLoader:
    """A loader that makes prompts of records according to the data options.

    Media lie below ``media_root``, by default in the folder of the file that names them. With ``original_compat`` every
    video lasts 1.0 s per temporal patch, for sampling and training alike. Media that cannot be used are then replaced
    by ``substitute_video`` and ``substitute_image``, if these are given.
    """
    data = config.data
    is_replay = not config.objective.is_supervised and config.rollout.engine == "replay"
    file = config.rollout.replay_path if is_replay else data.data_path
    assert file is not None, "the configuration's checks ask for it"
    loader = PromptLoader.from_model(
        config.model.model,
        media_root=data.media_root or Path(file).parent,
        sampling=FrameSampling(
            fps=data.video_fps,
            num_frames=data.video_num_frames,
            max_frames=data.video_max_frames,
            rule=data.frame_sampling,
        ),
        prompt_template=data.prompt_template,
        max_prompt_length=data.max_prompt_length,
        tokenizer=tokenizer,
        cache_bytes=round(data.media_cache_gb * 1e9),
        substitutes={"video": data.substitute_video, "image": data.substitute_image},
        fixed_seconds_per_grid=config.objective.fixed_seconds_per_grid,
        **pixel_limits(data),
    )
    if data.chat_template is not None:
        loader.chat_template = str(tokenizer.chat_template)
    return loader


def _replay_engine(config: Config, *, tokenizer: Tokenizer, vocab_size: int, problems: RecordProblems) -> ReplayEngine:
    return ReplayEngine(
        problems.path,
        tokenizer=tokenizer,
        num_generations=config.rollout.num_generations,
        vocab_size=vocab_size,
        required=Required(
            rewards=("accuracy",) if config.reward.length_bonus > 0 else (),
            because="the length bonus goes to correct responses: record it, or set --length-bonus 0",
            logprobs=config.objective.importance_sampling != "none" or bool(config.objective.importance_mask),
        ),
        ignored=config.data.ignore_fields,
        problems=problems,
    )


def _note_clips(records: Sequence[Record], *, problems: RecordProblems) -> None:
    """Warns if records show only a clip of a video, because data sets differ in the meaning of 'start' and 'end'."""
    numbers = [
        record["record_number"]
        for record in records
        if SYNONYMS.keys() & record.keys()
        and any(SYNONYMS[name] in request for request in record.get("media_requests", ()) for name in SYNONYMS)
    ]
    if numbers:
        _log.warning(
            "%s: %s, %d records show only the clip from their 'start' to their 'end' (first: record %d); where these "
            "are the answer: --ignore-fields start,end",
            problems.option,
            problems.path,
            len(numbers),
            numbers[0],
        )
