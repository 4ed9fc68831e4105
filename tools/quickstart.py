"""The whole of Video-KTR on a laptop: data, tiny model, supervised fine-tuning, Video-KTR, evaluation, report.

    python tools/quickstart.py --out runs/quickstart [--nproc-per-node 4 --tensor-model-parallel-size 2 ...]

Every stage is the ordinary training command on a file of examples/quickstart/. Flags this tool does not know go to
every stage. --rollout says what samples the responses of Video-KTR and of the evaluations: transformers' generate, or
vLLM inside the ranks. Writes summary.json and report.html below --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_ktr.config import config_from_values
from megatron_ktr.config.limits import LARGEST_INTEGER
from megatron_ktr.data.records import read_records
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.template import load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.distributed import platform
from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
from megatron_ktr.errors import Parser, UserError, run_cli, whole
from megatron_ktr.evaluation.accuracy import Accuracy, evaluate
from megatron_ktr.evaluation.item import Control
from megatron_ktr.files.hf_files import SafetensorsReader, published_name
from megatron_ktr.files.json_files import to_json
from megatron_ktr.report.html import write_report
from megatron_ktr.rollout.base import RolloutEngine
from megatron_ktr.rollout.build import build_sampler
from megatron_ktr.rollout.questions import prompt_loader
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.types import Prompt
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.media import media_spec

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "quickstart"
SAMPLED = SamplingSettings(num_generations=1, max_response_length=24)
GREEDY = dataclasses.replace(SAMPLED, temperature=0.0)
ENGINES = {"hf": "hf", "vllm": "vllm_colocated"}
"""For each value of --rollout, the value of the training option --engine."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of the quickstart."""

    name: str
    config: str
    data: str
    steps: int | None = None
    """None: the number in the config file."""


