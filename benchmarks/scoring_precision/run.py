"""How far key tokens agree when the counterfactual passes run in bf16 (``scoring_precision: bf16``), not in fp32.

    python benchmarks/scoring_precision/run.py [--preamble-tokens 0,4000] [--json] [--out F.json]

Fine-tunes the quickstart's tiny model for a minute (or takes the fine-tuned model of ``--quickstart``, the directory of
a whole one), samples responses to ``--prompts`` training questions, scores them once with fp32 and once with bf16
products in the hidden and the shuffled pass, and selects key tokens from each. The intact pass is in fp32 both times.

The questions are about 30 tokens long. Each of ``--preamble-tokens`` puts a system message of so many tokens before
the video and measures everything again: what an error of positions costs shows in long prompts only.

Agreement = tokens that both select / tokens that either selects (Jaccard). Two random choices of a share p agree to
p / (2 - p). ``..._clear``: in groups with a score of at least 0.01 nats. ``noise`` is |log-prob in bf16 - log-prob in
fp32| of the counterfactual passes in nats, ``threshold`` the median over groups of the smallest selected score in fp32:
a token whose score is within the noise of its group's threshold may be chosen by one and not by the other.

``--remedies`` measures in addition what a model that is in bf16 altogether gains by dropping scores below its noise,
and by averaging over orders of frames (``remedies.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.scoring_precision.remedies import measure_remedies  # noqa: E402
from megatron_ktr.attribution.key_tokens import KeyTokens, build_key_tokens  # noqa: E402
from megatron_ktr.attribution.signals import signal_applies, signal_scores  # noqa: E402
from megatron_ktr.attribution.signals.base import Signal  # noqa: E402
from megatron_ktr.batch.micro_batch import MicroBatch  # noqa: E402
from megatron_ktr.batch.packing import plan_micro_batches  # noqa: E402
from megatron_ktr.config import Config, load_config  # noqa: E402
from megatron_ktr.config.part_options import PolicyOptions, StepOptions  # noqa: E402
from megatron_ktr.config.sections import ObjectiveSection  # noqa: E402
from megatron_ktr.data.media.preprocess import PreprocessSettings  # noqa: E402
from megatron_ktr.data.synthetic import corpus, make_dataset  # noqa: E402
from megatron_ktr.data.template import load_tokenizer  # noqa: E402
from megatron_ktr.data.tiny_model import save_tiny_model  # noqa: E402
from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel  # noqa: E402
from megatron_ktr.distributed.platform import start  # noqa: E402
from megatron_ktr.errors import UserError, run_cli  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402
from megatron_ktr.objectives import build_objective  # noqa: E402
from megatron_ktr.policy.policy import Policy  # noqa: E402
from megatron_ktr.rollout.build import build_local_source, build_sampler  # noqa: E402
from megatron_ktr.rollout.source import ReplicaSource  # noqa: E402
from megatron_ktr.step.scoring import ScoringPasses  # noqa: E402
from megatron_ktr.types import BatchFacts, RolloutGroup, ScoredBatch, Selection, TokenScores  # noqa: E402
from models.qwen2_5_vl.config import Qwen2_5_VLConfig  # noqa: E402
from models.qwen2_5_vl.media import media_spec  # noqa: E402

EXAMPLES = REPOSITORY / "examples" / "quickstart"
STAGES = (("lookup", "sft_lookup", 80), ("sft", "sft", 120), ("guess", "sft_guess", 40))
"""The quickstart's stages of fine-tuning, cut short: configuration, data, steps."""
RATIOS = (0.1, 0.2, 0.4)
PRECISIONS = {"fp32": "same", "bf16": "bf16"}
CLEAR_NATS = 0.01
"""A signal whose largest score in a group is below this hardly sees the video: its ranking is rounding in any
precision."""
SHIFTS = ("signed", "absolute")


