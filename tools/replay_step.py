"""Runs one step of a training again, alone, from its dump, and says where a number first turned NaN or infinite.

    python tools/replay_step.py RUN/dumps/step_00000012 [--checkpoint DIR | --model DIR] [--json]

A dump is what a run leaves when it skips an update whose numbers are not finite (docs/guards.md). The step runs in this
one process, whatever the layout of the run was, on the groups of all replicas. Its weights are those of the checkpoint
that the dump names, or of --checkpoint, or of --model alone. Media are decoded again from the files that the records
name. Nothing is written.

Exit code: 0 when the step has run, whatever its numbers are; 2 for input that cannot be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Import this before torch, whose import takes seconds, so that ctrl-C prints one word instead of a traceback.
import megatron_ktr  # noqa: E402, F401

warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.")
logging.getLogger("megatron").setLevel(logging.ERROR)

from megatron_ktr.batch.micro_batch import UpdateResult  # noqa: E402
from megatron_ktr.config import Config, read_saved  # noqa: E402
from megatron_ktr.config.data_sources import DataSource  # noqa: E402
from megatron_ktr.config.part_options import PolicyOptions, StepOptions  # noqa: E402
from megatron_ktr.config.schedule import schedule_length  # noqa: E402
from megatron_ktr.config.sections import ParallelSection  # noqa: E402
from megatron_ktr.config.words import PLATFORM_NAMES  # noqa: E402
from megatron_ktr.data.media.preprocess import PreprocessSettings  # noqa: E402
from megatron_ktr.data.random_groups import FixedSource  # noqa: E402
from megatron_ktr.data.template import load_tokenizer  # noqa: E402
from megatron_ktr.data.tokenizer import Tokenizer  # noqa: E402
from megatron_ktr.data.unusable import UnusableSample  # noqa: E402
from megatron_ktr.distributed import platform as platforms  # noqa: E402
from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel  # noqa: E402
from megatron_ktr.errors import Parser, UserError, printable, run_cli  # noqa: E402
from megatron_ktr.files.intact_checkpoint import checkpoint_damage  # noqa: E402
from megatron_ktr.files.json_files import read_json_object, to_json  # noqa: E402
from megatron_ktr.objectives import build_objective  # noqa: E402
from megatron_ktr.policy.first_not_finite import FirstNotFinite, watching  # noqa: E402
from megatron_ktr.policy.gradient_norms import TensorGradient, tensor_gradients  # noqa: E402
from megatron_ktr.policy.policy import Policy  # noqa: E402
from megatron_ktr.rollout.questions import source_loader  # noqa: E402
from megatron_ktr.rollout.replay import ReplayEngine  # noqa: E402
from megatron_ktr.run.checkpoint_state import load_sharded_state  # noqa: E402
from megatron_ktr.run.directory import list_checkpoints  # noqa: E402
from megatron_ktr.run.dumps import CONFIG, FACTS, VERSION, replay_obstacle  # noqa: E402
from megatron_ktr.run.step_report import StepReport  # noqa: E402
from megatron_ktr.trainer import Trainer  # noqa: E402
from megatron_ktr.types import RolloutGroup  # noqa: E402
from models.qwen2_5_vl.config import Qwen2_5_VLConfig  # noqa: E402
from models.qwen2_5_vl.media import media_spec  # noqa: E402

MOST_SHOWN = 8
"""Tensors that the table names."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("dump", type=Path, help="RUN/dumps/step_N")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, help="a checkpoint of the run, in place of the one the dump names")
    weights.add_argument("--model", type=Path, help="a Hugging Face directory whose weights are used, no checkpoint")
    parser.add_argument("--platform", choices=PLATFORM_NAMES, help="where it runs, in place of the run's own")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line, no table")
    return parser.parse_args(argv)


def read_facts(dump: Path) -> dict[str, Any]:
    """The facts of a dump. Raises ``UserError`` if this is none, or one of another version."""
    facts = read_json_object(dump / FACTS)
    expected = {"step": int, "noise_floor": dict, "sources": dict, "values": dict, "num_replicas": int, "model": str}
    if facts.get("version") != VERSION:
        raise UserError(f"{dump / FACTS}: expected version {VERSION} of a dump, got {facts.get('version')!r}")
    for name, kind in expected.items():
        if not isinstance(facts.get(name), kind):
            raise UserError(
                f"{dump / FACTS}: expected the field {name} as {kind.__name__}, got {facts.get(name)!r:.80}"
            )
    return facts


