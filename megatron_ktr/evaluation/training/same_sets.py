"""What must be the same of held-out sets: on all replicas, and in a run that is resumed.

A set must stay what it is as long as a run is evaluated on it, or its curve would join figures of different things.
``eval/settings.json`` in the run directory says what each set is and how it is asked:

    {"held_out": {"questions": "<digest>", "frames": 8, ...}, "held_out (loss)": {"records": "<digest>", ...},
     "eval_loss (all sets)": {"sets": ["held_out"]}}

The name of a set is thus the name of one thing for the whole run. A figure that ``metrics.jsonl`` has under this name
is of exactly these questions, asked in exactly this way. A resumed run may have other sets under other names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ktr.distributed.agreement import gather_objects
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError, same_on_every_rank
from megatron_ktr.evaluation.registry import BENCHMARKS
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.json_files import read_json_object, to_json
from megatron_ktr.run.directory import EVALUATIONS
from megatron_ktr.run.metrics import FILE as METRICS_FILE
from megatron_ktr.run.metrics import figures_of_step, read_records

SETTINGS_FILE = "settings.json"
MISSING = "records that cannot be used"
"""Stands beside the facts of a set, and may change."""
_log = logging.getLogger(__name__)


class HeldOutSets(Protocol):
    """Sets of held-out records, as this rank has read them."""

    @property
    def facts(self) -> Mapping[str, Mapping[str, Any]]:
        """By set, what must stay as it is as long as a run is evaluated on it."""
        ...

    @property
    def facts_before(self) -> Mapping[str, Mapping[str, Any]]:
        """By set, the facts that an earlier version wrote in another form, in that form. A run that has them in its
        directory is the same as one that has today's."""
        ...

    @property
    def missing(self) -> Mapping[str, Sequence[Any]]:
        """By set, the records that cannot be used on this node."""
        ...

    @property
    def figures(self) -> Mapping[str, str]:
        """By set, a metric that every evaluation of it records."""
        ...

    @property
    def totals(self) -> Mapping[str, Sequence[str]]:
        """By metric that is taken over several sets together, their names."""
        ...


def require_same_held_out(held_out: HeldOutSets | None, *, ranks: ParallelGroups) -> None:
    """Compares what the reading ranks have read. Collective over the world.

    Raises:
        UserError: on every rank, if questions or wordings differ, or if media are missing on one node only: the figure
            would then depend on the number of replicas.
    """
    about = None if held_out is None else (held_out.facts, dict(held_out.missing))
    first, *others = [one for one in gather_objects(about, group=ranks.world) if one is not None]
    for replica, other in enumerate(others, start=1):
        for name in first[0]:
            what = ""
            if other[0][name] != first[0][name]:
                what = "found other questions or another wording"
            elif other[1][name] != first[1][name]:
                what = "lacks other media"
            if what:
                with same_on_every_rank():
                    raise UserError(
                        f"evaluation on {name}: the reading rank of replica {replica} {what} than that of replica 0: "
                        "the files differ between nodes, or were changed while they were read"
                    )


def require_unchanged(run_dir: Path, held_out: HeldOutSets, *, keep_best: str | None = None) -> None:
    """Checks the sets of a resumed run. Two things are logged: figures of which the file no longer says what they are
    of, since they are taken for those of the present sets; and that media were missing, or are, which change figures.

    Raises:
        UserError: a set has changed since the run was evaluated on it, or ``keep_best`` is taken over other sets than
            before.
    """
    earlier = _earlier(run_dir)
    recorded = {name for record in read_records(run_dir) for name in record}
    for name, facts in held_out.facts.items():
        if name not in earlier and held_out.figures[name] in recorded:
            _log.warning(
                "%s has figures of %s, and %s does not say of which questions: they are taken for the present ones",
                run_dir / METRICS_FILE,
                name,
                run_dir / EVALUATIONS / SETTINGS_FILE,
            )
        now = len(held_out.missing[name])
        if (before := earlier.get(name, {}).get(MISSING, now)) != now:
            _log.warning("evaluation on %s: %s records could not be used before, and %d cannot now", name, before, now)
        for what, value in earlier.get(name, {}).items():
            if what != MISSING and facts.get(what) != value and not _is_as_before(held_out, name, what, value):
                way_out = "ask it with tools/evaluate.py" if name in BENCHMARKS else "rename the file"
                raise UserError(
                    f"--resume: evaluation on {name} had other {what} before ({_changes(value, facts.get(what))}), so "
                    f"its curve would join figures of different things; evaluate as before, or {way_out}"
                )
    for metric, before, now in _changed_totals(earlier, held_out):
        if metric == keep_best:
            of_one = ", ".join(held_out.figures[name] for name in held_out.facts)
            raise UserError(
                f"--keep-best {metric}: it was taken over {', '.join(before)} before and would be over "
                f"{', '.join(now)} now, and figures of different things do not compare; keep the best by {of_one}"
            )


def _is_as_before(held_out: HeldOutSets, name: str, what: str, value: Any) -> bool:
    before = held_out.facts_before.get(name, {})
    return what in before and before[what] == value


def measured_totals(run_dir: Path, held_out: HeldOutSets) -> list[str]:
    """The metrics over several sets together that still mean what they meant when the run first had them.
    ``write_settings`` has been called. What is left out is logged."""
    changed = _changed_totals(_earlier(run_dir), held_out)
    for metric, before, now in changed:
        _log.warning(
            "%s is left out: it was taken over %s and would be over %s; every set has a figure of its own",
            metric,
            ", ".join(before),
            ", ".join(now),
        )
    return [metric for metric in held_out.totals if metric not in {one for one, _, _ in changed}]


def write_settings(run_dir: Path, held_out: HeldOutSets) -> None:
    """Writes what the sets are, for a run that continues this one. Sets of earlier parts stay in the file."""
    path = run_dir / EVALUATIONS / SETTINGS_FILE
    facts = {name: {**facts, MISSING: len(held_out.missing[name])} for name, facts in held_out.facts.items()}
    totals = {_key(metric): {"sets": sorted(names)} for metric, names in held_out.totals.items()}
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, to_json({**totals, **_earlier(run_dir), **facts}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--run-dir: cannot write {path}: {error.strerror}") from error


def lacking_sets(run_dir: Path, held_out: HeldOutSets, *, step: int) -> list[str]:
    """The sets of which no figures after ``step`` are recorded. ``require_unchanged`` has been called: figures under
    the name of a set are of this set."""
    recorded = figures_of_step(run_dir, step=step)
    return [name for name, figure in held_out.figures.items() if figure not in recorded]


def _changed_totals(
    earlier: Mapping[str, Mapping[str, Any]], held_out: HeldOutSets
) -> list[tuple[str, list[str], list[str]]]:
    """(metric, the sets that it was taken over first, those that it would be taken over now) of each that differs."""
    found = []
    for metric, names in held_out.totals.items():
        before = earlier.get(_key(metric), {}).get("sets", sorted(names))
        if before != sorted(names):
            found.append((metric, [str(name) for name in before], sorted(names)))
    return found


def _key(metric: str) -> str:
    return f"{metric} (all sets)"


def _earlier(run_dir: Path) -> dict[str, dict[str, Any]]:
    path = run_dir / EVALUATIONS / SETTINGS_FILE
    found = read_json_object(path) if path.exists() else {}
    if not all(isinstance(facts, dict) for facts in found.values()):
        raise UserError(f"{path} does not hold what a run writes there")
    return found


def _changes(old: Any, new: Any) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{old}, now {new}"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)}, now {new.get(name)}" for name in names)
