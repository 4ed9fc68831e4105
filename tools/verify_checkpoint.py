"""Compares this model with Hugging Face transformers: log-probs and gradients of the same inputs, in fp32.

    python tools/verify_checkpoint.py --hf DIR [--megatron DIR] [--video FILE ... | --image FILE ...] [--json]
    torchrun --nproc-per-node 4 tools/verify_checkpoint.py --hf DIR --tensor-model-parallel-size 2 \\
        --pipeline-model-parallel-size 2 --sequence-parallel

Inputs: the media in the order given (none: a drawn test pattern video), a question, 32 random response tokens
(seed 0). Loss: the sum of their log-probs. Reported:

    max_abs_logprob_diff   largest |log-prob - Hugging Face's| over the response tokens
    max_rel_grad_diff      largest |g - g_hf| / max(|g_hf|, 1e-3 of the largest |g_hf|) over Hugging Face's tensors,
                           Frobenius norms

Weights come from --hf, converted in memory, or from the Megatron checkpoint --megatron; Hugging Face always uses
--hf. Both sides get the same position ids, ours.
Exit code: 0 within the limits, 1 beyond them, 2 for input that cannot be used (torchrun turns any failure into 1).
Memory: rank 0 holds Hugging Face's model in fp32 with gradients (8 bytes a parameter) first, and its gradients (4
bytes, on the host) while this model runs (8 bytes a parameter, split over tensor and pipeline ranks).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Import this before torch, whose import takes seconds, so that ctrl-C prints one word instead of a traceback.
import megatron_ktr  # noqa: E402, F401

# Advice about speed that core and torch.distributed give on import and on every rank.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.")
warnings.filterwarnings("ignore", message="Please use DTensor instead")
logging.getLogger("megatron").setLevel(logging.ERROR)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_ktr.batch.micro_batch import MicroBatch  # noqa: E402
from megatron_ktr.batch.packing import pack_groups  # noqa: E402
from megatron_ktr.config import Config, config_from_values  # noqa: E402
from megatron_ktr.config.part_options import ModelOptions, PolicyOptions  # noqa: E402
from megatron_ktr.config.sections import DataSection  # noqa: E402
from megatron_ktr.config.words import TRANSFORMER_IMPLS  # noqa: E402
from megatron_ktr.data.media.preprocess import PreprocessSettings, load_media, pixel_limits  # noqa: E402
from megatron_ktr.data.media.video import FrameSampling  # noqa: E402
from megatron_ktr.data.unusable import UnusableMedia  # noqa: E402
from megatron_ktr.distributed import platform as platforms  # noqa: E402
from megatron_ktr.distributed.agreement import on_every_rank  # noqa: E402
from megatron_ktr.distributed.collectives import broadcast_object  # noqa: E402
from megatron_ktr.distributed.groups import ParallelGroups, destroy_parallel, init_parallel  # noqa: E402
from megatron_ktr.errors import Parser, UserError, number, run_cli, whole  # noqa: E402
from megatron_ktr.evaluation.hf_parity import (  # noqa: E402
    NUM_RESPONSE_TOKENS,
    GradientDifference,
    LogprobSum,
    VerificationInput,
    build_input,
    draw_test_pattern,
    max_abs_difference,
    max_relative_difference,
    run_hugging_face,
    write_dump,
)
from megatron_ktr.files.checksums import require_intact  # noqa: E402
from megatron_ktr.files.intact_checkpoint import require_intact_checkpoint  # noqa: E402
from megatron_ktr.files.json_files import read_json_object  # noqa: E402
from megatron_ktr.files.torch_dist_files import TorchDistReader  # noqa: E402
from megatron_ktr.ops.main_grad import main_gradient  # noqa: E402
from megatron_ktr.policy.policy import Policy  # noqa: E402
from megatron_ktr.run.preflight import parallel_sizes  # noqa: E402
from megatron_ktr.types import BatchFacts, PackedBatch, RolloutGroup, VisualInput  # noqa: E402
from models.qwen2_5_vl.config import Qwen2_5_VLConfig  # noqa: E402
from models.qwen2_5_vl.conversion import export_hf_tensors  # noqa: E402
from models.qwen2_5_vl.dist_checkpoint import locate_tensors  # noqa: E402
from models.qwen2_5_vl.dist_weights import load_megatron_weights  # noqa: E402
from models.qwen2_5_vl.hf_weights import canonical_hf_name, open_hf_weights  # noqa: E402
from models.qwen2_5_vl.media import media_spec  # noqa: E402
from models.qwen2_5_vl.transformer_config import language_transformer_config  # noqa: E402

LOGPROB_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
REPORT_SECONDS = 10.0
"""How long other ranks leave the report of an error to rank 0; torchrun usually ends them within one second."""


@dataclass(frozen=True)
class Comparison:
    """The two differences that are reported; they are complete only on rank 0."""

    logprob_diff: float
    gradient_diff: GradientDifference

    def is_within(self, options: argparse.Namespace) -> bool:
        return self.logprob_diff <= options.logprob_tolerance and self.gradient_diff.value <= options.gradient_tolerance


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="DIR", type=Path, help="Hugging Face directory")
    parser.add_argument("--megatron", metavar="DIR", type=Path, help="Megatron checkpoint to take the weights from")
    for kind in ("video", "image"):
        parser.add_argument(
            f"--{kind}", nargs="+", metavar="FILE", dest="media", action=_AppendMedia, help=f"{kind} of the prompt"
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument(
        "--dump",
        metavar="FILE.npz",
        type=Path,
        help="write token_ids [T], position_ids [3, T], logprobs and hf_logprobs [R], pixel_values, image_grid_thw, "
        "pixel_values_videos, video_grid_thw; the response is the last R tokens",
    )
    parser.add_argument(
        "--logprob-tolerance", type=number(), default=LOGPROB_TOLERANCE, metavar="X", help="limit (1e-4)"
    )
    parser.add_argument("--gradient-tolerance", type=number(), default=GRADIENT_TOLERANCE, metavar="X", help="(1e-3)")
    layout = parser.add_argument_group("layout, as in training")
    for name in ("tensor-model-parallel-size", "pipeline-model-parallel-size"):
        layout.add_argument(f"--{name}", type=whole(), default=1, metavar="N")
    layout.add_argument("--num-layers-per-virtual-pipeline-stage", type=whole(), metavar="N")
    layout.add_argument("--sequence-parallel", action="store_true")
    layout.add_argument("--platform", default="auto", help="devices, as in training (auto)")
    layout.add_argument(
        "--transformer-impl",
        choices=TRANSFORMER_IMPLS,
        default="local",
        help="layers; local, because Transformer Engine multiplies fp32 matrices in TF32, beyond the limits here",
    )
    layout.add_argument(
        "--distributed-timeout-minutes", type=whole(), default=120, metavar="N", help="wait for rank 0 (120)"
    )
    return parser.parse_args(argv)


class _AppendMedia(argparse.Action):
    """Collects (kind, path) of --video and --image in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        kind = str(option_string).lstrip("-")
        setattr(namespace, self.dest, (getattr(namespace, self.dest) or []) + [(kind, value) for value in values])


