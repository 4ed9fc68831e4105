"""The held-out questions of a training run. They are read and checked before the run's model is built.

    --eval-data FILE         asked as the run asks its own questions: its wording, rule for frames, limits of pixels
    --eval-benchmark NAME    asked as the benchmark says; the number of frames is the run's, and so are other pixels

A set of questions must stay what it is as long as a run evaluates on it (``same_sets.py``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_ktr.config.cli import did_you_mean
from megatron_ktr.config.part_options import EvaluationOptions
from megatron_ktr.data.media.preprocess import PreprocessSettings, pixel_limits
from megatron_ktr.data.template import chat_format_digest
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.data.wording import DEFAULT as DEFAULT_WORDING
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError
from megatron_ktr.evaluation.asking.scaling import Voting
from megatron_ktr.evaluation.asking.settings import BenchmarkSettings, EvaluationSettings, digest_of
from megatron_ktr.evaluation.benchmark import FrameRule
from megatron_ktr.evaluation.item import Condition, Item
from megatron_ktr.evaluation.protocols import PROTOCOL_NAMES
from megatron_ktr.evaluation.reading.benchmark_files import (
    NamedBenchmark,
    ReadBenchmark,
    missing_media,
    named_benchmarks,
    read_benchmark,
)
from megatron_ktr.evaluation.registry import BENCHMARKS
from megatron_ktr.evaluation.training.same_sets import require_same_held_out
from megatron_ktr.files.json_files import to_json

SEED = 0
"""Of the choice of questions and of sampling, in every run: runs with other seeds are evaluated alike."""
MOST_CATEGORIES = 12
"""An axis with more categories is not logged."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """The held-out questions of a run."""

    sets: tuple[ReadBenchmark, ...]
    settings: EvaluationSettings
    """Of an evaluation, apart from its model."""
    missing: Mapping[str, tuple[str, ...]]
    """By set, the ids of the items of which a medium is not there. They count as wrong."""
    chat_template: str
    """The digest of the chat template that is used."""
    is_template_given: bool = False
    """Whether it is the user's; else it is the model's own."""

    @property
    def items(self) -> tuple[Item, ...]:
        return tuple(item for one in self.sets for item in one.items)

    @property
    def condition(self) -> Condition:
        return self.settings.conditions[0]

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """By set, what must stay as it is."""
        of_all = {"chat template": self.chat_template}
        return {one.name: _facts(one, self.settings) | of_all for one in self.sets}

    @property
    def facts_before(self) -> dict[str, dict[str, Any]]:
        """See ``HeldOutSets``: of the model's own chat template there was no digest."""
        return {} if self.is_template_given else {one.name: {"chat template": None} for one in self.sets}

    @property
    def figures(self) -> dict[str, str]:
        """By set, a metric that every evaluation of it records."""
        return {one.name: accuracy_of(one.name) for one in self.sets}

    @property
    def totals(self) -> dict[str, list[str]]:
        """No figure is taken over several sets."""
        return {}

    def without(self, names: Collection[str]) -> HeldOut:
        """The other sets."""
        settings = dataclasses.replace(
            self.settings,
            benchmarks={name: asked for name, asked in self.settings.benchmarks.items() if name not in names},
            asked=tuple(one for one in self.settings.asked if one[0] not in names),
        )
        missing = {name: ids for name, ids in self.missing.items() if name not in names}
        sets = tuple(one for one in self.sets if one.name not in names)
        return dataclasses.replace(self, sets=sets, settings=settings, missing=missing)

    @property
    def lines(self) -> list[str]:
        """One line for each set, which say what is asked."""
        found = []
        for one in self.sets:
            asked = self.settings.benchmarks[one.name]
            number = f"{len(one.items)} questions"
            if asked.limit is not None:
                number = f"{asked.limit} of {asked.num_items} questions, the same in every evaluation"
            found.append(
                f"evaluation on {one.name}: {number}, at most {self.condition.frames} frames and "
                f"{asked.sampling.max_tokens} tokens, temperature {asked.sampling.temperature:g}; "
                f"wording: {asked.wording}"
            )
        return found


