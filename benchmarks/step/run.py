"""A whole Video-KTR step of this project against the same step written on Hugging Face's model, on one CPU thread.

    python benchmarks/step/run.py                               the table
    python benchmarks/step/run.py --json                        the same as JSON on stdout
    python benchmarks/step/run.py --out F.json --figure F.svg
    python benchmarks/step/run.py --points 1024x128 7b_shares objectives --repeats 1

Sides: ``weak`` (``baseline.py``, the usual implementation), ``strong`` (``strong_baseline.py``, a careful
user's), ``ours_recomputed`` (Trainer and Policy; layers and vision encoder run again in backward, as both baselines'
do: the one that ratios are of) and ``ours`` (nothing recomputed: faster, more memory). A step is one prompt group of 8
responses, from packing to the changed weights: all passes, AdamW, a reference model with weights of its own, without
the rollout. Everything is trained, in fp32.

Time: CPU seconds of one thread; all sides of a point take turns in one process on the same groups, a new group each
turn; medians. In every turn loss, gradient norm, log-probs and selected tokens of all sides must agree, else the
benchmark stops; a token whose score lies at its threshold counts as ours chose (``num_ties`` in the JSON).
Memory, at some points: each side in processes of its own, peak during a step minus what was there before it (weights,
optimizer state, our gradient buffer; the baselines' gradients come and go with the step); once by torch's allocator,
once by resident memory. ``objectives``: our trainer with plain GRPO, and with Video-KTR.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.harness import (  # noqa: E402
    allocated_peak_bytes,
    extra_peak_bytes,
    in_fresh_process,
    say,
    write_report,
)
from benchmarks.machine import about_machine  # noqa: E402
from benchmarks.step.baseline import Selected, StepNumbers, WeakBaseline  # noqa: E402
from benchmarks.step.figure import draw  # noqa: E402
from benchmarks.step.ours import OurStep, frame_order, numbers_of, save_random_model, token_ids_of  # noqa: E402
from benchmarks.step.strong_baseline import StrongBaseline  # noqa: E402
from megatron_ktr.data.random_groups import SyntheticSizes, synthetic_group  # noqa: E402
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes, init_parallel  # noqa: E402
from megatron_ktr.distributed.platform import Platform, start  # noqa: E402
from megatron_ktr.errors import UserError, run_cli  # noqa: E402
from megatron_ktr.types import RolloutGroup  # noqa: E402

TOLERANCE = 1e-4
"""Relative, of loss and gradient norm; absolute, of log-probs."""
NUM_RESPONSES, TEXT_LENGTH = 8, 200
OURS = ("ours", "ours_recomputed")
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "recompute_vision": True,
}


@dataclass(frozen=True)
class Point:
    """One size of model and group. Frames of 8 x 16 visual tokens, but for the tests' point."""

    visual: int
    """Visual tokens of the prompt."""
    response: int
    """Tokens of each response."""
    vocabulary: int = 32_000
    layers: int = 4
    sides: tuple[str, ...] = (*OURS, "weak")
    has_memory: bool = False
    frame_size: tuple[int, int] = (224, 448)

    @property
    def sizes(self) -> SyntheticSizes:
        height, width = self.frame_size
        num_frames = 2 * self.visual // (height * width // 784)
        return SyntheticSizes(num_frames, height, width, TEXT_LENGTH, (self.response,) * NUM_RESPONSES)

    @property
    def warm_up_sizes(self) -> SyntheticSizes:
        """Small, and with every pass: libraries allocate their own on first use, optimizers their state."""
        return SyntheticSizes(4, 56, 56, 40, (8,) * NUM_RESPONSES)


