"""How many questions a minute ``tools/evaluate.py`` answers: many at a time beside one at a time, by engine.

    .venv-vllm/bin/python benchmarks/evaluation.py                     vLLM and Hugging Face's generate
    .venv-vllm/bin/python benchmarks/evaluation.py --engines hf --json the latter alone, JSON on stdout
    .venv-vllm/bin/python benchmarks/evaluation.py --out FILE.json

A tiny model (random weights) answers questions on synthetic videos, greedily, with at most ``--max-tokens`` tokens.
Every measurement is a whole run of the command in a fresh process: reading, decoding, asking, judging and writing. Each
arm (engine and ``--concurrency``) runs once with few questions and once with many, and its rate is

    (many - few) / (seconds with many - seconds with few)

so that loading the model does not count. Arms take turns, ``--repeats`` times; the figures are medians, and the ratio
is the median of what neighbouring turns give. The report says how many answers of the two arms are equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# `python benchmarks/X.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import say, write_report  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from megatron_ktr.data.synthetic import corpus, make_dataset  # noqa: E402
from megatron_ktr.data.tiny_model import save_tiny_model  # noqa: E402
from megatron_ktr.distributed.platform import start  # noqa: E402
from megatron_ktr.errors import UserError, run_cli, whole  # noqa: E402
from megatron_ktr.evaluation.asking.store import read_answers  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402

EVALUATE = Path(__file__).resolve().parents[1] / "tools" / "evaluate.py"
ENGINES = ("vllm", "hf")


def make_inputs(folder: Path, *, num_questions: int, frames: int, size: int) -> None:
    """``model/``, and ``questions.json`` beside its videos."""
    make_dataset(folder / "data", num_train=1, num_eval=num_questions, num_frames=frames, size=size)
    save_tiny_model(folder / "model", corpus=corpus())


class Arm:
    """An engine that has so many questions open at a time."""

    def __init__(self, engine: str, concurrency: int, *, folder: Path, options: argparse.Namespace) -> None:
        self.engine, self.concurrency = engine, concurrency
        self._folder, self._options = folder, options

    def run(self, num_questions: int, *, out: Path) -> tuple[float, dict[str, str]]:
        """(seconds, text by question) of one run of the command."""
        command = [sys.executable, str(EVALUATE), "--model", str(self._folder / "model")]
        command += ["--benchmark", str(self._folder / "data" / "eval.json"), "--out", str(out)]
        command += ["--engine", self.engine, "--concurrency", str(self.concurrency), "--limit", str(num_questions)]
        command += ["--frames", str(self._options.frames), "--temperature", "0", "--data-workers", "0"]
        command += ["--max-tokens", str(self._options.max_tokens)]
        if self.engine == "vllm":
            command += ["--enforce-eager", "--max-model-len", str(self._options.max_model_len)]
        started = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        seconds = time.perf_counter() - started
        if result.returncode:
            raise UserError(f"evaluate failed (exit status {result.returncode}): {result.stderr.strip()[-2000:]}")
        return seconds, _texts(out)

    def turn(self, *, out: Path) -> tuple[dict[str, float | None], dict[str, str]]:
        """One turn of the arm, and its answers to the many questions."""
        few, many = self._options.few, self._options.many
        seconds_few, _ = self.run(few, out=out / "few")
        seconds_many, texts = self.run(many, out=out / "many")
        # So few questions on a busy machine measure nothing.
        rate = (many - few) / (seconds_many - seconds_few) if seconds_many > seconds_few else None
        say(
            f"{self.engine}, {self.concurrency} at a time: {few} in {seconds_few:.1f} s, {many} in {seconds_many:.1f} s"
        )
        turn = {"seconds_few": seconds_few, "seconds_many": seconds_many, "questions_per_second": rate}
        return turn, texts


def _texts(out: Path) -> dict[str, str]:
    """The stored texts by key of the question."""
    return {key: answer.text for key, answer in read_answers(out).items()}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    make_inputs(folder, num_questions=options.many, frames=options.frames, size=options.size)
    load_before = os.getloadavg()[0]
    results = []
    for engine in options.engines:
        arms = [Arm(engine, concurrency, folder=folder, options=options) for concurrency in (options.concurrency, 1)]
        turns: list[list[dict[str, float | None]]] = [[], []]
        num_equal = []
        for repeat in range(options.repeats):
            found = [arm.turn(out=folder / f"out-{engine}-{arm.concurrency}-{repeat}") for arm in arms]
            for of_arm, (turn, _) in zip(turns, found, strict=True):
                of_arm.append(turn)
            num_equal.append(_require_same_questions(*(texts for _, texts in found)))
        rates = [[turn["questions_per_second"] for turn in of_arm] for of_arm in turns]
        results.append(
            {
                "engine": engine,
                "concurrency": options.concurrency,
                "questions_per_second": _median(rates[0]),
                "questions_per_second_one_at_a_time": _median(rates[1]),
                "speedup": _median([many / one if many and one else None for many, one in zip(*rates, strict=True)]),
                "num_answers": options.many,
                "num_equal_answers": num_equal,
                "turns": turns[0],
                "turns_one_at_a_time": turns[1],
            }
        )
    return {
        "benchmark": "evaluation",
        "machine": about_machine(start("cpu")),
        "load": {"before": load_before, "after": os.getloadavg()[0]},
        "few": options.few,
        "many": options.many,
        "frames": options.frames,
        "frame_side": options.size,
        "max_tokens": options.max_tokens,
        "results": results,
    }


def _median(values: Sequence[float | None]) -> float | None:
    """The median of what was measured; None if nothing was."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def _require_same_questions(one: dict[str, str], other: dict[str, str]) -> int:
    """The number of equal answers. In reduced precision sums in another order may turn a greedy choice."""
    if one.keys() != other.keys():
        raise UserError("the arms did not answer the same questions")
    return sum(one[key] == other[key] for key in one)


def table(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = ["engine  questions/s  one at a time  ratio  equal answers"]
    for found in report["results"]:
        many, one, ratio = (
            "-" if found[name] is None else f"{found[name]:.2f}"
            for name in ("questions_per_second", "questions_per_second_one_at_a_time", "speedup")
        )
        equal = f"{min(found['num_equal_answers'])} of {found['num_answers']}"
        lines.append(f"{found['engine']:6}  {many:>11}  {one:>13}  {ratio:>5}  {equal}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--few", type=whole(), default=16, help="questions of the short run")
    parser.add_argument("--many", type=whole(low=2), default=112, help="questions of the long run")
    parser.add_argument("--concurrency", type=whole(low=2), default=32, help="of the arm with many at a time")
    parser.add_argument("--frames", type=whole(), default=16)
    parser.add_argument("--size", type=whole(low=28), default=112, help="pixels of a side of the videos")
    parser.add_argument("--max-tokens", type=whole(), default=64)
    parser.add_argument("--max-model-len", type=whole(), default=2048)
    parser.add_argument("--repeats", type=whole(), default=3)
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args(argv)
    if options.few >= options.many:
        raise UserError(f"--few must be below --many, got {options.few} and {options.many}")
    with tempfile.TemporaryDirectory(prefix="ktr-evaluation-") as folder:
        report = measure(options, Path(folder))
    write_report(report, out=options.out, figure=None, draw=lambda _: "")
    print(to_json(report, indent=1) if options.json else table(report))
    return 0


if __name__ == "__main__":
    run_cli(main)