class Quickstart:
    """Paths and options of one run, and its stages."""

    def __init__(self, options: argparse.Namespace, extra_flags: list[str]) -> None:
        self.out: Path = options.out
        self.options = options
        self.extra_flags = extra_flags
        self.model = self.out / "model"
        self.data = self.out / "data"
        self._engine: RolloutEngine | None = None
        self._held_out: list[Prompt] = []

    def make_inputs(self) -> None:
        save_tiny_model(self.model, corpus=corpus(), seed=self.options.seed)
        make_dataset(
            self.data, num_train=self.options.num_train, num_eval=self.options.num_eval, seed=self.options.seed
        )

    def train(self, stage: Stage, model: Path) -> Path:
        """Runs one stage from the weights in ``model`` and returns its export."""
        run_dir = self.out / stage.name
        command = [sys.executable, "-m"]
        if self.options.nproc_per_node > 1:
            command += ["megatron_ktr.launch", "--standalone", "--nproc-per-node", str(self.options.nproc_per_node)]
            command += ["-m"]
        command += ["megatron_ktr.train", "--config", str(EXAMPLES / f"{stage.config}.yaml")]
        command += ["--model", str(model), "--data-path", str(self.data / f"{stage.data}.json")]
        command += ["--prompt-template", str(self.model / "prompt_template.txt"), "--run-dir", str(run_dir)]
        if stage.config == "video_ktr":
            command += ["--engine", ENGINES[self.options.rollout]]
        command += ["--seed", str(self.options.seed), *self.extra_flags]
        steps = self.options.steps if self.options.steps is not None else stage.steps
        if steps is not None:
            command += ["--train-steps", str(steps), "--lr-warmup-steps", "0"]
        print(f"\n== {stage.name}", flush=True)
        finished = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": self._threads()})
        if finished.returncode != 0:
            raise UserError(f"stage {stage.name} failed with exit code {finished.returncode}; its own error is above")
        return run_dir / "export"

    def evaluate(self, model: Path, *, sampling: SamplingSettings = SAMPLED, control: Control = "intact") -> Accuracy:
        """Measures the accuracy of ``model`` on the held-out questions."""
        if self._engine is None:
            self._start_engine()
        assert self._engine is not None
        weights = SafetensorsReader(model)
        self._engine.load_weights((published_name(name), weights.read(name)) for name in weights.infos)
        return evaluate(self._engine, self._held_out, control=control, sampling=sampling)

    def _start_engine(self) -> None:
        """Loads the held-out questions and starts one engine for all evaluations.

        The engine gets the weights of each evaluated model in turn.
        """
        config = config_from_values(
            {
                "model": str(self.model),
                "engine": ENGINES[self.options.rollout],
                "data_path": str(self.data / "eval.json"),
                "prompt_template": str(self.model / "prompt_template.txt"),
                "video_num_frames": 8,
                "video_max_pixels": 3136,
                "image_max_pixels": 3136,
                "max_prompt_length": 512,
                "max_response_length": SAMPLED.max_response_length,
                "top_p": SAMPLED.top_p,
                "platform": "cpu",
            }
        )
        tokenizer = load_tokenizer(self.model)
        loader = prompt_loader(config, tokenizer=tokenizer)
        self._held_out = [loader.load(record) for record in read_records(self.data / "eval.json")]
        media = media_spec(Qwen2_5_VLConfig.from_hf(self.model), patchify=loader.settings.patchify)
        ranks = init_parallel(ParallelSizes(), platform=platform.current())
        sampler = build_sampler(config, ranks=ranks, tokenizer=tokenizer, media=media)
        assert sampler is not None, "this process is the only rank"
        self._engine = sampler.engine

    def close(self) -> None:
        """Stops the engine."""
        if self._engine is not None:
            self._engine.close()
            destroy_parallel()

    def _threads(self) -> str:
        return str(max(1, (os.cpu_count() or 1) // self.options.nproc_per_node))

    def metrics(self, stage: str) -> list[dict[str, float]]:
        lines = (self.out / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def run(quickstart: Quickstart) -> dict[str, Any]:
    """Runs all stages and evaluations and returns the summary."""
    started = time.perf_counter()
    quickstart.make_inputs()
    initial = quickstart.evaluate(quickstart.model)
    lookup = quickstart.train(Stage("1_lookup", "lookup", "sft_lookup"), quickstart.model)
    clean = quickstart.train(Stage("2_sft", "sft", "sft"), lookup)
    sft_model = quickstart.train(Stage("3_guess", "guess", "sft_guess"), clean)
    sft, sft_greedy = quickstart.evaluate(sft_model), quickstart.evaluate(sft_model, sampling=GREEDY)
    ktr_model = quickstart.train(Stage("4_video_ktr", "video_ktr", "train"), sft_model)
    ktr, ktr_greedy = quickstart.evaluate(ktr_model), quickstart.evaluate(ktr_model, sampling=GREEDY)
    shuffled = quickstart.evaluate(ktr_model, control="shuffled")
    blank = quickstart.evaluate(ktr_model, control="blank")
    steps = quickstart.metrics("4_video_ktr")
    seconds_per_step = _step_seconds(steps)
    sft_seconds = _step_seconds(quickstart.metrics("3_guess"))
    more = max(1, round(len(steps) * seconds_per_step / sft_seconds))
    continued_model = quickstart.train(Stage("5_continued_sft", "guess", "sft_guess", steps=more), sft_model)
    continued = quickstart.evaluate(continued_model)
    measured = {
        "accuracy_initial": initial,
        "accuracy_sft": sft,
        "accuracy_sft_greedy": sft_greedy,
        "accuracy_ktr": ktr,
        "accuracy_ktr_greedy": ktr_greedy,
        "accuracy_sft_continued": continued,
        "order_accuracy_ktr": ktr.by_task.get("order"),
        "order_accuracy_ktr_shuffled": shuffled.by_task.get("order"),
        "accuracy_ktr_shuffled": shuffled,
        "accuracy_ktr_blank": blank,
    }
    return {
        **{name: None if found is None else found.mean for name, found in measured.items()},
        "standard_error": {name: None if found is None else found.standard_error for name, found in measured.items()},
        "accuracy_ktr_by_task": {task: found.mean for task, found in ktr.by_task.items()},
        "num_eval": ktr.num_questions,
        "num_eval_order": ktr.by_task["order"].num_questions if "order" in ktr.by_task else 0,
        "key_token_ratio": _mean(steps, "key_token_ratio"),
        "sampler_trainer_logprob_gap": _mean(steps, "sampler_trainer_logprob_gap"),
        "seconds_per_step": seconds_per_step,
        "steps": len(steps),
        "sft_continued_steps": more,
        "seconds_total": time.perf_counter() - started,
        "seed": quickstart.options.seed,
        "num_processes": quickstart.options.nproc_per_node,
        "rollout": quickstart.options.rollout,
    }


def _step_seconds(steps: list[dict[str, float]]) -> float:
    """The mean wall-clock seconds of a step, over all phases."""
    return sum(v for step in steps for name, v in step.items() if name.startswith("seconds/")) / len(steps)


def _mean(steps: list[dict[str, float]], name: str) -> float | None:
    """The mean of ``name`` over the steps that report it; None if no step does."""
    values = [step[name] for step in steps if name in step]
    return sum(values) / len(values) if values else None


def _table(summary: dict[str, Any]) -> str:
    rows = [
        ("untrained", "accuracy_initial"),
        ("after supervised fine-tuning", "accuracy_sft"),
        ("  the same, greedy", "accuracy_sft_greedy"),
        ("after Video-KTR", "accuracy_ktr"),
        ("  the same, greedy", "accuracy_ktr_greedy"),
        ("  order questions", "order_accuracy_ktr"),
        ("  order questions, frames shuffled", "order_accuracy_ktr_shuffled"),
        ("  all questions, blank video", "accuracy_ktr_blank"),
        ("instead of Video-KTR, as much more fine-tuning", "accuracy_sft_continued"),
    ]
    lines = [f"{text:<48} {summary[name]:.3f}" if summary[name] is not None else f"{text:<48} -" for text, name in rows]
    return "\n".join([f"accuracy on {summary['num_eval']} held-out questions, temperature 1 unless greedy:", *lines])


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="directory to create")
    parser.add_argument(
        "--seed",
        type=whole(low=0, high=LARGEST_INTEGER),
        default=0,
        help="seed of data, model and sampling (default 0)",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=whole(),
        default=min(2, os.cpu_count() or 1),
        help="processes of each training stage, data-parallel unless flags say otherwise (default 2, or 1 on one core)",
    )
    parser.add_argument("--rollout", choices=ENGINES, default="hf", help="what samples responses (default hf)")
    parser.add_argument("--num-train", type=whole(), default=3000, help="training videos (default 3000)")
    parser.add_argument("--num-eval", type=whole(), default=400, help="held-out questions (default 400)")
    parser.add_argument(
        "--steps", type=whole(), help="steps of every stage, to try the commands quickly; learns nothing"
    )
    options, extra_flags = parser.parse_known_args()
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out} is not empty: choose another directory or remove it")
    if options.rollout == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--rollout vllm needs vLLM: make quickstart ROLLOUT=vllm installs it in .venv-vllm")
    platform.start("cpu")
    quickstart = Quickstart(options, extra_flags)
    try:
        summary = run(quickstart)
    finally:
        quickstart.close()
    path = options.out / "summary.json"
    path.write_text(to_json(summary, indent=2) + "\n", encoding="utf-8")
    report = options.out / "report.html"
    write_report(
        [
            ("Supervised fine-tuning", options.out / "2_sft"),
            ("Fine-tuning on guesses", options.out / "3_guess"),
            ("Video-KTR", options.out / "4_video_ktr"),
        ],
        out=report,
        summary=summary,
    )
    print(f"\n{_table(summary)}\n\nsummary  {path}\nreport   {report}")


if __name__ == "__main__":
    run_cli(main)
