"""The lengths of a run's records in tokens, found without decoding: what a length-bucketed order goes by.

    length = text of the prompt + visual tokens of its media + tokens of the given response, if there is one

Text is tokenised as in training. The visual tokens follow from the number and size of a video's frames, which its
packets and its first frame say, and from the rules for frames and pixels (``data/prepare``); of an image, its header is
read. A medium that cannot be read counts nothing, because its record will be skipped when it is drawn.

Reading the packets of all videos takes a while. The lengths of a file that has a store are therefore kept beside the
store, under a name made of all that decides them but the contents of the media.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import xxhash

from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.request import MediaSource, media_sources
from megatron_ktr.data.mixture import RecordSource
from megatron_ktr.data.prepare.media_looks import ProcessLimits, look_at_media
from megatron_ktr.data.prepare.media_probe import Look
from megatron_ktr.data.prepare.record_reader import count_text_tokens, visual_tokens
from megatron_ktr.data.reply import build_reply
from megatron_ktr.data.store.check_job import CheckJob
from megatron_ktr.data.store.record_store import RecordStore, progress
from megatron_ktr.data.store.sealed import open_sealed, sole_writer, write_sealed
from megatron_ktr.data.unusable import UnusableSample
from megatron_ktr.data.workers.cores import num_cores

_SCHEMA = pa.schema([("length", pa.int64())])


def record_lengths(source: RecordSource, *, jobs: int = 1, is_spokesman: bool = True) -> np.ndarray:
    """The length of every record, int64 [records]; 0 for those that are left out.

    Args:
        jobs: processes that look at media, where every reading rank of the machine does so.
        is_spokesman: shows the progress.
    """
    store = source.records
    if not isinstance(store, RecordStore) or store.file is None:
        return _count(source, jobs=jobs, is_shown=is_spokesman)
    path = store.file.path.with_name(f"{store.file.content}-lengths-{_key(source, store)}.arrow")
    found = open_sealed(path)
    if found is None:
        with sole_writer(store.file.directory, path.name):
            found = open_sealed(path)  # another process may have written it meanwhile
            if found is None:
                # The other ranks of the machine wait, so this one may have all cores.
                table = found = pa.table([_count(source, jobs=num_cores(), is_shown=is_spokesman)], schema=_SCHEMA)
                write_sealed(path, schema=_SCHEMA, write=lambda writer: writer.write_table(table))
    return found.column("length").to_numpy()


def _count(source: RecordSource, *, jobs: int, is_shown: bool) -> np.ndarray:
    builder = source.loader.builder
    lengths = np.zeros(len(source.records), dtype=np.int64)
    shown: dict[MediaSource, list[int]] = {}
    with progress("measuring records", total=len(lengths), is_shown=is_shown) as bar:
        for place in range(len(lengths)):
            bar.update(1)
            if source.is_left_out[place]:
                continue
            record = source.records[place]
            media = media_sources(record)
            try:
                lengths[place] = count_text_tokens(record, builder=builder)
                if "reply_turns" in record:
                    kinds = [medium.kind for medium in media]
                    lengths[place] += len(build_reply(record, kinds=kinds, builder=builder).token_ids)
            except UnusableSample:
                continue  # the check of all records has left it out, or will skip it
            for medium in media:
                shown.setdefault(medium, []).append(place)
    for medium, tokens in _visual_tokens(list(shown), source.loader, jobs=jobs).items():
        for place in shown[medium]:
            lengths[place] += tokens
    return lengths


def _visual_tokens(media: list[MediaSource], loader: PromptLoader, *, jobs: int) -> Mapping[MediaSource, int]:
    """The visual tokens of each medium that can be read."""
    tokens: dict[MediaSource, int] = {}
    limits = ProcessLimits(jobs=jobs)
    # Damaged files may hang or kill the process that opens them: others look at them.
    for seen in look_at_media(enumerate(media), look=Look.INDEX, loader=loader, limits=limits, total=len(media)):
        medium = media[seen.number]
        try:
            tokens[medium] = 0 if seen.facts.problem else visual_tokens(seen.facts, medium, loader.settings)
        except ValueError:
            continue  # asks for sizes outside the limits
    return tokens


def _key(source: RecordSource, store: RecordStore) -> str:
    """A digest of everything that decides the lengths, apart from the contents of media."""
    loader = source.loader
    job = CheckJob(store.file, store.path, store.rules, loader.builder, loader.settings, loader.sampling, ())
    vocabulary = json.dumps(sorted(loader.builder.tokenizer.get_vocab().items()))
    left_out = np.packbits(source.is_left_out).tobytes().hex()
    parts = [job.key(), str(loader.media_root.resolve()), vocabulary, left_out]
    return xxhash.xxh3_128("\0".join(parts).encode(errors="surrogatepass")).hexdigest()
