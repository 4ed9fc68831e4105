"""``preview``: writes a page with some samples of a question file as the model will see them (``sample_page.py``)."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ktr.data.prepare.media_looks import add_process_options, read_process_options
from megatron_ktr.data.prepare.options import add_reading_options, read_reading_options
from megatron_ktr.data.prepare.prompt_lengths import Rules, count_tokens, effects_in_words
from megatron_ktr.data.prepare.record_reader import RecordReader
from megatron_ktr.data.prepare.record_sample import RecordSample, sample_records, sampled_prompts
from megatron_ktr.errors import UserError, printable, whole
from megatron_ktr.files.json_files import to_json
from megatron_ktr.report.page import write_page
from megatron_ktr.report.sample_page import Lengths, sample_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reading_options(parser, model_is_required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="page to write")
    parser.add_argument("--num", type=whole(high=1000), metavar="N", help="samples to show, drawn at random (6)")
    parser.add_argument("--records", metavar="N[,...]", help="show the records of these numbers instead")
    parser.add_argument("--seed", type=whole(low=0), default=0, metavar="N", help="which records are drawn (0)")
    parser.add_argument(
        "--sample", type=whole(), default=200, metavar="N", help="records whose lengths are measured (200)"
    )
    add_process_options(parser)
    parser.add_argument("--json", action="store_true", help="say what was written as one JSON object")


def run(options: argparse.Namespace) -> int:
    reading = read_reading_options(options)
    numbers = _read_numbers(options.records)
    if numbers and options.num is not None:
        raise UserError("--num is not read with --records, which names the records to show")
    num_shown = options.num or 6
    reader = RecordReader(reading)
    sample = sample_records(reader, size=max(options.sample, num_shown), seed=options.seed, named=set(numbers))
    sampled = sampled_prompts(sample, reader, limits=read_process_options(options))
    rules = Rules(reader.loader.sampling, reader.loader.settings)
    lengths = Lengths(
        tokens=[length for prompt in sampled.prompts if (length := count_tokens(prompt, rules)) is not None],
        limit=reading.data.max_prompt_length,
        effects=effects_in_words(sampled.prompts, rules, max_prompt_length=reading.data.max_prompt_length),
    )
    samples = [sample.named[number] for number in numbers] or sample.drawn(num_shown)
    page = sample_page(
        f"Preview of {reading.file.name}",
        facts=_facts(sample),
        lengths=lengths,
        samples=samples,
        loader=reader.loader,
    )
    num_bytes = write_page(options.out, page)
    if options.json:
        print(to_json({"out": str(options.out), "num_bytes": num_bytes, "records": [item.number for item in samples]}))
        return 0
    for sentence in lengths.effects:
        print(sentence)
    print(f"wrote {printable(str(options.out))} ({num_bytes / 1e6:.1f} MB, {len(samples)} samples)")
    return 0


def _facts(sample: RecordSample) -> list[tuple[str, str]]:
    facts = [("records", f"{sample.num_records:,}"), ("usable by text and paths", f"{sample.num_usable:,}")]
    facts += [(kind, f"{count:,}") for kind, count in sample.problems.most_common(8)]
    return facts


def _read_numbers(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not 0 < len(numbers) <= 1000 or min(numbers) < 1:
        raise UserError(f"--records expects up to 1000 numbers from 1, such as 3,17; got {text[:80]!r}")
    return list(dict.fromkeys(numbers))