def main(argv: Sequence[str] | None = None) -> int:
    is_within = verify(parse_arguments(argv))
    destroy_parallel()
    return 0 if is_within else 1


def verify(options: argparse.Namespace) -> bool:
    """Compares the models and reports on rank 0; every rank returns whether the differences are within the limits."""
    platform = platforms.start(options.platform)
    model_config = _check_paths(options)
    config = _config(options)
    ranks = init_parallel(
        parallel_sizes(config, num_layers=model_config.text.num_hidden_layers),
        platform=platform,
        timeout_minutes=options.distributed_timeout_minutes,
    )
    # Build the configuration here, so that a layout that does not fit is refused now and not after minutes of running
    # Hugging Face's model.
    language_transformer_config(model_config, sizes=ranks.sizes, dtype=torch.float32, options=ModelOptions.of(config))

    def prepare() -> VerificationInput | None:
        return _read_input(options, model_config) if ranks.rank == 0 else None

    item = broadcast_object(on_every_rank(prepare, ranks=ranks), group=ranks.world, source=0)
    comparison = _compare(item.group, options, config=config, model_config=model_config, ranks=ranks)
    if comparison is not None:
        _print_report(comparison, item, options)
    is_within = None if comparison is None else comparison.is_within(options)
    return broadcast_object(is_within, group=ranks.world, source=0)


