"""What ``tools/evaluate.py`` does with a model: reads and checks all that is asked, then starts the engine and asks."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

from megatron_ktr.data.frame_cache import FrameCache
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.media_reader import MediaReader
from megatron_ktr.data.workers.cores import num_cores
from megatron_ktr.data.workers.pool import WorkerPool
from megatron_ktr.errors import EXIT_INTERRUPTED, EXIT_SAVED, EXIT_USER, UserError, printable
from megatron_ktr.evaluation.asking.directory import OutputDirectory, check_is_ours
from megatron_ktr.evaluation.asking.questions import QuestionMaker, frame_sampling, limited
from megatron_ktr.evaluation.asking.run import Left, Publisher, evaluate, leaving_on_signals
from megatron_ktr.evaluation.asking.scaling import Ask, frames_of, votes_of
from megatron_ktr.evaluation.asking.settings import BenchmarkSettings, EvaluationSettings, read_settings
from megatron_ktr.evaluation.commands.options import (
    conditions_of,
    frames_for,
    preprocess_for,
    sampling_for,
    voting_of,
)
from megatron_ktr.evaluation.engines.base import AnswerEngine
from megatron_ktr.evaluation.engines.build import (
    EngineOptions,
    build_engine,
    choose_engine,
    options_of,
    require_sampling,
)
from megatron_ktr.evaluation.item import Condition
from megatron_ktr.evaluation.reading.benchmark_files import (
    ReadBenchmark,
    by_name,
    check_media,
    missing_media,
    named_benchmarks,
    read_benchmark,
)
from megatron_ktr.evaluation.results.publish import PAGE_FILE, TABLE_FILE, headline_of, publish, summary_of
from megatron_ktr.files.json_files import to_json
from megatron_ktr.report.strips import StripFolder

_MEMORY_BYTES = 1_000_000_000
"""For frames that several questions about a video share."""
_MOST_WORKERS = 16


def run(options: argparse.Namespace) -> int:
    """The command. Everything that can be refused without the model is refused before it is loaded."""
    conditions = conditions_of(options)
    engine_options = _engine_options(options)
    benchmarks = read_all(options)
    if options.check:
        return _report_check(benchmarks, is_json=options.json)
    assert engine_options is not None
    check_media(benchmarks, max_share=options.max_missing_share)
    preprocess = preprocess_for(options, engine_options)
    settings = _settings(options, benchmarks, conditions, preprocess)
    _check_settings(settings, benchmarks, engine_options, preprocess)
    _check_directory(options.out, settings)
    reader = _reader(options)
    with OutputDirectory(options.out) as out, closing(build_engine(engine_options)) as engine:
        settings = dataclasses.replace(settings, identity=dict(engine.identity))
        num_changed = out.take_over(settings, [item for read in benchmarks for item in read.items])
        if num_changed:
            _say(f"{num_changed} questions have changed since they were asked; they are asked again")
        if options.retry_problems:
            _say(f"{out.store.forget(lambda answer: bool(answer.problem))} answers were problems and are asked again")
        maker = QuestionMaker(
            out.outcomes.settings,
            key_of=out.outcomes.key,
            preprocess=preprocess,
            media_roots={read.name: read.media_root for read in benchmarks},
            wordings={read.name: read.wording for read in benchmarks},
            reader=reader,
            pictures=StripFolder(out.path / PAGE_FILE),
        )
        return _ask(options, engine, out, maker, asked=settings.asked)


def _engine_options(options: argparse.Namespace) -> EngineOptions | None:
    """The engine that is asked for; None if --check is to look at the questions alone.

    Raises:
        UserError: an option of the engine contradicts another, or there is no model or no output directory.
    """
    if options.check and options.model is None and options.server_url is None:
        return None
    if options.out is None and not options.check:
        raise UserError("--out DIR: say where answers and results are to be written")
    found = options_of(options)
    if choose_engine(found) in ("hf", "vllm") and not Path(str(found.directory)).is_dir():
        raise UserError(f"--model: {found.directory} is neither a directory nor the URL of a server")
    return found


def read_all(options: argparse.Namespace) -> list[ReadBenchmark]:
    """The benchmarks of the command, with their questions.

    Raises:
        UserError: one cannot be read, or its media root is missing.
    """
    named = named_benchmarks(options.benchmark, root=options.benchmark_root)
    names = [one.name for one in named]
    roots = by_name(options.media_root, names, option="--media-root")
    wordings = by_name(options.prompt_template, names, option="--prompt-template")
    return [
        read_benchmark(
            one,
            media_root=Path(roots[one.name]) if one.name in roots else None,
            wording=wordings.get(one.name),
            limit=options.limit,
            seed=options.seed,
        )
        for one in named
    ]


def _report_check(benchmarks: Sequence[ReadBenchmark], *, is_json: bool) -> int:
    """Names everything that is missing; the exit code says whether anything is."""
    found = {read.name: {item.item_id: reason for item, reason in missing_media(read)} for read in benchmarks}
    if is_json:
        sizes = {read.name: len(read.items) for read in benchmarks}
        print(to_json({"questions": sizes, "missing_media": found}))
        return EXIT_USER if any(found.values()) else 0
    for read in benchmarks:
        missing = found[read.name]
        for item_id, reason in missing.items():
            print(printable(f"{read.name} {item_id}: {reason}"))
        print(
            f"{read.name}: {len(read.items)} questions, wording {read.wording.describe()}; the media of {len(missing)} "
            f"cannot be found below {read.media_root}"
        )
    return EXIT_USER if any(found.values()) else 0


def _settings(
    options: argparse.Namespace,
    benchmarks: Sequence[ReadBenchmark],
    conditions: Sequence[Condition],
    preprocess: PreprocessSettings,
) -> EvaluationSettings:
    """The settings, whose identity of the model is not known before the engine is."""
    sizes = dataclasses.asdict(preprocess)
    del sizes["video_max_pixels"]  # each benchmark's own
    return EvaluationSettings(
        model=options.model or options.served_model or options.server_url or "",
        identity={},
        seed=options.seed,
        preprocess=sizes,
        voting=voting_of(options),
        benchmarks={
            read.name: BenchmarkSettings(
                path=str(read.path),
                media_root=str(read.media_root),
                wording=read.wording.describe(),
                wording_digest=read.wording.digest,
                sampling=sampling_for(read.benchmark.sampling, options),
                frames=frames_for(read.benchmark.frames, options),
                num_items=read.num_items,
                limit=options.limit if options.limit is not None and options.limit < read.num_items else None,
            )
            for read in benchmarks
        },
        asked=tuple((read.name, condition) for read in benchmarks for condition in conditions),
    )


def _check_settings(
    settings: EvaluationSettings,
    benchmarks: Sequence[ReadBenchmark],
    engine: EngineOptions,
    preprocess: PreprocessSettings,
) -> None:
    """Raises ``UserError`` for sampling that the engine cannot do, and for frames that cannot be made."""
    first = {read.name: read.items[0] for read in benchmarks}
    for name, condition in settings.asked:
        for vote in range(votes_of(condition)):
            ask = Ask(first[name], condition, vote=vote)
            require_sampling(engine, settings.sampling(ask))
            rule = settings.frame_rule(ask)
            limited(preprocess, max_pixels=rule.max_pixels)
            frame_sampling(rule, frames=frames_of(ask))


def _check_directory(out: Path, settings: EvaluationSettings) -> None:
    """Raises ``UserError`` if the output directory will refuse these settings, but for the model's identity."""
    check_is_ours(out)
    settings.as_bytes()
    earlier = read_settings(out)
    if earlier is not None:
        dataclasses.replace(settings, identity=earlier.identity).after(earlier, directory=out)