def held_out_of_run(
    options: EvaluationOptions | None, *, ranks: ParallelGroups, tokenizer: Tokenizer
) -> HeldOut | None:
    """The held-out questions on reading ranks, checked and the same on all of them. None on other ranks, and if the run
    is not evaluated. Collective over the world.

    Raises:
        UserError: on every rank; also if ``--keep-best`` names no metric of theirs.
    """
    if options is None:
        return None

    def read() -> HeldOut | None:
        if not ranks.is_source:
            return None
        held_out = read_held_out(options, tokenizer=tokenizer, is_spokesman=ranks.rank == 0)
        require_known_metric(options.evaluation.keep_best, held_out, others=options.evaluation.loss_metrics)
        return held_out

    held_out = on_every_rank(read, ranks=ranks)
    require_same_held_out(held_out, ranks=ranks)
    return held_out


def read_held_out(options: EvaluationOptions, *, tokenizer: Tokenizer, is_spokesman: bool) -> HeldOut:
    """Reads and checks all sets.

    Raises:
        UserError: a file is missing or is none of questions, or more than ``max_skip_share`` of its media are missing.
    """
    section = options.evaluation
    sets = []
    for named, is_own in _named(options):
        sets.append(
            _in_our_words(
                lambda named=named, is_own=is_own: read_benchmark(
                    named,
                    media_root=Path(section.eval_media_root) if section.eval_media_root and is_own else None,
                    wording=(options.data.prompt_template or DEFAULT_WORDING) if is_own else None,
                    limit=section.eval_max_items,
                    seed=SEED,
                ),
                is_own=is_own,
            )
        )
    _require_read_alike(sets, options)
    missing = {one.name: _missing(one, options=options, is_spokesman=is_spokesman) for one in sets}
    return HeldOut(
        tuple(sets),
        _settings(sets, options),
        missing,
        chat_format_digest(tokenizer),
        is_template_given=options.data.chat_template is not None,
    )


def _require_read_alike(sets: Sequence[ReadBenchmark], options: EvaluationOptions) -> None:
    """Refuses fields that training passes over (``ignore_fields``), because evaluation would do what they say."""
    for one in sets:
        for item in one.items:
            if found := [name for name in options.data.ignore_fields if name in item.record]:
                raise UserError(
                    f"evaluation on {one.name}: question {item.item_id} has the field {found[0]}, which training "
                    "passes over (--ignore-fields) and evaluation does not: leave it out of the file"
                )


def _named(options: EvaluationOptions) -> Iterator[tuple[NamedBenchmark, bool]]:
    """Every set, and whether it is a file of the user's own."""
    section = options.evaluation
    for written in section.eval_data:
        path = Path(written)
        if not path.is_file():
            raise UserError(f"--eval-data {written}: {'is no file' if path.exists() else 'no such file'}")
        if path.stem in BENCHMARKS:
            raise UserError(
                f"--eval-data {written}: its metrics would look like those of the benchmark {path.stem}; rename the "
                f"file, or evaluate on --eval-benchmark {path.stem}={written}"
            )
        yield NamedBenchmark(path.stem, path), True
    if section.eval_benchmark:
        root = None if section.eval_benchmark_root is None else Path(section.eval_benchmark_root)
        found = _in_our_words(lambda: named_benchmarks(section.eval_benchmark, root=root), is_own=False)
        for named in found:
            if named.name not in BENCHMARKS:
                raise UserError(f"--eval-benchmark {named.path}: a file of one's own is named by --eval-data")
            yield named, False


def _in_our_words(read: Any, *, is_own: bool) -> Any:
    """What ``read`` returns. Its errors name the options of ``tools/evaluate.py``; ours have other names."""
    try:
        return read()
    except UserError as error:
        option = "--eval-data" if is_own else "--eval-benchmark"
        text = str(error).replace("--benchmark-root", "--eval-benchmark-root").replace("--benchmark ", f"{option} ")
        raise UserError(
            text.replace("--benchmark:", f"{option}:").replace("--media-root", "--eval-media-root")
        ) from error


def _missing(one: ReadBenchmark, *, options: EvaluationOptions, is_spokesman: bool) -> tuple[str, ...]:
    found = list(missing_media(one))
    if not found:
        return ()
    item, reason = found[0]
    told = (
        f"evaluation on {one.name}: the media of {len(found)} of {len(one.items)} questions are not below "
        f"{one.media_root} (first: {item.item_id}: {reason})"
    )
    if len(found) > options.data.max_skip_share * len(one.items):
        raise UserError(
            f"{told}; more than --max-skip-share {options.data.max_skip_share:g} would count as wrong unseen "
            "(--eval-media-root)"
        )
    if is_spokesman:
        _log.warning("%s; they count as wrong", told)
    return tuple(item.item_id for item, _ in found)