POINTS = {
    "256x128": Point(256, 128),
    "256x256": Point(256, 256),
    "1024x128": Point(1024, 128, sides=(*OURS, "weak", "strong")),
    "1024x256": Point(1024, 256),
    "2048x128": Point(2048, 128, has_memory=True),
    "2048x256": Point(2048, 256),
    "152k": Point(256, 128, vocabulary=152_064),
    "7b_shares": Point(1024, 256, vocabulary=3_200, layers=8),
    "tiny": Point(
        16, 16, vocabulary=199, layers=1, sides=(*OURS, "weak", "strong"), has_memory=True, frame_size=(56, 112)
    ),
}
"""Visual tokens x response tokens. 152k: the published vocabulary. 7b_shares: layers and head have the shares of the
work that they have in the 7B model. tiny: for tests, not among the defaults."""
OBJECTIVES = {
    "grpo": {"objective": "grpo"},
    "ktr_frame": {"shuffle_unit": "frame"},
    "ktr_temporal_patch": {"shuffle_unit": "temporal_patch"},
    "grpo_no_reference": {"objective": "grpo", "kl_beta": 0.0},
    "ktr_frame_no_reference": {"shuffle_unit": "frame", "kl_beta": 0.0},
}
OBJECTIVE_TURNS = 3
"""For each of a point's: their steps are short, and the ratios near 1."""
Step = Callable[[RolloutGroup, int, Selected | None], StepNumbers]
"""(group, count of steps, what another side selected) -> numbers."""


def measure_time(point: Point, models: Path, *, repeats: int, seed: int, platform: Platform) -> dict[str, Any]:
    """CPU seconds of every side, in turns, and the largest differences between them."""
    steps = _build_sides(point.sides, models, platform)
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    differences = {"loss": 0.0, "grad_norm": 0.0, "logprob": 0.0}
    num_ties = 0
    for index, group in enumerate(_groups(point, models, repeats=repeats, seed=seed)):
        found: dict[str, StepNumbers] = {}
        for side, step in steps.items():
            begin = time.process_time()
            found[side] = step(group, index, found["ours"].is_selected if "ours" in found else None)
            if index:  # the first is the warm-up
                seconds[side].append(time.process_time() - begin)
        for name, value in compare(found).items():
            differences[name] = max(differences[name], value)
        num_ties += sum(numbers.num_ties for numbers in found.values())
    entries = [
        {"side": side, "seconds": statistics.median(values), "all_seconds": values} for side, values in seconds.items()
    ]
    return {"entries": entries, "differences": differences, "num_ties": num_ties}


def measure_memory(point: Point, models: Path, side: str, *, by: str, seed: int, platform: Platform) -> int:
    """Peak bytes of one step of one side. For a fresh process."""
    step = _build_sides((side,), models, platform)[side]
    warm_up, group = _groups(point, models, repeats=1, seed=seed)
    step(warm_up, 0, None)
    if by == "allocator":
        return allocated_peak_bytes(lambda: step(group, 1, None))
    return extra_peak_bytes(lambda: step(group, 1, None), platform=platform)


