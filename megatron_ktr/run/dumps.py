"""Dumps of a step that went wrong, from which ``tools/replay_step.py`` runs that step again, alone.

    dumps/step_00000012/
        facts.json                what went wrong: reason, loss, norms, gradient of every tensor, the step's metrics;
                                  what a replay needs: seed, step, noise floors, the checkpoint with the weights
        replica_0000.jsonl, ...   the groups of each replica in the form of a replay file (``rollout/replay.py``): ids
                                  of problems and tokens, rewards, log-probs of sampler and trainer, all scores
        config.yaml               the options of the run

Frames are not stored: a replay decodes them again from the paths in the records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ktr.config.part_options import StepOptions
from megatron_ktr.config.view_registry import load_view
from megatron_ktr.distributed.agreement import gather_objects
from megatron_ktr.errors import UserError
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.json_files import to_json
from megatron_ktr.objectives import Objective
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.replay import write_rollouts
from megatron_ktr.run.directory import list_checkpoints, step_name
from megatron_ktr.run.step_report import StepReport

DUMPS, FACTS, CONFIG = "dumps", "facts.json", "config.yaml"
VERSION = 1


def dump_of(run_dir: Path, step: int) -> Path:
    return run_dir / DUMPS / step_name(step)


def replay_obstacle(objective: Objective, *, options: StepOptions) -> str | None:
    """Why a step of such a run cannot be run again from its dump; None if it can."""
    if options.objective.is_supervised:
        return f"steps of --objective {options.objective.objective} cannot be run again from a dump"
    if options.num_shuffled:
        return "steps that ask videos twice (--temporal-bonus) cannot be run again from a dump"
    if any(load_view(view).needs_other_media for view in objective.views):
        return "steps that show the media of other questions cannot be run again from a dump"
    return None


def write_dump(
    run_dir: Path, report: StepReport, *, policy: Policy, resolved: str, about: Mapping[str, Any], last_change: int
) -> Path | str:
    """Writes the dump of the step that was just trained; collective over the world. Returns its directory, or in one
    line why it could not be written: a full disk is no reason to lose the run as well.

    Args:
        resolved: the options of the run, as YAML.
        about: further facts: the reason, and what was found.
        last_change: the newest step before this one after which weights had changed; 0 if none had.
    """
    directory, ranks = dump_of(run_dir, report.step), policy.ranks
    gradients = report.gather_gradients()
    selections, scores = report.selections, report.gather_scores()
    own = {str(group.prompt.draw_number): group.prompt.source for group in report.groups}
    sources = {number: name for part in gather_objects(own, group=ranks.world) for number, name in part.items()}

    def write() -> None:
        if ranks.is_source:
            path = directory / f"replica_{ranks.data_rank:04d}.jsonl"
            write_rollouts(path, report.groups, selections=selections, scores=scores, append=False)
        if ranks.rank == 0:
            facts = {
                "version": VERSION,
                "step": report.step,
                **about,
                **_weights_before(run_dir, report.step, last_change=last_change),
                "last_change": last_change,
                "model": str(policy.hf_dir),
                "num_replicas": ranks.data_size,
                "num_ranks": ranks.world_size,
                "layout": asdict(ranks.sizes),
                "noise_floor": dict(report.noise_floor),
                "sources": sources,
                "values": report.values,
                "gradients": {name: asdict(found) for name, found in gradients.items()},
            }
            write_atomically(directory / CONFIG, resolved)
            write_atomically(directory / FACTS, to_json(facts, indent=1) + "\n")

    failures = [found for found in gather_objects(_failure_of(write), group=ranks.world) if found]
    return failures[0] if failures else directory


def _failure_of(write: Any) -> str | None:
    try:
        write()
    except OSError as error:
        return f"the dump cannot be written: {error.strerror or error}"
    except UserError as error:
        return f"the dump cannot be written: {error}"
    return None


def _weights_before(run_dir: Path, step: int, *, last_change: int) -> dict[str, Any]:
    """Where the weights before ``step`` are: the newest checkpoint, and whether its weights are those exactly."""
    known = [(saved, path) for saved, path in list_checkpoints(run_dir) if saved < step]
    if not known:
        return {"checkpoint": None, "checkpoint_step": 0, "is_exact": last_change == 0}
    saved, path = max(known)
    return {
        "checkpoint": str(path.relative_to(run_dir)),
        "checkpoint_step": saved,
        "is_exact": saved >= last_change,
    }
