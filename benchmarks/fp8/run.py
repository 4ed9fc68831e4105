"""What FP8 does to attribution: scores, key tokens and gradients of each recipe, against fp32 and against bf16.

    python benchmarks/fp8/run.py [--json] [--out F.json] [--figure F.svg] [--seed N]

Fine-tunes the quickstart's tiny model for a minute (or takes the fine-tuned model of ``--quickstart``, the directory of
a whole one), samples responses to ``--prompts`` training questions and takes the same training step on them in fp32, in
bf16 and in bf16 with the four linears of every language layer in FP8 (``emulation.py``); embedding, head, norms,
attention and vision encoder stay in bf16. No weight is moved: a step ends with its gradient.

Two cases. ``everything``: all passes in FP8, as a run with ``--fp8-recipe`` has it. ``scoring``: only the hidden and
the shuffled pass are in FP8, the intact pass and backward in bf16. Delayed scales come from ``--warm-up`` questions
more, on which the step is taken before; in ``first step`` they start with the measured step, as in a new run. Passes
without gradient do not move them on, so that in ``scoring`` they are 1 for ever.

``halves`` tells what is much: the gradients of one half of the questions and of the other, both in fp32, compared.

``products`` holds the errors of single products with random operands, against fp64.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.fp8.emulation import EmulatedLinear, Recipe  # noqa: E402
from benchmarks.fp8.figure import draw  # noqa: E402
from benchmarks.fp8.measures import (  # noqa: E402
    Observed,
    compare,
    cosine,
    cosine_by_part,
    quantised_row_errors,
    token_gradient_errors,
)
from benchmarks.fp8.step import Case, Parts, Step, Variant  # noqa: E402
from benchmarks.harness import say, write_report  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from benchmarks.scoring_precision.run import EXAMPLES, fine_tune, sample  # noqa: E402
from megatron_ktr.batch.packing import plan_micro_batches  # noqa: E402
from megatron_ktr.config import Config, load_config  # noqa: E402
from megatron_ktr.config.part_options import PolicyOptions  # noqa: E402
from megatron_ktr.data.media.preprocess import PreprocessSettings  # noqa: E402
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes, destroy_parallel, init_parallel  # noqa: E402
from megatron_ktr.distributed.platform import current, start  # noqa: E402
from megatron_ktr.errors import UserError, run_cli  # noqa: E402
from megatron_ktr.policy.policy import Policy  # noqa: E402
from models.qwen2_5_vl.config import Qwen2_5_VLConfig  # noqa: E402
from models.qwen2_5_vl.media import media_spec  # noqa: E402

LAST_AMAX = dict(amax_history_len=1, amax_compute_algo="most_recent")
"""megatron-core's defaults; Transformer Engine's are the largest of 1,024."""
VARIANTS = (
    Variant("tensorwise, hybrid", Recipe("tensorwise")),
    Variant("tensorwise, e4m3", Recipe("tensorwise", "e4m3")),
    Variant("blockwise, e4m3", Recipe("blockwise", "e4m3")),
    Variant("blockwise, hybrid", Recipe("blockwise")),
    Variant("mxfp8, e4m3", Recipe("mxfp8", "e4m3")),
    Variant("mxfp8, hybrid", Recipe("mxfp8")),
    Variant("delayed, hybrid", Recipe("delayed")),
    Variant("delayed, e4m3", Recipe("delayed", "e4m3")),
    Variant("delayed, last amax, hybrid", Recipe("delayed", **LAST_AMAX)),
    Variant("delayed, first step, hybrid", Recipe("delayed"), is_warm=False),
    Variant("tensorwise", Recipe("tensorwise"), "scoring"),
    Variant("blockwise", Recipe("blockwise", "e4m3"), "scoring"),
    Variant("mxfp8", Recipe("mxfp8", "e4m3"), "scoring"),
    Variant("delayed, scales of 1", Recipe("delayed"), "scoring"),
)


def measure(fp32: Step, bf16: Step, *, warm_up: Parts, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """An entry for bf16 against fp32, then one a variant against both."""
    truth = fp32.observe(None)
    pull_R = fp32.pull_of_tokens()
    if not any(gradient.any() for gradient in truth.gradients.values()):
        raise UserError("no question has responses with unequal rewards: nothing to learn; choose another --seed")
    baseline = bf16.observe(None, fp32_choice=truth)
    entries = [_entry("bf16", "everything", baseline, {"fp32": truth}, pull_R)]
    for variant in variants:
        say(f"{variant.name} ({variant.case})")
        choice = truth if variant.case == "everything" else None
        found = bf16.observe(variant, fp32_choice=choice, warm_up=warm_up)
        entries.append(_entry(variant.name, variant.case, found, {"fp32": truth, "bf16": baseline}, pull_R))
    return entries


def _entry(name: str, case: Case, found: Observed, against: dict[str, Observed], pull_R: Tensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "case": case}
    for reference_name, reference in against.items():
        values: dict[str, Any] = compare(found, reference)
        if found.token_gradients_RD is not None:
            values |= token_gradient_errors(found, reference, pull_R)
        entry[f"against_{reference_name}"] = values | {"gradient_cosine_by_part": cosine_by_part(found, reference)}
    return entry | quantised_row_errors(found)


def product_errors(*, seed: int, sizes: tuple[int, int, int] = (256, 1024, 512)) -> list[dict[str, Any]]:
    """Relative errors of the three products of one linear layer (T, K, N) with normal operands, and the worst row of dx
    where the rows of dy differ in size by up to a million, as advantages and certain tokens make them."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_inputs, num_outputs = sizes
    x = torch.randn(num_rows, num_inputs, generator=generator)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.02
    even = torch.randn(num_rows, num_outputs, generator=generator)
    uneven = even * 10 ** (-6 * torch.rand(num_rows, 1, generator=generator))
    entries = []
    for variant in VARIANTS:
        if variant.case != "everything" or not variant.is_warm:
            continue
        errors = _layer_errors(variant.recipe, x, weight, even)
        worst = _layer_errors(variant.recipe, x, weight, uneven)["worst_row_dx"]
        entries.append({"name": variant.name, **errors, "worst_row_dx_uneven": worst})
    return entries


