"""Makes the questions that an engine is asked of the items of benchmarks: media, control, and wording.

    Ask --read its media--> frames --control--> what is shown --wording--> Question, or why it cannot be asked

Frames are chosen by the benchmark's rule and resized once. Asks that stand beside one another and show the same frames
(the controls and votes of an item, the questions about a video) are decoded once. Media are decoded ahead of the engine
in the worker processes of ``data/workers``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_ktr.data.media.files import files_of
from megatron_ktr.data.media.job import Decode, MediaJob
from megatron_ktr.data.media.preprocess import LoadedMedia, PreprocessSettings
from megatron_ktr.data.media.request import media_sources
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.media_reader import MediaReader
from megatron_ktr.data.template import place_media, question_turns
from megatron_ktr.data.unusable import UnusableMedia, UnusableSample
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.data.workers.look_ahead import LookAhead, SampleMedia
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking.controls import apply_control, is_felt
from megatron_ktr.evaluation.asking.scaling import Ask, frames_of
from megatron_ktr.evaluation.asking.settings import EvaluationSettings
from megatron_ktr.evaluation.benchmark import FrameRule
from megatron_ktr.evaluation.engines.base import Question
from megatron_ktr.evaluation.item import Answer
from megatron_ktr.report.strips import StripFolder
from megatron_ktr.types import Prompt, VisualInput

AHEAD_BYTES = 2_000_000_000
"""Frames that are held ready for the engine, beside those of the questions that it is answering."""


@dataclass(frozen=True)
class Made:
    """What became of an ask."""

    ask: Ask
    key: str
    question: Question | None
    """None if it cannot be asked."""
    is_control_felt: bool = True
    problem: str = ""
    """Why it cannot be asked."""

    def answered(self, answer: Answer) -> Answer:
        """The engine's answer with what the engine cannot know of it."""
        assert self.question is not None
        num_frames = sum(len(medium.frames_FCHW) for medium in self.question.media)
        return dataclasses.replace(answer, num_frames=num_frames, is_control_felt=self.is_control_felt)


class QuestionMaker:
    """Makes questions of asks according to the settings of an evaluation."""

    def __init__(
        self,
        settings: EvaluationSettings,
        *,
        key_of: Callable[[Ask], str],
        preprocess: PreprocessSettings,
        media_roots: Mapping[str, Path],
        wordings: Mapping[str, WordingTemplate],
        reader: MediaReader | None = None,
        pictures: StripFolder | None = None,
    ) -> None:
        """
        Args:
            preprocess: sizes that the model wants; the benchmark's own limit of pixels takes the place of
                ``video_max_pixels``.
            media_roots, wordings: by benchmark.
            reader: the caches of media; None means none.
            pictures: gets a strip of frames of everything that is read, for the page.
        """
        self._settings = settings
        self._key_of = key_of
        self._preprocess = preprocess
        self._media_roots = media_roots
        self._wordings = wordings
        self._reader = reader or MediaReader()
        self._pictures = pictures

    def jobs(self, ask: Ask) -> tuple[MediaJob, ...] | str:
        """The media to read for an ask, or why they cannot be read. Two asks with equal jobs are about equal frames."""
        rule = self._settings.frame_rule(ask)
        preprocess = limited(self._preprocess, max_pixels=rule.max_pixels)
        sampling = frame_sampling(rule, frames=frames_of(ask))
        try:
            return tuple(self._job(ask, source, preprocess, sampling) for source in media_sources(ask.item.record))
        except (UnusableSample, UserError) as error:
            return str(error)

    def _job(self, ask: Ask, source: Any, preprocess: PreprocessSettings, sampling: FrameSampling) -> MediaJob:
        files = files_of(source, self._media_roots[ask.item.benchmark])
        return MediaJob(
            paths=(files,) if isinstance(files, Path) else files,
            kind=source.kind,
            is_pictures=source.is_pictures,
            request=source.request,
            settings=preprocess,
            sampling=sampling,
        )

    def read(self, jobs: Sequence[MediaJob], decode: Decode = MediaJob.load) -> SampleMedia:
        """The media of one ask. They end early after one that cannot be used."""
        found: SampleMedia = []
        for job in jobs:
            try:
                found.append(self._reader.read(job, decode))
            except UnusableMedia as error:
                found.append(error)
                break
        return found

    def keep_pictures(self, ask: Ask, found: SampleMedia) -> None:
        """Keeps what can be shown of the media of an ask."""
        if self._pictures is None:
            return
        for source, one in zip(media_sources(ask.item.record), found, strict=False):
            if isinstance(one, LoadedMedia):
                frames, seconds = one.visual.frames_FCHW, one.frame_seconds
                self._pictures.save(source, frames, group=ask.item.benchmark, seconds=seconds)

    def make(self, ask: Ask, found: SampleMedia | str) -> Made:
        """The question; ``found`` is what ``read`` returned, or why there is nothing to read."""
        key = self._key_of(ask)
        if isinstance(found, str):
            return Made(ask, key, None, problem=found)
        media = [one.visual for one in found if isinstance(one, LoadedMedia)]
        for one in found:
            if isinstance(one, UnusableMedia):
                return Made(ask, key, None, problem=str(one))
        name = f"{ask.item.benchmark}/{ask.item.item_id}"
        system, turns = question_turns(ask.item.record, wording=self._wordings[ask.item.benchmark])
        try:
            placed = place_media(turns, [medium.kind for medium in media], source=name)
        except UnusableSample as error:
            return Made(ask, key, None, problem=str(error))
        order = [piece for _, pieces in placed for piece in pieces if isinstance(piece, int)]
        intact = Prompt(problem_id=name, token_ids=(), media=tuple(media[index] for index in order))
        shown = apply_control(intact, ask.condition.control, seed=self._settings.seed)
        asked = [
            {"role": role, "content": [part for piece in pieces if (part := _part(piece, media, shown)) is not None]}
            for role, pieces in placed
        ]
        question = Question(
            key=key,
            record={"problem_id": name, "messages": asked, "system_text": system},
            media=shown.media,
            sampling=self._settings.sampling(ask),
            seed=self._settings.seed,
            draw=f"{name} {frames_of(ask)} {ask.condition.control} {ask.round} {ask.vote}",
        )
        is_control_felt = ask.condition.control == "intact" or is_felt(intact, shown)
        return Made(ask, key, question, is_control_felt=is_control_felt)