def _check_paths(options: argparse.Namespace) -> Qwen2_5_VLConfig:
    """Refuses everything that can be refused without reading weights, in the same way on every rank."""
    for flag, directory in (("--hf", options.hf), ("--megatron", options.megatron)):
        if directory is not None and not directory.is_dir():
            raise UserError(f"{flag} {directory}: no such directory")
    if options.dump is not None and (options.dump.is_dir() or not options.dump.absolute().parent.is_dir()):
        raise UserError(f"--dump {options.dump}: expected a file in an existing directory")
    if int(os.environ.get("RANK", "0")) == 0:  # One rank is enough, because all ranks read the same files.
        require_intact(options.hf, option="--hf")
        if options.megatron is not None:
            require_intact_checkpoint(options.megatron, option="--megatron")
    model_config = Qwen2_5_VLConfig.from_hf(options.hf)
    # Check that no tensor is missing, because transformers would fill missing ones with random numbers.
    open_hf_weights(options.hf, config=model_config)
    if options.megatron is not None:
        locate_tensors(TorchDistReader(options.megatron), config=model_config)
    return model_config


def _config(options: argparse.Namespace) -> Config:
    return config_from_values(
        {
            "model": str(options.hf),
            "transformer_impl": options.transformer_impl,
            "params_dtype": "fp32",
            # Keep gradients whole on every replica, because the comparison reads them there.
            "use_distributed_optimizer": False,
            "tensor_model_parallel_size": options.tensor_model_parallel_size,
            "pipeline_model_parallel_size": options.pipeline_model_parallel_size,
            "num_layers_per_virtual_pipeline_stage": options.num_layers_per_virtual_pipeline_stage,
            "sequence_parallel": options.sequence_parallel,
        }
    )


def _read_input(options: argparse.Namespace, model_config: Qwen2_5_VLConfig) -> VerificationInput:
    """Loads the media, sampled and resized with the defaults of training."""
    data = DataSection()
    settings = PreprocessSettings.from_model(options.hf, **pixel_limits(data))
    sampling = FrameSampling(fps=data.video_fps, max_frames=data.video_max_frames)
    media: list[VisualInput] = []
    for kind, path in options.media or ():
        try:
            media.append(load_media(path, kind=kind, settings=settings, sampling=sampling).visual)
        except UnusableMedia as error:
            raise UserError(f"--{kind} {error}") from error
    return build_input(
        options.hf,
        media=media or [draw_test_pattern(settings)],
        spec=media_spec(model_config, patchify=settings.patchify),
        vocab_size=model_config.text.vocab_size,
        vision_start_id=model_config.vision_start_token_id,
        vision_end_id=model_config.vision_end_token_id,
        pad_id=_pad_token_id(options.hf),
    )


def _pad_token_id(hf_dir: Path) -> int | None:
    values = read_json_object(hf_dir / "config.json")
    return (values.get("text_config") or values).get("pad_token_id", values.get("pad_token_id"))


def _compare(
    group: RolloutGroup,
    options: argparse.Namespace,
    *,
    config: Config,
    model_config: Qwen2_5_VLConfig,
    ranks: ParallelGroups,
) -> Comparison | None:
    """Runs Hugging Face's model on rank 0 and frees it before our model is built; returns None on other ranks."""
    patchify = PreprocessSettings.from_model(options.hf).patchify
    batch = pack_groups(
        [group],
        view="intact",
        media=media_spec(model_config, patchify=patchify),
        pad_to_multiple=ranks.sizes.tensor if ranks.sizes.sequence_parallel else 1,
    )
    kinds = [medium.kind for medium in group.prompt.media]
    device = platforms.current().device

    def ask_hugging_face() -> Any:
        if ranks.rank != 0:
            return None
        return run_hugging_face(options.hf, batch, kinds=kinds, device=device, rename=canonical_hf_name)

    theirs = on_every_rank(ask_hugging_face, ranks=ranks)
    platforms.current().empty_cache()
    policy = Policy(
        options.hf, options=PolicyOptions.of(config), ranks=ranks, platform=platforms.current(), num_steps=1
    )
    if options.megatron is not None:
        _replace_weights(policy, options.megatron)
    ours_R = _forward_backward(policy, group, batch)
    gradients = export_hf_tensors(policy.bare_chunks, ranks=ranks, tensor_of=main_gradient, gather_to="source")
    if ranks.rank != 0:
        for _ in gradients:  # every rank must take part in the gathering
            pass
        return None
    if options.dump is not None:
        write_dump(options.dump, batch, kinds=kinds, ours_R=ours_R, theirs_R=theirs.logprob_R)
    return Comparison(
        logprob_diff=max_abs_difference(ours_R, theirs.logprob_R),
        gradient_diff=max_relative_difference(gradients, theirs.gradients),
    )