def config_of(dump: Path, facts: dict[str, Any], options: argparse.Namespace) -> Config:
    """The run's options, for one process.

    Raises:
        UserError: the step needs what a dump does not hold.
    """
    config = read_saved(dump / CONFIG)
    objective = build_objective(config.objective, reward=config.reward, rollout=config.rollout)
    if obstacle := replay_obstacle(objective, options=StepOptions.of(config)):
        raise UserError(f"{dump}: {obstacle}")
    kept = ("recompute_granularity", "recompute_modules", "recompute_method", "recompute_num_layers", "mlp_chunks")
    kept += ("recompute_vision", "vision_cache_gb")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, model=str(options.model or facts["model"])),
        parallel=ParallelSection(**{name: getattr(config.parallel, name) for name in kept}),
        optimizer=dataclasses.replace(config.optimizer, offload_optimizer_states=False, offload_during_rollout=False),
        trainer=dataclasses.replace(
            config.trainer,
            balance_replicas=False,
            platform=options.platform or config.trainer.platform,
        ),
    )


def checkpoint_of(dump: Path, facts: dict[str, Any], options: argparse.Namespace) -> Path | None:
    """The intact checkpoint whose weights are used; None for those of the model."""
    named = facts.get("checkpoint")
    if options.model is not None or (options.checkpoint is None and named is None and not facts.get("last_change")):
        return None
    run_dir = dump.resolve().parents[1]
    checkpoint = options.checkpoint or run_dir / str(named)
    if options.checkpoint is None:
        # A checkpoint of the step before may have been completed only after the dump was written.
        low, high = facts.get("last_change", facts["step"]), facts["step"]
        exact = [path for saved, path in list_checkpoints(run_dir) if low <= saved < high]
        if exact:
            checkpoint, facts["is_exact"] = exact[-1], True
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint (it may have been removed): give --checkpoint or --model")
    if damage := checkpoint_damage(checkpoint):
        raise UserError(f"{checkpoint} is damaged: {damage[0]}")
    return checkpoint


def read_groups(dump: Path, facts: dict[str, Any], config: Config, tokenizer: Tokenizer) -> list[RolloutGroup]:
    """The groups of all replicas, with their media decoded again."""
    files = [dump / f"replica_{replica:04d}.jsonl" for replica in range(facts["num_replicas"])]
    vocab_size = Qwen2_5_VLConfig.from_hf(config.model.model).text.vocab_size
    given = {source.label: source for source in config.data.sources} if config.data.data_path else {}
    replay = DataSource(str(config.rollout.replay_path or dump))
    loaders: dict[str, Any] = {}
    groups = []
    for path in files:
        engine = ReplayEngine(path, tokenizer=tokenizer, vocab_size=vocab_size, ignored=config.data.ignore_fields)
        for record in engine.records:
            number = record.get("draw_number", 0)
            label = facts["sources"].get(str(number), "")
            if label not in loaders:
                source = given.get(label) or next(iter(given.values()), replay)
                loaders[label] = source_loader(config, source, tokenizer=tokenizer)
            try:
                prompt = loaders[label].load(record)
            except UnusableSample as error:
                raise UserError(f"{path}: record {record['problem_id']}: {error}") from error
            prompt = dataclasses.replace(prompt, draw_number=number, source=label)
            groups += [group for _, group in engine.stream([prompt])]
    return groups


class WatchedPolicy(Policy):
    """Looks at the gradients of each update before the optimizer clips them."""

    first_gradients: dict[str, TensorGradient] = {}  # noqa: RUF012
    """Of the first update some of whose gradient is not finite, or else of the last."""

    def backward(self, *args: Any, **kwargs: Any) -> UpdateResult:
        result = super().backward(*args, **kwargs)
        if not any(one.num_not_finite for one in self.first_gradients.values()):
            self.first_gradients = tensor_gradients(self)
        return result


def run_again(config: Config, groups: list[RolloutGroup], facts: dict[str, Any], checkpoint: Path | None) -> Replayed:
    """Runs the step in this process."""
    platform = platforms.start(config.trainer.platform)
    ranks = init_parallel(ParallelSizes(), platform=platform, seed=config.trainer.seed)
    platform.seed(config.trainer.seed)
    policy = WatchedPolicy(
        config.model.model,
        options=PolicyOptions.of(config),
        ranks=ranks,
        platform=platform,
        num_steps=round(schedule_length(config)),
    )
    objective = build_objective(config.objective, reward=config.reward, rollout=config.rollout)
    if objective.needs_reference:
        policy.add_reference(facts["model"])
    if checkpoint is not None:
        load_sharded_state(policy, checkpoint)
    trainer = Trainer(
        options=StepOptions.of(config),
        policy=policy,
        source=FixedSource(groups),
        objective=objective,
        media=media_spec(policy.model_config, patchify=PreprocessSettings.from_model(config.model.model).patchify),
    )
    trainer.noise.load_state_dict(facts["noise_floor"])
    with watching(policy) as first:
        report = trainer.train_step(facts["step"])
    return Replayed(report, first, policy.first_gradients)


