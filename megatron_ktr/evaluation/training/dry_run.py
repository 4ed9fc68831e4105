"""What a run is evaluated on, where the run is only looked at (``--dry-run`` of ``train``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config import Config
from megatron_ktr.config.part_options import EvaluationOptions
from megatron_ktr.config.sections import EvaluationSection
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.evaluation.reading.benchmark_files import place_of
from megatron_ktr.evaluation.registry import BENCHMARKS
from megatron_ktr.evaluation.training.held_out import read_held_out, require_known_metric
from megatron_ktr.evaluation.training.held_out_loss import TOTAL, HeldOutResponses
from megatron_ktr.evaluation.training.same_sets import HeldOutSets, require_unchanged
from megatron_ktr.rollout.questions import read_held_out_responses
from megatron_ktr.run.directory import list_checkpoints
from megatron_ktr.run.dry_run.data import tokenizer_of
from megatron_ktr.run.dry_run.model import KnownModel


@dataclass(frozen=True)
class KnownHeldOut:
    """What is known of the held-out questions and responses."""

    lines: tuple[str, ...] = ()
    """For the console."""
    not_checked: tuple[str, ...] = ()


def find_held_out(config: Config, model: KnownModel) -> KnownHeldOut:
    """Reads and checks the sets of which the files are there, as training does, and compares them with those of the run
    that is resumed. Without the model's directory nothing is read, because the sizes of frames depend on its
    preprocessor.

    Raises:
        UserError: training would refuse a set, or ``--keep-best``.
    """
    options = EvaluationOptions.of(config, data_parallel_size=1)
    asked = ["the held-out questions"] if options is not None else []
    if config.evaluation.eval_loss_data:
        asked.append("the held-out responses")
    if not asked:
        return KnownHeldOut()
    if not model.is_here:
        return KnownHeldOut(not_checked=tuple(f"{what}, without the model" for what in asked))
    tokenizer = tokenizer_of(config, model)
    questions = KnownHeldOut() if options is None else _questions(options, tokenizer)
    responses = _responses(config, tokenizer)
    return KnownHeldOut(questions.lines + responses.lines, questions.not_checked + responses.not_checked)


def _questions(options: EvaluationOptions, tokenizer: Tokenizer) -> KnownHeldOut:
    here, missing = _split(options.evaluation)
    lines: tuple[str, ...] = ()
    not_checked = _not_there("the held-out questions", missing)
    if here.asks:
        known = dataclasses.replace(options, evaluation=here)
        held_out = read_held_out(known, tokenizer=tokenizer, is_spokesman=True)
        lines = tuple(held_out.lines)
        _require_unchanged(options.run_dir, held_out)
        metric = here.keep_best
        if not missing or any((metric or "").startswith(f"eval/{name}/") for name in here.set_names):
            require_known_metric(metric, held_out, others=here.loss_metrics)
        elif metric is not None:
            not_checked.append(f"whether evaluation gives --keep-best {metric}")
    return KnownHeldOut(lines, tuple(not_checked))


def _responses(config: Config, tokenizer: Tokenizer) -> KnownHeldOut:
    section = config.evaluation
    missing = [path for path in section.eval_loss_data if not Path(path).exists()]
    not_checked = _not_there("the held-out responses", missing)
    here = tuple(path for path in section.eval_loss_data if path not in missing)
    if not here:
        return KnownHeldOut(not_checked=tuple(not_checked))
    config = dataclasses.replace(config, evaluation=dataclasses.replace(section, eval_loss_data=here))
    sources = read_held_out_responses(config, tokenizer=tokenizer, is_spokesman=True)
    # Which sets ``TOTAL`` is taken over is not known of a part of them.
    keep_best = None if missing else section.keep_best
    if missing and section.keep_best == TOTAL:
        not_checked.append(f"whether --keep-best {TOTAL} is taken over the same sets as before")
    held_out = HeldOutResponses.of(sources, limit=section.eval_max_items)
    _require_unchanged(config.trainer.run_dir, held_out, keep_best=keep_best)
    lines = (f"loss on {one.name}: {len(one.records)} records, {len(one.left_out)} left out" for one in sources)
    return KnownHeldOut(tuple(lines), tuple(not_checked))


def _not_there(what: str, missing: Sequence[str]) -> list[str]:
    """The words for sets whose files are missing; nothing if none is."""
    is_or_are = "is" if len(missing) == 1 else "are"
    return [f"{what} of {', '.join(missing)}, which {is_or_are} not there"] if missing else []


def _require_unchanged(run_dir: str, held_out: HeldOutSets, *, keep_best: str | None = None) -> None:
    if list_checkpoints(Path(run_dir)):  # the run is resumed; other runs are refused there
        require_unchanged(Path(run_dir), held_out, keep_best=keep_best)


def _split(section: EvaluationSection) -> tuple[EvaluationSection, list[str]]:
    """The section with the sets that are there, or that are refused wherever the run starts; and the other ones."""
    root = None if section.eval_benchmark_root is None else Path(section.eval_benchmark_root)
    files = [path for path in section.eval_data if Path(path).exists() or Path(path).stem in BENCHMARKS]
    benchmarks = [written for written in section.eval_benchmark if not _is_away(written.strip(), root)]
    here = dataclasses.replace(section, eval_data=tuple(files), eval_benchmark=tuple(benchmarks))
    missing = [one for one in section.eval_data if one not in files]
    return here, missing + [one for one in section.eval_benchmark if one not in benchmarks]


def _is_away(written: str, root: Path | None) -> bool:
    name, sign, path = written.partition("=")
    if name not in BENCHMARKS:
        return False
    return not Path(path).exists() if sign else root is not None and place_of(name, root) is None