def _ask(
    options: argparse.Namespace,
    engine: AnswerEngine,
    out: OutputDirectory,
    maker: QuestionMaker,
    *,
    asked: Sequence[tuple[str, Condition]],
) -> int:
    num_workers = min(_MOST_WORKERS, max(1, num_cores() - 1)) if options.data_workers is None else options.data_workers
    pool = WorkerPool(num_workers, timeout_seconds=options.data_timeout_seconds) if num_workers else None
    publisher = Publisher(lambda: _publish(out, options, is_partial=True))
    try:
        with closing(pool) if pool is not None else nullcontext(), leaving_on_signals():
            missing = evaluate(
                engine,
                outcomes=out.outcomes,
                asked=asked,
                maker=maker,
                store=out.store,
                pool=pool,
                publisher=publisher,
            )
    except Left as left:
        return _leave(out, options, left)
    except UserError:
        with suppress(UserError):  # the first error is the cause
            _publish(out, options, is_partial=True)
        raise
    return _finish(options, _publish(out, options, is_partial=False), missing)


def _reader(options: argparse.Namespace) -> MediaReader:
    directory = options.frame_cache_dir
    disk = None if directory is None else FrameCache(directory, max_bytes=round(options.frame_cache_gb * 1e9))
    return MediaReader(memory_bytes=_MEMORY_BYTES, disk=disk)


def _publish(out: OutputDirectory, options: argparse.Namespace, *, is_partial: bool) -> dict[str, Any]:
    evaluation = out.outcomes.evaluation(out.store.get)
    return publish(out.path, evaluation, protocol=options.protocol, paper=options.paper, is_partial=is_partial)


def _leave(out: OutputDirectory, options: argparse.Namespace, left: Left) -> int:
    """Writes what is there, and says how to go on."""
    results = _publish(out, options, is_partial=True)
    _say(
        f"ended by {left}: {results['num_answered']:,} of {results['num_wanted']:,} items are answered and stored in "
        f"{out.path}; the same command goes on from there"
    )
    return EXIT_INTERRUPTED if left.number == signal.SIGINT else EXIT_SAVED


def _finish(options: argparse.Namespace, results: Mapping[str, Any], missing: Mapping[str, str]) -> int:
    """Prints the results. The exit code says whether all that this command asked for is answered."""
    print(headline_of(results, protocol=options.protocol, paper=options.paper))
    _say(f"tables: {options.out / TABLE_FILE}, every item: {options.out / PAGE_FILE}")
    if options.json:
        print(to_json({"out": str(options.out), **summary_of(results, protocol=options.protocol)}))
    if not missing:
        return 0
    reasons = Counter(missing.values()).most_common(3)
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    raise UserError(
        f"{len(missing)} answers are missing, so the results are incomplete: {told}; give the same command again"
    )


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
