"""Throughput of training steps on random inputs: any model size, any layout, without a checkpoint or data.

    python tools/benchmark_throughput.py --model tiny --frames 8 --response-length 64
    torchrun --nproc-per-node 8 tools/benchmark_throughput.py --model 7b --num-layers 8 --bf16 --frames 32 \\
        --tensor-model-parallel-size 4 --sequence-parallel --peak-tflops 989 --json --plot throughput.svg

Runs the real Trainer on fixed groups, so that every pass, the optimizer and the communication are in the numbers and
the rollout is not. Takes every option of ``megatron_ktr.train`` beside its own: what ``tools/plan_parallelism.py``
prints as flags can be pasted. A published size (3b, 7b, 32b, 72b), ``tiny`` (for a CPU), a directory without weights,
or ``--num-layers`` mean random weights.

Every step sees new videos: a frozen encoder would remember old ones. Reported are medians over the steps after the
warm-up; seconds of the slowest rank, peak memory of the fullest (allocator on a GPU, resident memory on CPU); tokens
count each prompt once; TFLOP/s are arithmetic that the step needs (``megatron_ktr/accounting``), nothing recomputed.
Phase ``vision`` is the encoder's run where a scoring pass shows its features before the update; otherwise each pass
runs what it needs of it, in ``score`` and ``update``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Advice about speed that core and torch.distributed give on import and on every rank.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.")
warnings.filterwarnings("ignore", message="Please use DTensor instead")
logging.getLogger("megatron").setLevel(logging.ERROR)

from megatron_ktr.config import Config, load_config  # noqa: E402
from megatron_ktr.config.part_options import PolicyOptions, StepOptions  # noqa: E402
from megatron_ktr.config.schedule import schedule_length  # noqa: E402
from megatron_ktr.data.media.preprocess import PreprocessSettings  # noqa: E402
from megatron_ktr.data.random_groups import FixedSource, SyntheticSizes, TokenIds, synthetic_group  # noqa: E402
from megatron_ktr.distributed import platform as platforms  # noqa: E402
from megatron_ktr.distributed.collectives import reduce_metrics  # noqa: E402
from megatron_ktr.distributed.groups import (  # noqa: E402
    ParallelGroups,
    destroy_parallel,
    init_parallel,
    world_size_from_environment,
)
from megatron_ktr.distributed.platform import Platform  # noqa: E402
from megatron_ktr.errors import Parser, UserError, run_cli, same_on_every_rank, whole  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402
from megatron_ktr.files.listing import paths_in  # noqa: E402
from megatron_ktr.objectives import build_objective  # noqa: E402
from megatron_ktr.policy.policy import Policy  # noqa: E402
from megatron_ktr.run.preflight import check_layout, check_micro_batches  # noqa: E402
from megatron_ktr.sums import Metrics  # noqa: E402
from megatron_ktr.trainer import Trainer  # noqa: E402
from megatron_ktr.types import RolloutGroup  # noqa: E402
from models.qwen2_5_vl.config import Qwen2_5_VLConfig  # noqa: E402
from models.qwen2_5_vl.hf_config import MOST_LAYERS  # noqa: E402
from models.qwen2_5_vl.media import media_spec  # noqa: E402
from models.qwen2_5_vl.model import Qwen2_5_VLModel, build_model  # noqa: E402
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS, to_hf_config  # noqa: E402

PHASES = ("pack", "vision", "score", "update")
COLOURS = {"pack": "#8c8c8c", "vision": "#5b7f3a", "score": "#c28e2c", "update": "#1f6f8b"}

TINY_CONFIG = Qwen2_5_VLConfig(
    text=dataclasses.replace(
        PUBLISHED_CONFIGS["7B"].text,
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(8, 12, 12),
    ),
    vision=dataclasses.replace(
        PUBLISHED_CONFIGS["7B"].vision,
        depth=4,
        hidden_size=160,
        intermediate_size=428,
        num_heads=4,
        out_hidden_size=256,
        fullatt_block_indexes=(3,),
    ),
    image_token_id=4095,
    video_token_id=4094,
    vision_start_token_id=4093,
    vision_end_token_id=4092,
    tie_word_embeddings=False,
)
SIZES = {**{name.lower(): config for name, config in PUBLISHED_CONFIGS.items()}, "tiny": TINY_CONFIG}


@dataclass(frozen=True)
class StepTiming:
    """The measurements of one step; they are the same on every rank."""

    seconds: dict[str, float]
    """For each phase, the seconds of the rank that was slowest in it."""
    total: float
    """The seconds of the slowest rank for the whole step."""
    operations: float
    """The operations of all ranks."""


class RandomPolicy(Policy):
    """A policy whose weights are the layers' random initial values, as are the reference model's."""

    def _load_model(self, hf_dir: Path) -> list[Qwen2_5_VLModel]:
        return build_model(self.model_config, ranks=self.ranks, options=self.options.build, dtype=self.dtype)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Returns this tool's own options, and the remaining flags, which are the trainer's."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, help=f"{', '.join(SIZES)}, or a Hugging Face directory")
    parser.add_argument(
        "--num-layers", type=whole(high=MOST_LAYERS), help="layers of the language model in place of the model's own"
    )
    parser.add_argument("--frames", type=whole(low=2, even=True), default=16, help="frames of every video, even (16)")
    parser.add_argument("--frame-size", type=_frame_size, default=(224, 448), help="pixels, multiples of 28 (224x448)")
    parser.add_argument("--text-length", type=whole(), default=200, help="prompt tokens that are not visual (200)")
    parser.add_argument(
        "--response-length", type=_lengths, default=(768,), help="tokens; several, by comma, take turns"
    )
    parser.add_argument(
        "--prompts-per-step", type=whole(), help="over all ranks (every replica's pipeline filled once)"
    )
    parser.add_argument("--steps", type=whole(), default=3, help="steps that are measured (3)")
    parser.add_argument("--warm-up", type=whole(low=0), default=1, help="steps before them (1)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line, no table")
    parser.add_argument("--plot", type=Path, help="SVG of the seconds by phase of every step")
    options, trainer_flags = parser.parse_known_args(argv)
    return options, trainer_flags


def _frame_size(text: str) -> tuple[int, int]:
    side = whole(low=28, high=28 * 1024)
    height, _, width = text.partition("x")
    size = side(height), side(width)
    if size[0] % 28 or size[1] % 28:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in multiples of 28 pixels, got {text!r}")
    return size


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(map(whole(), text.split(",")))


def main(argv: Sequence[str] | None = None) -> None:
    with same_on_every_rank():
        options, trainer_flags = parse_arguments(argv)
    with _model_directory(options) as (hf_dir, has_weights):
        with same_on_every_rank():
            config = _load_config(options, trainer_flags, hf_dir=hf_dir)
        platform = platforms.start(config.trainer.platform)
        groups, config = _join(config, options, platform)
        platform.seed(config.trainer.seed)
        source = FixedSource([])
        trainer = _build_trainer(config, source, ranks=groups, platform=platform, has_weights=has_weights)
        timings, memory = _measure(trainer, source, config, options)
    if groups.rank == 0:
        report = summarise(timings, memory, trainer=trainer, group=source.groups[0], config=config, options=options)
        if options.plot:
            options.plot.write_text(draw(report), encoding="utf-8")
        print(to_json(report) if options.json else table(report), flush=True)
    destroy_parallel()


@contextlib.contextmanager
def _model_directory(options: argparse.Namespace) -> Iterator[tuple[Path, bool]]:
    """Returns a directory with the model's config.json, and whether the directory also has the weights."""
    with same_on_every_rank():
        if options.model.lower() in SIZES:
            model_config, has_weights = SIZES[options.model.lower()], False
        elif Path(options.model).is_dir():
            model_config = Qwen2_5_VLConfig.from_hf(options.model)
            has_weights = options.num_layers is None and bool(paths_in(Path(options.model), "*.safetensors"))
        else:
            sizes = ", ".join(SIZES)
            raise UserError(f"--model {options.model}: neither one of {sizes} nor a directory with a config.json")
    if has_weights:
        yield Path(options.model), True
        return
    if options.num_layers is not None:
        text = dataclasses.replace(model_config.text, num_hidden_layers=options.num_layers)
        model_config = dataclasses.replace(model_config, text=text)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(to_hf_config(model_config)), encoding="utf-8")
        yield Path(directory), False