def _layer_errors(recipe: Recipe, x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, float]:
    linear = EmulatedLinear(recipe)
    for _ in range(2):  # the second time with scales from the first
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = linear(*inputs)
        dx, dw = torch.autograd.grad(y, inputs, dy)
    truth = {"y": x.double() @ weight.double().T, "dx": dy.double() @ weight.double(), "dw": dy.double().T @ x.double()}
    found = {"y": y.detach(), "dx": dx, "dw": dw}
    errors = {name: float((found[name] - exact).norm() / exact.norm()) for name, exact in truth.items()}
    return errors | {"worst_row_dx": float(((dx - truth["dx"]).norm(dim=1) / truth["dx"].norm(dim=1)).max())}


SUMMARY = (
    "agreement_visual",
    "agreement_temporal",
    "agreement_union",
    "gradient_cosine",
    "gradient_cosine_same_tokens",
    "logprob_error_intact_mean",
)


def summarise(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The main numbers against fp32, by case and name."""
    return {
        f"{entry['case']}: {entry['name']}": {
            name: entry["against_fp32"][name] for name in SUMMARY if entry["against_fp32"].get(name) is not None
        }
        for entry in entries
    }


def set_up(root: Path, model: Path, options: argparse.Namespace) -> tuple[Step, Step, Parts]:
    """The step in fp32 and in bf16 on the same responses, and the micro-batches to warm up on."""
    ranks = init_parallel(ParallelSizes(), platform=start("cpu"), seed=options.seed)
    flags = ["--config", EXAMPLES / "video_ktr.yaml", "--model", model, "--data-path", root / "data" / "train.json"]
    flags += ["--prompt-template", root / "model" / "prompt_template.txt", "--run-dir", root / "unused"]
    num_prompts = options.prompts + options.warm_up
    flags += ["--prompts-per-step", num_prompts, "--seed", options.seed]
    media = media_spec(Qwen2_5_VLConfig.from_hf(model), patchify=PreprocessSettings.from_model(model).patchify)
    configs = [load_config([str(flag) for flag in [*flags, *more]]) for more in ((), ("--bf16",))]
    policies = [_policy(model, config=config, ranks=ranks) for config in configs]
    rollouts = sample(configs[0], policies[0], media=media, num_prompts=num_prompts)
    size = configs[0].trainer.micro_batch_groups
    parts, warm_up = (
        plan_micro_batches(some, groups_per_micro_batch=size) if some else ()
        for some in (rollouts[: options.prompts], rollouts[options.prompts :])
    )
    steps = [
        Step(policy, config=config, media=media, parts=parts) for policy, config in zip(policies, configs, strict=True)
    ]
    return steps[0], steps[1], warm_up


def _policy(model: Path, *, config: Config, ranks: ParallelGroups) -> Policy:
    return Policy(model, options=PolicyOptions.of(config), ranks=ranks, platform=current(), num_steps=1)


def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    if options.quickstart is None:
        model = fine_tune(root, seed=options.seed, steps=options.steps)
    else:
        model = root / "3_guess" / "export"
    fp32, bf16, warm_up = set_up(root, model, options)
    try:
        results = measure(fp32, bf16, warm_up=warm_up, variants=VARIANTS)
        cosine_of_halves = cosine(*fp32.gradients_of_halves())
        num_tokens = sum(len(r.token_ids) for part in fp32.parts for group in part for r in group.rollouts)
    finally:
        destroy_parallel()
    settings = {"prompts": options.prompts, "warm_up": options.warm_up, "seed": options.seed}
    return {
        "settings": {**settings, "response_tokens": num_tokens},
        "machine": about_machine(current()),
        "products": product_errors(seed=options.seed),
        "halves": {"gradient_cosine": cosine_of_halves},
        "results": results,
        "summary": summarise(results),
    }


def _table(report: dict[str, Any]) -> str:
    columns = {"visual": "agreement_visual", "temporal": "agreement_temporal", "union": "agreement_union"}
    columns |= {"cosine": "gradient_cosine", "same tokens": "gradient_cosine_same_tokens"}
    lines = [f"{'against fp32':<42}" + "".join(f"{name:>13}" for name in columns)]
    for name, values in report["summary"].items():
        cells = [values.get(column) for column in columns.values()]
        lines.append(f"{name:<42}" + "".join(f"{'-' if cell is None else f'{cell:.4f}':>13}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, help="directory of a finished quickstart; none = fine-tune a model")
    parser.add_argument("--prompts", type=int, default=32, help="questions, with 8 responses each (default 32)")
    parser.add_argument("--warm-up", type=int, default=16, help="questions that delayed scales come from (default 16)")
    parser.add_argument("--steps", type=int, help="steps of every stage of fine-tuning, to try the command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", type=Path, help="write the report to this file, as JSON")
    parser.add_argument("--figure", type=Path, help="draw the report into this file, as SVG")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = run(options, options.quickstart or Path(scratch))
    text = write_report(report, out=options.out, figure=options.figure, draw=draw)
    print(text if options.json else _table(report))


if __name__ == "__main__":
    run_cli(main)