def fine_tune(out: Path, *, seed: int, steps: int | None) -> Path:
    """Model and data below ``out``, and every stage from the last one's export, which the last one returns. ``steps``
    replaces those of every stage."""
    save_tiny_model(out / "model", corpus=corpus(), seed=seed)
    make_dataset(out / "data", num_train=200, num_eval=1, seed=seed)
    model = out / "model"
    for name, data, own_steps in STAGES:
        command = [sys.executable, "-m", "megatron_ktr.train", "--config", str(EXAMPLES / f"{name}.yaml")]
        command += ["--model", str(model), "--data-path", str(out / "data" / f"{data}.json")]
        command += ["--run-dir", str(out / name), "--prompt-template", str(out / "model" / "prompt_template.txt")]
        command += ["--train-steps", str(steps or own_steps), "--lr-warmup-steps", "0", "--seed", str(seed)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        if subprocess.run(command, env=environment, stdout=sys.stderr).returncode:
            raise UserError(f"stage {name} failed; its own error is above")
        model = out / name / "export"
    return model


def sample(
    config: Config, policy: Policy, *, media: Any, num_prompts: int, at_once: int | None = None
) -> list[RolloutGroup]:
    """Rewarded responses of ``policy`` to the first questions, ``at_once`` in a batch: the same ones however many."""
    ranks = policy.ranks
    vocab_size = policy.model_config.text.vocab_size
    tokenizer = load_tokenizer(policy.hf_dir)
    source = ReplicaSource(
        build_local_source(config, ranks=ranks, tokenizer=tokenizer, vocab_size=vocab_size),
        ranks=ranks,
        sampler=build_sampler(config, ranks=ranks, tokenizer=tokenizer, media=media),
    )
    source.load_weights(policy.export(gather_to=source.gather_weights_to))
    found = []
    while len(found) < num_prompts:
        source.begin(min(at_once or num_prompts, num_prompts - len(found)), step=1)
        found += source.finish()
    source.close()
    return found


@dataclass(frozen=True)
class Scored:
    """One micro-batch with its scores: the counterfactual ones in fp32, and in bf16."""

    item: MicroBatch
    scores: Mapping[str, TokenScores]
    """By precision."""


def write_wording(path: Path, *, base: Path, tokenizer: Any, num_tokens: int) -> None:
    """The wording of ``base`` with a system message of about ``num_tokens`` tokens: questions as they are trained on,
    again and again."""
    text = ""
    if num_tokens:
        sentences = " ".join(corpus())
        token_ids = tokenizer(sentences, add_special_tokens=False)["input_ids"]
        repeated = (token_ids * (num_tokens // len(token_ids) + 1))[:num_tokens]
        text = "{%- set system = " + json.dumps(tokenizer.decode(repeated)) + " -%}"
    path.write_text(text + base.read_text(encoding="utf-8"), encoding="utf-8")


def sample_and_score(
    root: Path, model: Path, *, num_prompts: int, num_preamble: int, seed: int, has_remedies: bool = False
) -> tuple[list[Scored], dict[str, Any]]:
    """Responses of ``model`` to training questions of the quickstart in ``root``, scored in both precisions; and what
    remedies do, if that is asked for."""
    platform = start("cpu")
    ranks = init_parallel(ParallelSizes(), platform=platform, seed=seed)
    wording = root / f"wording_{num_preamble}.txt"
    base = root / "model" / "prompt_template.txt"
    write_wording(wording, base=base, tokenizer=load_tokenizer(model), num_tokens=num_preamble)
    flags = ["--config", EXAMPLES / "video_ktr.yaml", "--model", model, "--data-path", root / "data" / "train.json"]
    flags += ["--prompt-template", wording, "--max-prompt-length", num_preamble + 512, "--run-dir", root / "unused"]
    config = load_config([str(flag) for flag in [*flags, "--prompts-per-step", num_prompts, "--seed", seed]])
    model_config = Qwen2_5_VLConfig.from_hf(model)
    media = media_spec(model_config, patchify=PreprocessSettings.from_model(model).patchify)
    policy = Policy(model, options=PolicyOptions.of(config), ranks=ranks, platform=platform, num_steps=1)
    # Together, generate would hold a mask of prompt x prompt for every response to every prompt.
    sampled = sample(config, policy, media=media, num_prompts=num_prompts, at_once=1 if num_preamble else None)
    parts = plan_micro_batches(sampled, groups_per_micro_batch=config.trainer.micro_batch_groups)
    objective = build_objective(config.objective, reward=config.reward)
    found = {}
    for name, precision in PRECISIONS.items():
        section = dataclasses.replace(config.objective, scoring_precision=precision)
        changed = dataclasses.replace(config, objective=section)
        scoring = ScoringPasses(options=StepOptions.of(changed), policy=policy, objective=objective, media=media)
        items = [MicroBatch(part, scoring.pack(part, "intact")) for part in parts]
        found[name] = policy.score_intact(scoring.with_counterfactuals(items, step=1), objective=objective)
    scored = [
        Scored(of_fp32[0], dict(zip(PRECISIONS, (of_fp32[1], of_bf16[1]), strict=True)))
        for of_fp32, of_bf16 in zip(*found.values(), strict=True)
    ]
    return scored, measure_remedies(config, ranks=ranks, media=media, parts=parts) if has_remedies else {}


@dataclass(frozen=True)
class OfGroup:
    """One signal in one group."""

    score_R: Tensor
    """In fp32, NaN where the signal does not apply."""
    is_chosen_R: Mapping[str, Tensor]
    """By precision."""

    @property
    def is_clear(self) -> bool:
        largest = self.score_R[self.score_R.isfinite()].abs()
        return bool(len(largest)) and float(largest.max()) >= CLEAR_NATS

    @property
    def threshold(self) -> float | None:
        """The smallest chosen score in fp32; None where nothing is chosen."""
        chosen = self.score_R[self.is_chosen_R["fp32"]]
        return float(chosen.min()) if len(chosen) else None


def measure(scored: Sequence[Scored], selection: KeyTokens) -> dict[str, float | None]:
    """Agreement by signal and of the union, and shares, thresholds and noise that explain it."""
    result: dict[str, float | None] = {}
    for read in selection.signals:
        if read.view is None:
            continue
        signal, view = read.name, read.view
        groups = list(_groups(scored, selection, read))
        clear = [group for group in groups if group.is_clear]
        logprobs = [torch.cat([s.scores[name].logprob_of_view[view] for s in scored]) for name in PRECISIONS]
        noise_R = (logprobs[0] - logprobs[1]).abs()
        noise_R = noise_R[noise_R.isfinite()]
        result |= {
            f"agreement_{signal}": _agreement([group.is_chosen_R for group in groups]),
            f"agreement_{signal}_clear": _agreement([group.is_chosen_R for group in clear]),
            f"groups_{signal}": sum(1 for group in groups if group.threshold is not None),
            f"groups_{signal}_clear": len(clear),
            f"threshold_{signal}": _median([t for group in groups if (t := group.threshold) is not None]),
            f"noise_{signal}_median": float(noise_R.median()),
            f"noise_{signal}_mean": float(noise_R.mean()),
        }
    unions = [
        {name: Selection.union(masks).is_key_R for name, masks in _chosen(part, selection).items()} for part in scored
    ]
    share = torch.cat([union["fp32"] for union in unions]).float().mean()
    return {**result, "agreement_union": _agreement(unions), "share_union": float(share)}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _agreement(chosen: Sequence[Mapping[str, Tensor]]) -> float | None:
    """Jaccard over all tokens of the parts; None where neither precision chooses any."""
    both = sum(int((part["fp32"] & part["bf16"]).sum()) for part in chosen)
    either = sum(int((part["fp32"] | part["bf16"]).sum()) for part in chosen)
    return both / either if either else None


def _chosen(part: Scored, selection: KeyTokens) -> dict[str, dict[str, Tensor]]:
    """bool [R] by precision and signal."""
    item = part.item
    items = [ScoredBatch(item.batch, part.scores[name], item.groups) for name in PRECISIONS]
    chosen = selection.select(items, BatchFacts(num_responses=item.batch.num_responses))
    return {name: dict(found.by_signal) for name, found in zip(PRECISIONS, chosen, strict=True)}


def _groups(scored: Sequence[Scored], selection: KeyTokens, signal: Signal) -> Iterator[OfGroup]:
    for part in scored:
        batch, groups, chosen = part.item.batch, part.item.groups, _chosen(part, selection)
        applies_R = signal_applies([signal], batch, groups)
        score_R = signal_scores([signal], part.scores["fp32"], applies_R=applies_R)[signal.name]
        for index in range(len(groups)):
            is_mine_R = batch.group_R == index
            yield OfGroup(score_R[is_mine_R], {name: chosen[name][signal.name][is_mine_R] for name in PRECISIONS})


def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    if options.quickstart is None:
        model = fine_tune(root, seed=options.seed, steps=options.steps)
    else:
        model = root / "3_guess" / "export"
    settings = {"prompts": options.prompts, "responses": 8, "seed": options.seed, "torch": torch.__version__}
    lengths = [measure_at(num_preamble, root, model, options=options) for num_preamble in options.preamble_tokens]
    return {"settings": settings, "lengths": lengths}


def measure_at(num_preamble: int, root: Path, model: Path, *, options: argparse.Namespace) -> dict[str, Any]:
    """All shifts and ratios with prompts of one length."""
    scored, remedies = sample_and_score(
        root,
        model,
        num_prompts=options.prompts,
        num_preamble=num_preamble,
        seed=options.seed,
        has_remedies=options.remedies,
    )
    destroy_parallel()
    prompts = [len(group.prompt.token_ids) for part in scored for group in part.item.groups]
    results = {
        f"{shift}, {ratio:g}": measure(scored, _key_tokens(shift=shift, selection_ratio=(ratio,)))
        for shift in SHIFTS
        for ratio in RATIOS
    }
    return {
        "preamble_tokens": num_preamble,
        "prompt_tokens": {"shortest": min(prompts), "median": statistics.median(prompts), "longest": max(prompts)},
        "response_tokens": sum(len(part.item.batch.target_ids_R) for part in scored),
        "results": results,
        **remedies,
    }


def _key_tokens(**options: Any) -> KeyTokens:
    found = build_key_tokens(ObjectiveSection(**options))
    assert found is not None
    return found


def _table(report: dict[str, Any]) -> str:
    columns = ("visual", "visual_clear", "temporal", "temporal_clear", "union")
    lines = ["agreement of key tokens, bf16 and fp32"]
    for length in report["lengths"]:
        prompt = f"{length['prompt_tokens']['median']:g} tokens"
        lines.append(f"{prompt:<16}" + "".join(f"{name:>15}" for name in columns))
        for name, values in length["results"].items():
            cells = [values[f"agreement_{column}"] for column in columns]
            lines.append(f"{name:<16}" + "".join(f"{'-' if cell is None else f'{cell:.3f}':>15}" for cell in cells))
        for name, values in length.get("remedies", {}).items():
            shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items() if value is not None)
            lines.append(f"{name}: {shown}")
    return "\n".join(lines)


def _lengths(text: str) -> list[int]:
    lengths = [int(part) for part in text.split(",")]
    if min(lengths) < 0:
        raise ValueError
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, help="directory of a finished quickstart; none = fine-tune a model")
    parser.add_argument("--prompts", type=int, default=32, help="questions, with 8 responses each (default 32)")
    parser.add_argument(
        "--preamble-tokens", type=_lengths, default=[0], help="tokens before the question, several with commas"
    )
    parser.add_argument("--remedies", action="store_true", help="measure remedies against rounding, too")
    parser.add_argument("--steps", type=int, help="steps of every stage of fine-tuning, to try the command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", type=Path, help="write the report to this file, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = run(options, options.quickstart or Path(scratch))
    text = to_json(report, indent=2) + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    print(text if options.json else _table(report), end="\n" if not options.json else "")


if __name__ == "__main__":
    run_cli(main)