def measure_objectives(point: Point, models: Path, *, repeats: int, seed: int, platform: Platform) -> list:
    """CPU seconds of our trainer by objective, in turns."""
    parallel = init_parallel(ParallelSizes(), platform=platform)
    trainers = {name: _ours(models, options, parallel, platform) for name, options in OBJECTIVES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    runs: dict[str, float] = {}
    for index, group in enumerate(_groups(point, models, repeats=repeats, seed=seed)):
        for name, trainer in trainers.items():
            begin = time.process_time()
            report = trainer.step(group, index)
            if index:
                seconds[name].append(time.process_time() - begin)
            runs[name] = report.values["vision_runs_per_prompt"]
    return [
        {
            "objective": name,
            "seconds": statistics.median(values),
            "all_seconds": values,
            "vision_runs_per_prompt": runs[name],
        }
        for name, values in seconds.items()
    ]


def compare(found: dict[str, StepNumbers]) -> dict[str, float]:
    """Largest differences of all sides from the first.

    Raises:
        UserError: beyond the tolerance, or other tokens were selected.
    """
    (name, one), *others = found.items()
    largest = {"loss": 0.0, "grad_norm": 0.0, "logprob": 0.0}
    for other_name, other in others:
        here = {
            "loss": abs(one.loss - other.loss) / abs(one.loss),
            "grad_norm": abs(one.grad_norm - other.grad_norm) / one.grad_norm,
            "logprob": float((one.logprob_GR - other.logprob_GR).abs().max()),
        }
        num_different = sum(int((mask != other.is_selected[key]).sum()) for key, mask in one.is_selected.items())
        # "not <=", so that a NaN stops the benchmark too.
        if num_different or not all(value <= TOLERANCE for value in here.values()):
            raise UserError(
                f"{name} and {other_name} are not the same step: {num_different} tokens selected by one alone, "
                f"differences {here}, loss {one.loss} and {other.loss}"
            )
        largest = {key: max(value, largest[key]) for key, value in here.items()}
    return largest


def _groups(point: Point, models: Path, *, repeats: int, seed: int) -> list[RolloutGroup]:
    """The warm-up's, then one for each turn: a frozen encoder would remember what it has seen."""
    tokens = token_ids_of(models / "policy")
    sizes = [point.warm_up_sizes, *[point.sizes] * repeats]
    return [synthetic_group(size, tokens=tokens, seed=seed + index) for index, size in enumerate(sizes)]


def _build_sides(sides: tuple[str, ...], models: Path, platform: Platform) -> dict[str, Step]:
    parallel = init_parallel(ParallelSizes(), platform=platform)
    directories = (models / "policy", models / "reference")
    built: dict[str, Step] = {}
    for side in sides:
        if side in OURS:
            ours = _ours(models, RECOMPUTED if side == "ours_recomputed" else {}, parallel, platform)
            built[side] = lambda group, index, _, ours=ours: numbers_of(ours.step(group, index))
        else:
            theirs = (WeakBaseline if side == "weak" else StrongBaseline)(*directories)
            built[side] = lambda group, index, tied, theirs=theirs: theirs.step(
                group, frame_order(group, index), tied=tied
            )
    return built


def _ours(models: Path, options: dict[str, Any], ranks: ParallelGroups, platform: Platform) -> OurStep:
    return OurStep(models / "policy", models / "reference", ranks=ranks, platform=platform, options=options)


def run_benchmark(
    arguments: argparse.Namespace, platform: Platform, *, done: dict[str, Any], write: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """
    Args:
        done: an earlier report; its points stay and are not measured again. Empty: none.
        write: called with the report so far after every point.
    """
    results, objectives = list(done.get("results", ())), done.get("objectives", [])
    differences, num_ties, load = (dict(done.get(name, {})) for name in ("differences", "num_ties", "load"))
    measured = differences.keys() | ({"objectives"} if objectives else set())
    report = done
    for name in arguments.points:
        if name in measured:
            continue
        say(f"{name} ...")
        load_before = os.getloadavg()[0]
        if name == "objectives":
            objectives = _measure_in_fresh_processes(name, arguments)
        else:
            found = _measure_in_fresh_processes(name, arguments)
            differences[name], num_ties[name] = found["differences"], found["num_ties"]
            results += [{"point": name, **_about(POINTS[name]), **entry} for entry in found["entries"]]
            results.sort(key=lambda entry: list(POINTS).index(entry["point"]))
        load[name] = [load_before, os.getloadavg()[0]]
        report = {
            "machine": about_machine(platform),
            "load": load,
            "repeats": arguments.repeats,
            "time": "CPU seconds of one thread, median",
            "memory": "peak during a step minus before it: torch's allocator, and resident memory of the process",
            "differences": differences,
            "num_ties": num_ties,
            "results": results,
            "objectives": objectives,
            "summary": summarise(results, objectives),
        }
        write(report)
    return report


def _measure_in_fresh_processes(name: str, arguments: argparse.Namespace) -> Any:
    """What ``measure_time`` found, with memory where the point has it; of "objectives" what ``measure_objectives``
    found."""
    is_objectives = name == "objectives"
    point_name = "1024x128" if is_objectives else name
    point = POINTS[point_name]
    with tempfile.TemporaryDirectory() as directory:
        for seed, model in enumerate(("policy", "reference")):
            path = Path(directory) / model
            save_random_model(path, vocab_size=point.vocabulary, num_layers=point.layers, seed=seed)
        job = {"point": point_name, "models": directory, "seed": arguments.seed, "repeats": arguments.repeats}
        if is_objectives:
            job["repeats"] *= OBJECTIVE_TURNS
            return in_fresh_process(__file__, {"kind": "objectives", **job})
        found = in_fresh_process(__file__, {"kind": "time", **job})
        if point.has_memory and not arguments.no_memory:
            for entry in found["entries"]:
                for by in ("allocator", "resident"):
                    memory = {"kind": "memory", "side": entry["side"], "by": by, **job}
                    entry[f"{by}_bytes"] = in_fresh_process(__file__, memory)
    return found


def _about(point: Point) -> dict[str, int]:
    return {name: getattr(point, name) for name in ("visual", "response", "vocabulary", "layers")}


def summarise(results: list[dict[str, Any]], objectives: list[dict[str, Any]]) -> dict[str, float]:
    """Baseline / ours of time and of the allocator's peak, and Video-KTR / GRPO; what was not measured is left out.

    Ours is ``ours_recomputed``, in time and in memory: one setting, and that of the baselines. ``_nothing_recomputed``
    has the other one.
    """
    values = {(entry["point"], entry["side"]): entry for entry in results}
    seconds = {entry["objective"]: entry["seconds"] for entry in objectives}
    summary: dict[str, float] = {}
    for ours, ending in (("ours_recomputed", ""), ("ours", "_nothing_recomputed")):
        for name, point, side, quantity in (
            ("time_ratio_1024", "1024x128", "weak", "seconds"),
            ("time_ratio_2048", "2048x128", "weak", "seconds"),
            ("time_ratio_7b_shares", "7b_shares", "weak", "seconds"),
            ("time_ratio_strong_1024", "1024x128", "strong", "seconds"),
            ("memory_ratio_2048", "2048x128", "weak", "allocator_bytes"),
        ):
            found = [values.get((point, side), {}).get(quantity) for side in (side, ours)]
            if all(found):
                summary[name + ending] = found[0] / found[1]
    for ending, ktr, grpo in (
        ("", "ktr_frame", "grpo"),
        ("_temporal_patch", "ktr_temporal_patch", "grpo"),
        ("_no_reference", "ktr_frame_no_reference", "grpo_no_reference"),
    ):
        if ktr in seconds and grpo in seconds:
            summary["ktr_over_grpo_1024" + ending] = seconds[ktr] / seconds[grpo]
    return summary


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{'point':<10} {'visual':>6} {'resp':>5} {'vocab':>7} {'side':<16} {'CPU s':>8} {'x ours':>7} "
        f"{'alloc MB':>9} {'resident':>9}"
    ]
    ours = {entry["point"]: entry["seconds"] for entry in report["results"] if entry["side"] == "ours_recomputed"}
    for entry in report["results"]:
        memory = [f"{entry[f'{by}_bytes'] / 1e6:>9.0f}" for by in ("allocator", "resident") if f"{by}_bytes" in entry]
        lines.append(
            f"{entry['point']:<10} {entry['visual']:>6} {entry['response']:>5} {entry['vocabulary']:>7} "
            f"{entry['side']:<16} {entry['seconds']:>8.2f} {entry['seconds'] / ours[entry['point']]:>7.2f} "
            + " ".join(memory)
        )
    for entry in report["objectives"]:
        lines.append(f"{entry['objective']:<46} {entry['seconds']:>8.2f}")
    lines += [f"{name} {value:.2f}" for name, value in report["summary"].items()]
    return "\n".join(lines)


def _run_job(job: dict[str, Any], platform: Platform) -> Any:
    point, models = POINTS[job["point"]], Path(job["models"])
    shared = {"seed": job["seed"], "platform": platform}
    if job["kind"] == "time":
        return measure_time(point, models, repeats=job["repeats"], **shared)
    if job["kind"] == "objectives":
        return measure_objectives(point, models, repeats=job["repeats"], **shared)
    return measure_memory(point, models, job["side"], by=job["by"], **shared)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = [*(name for name in POINTS if name != "tiny"), "objectives"]
    parser.add_argument("--points", nargs="+", choices=[*POINTS, "objectives"], default=defaults)
    parser.add_argument("--repeats", type=int, default=3, help="turns of every side at every point")
    parser.add_argument("--seed", type=int, default=0, help="of tokens and frames")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file, after every point")
    parser.add_argument("--resume", action="store_true", help="keep the points that the file of --out has")
    parser.add_argument("--figure", type=Path, help="also draw the results as SVG into this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    platform = start("cpu")
    if arguments.job:
        print(json.dumps(_run_job(json.loads(arguments.job), platform)))
        return
    if arguments.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {arguments.repeats}")
    done: dict[str, Any] = {}
    if arguments.resume and arguments.out is not None and arguments.out.exists():
        done = json.loads(arguments.out.read_text(encoding="utf-8"))
    write = functools.partial(write_report, out=arguments.out, figure=arguments.figure, draw=draw)
    report = run_benchmark(arguments, platform, done=done, write=write)
    text = write(report)
    print(text if arguments.json else _table(report))


if __name__ == "__main__":
    run_cli(_main)
