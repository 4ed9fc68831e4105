"""Loads a record as a prompt: reads and resizes its media, and tokenises its text.

The two halves can be done apart. ``read_media`` changes nothing in the loader, so that threads may run it for coming
records; ``load`` makes the prompt and counts what was met, in the order in which records are used.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_ktr.data.media.files import files_of
from megatron_ktr.data.media.job import Decode, MediaJob
from megatron_ktr.data.media.preprocess import LoadedMedia, PreprocessSettings, load_media
from megatron_ktr.data.media.request import MediaKind, MediaSource, media_sources
from megatron_ktr.data.media.video import FrameSampling, say_fallback_once
from megatron_ktr.data.media_reader import MediaReader
from megatron_ktr.data.template import PromptBuilder, VisualTokens, load_tokenizer
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.data.unusable import PromptTooLong, UnusableMedia
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt, VisualInput

_log = logging.getLogger(__name__)


class PromptLoader:
    """Loads one record: media below ``media_root``, resized frames, tokenised prompt."""

    def __init__(
        self,
        builder: PromptBuilder,
        *,
        media_root: Path | str,
        settings: PreprocessSettings,
        sampling: FrameSampling,
        max_prompt_length: int | None = None,
        reader: MediaReader | None = None,
        substitutes: Mapping[MediaKind, str | None] | None = None,
    ) -> None:
        """``reader`` holds the caches of media, which loaders may share; None means no caches.

        ``substitutes`` names, for a kind, the file (as records write it) that is shown in place of media that cannot be
        used. The model then learns to answer about media that it does not see, so this is only for reproducing the
        authors' release.

        Raises:
            UserError: a substitute cannot be used itself.
        """
        self.builder = builder
        self.reader = reader or MediaReader()
        self.media_root = Path(media_root)
        self.settings = settings
        self.sampling = sampling
        self.max_prompt_length = max_prompt_length
        self.chat_template: str | None = None
        """The text of the chat template that the user gave ``builder.tokenizer`` in place of the model's own."""
        self.counts: Counter[str] = Counter()
        """decoder/<name>, decoder/pyav: <why not decord>, repeated_frames, substituted_media. They count the media
        of the prompts made, whether decoded for them or found in a cache, so that they do not depend on caches."""
        self.substitutes: dict[MediaKind, tuple[str, VisualInput]] = {
            kind: (written, self._load_substitute(kind, written))
            for kind, written in (substitutes or {}).items()
            if written
        }

    @classmethod
    def from_model(
        cls,
        model_dir: Path | str,
        *,
        media_root: Path | str,
        sampling: FrameSampling | None = None,
        prompt_template: Path | str | None = None,
        max_prompt_length: int | None = None,
        tokenizer: Tokenizer | None = None,
        reader: MediaReader | None = None,
        substitutes: Mapping[MediaKind, str | None] | None = None,
        **preprocessing: float | None,
    ) -> PromptLoader:
        """A loader with tokenizer and settings read from a Hugging Face directory. ``preprocessing`` overrides fields
        of ``PreprocessSettings``."""
        if not Path(media_root).is_dir():
            raise UserError(f"media_root: {media_root} is not a directory")
        settings = PreprocessSettings.from_model(model_dir, **preprocessing)
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model_dir)
        builder = PromptBuilder(
            tokenizer,
            visual_tokens=VisualTokens.from_model(model_dir, tokenizer),
            merge_size=settings.merge_size,
            wording=WordingTemplate(prompt_template),
        )
        return cls(
            builder,
            media_root=media_root,
            settings=settings,
            sampling=sampling or FrameSampling(),
            max_prompt_length=max_prompt_length,
            reader=reader,
            substitutes=substitutes,
        )

    @property
    def wording_digest(self) -> str:
        """A digest of the template that words the questions, and of the chat template if the user gave one."""
        digest = self.builder.wording.digest
        if self.chat_template is not None:
            digest = xxhash.xxh3_128(f"{digest}\0{self.chat_template}".encode()).hexdigest()
        return digest

    def describe_wording(self) -> str:
        """One line that says how questions are worded: for the console, the configuration and the report."""
        line = self.builder.wording.describe()
        if self.chat_template is not None:
            line += (
                f"; the user's chat template, digest {xxhash.xxh3_128(self.chat_template.encode()).hexdigest()[:12]}"
            )
        return line

    def read_media(
        self, record: Mapping[str, Any], decode: Decode = MediaJob.load
    ) -> list[LoadedMedia | UnusableMedia]:
        """The media of a record in their order, or why one cannot be used. Where that makes the record unusable, the
        list ends there.

        Raises:
            UserError: a path leads out of the media root.
        """
        found: list[LoadedMedia | UnusableMedia] = []
        for source in media_sources(record):
            try:
                found.append(self.reader.read(self._job(source), decode))
            except UnusableMedia as error:
                found.append(error)
                if source.kind not in self.substitutes:
                    break
        return found

    def load(self, record: Mapping[str, Any], found: Sequence[LoadedMedia | UnusableMedia] | None = None) -> Prompt:
        """The prompt of one record; ``found`` is what ``read_media`` returned for it, which is called if it is None.
        If media were substituted, the prompt's ``record`` maps each to its substitute under ``substituted_media``.

        Raises:
            UnusableSample: the record must be skipped: its media (``UnusableMedia``), its length (``PromptTooLong``) or
                its text.
            UserError: a path leads out of the media root, or template and model do not fit together.
        """
        media, substituted = [], {}
        found = self.read_media(record) if found is None else found
        for source, one in zip(media_sources(record), found, strict=False):
            if isinstance(one, LoadedMedia):
                self._count(one)
                media.append(one.visual)
                continue
            if source.kind not in self.substitutes:
                raise one
            name = source.name
            substituted[name], substitute = self.substitutes[source.kind]
            media.append(substitute)
            self.counts["substituted_media"] += 1
            _log.warning("record %s is shown %s instead: %s", record["problem_id"], substituted[name], one)
        if substituted:
            record = {**record, "substituted_media": substituted}
        prompt = self.builder.build(record, media)
        if self.max_prompt_length is not None and len(prompt.token_ids) > self.max_prompt_length:
            raise PromptTooLong(
                f"record {prompt.problem_id}",
                f"{len(prompt.token_ids)} tokens, at most {self.max_prompt_length} (max_prompt_length)",
            )
        return prompt

    def _load_substitute(self, kind: MediaKind, written: str) -> VisualInput:
        try:
            files = files_of(MediaSource(kind, written), self.media_root)
            return load_media(files, kind=kind, settings=self.settings, sampling=self.sampling).visual
        except (UnusableMedia, UserError) as error:
            raise UserError(f"substitute_{kind}: {error}") from error

    def _job(self, source: MediaSource) -> MediaJob:
        files = files_of(source, self.media_root)
        return MediaJob(
            paths=(files,) if isinstance(files, Path) else files,
            kind=source.kind,
            is_pictures=source.is_pictures,
            request=source.request,
            settings=self.settings,
            sampling=self.sampling,
        )

    def _count(self, loaded: LoadedMedia) -> None:
        self.counts[f"decoder/{loaded.backend}"] += 1
        if loaded.fallback_reason:
            self.counts[f"decoder/pyav: {loaded.fallback_reason}"] += 1
            say_fallback_once(loaded.fallback_reason, loaded.visual.source)
        self.counts["repeated_frames"] += loaded.num_repeated_frames