@dataclasses.dataclass(frozen=True)
class Replayed:
    report: StepReport
    first: FirstNotFinite
    gradients: dict[str, TensorGradient]

    def first_token(self, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """The first response token whose log-prob is not finite."""
        for group, selections in zip(self.report.groups, self.report.selections, strict=False):
            for number, (rollout, selection) in enumerate(zip(group.rollouts, selections, strict=True), start=1):
                for place, logprob in enumerate(selection.policy_logprobs):
                    if not math.isfinite(logprob):
                        text = printable(tokenizer.decode([rollout.token_ids[place]]))
                        where = {"problem_id": group.prompt.problem_id, "response": number, "token": place + 1}
                        return where | {"token_id": rollout.token_ids[place], "text": text}
        return None


def summarise(found: Replayed, facts: dict[str, Any], checkpoint: Path | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """The report as a dictionary for JSON. ``first_tensor`` is where the number came up, in the order of a step: a
    weight, the output of a module, the gradient of a parameter."""
    values, before = found.report.values, facts["values"]
    backward = found.first.of_gradients(found.gradients)
    tensor: dict[str, Any] | None = None
    if found.first.weight is not None:
        tensor = {"kind": "weight", "name": found.first.weight}
    elif found.first.module is not None:
        tensor = {"kind": "output of module", "name": found.first.module, "num_elements": found.first.num_elements}
        tensor["had_finite_input"] = found.first.had_finite_input
    elif backward:
        number = found.gradients[backward[0]].num_not_finite
        tensor = {"kind": "gradient", "name": backward[0], "num_elements": number}
    loss, original = values.get("loss"), before.get("loss")
    difference = None if loss is None or original is None else abs(loss - original)
    return {
        "step": facts["step"],
        "reason": facts.get("reason"),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "has_exact_weights": bool(facts["is_exact"]),
        "num_groups": len(found.report.groups),
        "loss": loss,
        "original_loss": original,
        "loss_difference": difference,
        "grad_norm": values.get("grad_norm"),
        "original_grad_norm": before.get("grad_norm"),
        "has_stepped": bool(values["has_stepped"]),
        "skipped": [name.split("/")[1] for name in values if name.startswith("skipped_updates/")],
        "first_tensor": tensor,
        "first_token": found.first_token(tokenizer),
        "gradients_not_finite": backward,
        "gradients": {name: dataclasses.asdict(one) for name, one in found.gradients.items()},
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""

    def number(value: float | None) -> str:
        return "not finite" if value is None or not math.isfinite(value) else f"{value:.8g}"

    rows = [
        ("step", f"{report['step']}, {report['num_groups']} groups"),
        ("skipped in the run", ", ".join(map(str, report["reason"] or ["?"]))),
        ("weights", report["checkpoint"] or "of the model"),
        ("loss", f"{number(report['loss'])} (in the run {number(report['original_loss'])})"),
        ("gradient norm", f"{number(report['grad_norm'])} (in the run {number(report['original_grad_norm'])})"),
        ("optimizer step", "taken" if report["has_stepped"] else f"skipped: {', '.join(report['skipped'])}"),
    ]
    if tensor := report["first_tensor"]:
        made = {True: ", from a finite input", False: ", from an input that was not finite"}
        text = f"{tensor['kind']} {tensor['name']}{made.get(tensor.get('had_finite_input'), '')}"
        rows.append(("first not finite", text))
    if token := report["first_token"]:
        text = f"token {token['token']} ({token['text']!r}) of response {token['response']}, problem"
        rows.append(("first such token", f"{text} {printable(str(token['problem_id']))}"))
    if not report["first_tensor"] and not report["first_token"]:
        rows.append(("first not finite", "nothing: every number of this replay is finite"))
    if names := report["gradients_not_finite"]:
        more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
        rows.append(("gradients not finite", ", ".join(names[:MOST_SHOWN]) + more))
    else:
        norms = {name: one["norm"] for name, one in report["gradients"].items()}
        largest = sorted(norms, key=lambda name: -norms[name])[:MOST_SHOWN]
        rows.append(("largest gradients", ", ".join(f"{name} {norms[name]:.4g}" for name in largest)))
    lines = [f"{name:<22}{text}" for name, text in rows]
    if not report["has_exact_weights"]:
        lines.append("these weights are not known to be those of the step: its own numbers may differ from the above")
    return "\n".join(lines)


def replay(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the dump, runs its step, and returns the report."""
    facts = read_facts(options.dump)
    config = config_of(options.dump, facts, options)
    checkpoint = checkpoint_of(options.dump, facts, options)
    tokenizer = load_tokenizer(config.model.model, chat_template=config.data.chat_template)
    groups = read_groups(options.dump, facts, config, tokenizer)
    found = run_again(config, groups, facts, checkpoint)
    is_overridden = options.checkpoint is not None or options.model is not None
    facts["is_exact"] = bool(facts.get("is_exact")) and not is_overridden
    return summarise(found, facts, checkpoint, tokenizer)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    report = replay(options)
    print(to_json(report) if options.json else table(report), flush=True)
    destroy_parallel()


if __name__ == "__main__":
    run_cli(main)