@torch.no_grad()
def _replace_weights(policy: Policy, directory: Path) -> None:
    # A weight that the checkpoint fails to fill must not be mistaken for Hugging Face's weight.
    for chunk in policy.bare_chunks:
        for parameter in chunk.parameters():
            parameter.zero_()
    load_megatron_weights(policy.bare_chunks, directory)


def _forward_backward(policy: Policy, group: RolloutGroup, batch: PackedBatch) -> Tensor:
    """Returns the log-probs [R] of the response on every rank; the gradients of their sum are then in ``main_grad``."""
    sizes = policy.ranks.sizes
    # The interleaved schedule needs one micro-batch per pipeline rank, so the batch is copied. Each copy, and each
    # replica, contributes its share of the loss.
    num_copies = sizes.pipeline if (sizes.virtual_pipeline or 1) > 1 else 1
    result = policy.backward(
        [MicroBatch((group,), batch)] * num_copies,
        objective=LogprobSum(),
        facts=BatchFacts(num_responses=policy.ranks.data_size * num_copies),
    )
    return policy.from_last_stage(result.scores[0].policy_logprob_R.cpu() if result.scores else None)


def _print_report(comparison: Comparison, item: VerificationInput, options: argparse.Namespace) -> None:
    if item.note:
        print(f"note: random text around the media: {item.note}", file=sys.stderr, flush=True)
    logprob, gradient = comparison.logprob_diff, comparison.gradient_diff
    if options.json:
        values = {
            # JSON has no infinity, so write null; the exit code is 1.
            "max_abs_logprob_diff": logprob if math.isfinite(logprob) else None,
            "max_rel_grad_diff": gradient.value if math.isfinite(gradient.value) else None,
            "num_response_tokens": NUM_RESPONSE_TOKENS,
            "tensor_model_parallel_size": options.tensor_model_parallel_size,
            "pipeline_model_parallel_size": options.pipeline_model_parallel_size,
            "sequence_parallel": options.sequence_parallel,
        }
        print(json.dumps(values), flush=True)
    else:
        prompt = item.group.prompt
        shown = ", ".join(f"{m.kind} {m.source} {'x'.join(map(str, m.grid_thw))} patches" for m in prompt.media)
        print(
            f"weights            {options.megatron or options.hf}, against {options.hf} in Hugging Face, fp32\n"
            f"layout             tensor {options.tensor_model_parallel_size} x pipeline "
            f"{options.pipeline_model_parallel_size}{', sequence parallel' if options.sequence_parallel else ''}\n"
            f"input              {len(prompt.token_ids)} prompt tokens and {NUM_RESPONSE_TOKENS} random "
            f"response tokens; {shown}\n"
            f"log-probs          {logprob:.2e}  largest absolute difference, limit {options.logprob_tolerance:g}\n"
            f"gradients          {gradient.value:.2e}  largest relative difference, limit "
            f"{options.gradient_tolerance:g}; in {gradient.name}",
            flush=True,
        )
    if not comparison.is_within(options):
        print("FAILED: the differences exceed the limits", file=sys.stderr, flush=True)
    elif not options.json:
        print("passed", flush=True)


def _main_of_rank() -> int:
    """Reports bad input on rank 0 only, because all ranks find the same.

    Another rank waits until torchrun ends it. If it is not ended, it has found an error of its own, and reports that.
    """
    try:
        return main()
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(REPORT_SECONDS)
        raise


if __name__ == "__main__":
    run_cli(_main_of_rank)
