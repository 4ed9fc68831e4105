"""Prompts for training: which record comes next on this rank, loaded, skipped where unusable, resumable.

All ranks walk through one endless sequence, the epochs' orders back to back; data-parallel rank r of n takes
elements r, r + n, r + 2n, ... So the prompts of a step are the same set whatever n is (as long as nothing is
skipped), no epoch loses its tail, and the whole state is one number: how many elements this rank has drawn.

An element's place in the sequence is the ``draw_number`` of its prompt. Seeds and kept responses go by it, not by the
problem id, which may stand on several records, nor by the record, which may be drawn several times in a step.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_ktr.data.media_files import resolve_media_path
from megatron_ktr.data.media_source import MediaRequest, MediaSource, media_sources
from megatron_ktr.data.preprocess import LoadedMedia, PreprocessSettings, load_media
from megatron_ktr.data.records import Record, read_records, record_digest
from megatron_ktr.data.template import PromptBuilder, VisualTokens, WordingTemplate, load_tokenizer
from megatron_ktr.data.unusable import PromptTooLong, UnusableMedia, UnusableSample
from megatron_ktr.data.video import FrameSampling
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt, VisualInput

__all__ = ["PromptDataset", "PromptLoader", "SkipCounter", "read_records", "resolve_media_path"]

_log = logging.getLogger(__name__)
_MAX_FRUITLESS_DRAWS = 1000
"""So many samples in a row without a usable one stop the run, even if each was rejected for its length."""


MediaKey = tuple[tuple[Path, ...], str, bool, MediaRequest]
"""Files, kind, whether they are the pictures of one video, and what the record asks for."""


class MediaCache:
    """Resized media by files, kind and how they are read; least recently used ones are dropped beyond ``max_bytes``.

    Files are taken not to change during a run.
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
        substitutes: Mapping[str, str | None] | None = None,
    ) -> None:
        """``substitutes``: by kind, the file (as records write it) that is shown in place of media that cannot be used.
        The model then learns to answer about what it does not see: only to reproduce the authors' release.

        Raises:
            UserError: a substitute cannot be used itself.
        """
        self.builder = builder
        self.cache = MediaCache(cache_bytes)
        self.media_root = Path(media_root)
        self.settings = settings
        self.sampling = sampling
        self.max_prompt_length = max_prompt_length
        self.counts: Counter[str] = Counter()
        """decoder/<name>, decoder/pyav: <why not decord>, repeated_frames, substituted_media."""
        self.substitutes = {
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
        tokenizer: Any = None,
        cache_bytes: int = 0,
        substitutes: Mapping[str, str | None] | None = None,
        **preprocessing: float | None,
    ) -> PromptLoader:
        """Everything read from a Hugging Face directory; ``preprocessing`` are ``PreprocessSettings`` fields."""
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
        """Of the template that words the questions."""
        return xxhash.xxh3_128(self.builder.wording.text.encode()).hexdigest()

    def load(self, record: Mapping[str, Any]) -> Prompt:
        """The prompt of one record; its ``record`` names under ``substituted_media`` what was shown in place of what.

        Raises:
            UnusableSample: the record must be skipped (``UnusableMedia``, ``PromptTooLong`` or its text).
            UserError: a path leads out of the media root, or template and model do not fit.
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

    def _load_substitute(self, kind: str, written: str) -> VisualInput:
        try:
            path = resolve_media_path(self.media_root, written)
            return load_media(path, kind=kind, settings=self.settings, sampling=self.sampling).visual
        except (UnusableMedia, UserError) as error:
            raise UserError(f"substitute_{kind}: {error}") from error

    def _load_media(self, source: MediaSource) -> LoadedMedia:
        paths = tuple(resolve_media_path(self.media_root, written) for written in source.paths)
        key = paths, source.kind, source.is_pictures, source.request
        loaded = self.cache.get(key)
        if loaded is None:
            loaded = load_media(
                paths if source.is_pictures else paths[0],
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


class SkipCounter:
    """Counts samples drawn and skipped, and stops the run when too large a share is unusable.

    Over-long prompts are counted, but not in that share: leaving them out is a choice, not a defect of the data.
    """

    def __init__(self, *, max_skip_share: float = 0.1, min_drawn: int = 20) -> None:
        self.max_skip_share = max_skip_share
        self.min_drawn = min_drawn
        """The share means something only after so many samples."""
        self.num_drawn = 0
        self.by_kind: Counter[str] = Counter()
        self.last: UnusableSample | None = None

    @property
    def num_skipped(self) -> int:
        return sum(self.by_kind.values())

    def count_drawn(self) -> None:
        self.num_drawn += 1

    def count_skip(self, error: UnusableSample, *, number: object = None) -> None:
        """Logs path and reason, and ``number``, the record's in its file.

        Raises:
            UserError: more than ``max_skip_share`` of at least ``min_drawn`` samples are unusable.
        """
        self.by_kind[error.kind] += 1
        self.last = error
        _log.warning("skipped%s (%s): %s", "" if number is None else f" record {number}", error.kind, error)
        num_unusable = self.num_skipped - self.by_kind[PromptTooLong.kind]
        if self.num_drawn >= self.min_drawn and num_unusable > self.max_skip_share * self.num_drawn:
            raise UserError(
                f"{num_unusable} of {self.num_drawn} samples are unusable, more than max_skip_share "
                f"{self.max_skip_share:g}; the last one: {error}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"num_drawn": self.num_drawn, "by_kind": dict(self.by_kind)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_drawn = int(state["num_drawn"])
        self.by_kind = Counter({str(kind): int(count) for kind, count in state["by_kind"].items()})


class PromptDataset:
    """An endless, seeded, resumable stream of prompts for one data-parallel rank."""

    def __init__(
        self,
        records: Sequence[Record],
        *,
        loader: PromptLoader,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        size: int = 1,
        skips: SkipCounter | None = None,
        left_out: Collection[int] = (),
    ) -> None:
        """``left_out``: places in ``records`` that are passed over. They keep their place, so that the order of the
        others, and where a resumed run goes on, do not depend on what can be used today."""
        if len(left_out) >= len(records):
            raise UserError("data_path: no records to draw prompts from")
        if not 0 <= rank < size:
            raise ValueError(f"expected a data-parallel rank in [0, {size}), got {rank}")
        self.records = records
        self.loader = loader
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.size = size
        self.skips = skips or SkipCounter()
        self.left_out = frozenset(left_out)
        self.position = 0
        """Samples drawn by this rank so far, skipped ones included."""
        self._order: tuple[int, list[int]] | None = None

    @property
    def num_kept(self) -> int:
        """Records of an epoch, without those that are passed over."""
        return len(self.records) - len(self.left_out)

    @property
    def num_skipped(self) -> int:
        return self.skips.num_skipped

    @property
    def counts(self) -> dict[str, int]:
        """Over the whole run, for the metrics: the loader's counts, and ``skipped/<kind>`` for each kind of skip."""
        return dict(self.loader.counts) | {f"skipped/{kind}": number for kind, number in self.skips.by_kind.items()}

    @property
    def epoch(self) -> int:
        """The epoch of the next sample."""
        return self._element(self.position) // len(self.records)

    def next(self, num_prompts: int) -> list[Prompt]:
        """The next ``num_prompts`` usable prompts; each skipped sample is replaced by the one after it.

        Raises:
            UserError: too large a share of samples is unusable, or none is.
        """
        prompts: list[Prompt] = []
        fruitless = 0
        while len(prompts) < num_prompts:
            draw_number, record = self._draw()
            try:
                prompts.append(dataclasses.replace(self.loader.load(record), draw_number=draw_number))
                fruitless = 0
            except UnusableSample as error:
                self.skips.count_skip(error, number=record.get("record_number"))
                fruitless += 1
                if fruitless >= min(len(self.records) + self.skips.min_drawn, _MAX_FRUITLESS_DRAWS):
                    raise UserError(
                        f"no usable prompt among the last {fruitless} samples; the last one: {error}"
                    ) from None
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text: where this rank stands, and its counts."""
        return {
            "position": self.position,
            "epoch": self.epoch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "rank": self.rank,
            "size": self.size,
            "num_records": len(self.records),
            "records_digest": self.records_digest,
            "wording_digest": self.loader.wording_digest,
            "skips": self.skips.state_dict(),
            "counts": dict(self.loader.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where ``state_dict`` was taken.

        Raises:
            UserError: taken with other data, seed, shuffling or number of data-parallel ranks (for the last, see
                ``reshard_states``).
        """
        ours = {"num_records": len(self.records), "seed": self.seed, "shuffle": self.shuffle}
        ours |= {"rank": self.rank, "size": self.size}
        for name, value in ours.items():
            if state[name] != value:
                raise UserError(
                    f"resume: the data position was saved with {name} = {state[name]}, this run has {value}"
                )
        self._require_same_content(state)
        self.position = int(state["position"])
        self.skips.load_state_dict(state["skips"])
        self.loader.counts = Counter({str(name): int(count) for name, count in state["counts"].items()})

    @cached_property
    def records_digest(self) -> str:
        """Of the records in their order: those that are drawn, whatever else the file holds (``--problem-types``)."""
        digests = (record.get("record_digest") or record_digest(record) for record in self.records)
        return xxhash.xxh3_128("".join(digests).encode()).hexdigest()

    def _require_same_content(self, state: Mapping[str, Any]) -> None:
        if "records_digest" not in state:
            _log.warning("resume: the checkpoint does not say which records it was trained on; they are not compared")
            return
        if state["records_digest"] != self.records_digest:
            raise UserError(
                f"resume: the {len(self.records)} records are not those of the saved run (same number, other content "
                "or order): give --data-path or --replay-path the same questions, only their directory may change"
            )
        if state["wording_digest"] != self.loader.wording_digest:
            raise UserError("resume: --prompt-template is not the text of the saved run; only its place may change")

    def _element(self, position: int) -> int:
        return self.rank + position * self.size

    def _draw(self) -> tuple[int, Record]:
        """The next usable element's place in the sequence, and its record."""
        for _ in range(len(self.records) + _MAX_FRUITLESS_DRAWS):
            element = self._element(self.position)
            place = self._place_of(element)
            self.position += 1
            if place not in self.left_out:
                self.skips.count_drawn()
                return element, self.records[place]
        # Without shuffling a replica may see the same few places in every epoch.
        raise UserError(f"data-parallel replica {self.rank} of {self.size} draws only records that cannot be used")

    def _place_of(self, element: int) -> int:
        epoch, offset = divmod(element, len(self.records))
        if not self.shuffle:
            return offset
        if self._order is None or self._order[0] != epoch:
            # Seeded by the sum of two far-apart streams: a generator takes one number, epochs and seeds are small.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.records), generator=generator).tolist())
        return self._order[1][offset]