def _load_config(options: argparse.Namespace, flags: list[str], *, hf_dir: Path) -> Config:
    # The replay path is never read, because this tool makes the groups itself.
    own = ["--model", str(hf_dir), "--replay-path", "synthetic", "--train-steps", str(options.warm_up + options.steps)]
    return load_config([*flags, *own], prog="benchmark_throughput.py")


def _join(config: Config, options: argparse.Namespace, platform: Platform) -> tuple[ParallelGroups, Config]:
    """Creates the process groups. Without ``--prompts-per-step`` a replica gets one micro-batch per pipeline stage."""
    with same_on_every_rank():
        world_size = world_size_from_environment()
        sizes = check_layout(config, Qwen2_5_VLConfig.from_hf(config.model.model), world_size=world_size)
        number, data_size = options.prompts_per_step, world_size // sizes.model
        if number is None:
            number = data_size * sizes.pipeline * config.trainer.micro_batch_groups
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, prompts_per_step=number))
        check_micro_batches(config, sizes=sizes, data_size=data_size)
    ranks = init_parallel(
        sizes,
        platform=platform,
        seed=config.trainer.seed,
        timeout_minutes=config.trainer.distributed_timeout_minutes,
    )
    return ranks, config


def _build_trainer(
    config: Config, source: FixedSource, *, ranks: ParallelGroups, platform: Platform, has_weights: bool
) -> Trainer:
    hf_dir = Path(config.model.model)
    objective = build_objective(config.objective, reward=config.reward)
    policy = (Policy if has_weights else RandomPolicy)(
        hf_dir,
        options=PolicyOptions.of(config),
        ranks=ranks,
        platform=platform,
        num_steps=round(schedule_length(config)),
    )
    if objective.needs_reference:
        policy.add_reference()
    return Trainer(
        options=StepOptions.of(config),
        policy=policy,
        source=source,
        objective=objective,
        media=media_spec(policy.model_config, patchify=PreprocessSettings.from_model(hf_dir).patchify),
    )