def _settings(sets: Sequence[ReadBenchmark], options: EvaluationOptions) -> EvaluationSettings:
    condition = Condition(options.frames)
    preprocess = PreprocessSettings.from_model(options.model, **pixel_limits(options.data))
    return EvaluationSettings(
        model=options.run_dir,
        identity={},
        seed=SEED,
        preprocess=dataclasses.asdict(preprocess),
        voting=Voting(),
        benchmarks={one.name: _asked(one, options) for one in sets},
        asked=tuple((one.name, condition) for one in sets),
    )


def _asked(one: ReadBenchmark, options: EvaluationOptions) -> BenchmarkSettings:
    section, data = options.evaluation, options.data
    sampling = dataclasses.replace(one.benchmark.sampling, max_tokens=options.max_tokens)
    if section.eval_temperature is not None:
        sampling = dataclasses.replace(sampling, temperature=section.eval_temperature, top_p=1.0)
    frames = one.benchmark.frames
    if one.name not in BENCHMARKS:
        rule = data.frame_sampling or ("fps" if data.video_num_frames is None else "fixed")
        frames = FrameRule(rule=rule, fps=data.video_fps, max_pixels=data.video_max_pixels)
    return BenchmarkSettings(
        path=str(one.path),
        media_root=str(one.media_root),
        wording=one.wording.describe(),
        wording_digest=one.wording.digest,
        sampling=sampling,
        frames=frames,
        num_items=one.num_items,
        limit=None if len(one.items) == one.num_items else len(one.items),
    )


# What must be the same (``same_sets.py``)


def _facts(one: ReadBenchmark, settings: EvaluationSettings) -> dict[str, Any]:
    asked = settings.benchmarks[one.name]
    questions = [[item.item_id, digest_of(item)] for item in one.items]
    facts = {
        "questions": xxhash.xxh3_128(json.dumps(questions).encode(errors="surrogatepass")).hexdigest(),
        "number of questions": len(one.items),
        "frames": settings.conditions[0].frames,
        "rule for frames": dataclasses.asdict(asked.frames),
        "pixels": dict(settings.preprocess),
        "wording": asked.wording_digest,
        "sampling": dataclasses.asdict(asked.sampling),
    }
    return json.loads(to_json(facts))  # as they are read again: JSON knows no tuples


# Metrics


def accuracy_of(name: str) -> str:
    """The metric that every evaluation of a set records, even of questions none of which could be asked."""
    return f"eval/{name}/accuracy"


def logged_axes(held_out: HeldOut) -> dict[str, dict[str, list[str]]]:
    """By set and axis, the categories with curves of their own: those of axes that have few."""
    found: dict[str, dict[str, list[str]]] = {}
    for one in held_out.sets:
        of_axis: dict[str, dict[str, None]] = {}
        for item in one.items:
            for axis in one.benchmark.axes:
                if value := item.categories.get(axis):
                    of_axis.setdefault(axis, {})[value] = None
        found[one.name] = {
            axis: sorted(values) for axis, values in of_axis.items() if 1 < len(values) <= MOST_CATEGORIES
        }
    return found


def best_metrics(held_out: HeldOut) -> list[str]:
    """The metrics of evaluation of which more is better."""
    names = []
    for one in held_out.sets:
        others = [name for name in (*PROTOCOL_NAMES, *one.benchmark.other_judges) if name != "official"]
        names += [f"eval/{one.name}/{figure}" for figure in ("accuracy", *others, "format")]
        names += [
            f"eval/{one.name}/{axis}/{value}"
            for axis, values in logged_axes(held_out)[one.name].items()
            for value in values
        ]
    return names


def require_known_metric(metric: str | None, held_out: HeldOut, *, others: Sequence[str] = ()) -> None:
    """Checks ``--keep-best``. ``others`` are metrics that the run has beside those of ``held_out``.

    Raises:
        UserError: evaluation gives no such metric, or one of which less is better.
    """
    names = [*best_metrics(held_out), *others]
    if metric is not None and metric not in names:
        raise UserError(
            f"--keep-best {metric}: expected one of {', '.join(names)}{did_you_mean(metric, names, cutoff=0.6)}"
        )
