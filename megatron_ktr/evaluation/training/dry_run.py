"""The held-out questions of a run that is only looked at (``--dry-run`` of ``train``)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config.part_options import EvaluationOptions
from megatron_ktr.config.sections import EvaluationSection
from megatron_ktr.evaluation.reading.benchmark_files import place_of
from megatron_ktr.evaluation.registry import BENCHMARKS
from megatron_ktr.evaluation.training.held_out import read_held_out, require_known_metric
from megatron_ktr.evaluation.training.same_sets import require_unchanged
from megatron_ktr.run.directory import list_checkpoints


@dataclass(frozen=True)
class KnownHeldOut:
    """What is known of the held-out questions."""

    lines: tuple[str, ...] = ()
    """For the console."""
    not_checked: tuple[str, ...] = ()


def find_held_out(options: EvaluationOptions | None, is_model_here: bool) -> KnownHeldOut:
    """Reads and checks the sets of which the files are there, as training does. Without the model's directory nothing
    is read, because the sizes of frames depend on its preprocessor. ``options`` are None if the run is not evaluated.

    Raises:
        UserError: training would refuse a set, or ``--keep-best``.
    """
    if options is None:
        return KnownHeldOut()
    if not is_model_here:
        return KnownHeldOut(not_checked=("the held-out questions, without the model",))
    here, missing = _split(options.evaluation)
    lines: tuple[str, ...] = ()
    not_checked: list[str] = []
    if missing:
        is_or_are = "is" if len(missing) == 1 else "are"
        not_checked.append(f"the held-out questions of {', '.join(missing)}, which {is_or_are} not there")
    if here.asks:
        held_out = read_held_out(dataclasses.replace(options, evaluation=here), is_spokesman=True)
        lines = tuple(held_out.lines)
        if list_checkpoints(Path(options.run_dir)):  # the run is resumed; other runs are refused there
            require_unchanged(Path(options.run_dir), held_out)
        metric = here.keep_best
        if not missing or any((metric or "").startswith(f"eval/{name}/") for name in here.set_names):
            require_known_metric(metric, held_out, others=here.loss_metrics)
        elif metric is not None:
            not_checked.append(f"whether evaluation gives --keep-best {metric}")
    return KnownHeldOut(lines, tuple(not_checked))


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