def _measure(
    trainer: Trainer, source: FixedSource, config: Config, options: argparse.Namespace
) -> tuple[list[StepTiming], float]:
    """Runs the steps; returns the measured ones, and the largest peak of memory of all ranks, in bytes."""
    ranks, platform = trainer.policy.ranks, trainer.policy.platform
    timings: list[StepTiming] = []
    for step in range(1, options.warm_up + options.steps + 1):
        if step == options.warm_up + 1:
            platform.reset_peak_memory()
        source.groups = _groups_of(step, trainer, config, options)
        values = trainer.train_step(step).values
        if step <= options.warm_up:
            continue
        own = {phase: values[f"seconds/{phase}"] for phase in PHASES}
        # The metric is a rate over this rank's own seconds, so multiply by these to get the operations.
        operations = values["tflops_per_gpu"] * 1e12 * ranks.world_size * sum(own.values())
        slowest = reduce_metrics(Metrics(maxima={**own, "total": sum(own.values())}), ranks.world).maxima
        timings.append(StepTiming(slowest, slowest.pop("total"), operations))
    memory = Metrics(maxima={"peak": float(platform.peak_memory_bytes())})
    return timings, reduce_metrics(memory, ranks.world).maxima["peak"]


def _groups_of(step: int, trainer: Trainer, config: Config, options: argparse.Namespace) -> list[Any]:
    """Makes this replica's groups for one step."""
    ranks = trainer.policy.ranks
    model_config = trainer.policy.model_config
    lengths = options.response_length
    sizes = SyntheticSizes(
        num_frames=options.frames,
        height=options.frame_size[0],
        width=options.frame_size[1],
        text_length=options.text_length,
        response_lengths=tuple(lengths[i % len(lengths)] for i in range(config.rollout.num_generations)),
    )
    tokens = TokenIds.of(model_config)
    first = step * config.trainer.prompts_per_step + ranks.data_rank
    number = config.trainer.prompts_per_replica(ranks.data_size)
    return [synthetic_group(sizes, tokens=tokens, seed=first + i * ranks.data_size) for i in range(number)]