def reshard_states(states: Iterable[Mapping[str, Any]], *, rank: int, size: int) -> dict[str, Any]:
    """State of rank ``rank`` of ``size`` from the states of all data-parallel ranks of a saved run.

    Same size: that rank's own state, exact. Another size: all ranks continue after the furthest sample that any rank
    has drawn, so none is seen twice; where ranks had skipped different numbers of samples, a few are passed over.
    Counts are kept once, on rank 0. Responses that were pending (``pending``, by ``Prompt.identity``) go to every rank:
    it draws some of their prompts again.
    """
    saved = sorted(states, key=lambda state: state["rank"])
    old_size = int(saved[0]["size"])
    if len(saved) != old_size:
        raise ValueError(f"expected the states of all {old_size} data-parallel ranks, got {len(saved)}")
    if size == old_size:
        return dict(saved[rank])
    furthest = max(int(state["position"]) for state in saved) * old_size
    skips, counts = SkipCounter(), Counter[str]()
    if rank == 0:
        for state in saved:
            skips.num_drawn += int(state["skips"]["num_drawn"])
            skips.by_kind.update(state["skips"]["by_kind"])
            counts.update(state["counts"])
    position = -(-(furthest - rank) // size) if furthest > rank else 0
    state = {**saved[0], "position": position, "rank": rank, "size": size}
    state["epoch"] = (rank + position * size) // int(state["num_records"])
    pending = {name: found for other in saved for name, found in other.get("pending", {}).items()}
    if pending:
        state["pending"] = pending
    return {**state, "skips": skips.state_dict(), "counts": dict(counts)}
