"""Loads a record as a prompt: reads and resizes its media, keeps them in a cache, and tokenises its text."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_ktr.data.media.files import files_of
from megatron_ktr.data.media.preprocess import LoadedMedia, PreprocessSettings, load_media
from megatron_ktr.data.media.request import MediaKind, MediaRequest, MediaSource, media_sources
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.template import PromptBuilder, VisualTokens, load_tokenizer
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.data.unusable import PromptTooLong, UnusableMedia
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt, VisualInput

_log = logging.getLogger(__name__)

MediaKey = tuple[tuple[Path, ...], str, bool, MediaRequest]
"""(files, kind, whether the files are the pictures of one video, what the record asks for)."""


class MediaCache:
    """A cache of resized media, by files, kind and the way they are read. Beyond ``max_bytes`` the least recently used
    ones are dropped.

    The cache assumes that files do not change during a run.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[MediaKey, LoadedMedia] = OrderedDict()

    def get(self, key: MediaKey) -> LoadedMedia | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: MediaKey, media: LoadedMedia) -> None:
        if media.visual.frames_FCHW.nbytes > self.max_bytes:
            return
        self._items[key] = media
        self.num_bytes += media.visual.frames_FCHW.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._items.popitem(last=False)
            self.num_bytes -= oldest.visual.frames_FCHW.nbytes


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
        cache_bytes: int = 0,
        substitutes: Mapping[MediaKind, str | None] | None = None,
    ) -> None:
        """``substitutes`` names, for a kind, the file (as records write it) that is shown in place of media that cannot
        be used. The model then learns to answer about media that it does not see, so this is only for reproducing the
        authors' release.

        Raises:
            UserError: a substitute cannot be used itself.
        """
        self.builder = builder
        self.cache = MediaCache(cache_bytes)
        self.media_root = Path(media_root)
        self.settings = settings
        self.sampling = sampling
        self.max_prompt_length = max_prompt_length
        self.chat_template: str | None = None
        """The text of the chat template that the user gave ``builder.tokenizer`` in place of the model's own."""
        self.counts: Counter[str] = Counter()
        """decoder/<name>, decoder/pyav: <why not decord>, repeated_frames, substituted_media."""
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
        cache_bytes: int = 0,
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
            cache_bytes=cache_bytes,
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

    def load(self, record: Mapping[str, Any]) -> Prompt:
        """The prompt of one record. If media were substituted, the prompt's ``record`` maps each to its substitute
        under ``substituted_media``.

        Raises:
            UnusableSample: the record must be skipped: its media (``UnusableMedia``), its length (``PromptTooLong``) or
                its text.
            UserError: a path leads out of the media root, or template and model do not fit together.
        """
        media, substituted = [], {}
        for source in media_sources(record):
            try:
                media.append(self._load_media(source).visual)
            except UnusableMedia as error:
                if source.kind not in self.substitutes:
                    raise
                name = source.name
                substituted[name], substitute = self.substitutes[source.kind]
                media.append(substitute)
                self.counts["substituted_media"] += 1
                _log.warning("record %s is shown %s instead: %s", record["problem_id"], substituted[name], error)
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

    def _load_media(self, source: MediaSource) -> LoadedMedia:
        files = files_of(source, self.media_root)
        paths = (files,) if isinstance(files, Path) else files
        key = paths, source.kind, source.is_pictures, source.request
        loaded = self.cache.get(key)
        if loaded is None:
            loaded = load_media(
                files,
                kind=source.kind,
                settings=self.settings,
                sampling=self.sampling,
                request=source.request,
            )
            self.cache.put(key, loaded)
            self.counts[f"decoder/{loaded.backend}"] += 1
            if loaded.fallback_reason:
                self.counts[f"decoder/pyav: {loaded.fallback_reason}"] += 1
            self.counts["repeated_frames"] += loaded.num_repeated_frames
        return loaded