def summarise(
    timings: Sequence[StepTiming],
    memory: float,
    *,
    trainer: Trainer,
    group: RolloutGroup,
    config: Config,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The report as a dictionary for JSON."""
    ranks = trainer.policy.ranks
    sizes = ranks.sizes
    prompts = config.trainer.prompts_per_step
    seconds = statistics.median(timing.total for timing in timings)
    rate = statistics.median(timing.operations / timing.total for timing in timings) / ranks.world_size / 1e12
    return {
        "model": Path(options.model).name,
        "num_parameters": trainer.policy.model_config.num_parameters,
        "num_layers": trainer.policy.model_config.text.num_hidden_layers,
        "params_dtype": config.model.params_dtype,
        "objective": config.objective.objective,
        "device": trainer.policy.platform.name,
        "num_gpus": ranks.world_size,
        "layout": {
            "tensor": sizes.tensor,
            "pipeline": sizes.pipeline,
            "context": sizes.context,
            "data": ranks.data_size,
            "virtual_pipeline": sizes.virtual_pipeline or 1,
            "sequence_parallel": sizes.sequence_parallel,
            "vision_parallel": config.parallel.vision_parallel,
            "recompute_granularity": config.parallel.recompute_granularity,
        },
        "prompts_per_step": prompts,
        "num_generations": len(group.rollouts),
        "prompt_tokens": len(group.prompt.token_ids),
        "response_tokens": group.num_response_tokens,
        "step_seconds": seconds,
        "tokens_per_second": prompts * group.num_tokens / seconds,
        "samples_per_second": prompts * len(group.rollouts) / seconds,
        "tflops_per_gpu": rate,
        "mfu": rate / config.trainer.peak_tflops if config.trainer.peak_tflops else None,
        "peak_memory_gb": memory / 1e9,
        "seconds": {phase: statistics.median(timing.seconds[phase] for timing in timings) for phase in PHASES},
        "steps": [timing.seconds for timing in timings],
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    layout = ", ".join(f"{name} {value}" for name, value in report["layout"].items())
    mfu = "" if report["mfu"] is None else f", MFU {report['mfu']:.1%}"
    lines = [
        f"{_heading(report)} in {report['params_dtype']}, {report['objective']}",
        f"layout: {layout}",
        f"a step: {report['prompts_per_step']} prompts of {report['prompt_tokens']} tokens, "
        f"{report['num_generations']} responses each ({report['response_tokens']} tokens)",
        "",
        f"{'step':<22} {report['step_seconds']:>10.3f} s",
        f"{'tokens':<22} {report['tokens_per_second']:>10.1f} /s",
        f"{'samples (responses)':<22} {report['samples_per_second']:>10.3f} /s",
        f"{'arithmetic':<22} {report['tflops_per_gpu']:>10.4g} TFLOP/s per GPU{mfu}",
        f"{'peak memory':<22} {report['peak_memory_gb']:>10.2f} GB on the fullest rank",
        "",
    ]
    total = sum(report["seconds"].values())
    lines += [f"{phase:<22} {value:>10.3f} s {value / total:>6.1%}" for phase, value in report["seconds"].items()]
    return "\n".join(lines)


def _heading(report: dict[str, Any]) -> str:
    number = report["num_parameters"]
    size = f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"
    return f"{report['model']}: {size} parameters on {report['num_gpus']} x {report['device']}"


def draw(report: dict[str, Any]) -> str:
    """An SVG chart with one bar per step, in which the phases are stacked."""
    label, bar, line = 80, 480, 24
    longest = max(sum(step.values()) for step in report["steps"])
    title = f"{_heading(report)}, {report['tokens_per_second']:,.0f} tokens/s; seconds by phase"
    parts, y = [f'<text x="8" y="16" class="title">{escape(title)}</text>'], 40
    for index, phase in enumerate(PHASES):
        parts.append(
            f'<rect x="{label + 110 * index}" y="{y - 10}" width="12" height="12" fill="{COLOURS[phase]}"/>'
            f'<text x="{label + 110 * index + 16}" y="{y}">{phase}</text>'
        )
    for number, step in enumerate(report["steps"], start=1):
        y += line
        parts.append(f'<text x="{label - 8}" y="{y}" text-anchor="end">step {number}</text>')
        x = float(label)
        for phase in PHASES:
            width = bar * step[phase] / longest
            parts.append(f'<rect x="{x:.1f}" y="{y - 12}" width="{width:.1f}" height="16" fill="{COLOURS[phase]}"/>')
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y}">{sum(step.values()):.3g} s</text>')
    width, height = label + bar + 80, y + line
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="Seconds by phase of training steps"><style>text{{font:12px sans-serif;fill:#222}}'
        f'.title{{font-weight:bold}}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    run_cli(main)
