"""``stats``: measures the media and prompts of a question file, and suggests options for a token budget.

Problem types are counted over the whole file. Durations, sizes and lengths of prompts are those of a sample of its
usable records, read without decoding; what decoding costs is measured on a few of their media.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from megatron_ktr.data.media.request import MediaSource
from megatron_ktr.data.prepare.media_looks import (
    ProcessLimits,
    add_process_options,
    look_at_media,
    read_process_options,
)
from megatron_ktr.data.prepare.media_probe import Look, MediaFacts
from megatron_ktr.data.prepare.options import ReadingOptions, add_reading_options, read_reading_options
from megatron_ktr.data.prepare.prompt_lengths import Rules, count_tokens, effects_in_words
from megatron_ktr.data.prepare.record_reader import RecordReader
from megatron_ktr.data.prepare.record_sample import RecordSample, SampledPrompts, sample_records, sampled_prompts
from megatron_ktr.data.prepare.token_budget import Suggestion, suggest_options
from megatron_ktr.errors import printable, whole
from megatron_ktr.files.json_files import to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reading_options(parser)
    parser.add_argument("--sample", type=whole(), default=200, metavar="N", help="records to measure (200)")
    parser.add_argument(
        "--decode-sample",
        type=whole(low=0),
        default=16,
        metavar="N",
        help="media to decode for the cost; 0 = none (16)",
    )
    parser.add_argument("--seed", type=whole(low=0), default=0, metavar="N", help="which records are the sample (0)")
    parser.add_argument(
        "--token-budget", type=whole(), metavar="N", help="tokens of a prompt to fit (default: --max-prompt-length)"
    )
    add_process_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(options: argparse.Namespace) -> int:
    reading = read_reading_options(options)
    result = measure(
        reading,
        size=options.sample,
        num_decoded=options.decode_sample,
        seed=options.seed,
        token_budget=options.token_budget or reading.data.max_prompt_length,
        limits=read_process_options(options),
    )
    if options.json:
        print(to_json(asdict(result)))
    else:
        for line in lines_for_people(result):
            print(printable(line))
    return 0


@dataclass(frozen=True)
class Spread:
    """How a quantity is distributed over the sample."""

    least: float
    median: float
    high: float
    """The least value that 90% do not exceed."""
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None without values."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[(len(ordered) * 9 + 9) // 10 - 1], ordered[-1])


@dataclass(frozen=True)
class DecodingCost:
    """What decoding and resizing costs in one process, over the media that were decoded."""

    num_media: int
    seconds_per_medium: float
    """The mean, with reading the file and resizing the frames."""
    megabytes_per_second: float
    """10^6 bytes of files, per second of work."""
    seconds_per_sample: float
    """The mean over prompts of the sample: media of a prompt times ``seconds_per_medium``."""


@dataclass(frozen=True)
class Stats:
    """What is known of a question file."""

    file: str
    num_records: int
    num_usable: int
    problems: dict[str, int]
    problem_types: dict[str, int]
    data_types: dict[str, int]
    num_sampled: int
    num_media: int
    num_media_unreadable: int
    codecs: dict[str, int]
    sizes: dict[str, int]
    """"width x height" -> media of the sample, the most frequent first."""
    seconds: Spread | None
    """Durations of videos."""
    frame_rates: Spread | None
    megabytes: Spread | None
    frames_taken: Spread | None
    """Frames of a video in a prompt."""
    tokens: Spread | None
    """Of a prompt; without a model, of its media alone."""
    has_text_tokens: bool
    effects: list[str]
    decoding: DecodingCost | None
    token_budget: int
    suggestions: list[Suggestion]


def measure(
    reading: ReadingOptions, *, size: int, num_decoded: int, seed: int, token_budget: int, limits: ProcessLimits
) -> Stats:
    """Reads the file and measures a sample of ``size`` records.

    Raises:
        UserError: as ``RecordReader`` does.
    """
    reader = RecordReader(reading)
    sample = sample_records(reader, size=size, seed=seed)
    sampled = sampled_prompts(sample, reader, limits=limits)
    rules = Rules(reader.loader.sampling, reader.loader.settings)
    good = {source: facts for source, facts in sampled.media.items() if not facts.problem}
    videos = [facts for source, facts in good.items() if source.kind == "video"]
    tokens = [length for prompt in sampled.prompts if (length := count_tokens(prompt, rules)) is not None]
    return Stats(
        file=str(reading.file),
        num_records=sample.num_records,
        num_usable=sample.num_usable,
        problems=dict(sample.problems.most_common()),
        problem_types=dict(sample.problem_types.most_common()),
        data_types=dict(sample.data_types.most_common()),
        num_sampled=len(sample.records),
        num_media=len(sampled.media),
        num_media_unreadable=len(sampled.media) - len(good),
        codecs=dict(Counter(facts.codec for facts in good.values()).most_common()),
        sizes=dict(Counter(f"{facts.width} x {facts.height}" for facts in good.values()).most_common()),
        seconds=Spread.of([facts.duration for facts in videos]),
        frame_rates=Spread.of([facts.native_fps for facts in videos]),
        megabytes=Spread.of([facts.num_bytes / 1e6 for facts in good.values()]),
        frames_taken=Spread.of([facts.num_frames for facts in videos]),
        tokens=Spread.of(tokens),
        has_text_tokens=reading.model is not None,
        effects=effects_in_words(sampled.prompts, rules, max_prompt_length=reading.data.max_prompt_length),
        decoding=_decoding_cost(list(good)[:num_decoded], sample, sampled, reader, limits),
        token_budget=token_budget,
        suggestions=suggest_options(sampled.prompts, rules, token_budget=token_budget),
    )


def _decoding_cost(
    media: Sequence[MediaSource],
    sample: RecordSample,
    sampled: SampledPrompts,
    reader: RecordReader,
    limits: ProcessLimits,
) -> DecodingCost | None:
    if not media or not sampled.prompts:
        return None
    # One process, so that they do not slow down each other. The first medium is decoded twice, and counts when the
    # decoders have started.
    seen: dict[int, MediaFacts] = {}
    for found in look_at_media(
        enumerate([media[0], *media]),
        look=Look.FRAMES,
        loader=reader.loader,
        limits=replace(limits, jobs=1),
        total=len(media) + 1,
        measures_time=True,
    ):
        if found.number and not found.facts.problem:
            seen[found.number] = found.facts
    if not seen:
        return None
    seconds = sum(facts.seconds for facts in seen.values())
    num_shown = sum(len(prompt.media) for prompt in sampled.prompts)
    return DecodingCost(
        num_media=len(seen),
        seconds_per_medium=seconds / len(seen),
        megabytes_per_second=sum(facts.num_bytes for facts in seen.values()) / 1e6 / seconds,
        seconds_per_sample=seconds / len(seen) * num_shown / len(sampled.prompts),
    )


def lines_for_people(stats: Stats) -> Iterator[str]:
    """The result in words."""
    yield (
        f"{stats.file}: {stats.num_records:,} records, {stats.num_usable:,} can be used as far as text and paths say."
    )
    if stats.problems:
        yield f"  cannot be used   {_counts(stats.problems)} (see: validate)"
    yield f"  problem types    {_counts(stats.problem_types)}"
    yield f"  data types       {_counts(stats.data_types)}"
    unreadable = f", {stats.num_media_unreadable:,} of which cannot be read" if stats.num_media_unreadable else ""
    yield f"In a sample of {stats.num_sampled:,} records with {stats.num_media:,} media{unreadable}:"
    if stats.codecs:
        yield f"  codecs           {_counts(stats.codecs)}"
        yield f"  sizes            {_counts(stats.sizes)}"
    what = "tokens" if stats.has_text_tokens else "media tokens"
    for name, spread, digits in (
        ("seconds", stats.seconds, 3),
        ("frame rate", stats.frame_rates, 3),
        ("MB of a file", stats.megabytes, 3),
        ("frames taken", stats.frames_taken, 6),
        (f"{what}", stats.tokens, 6),
    ):
        if spread is not None:
            yield f"  {name:16} {_spread(spread, digits)}"
    if not stats.has_text_tokens:
        yield "  (the tokens of texts are not counted: --model DIR)"
    yield from (f"  {sentence}" for sentence in stats.effects)
    if (cost := stats.decoding) is not None:
        yield (
            f"Decoding costs {cost.seconds_per_sample:.3g} s a sample in one process "
            f"({cost.seconds_per_medium:.3g} s a medium, {cost.megabytes_per_second:.3g} MB/s; measured on "
            f"{cost.num_media})."
        )
    yield from _suggestions_in_words(stats)


def _suggestions_in_words(stats: Stats) -> Iterator[str]:
    if not stats.suggestions:
        if stats.seconds is not None:
            yield f"No choice of frames and pixels makes 99% of the prompts fit into {stats.token_budget:,} tokens."
        return
    yield f"For {stats.token_budget:,} tokens a prompt (--token-budget), one of:"
    for found in stats.suggestions:
        yield (
            f"  --video-max-frames {found.video_max_frames:<4} --video-max-pixels {found.video_max_pixels:<7} median "
            f"{found.median_tokens:,}, longest {found.longest_tokens:,} tokens, {found.fitting_share:.1%} fit"
        )


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{name[:60] or '(none)'} {count:,}" for name, count in list(counts.items())[:8]]
    return ", ".join(shown) + (f", and {len(counts) - 8:,} others" if len(counts) > 8 else "") or "none"


def _spread(spread: Spread, digits: int) -> str:
    least, median, high, most = (
        f"{value:.{digits}g}" for value in (spread.least, spread.median, spread.high, spread.most)
    )
    return f"{least} to {most}, median {median}, 90% at most {high}"