def _part(piece: str | int, media: Sequence[VisualInput], shown: Prompt) -> dict[str, str] | None:
    """A part of a message; None for one that says nothing: no text, or a medium that is hidden."""
    if isinstance(piece, int):
        return {"type": media[piece].kind} if shown.media else None
    return {"type": "text", "text": piece} if piece else None


def frame_sampling(rule: FrameRule, *, frames: int) -> FrameSampling:
    """At most ``frames`` frames by a benchmark's rule."""
    if rule.rule == "fps":
        return FrameSampling(fps=rule.fps, max_frames=frames)
    return FrameSampling(fps=rule.fps, num_frames=frames, max_frames=frames, rule=rule.rule)


def limited(preprocess: PreprocessSettings, *, max_pixels: int) -> PreprocessSettings:
    """The settings with this limit for the frames of videos. A minimum above it is lowered to it."""
    least = min(preprocess.video_min_pixels, max_pixels)
    return dataclasses.replace(preprocess, video_min_pixels=least, video_max_pixels=max_pixels)


@dataclass(frozen=True)
class _Group:
    """Neighbouring asks about the same frames."""

    asks: tuple[Ask, ...]
    jobs: tuple[MediaJob, ...] | str
    next_position: int


def _with_jobs(maker: QuestionMaker, asks: Sequence[Ask]) -> Iterator[tuple[Ask, tuple[MediaJob, ...] | str]]:
    """Each ask with its media. Paths are looked at once for neighbouring asks about one item."""
    place: tuple[object, ...] = ()
    jobs: tuple[MediaJob, ...] | str = ()
    for ask in asks:
        here = (ask.item.benchmark, ask.item.item_id, frames_of(ask), ask.condition.scaling)
        if here != place:
            place, jobs = here, maker.jobs(ask)
        yield ask, jobs


class QuestionStream:
    """Iterates over the questions of ``asks`` in their order, with the media of the next ones being decoded.

    Several threads must not iterate at a time.
    """

    def __init__(self, maker: QuestionMaker, asks: Sequence[Ask], *, pool: WorkerPool | None, num_ahead: int) -> None:
        """
        Args:
            pool: decodes; None decodes in this process, when the question is wanted.
            num_ahead: groups of asks about the same frames that are decoded ahead, memory allowing.
        """
        self._maker = maker
        self._pool = pool
        self._num_ahead = num_ahead if pool is not None else 1
        found = groupby(_with_jobs(maker, asks), key=lambda pair: pair[1])
        groups = ((jobs, tuple(ask for ask, _ in pairs)) for jobs, pairs in found)
        self._groups = [_Group(of, jobs, number + 1) for number, (jobs, of) in enumerate(groups)]
        self._ahead = LookAhead(element_at=self._group_at, submit=self._submit, most_bytes=AHEAD_BYTES)

    def __iter__(self) -> Iterator[Made]:
        for position in range(len(self._groups)):
            group, media = self._ahead.take(position, num_wanted=self._num_ahead)
            found = media.result() if not isinstance(group.jobs, str) else group.jobs
            if not isinstance(found, str):
                self._maker.keep_pictures(group.asks[0], found)
            for ask in group.asks:
                yield self._maker.make(ask, found)

    def close(self) -> None:
        """Forgets what is decoded ahead."""
        self._ahead.drop()

    def _group_at(self, position: int) -> _Group:
        if position == len(self._groups):
            raise UserError("no further question")
        return self._groups[position]

    def _submit(self, group: _Group) -> Future[SampleMedia]:
        jobs = group.jobs
        if not isinstance(jobs, str) and jobs and self._pool is not None:
            return self._pool.submit(lambda decode: self._maker.read(jobs, decode))
        done: Future[SampleMedia] = Future()
        done.set_result([] if isinstance(jobs, str) else self._maker.read(jobs))
        return done
