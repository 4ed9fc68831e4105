"""Host seconds of a training step at 7B shapes: what a GPU would wait for, measured without one.

    python benchmarks/step/host_time.py                            the table
    python benchmarks/step/host_time.py --json --out FILE.json     the result as JSON, also into a file
    python benchmarks/step/host_time.py --context 2                as one of two context-parallel ranks

The product's Trainer, Policy and megatron-core's schedule, twice, each time with one side of a 7B step so small that
arithmetic is next to nothing:

    data     prompts, videos and responses of full size, two layers: seconds before the first operation of a model
             (``first_forward``, which a GPU idles through), in packing, and in digests of frames
    depth    28 and 32 layers as in the 7B model, narrow and on few tokens: Python and dispatch of every layer, by phase

Attention and vocabulary head, each a launch or two on a GPU, are stubs of one operation; collectives of context
parallelism only write zeros; the optimizer is left out. Processor seconds, medians over ``--repeats`` steps: numbers of
one machine, of which ratios between two versions hold elsewhere.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.harness import write_report  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from megatron_ktr.config import config_from_values  # noqa: E402
from megatron_ktr.config.part_options import PolicyOptions, StepOptions  # noqa: E402
from megatron_ktr.data.media.preprocess import PreprocessSettings  # noqa: E402
from megatron_ktr.data.random_groups import FixedSource, SyntheticSizes, TokenIds, synthetic_group  # noqa: E402
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes, init_parallel  # noqa: E402
from megatron_ktr.distributed.platform import Platform, start  # noqa: E402
from megatron_ktr.errors import run_cli  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402
from megatron_ktr.objectives import build_objective  # noqa: E402
from megatron_ktr.types import RolloutGroup  # noqa: E402

TOKENS = TokenIds(vocab_size=151_643, vision_start=151_652, vision_end=151_653, image=151_655, video=151_656)
SIZES = ("prompts", "responses", "length", "text", "frames", "height", "width", "context")


def measure(arguments: argparse.Namespace, platform: Platform) -> dict[str, Any]:
    about = {key: getattr(arguments, key) for key in SIZES}
    with _stubs():
        data = _steps(arguments, platform, num_layers=2, vision_depth=2)
        small = argparse.Namespace(**{**vars(arguments), "length": 8, "text": 20, "frames": 4})
        depth = _steps(small, platform, num_layers=28, vision_depth=32)
    found = {"data": _only(data, "first_forward", "packing", "digests"), "depth": depth}
    machine = about_machine(platform) | {"load": os.getloadavg()[0]}
    return {"point": {"model": "7B", **about}, "machine": machine, "seconds": found}


def _only(seconds: dict[str, float], *names: str) -> dict[str, float]:
    return {name: seconds[name] for name in names}


def _steps(
    arguments: argparse.Namespace, platform: Platform, *, num_layers: int, vision_depth: int
) -> dict[str, float]:
    """Medians over steps, each on new groups; the first step is left out."""
    # Imported here: these build on megatron-core, which must not be touched before the platform is started.
    from megatron_ktr.policy.vision_pass import VisionPass
    from megatron_ktr.step import scoring

    spent: dict[str, float] = {}
    first: list[float] = []
    steps: list[dict[str, float]] = []
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        trainer = _trainer(Path(scratch), arguments, platform, num_layers=num_layers, vision_depth=vision_depth)
        for module in trainer.policy.bare_chunks[0].children():
            module.register_forward_pre_hook(lambda *_: first.append(time.process_time()))
        packing = [(scoring, name, "packing") for name in ("pack_groups", "with_media")]
        for owner, name, part in (*packing, (VisionPass, "units_of", "digests")):
            stack.enter_context(mock.patch.object(owner, name, _clocked(getattr(owner, name), spent, part)))
        for step in range(arguments.repeats + 1):
            trainer.source.groups = _groups(arguments, step)
            first.clear()
            spent.clear()
            begin = time.process_time()
            with mock.patch("time.perf_counter", time.process_time):
                report = trainer.train_step(step)
            numbers = {"step": time.process_time() - begin, "first_forward": first[0] - begin, **spent}
            phases = ("seconds/pack", "seconds/vision", "seconds/score", "seconds/update")
            numbers |= {name.removeprefix("seconds/"): report.values[name] for name in phases}
            if step:
                steps.append(numbers)
    return {name: statistics.median(numbers[name] for numbers in steps) for name in steps[0]}


def _clocked(function: Any, spent: dict[str, float], name: str) -> Any:
    def run(*args: Any, **options: Any) -> Any:
        begin = time.process_time()
        try:
            return function(*args, **options)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - begin

    return run


def _groups(arguments: argparse.Namespace, step: int) -> list[RolloutGroup]:
    """Prompts with a video of their own each, and responses of unequal reward, all of one length."""
    sizes = SyntheticSizes(
        num_frames=arguments.frames,
        height=arguments.height,
        width=arguments.width,
        text_length=arguments.text,
        response_lengths=(arguments.length,) * arguments.responses,
    )
    drawn = [synthetic_group(sizes, tokens=TOKENS, seed=1000 * step + index) for index in range(arguments.prompts)]
    return [_with_logprobs(group) for group in drawn]


def _with_logprobs(group: RolloutGroup) -> RolloutGroup:
    """As an engine records them."""
    rollouts = (replace(one, sampler_logprobs=(-0.5,) * len(one.token_ids)) for one in group.rollouts)
    return replace(group, rollouts=tuple(rollouts))


def _trainer(
    scratch: Path, arguments: argparse.Namespace, platform: Platform, *, num_layers: int, vision_depth: int
) -> Any:
    from megatron_ktr.policy.policy import Policy
    from megatron_ktr.trainer import Trainer
    from models.qwen2_5_vl.attention import PrefixCoreAttention
    from models.qwen2_5_vl.context import ContextRanks
    from models.qwen2_5_vl.media import media_spec
    from models.qwen2_5_vl.model import build_model
    from models.qwen2_5_vl.published import to_hf_config

    class RandomPolicy(Policy):
        def _load_model(self, hf_dir: Path) -> list[Any]:
            chunks = build_model(self.model_config, ranks=self.ranks, options=self.options.build, dtype=self.dtype)
            for chunk in chunks:
                if arguments.context > 1:
                    chunk.context = ContextRanks(_Ranks(arguments.context), multiple=1)
                for module in chunk.modules():
                    if isinstance(module, PrefixCoreAttention):
                        module.impl = "varlen"
            return chunks

    model_config = _narrow(num_layers=num_layers, vision_depth=vision_depth)
    (scratch / "config.json").write_text(to_json(to_hf_config(model_config)))
    config = config_from_values(
        dict(
            model=str(scratch),
            platform=platform.name,
            prompts_per_step=arguments.prompts,
            micro_batch_groups=1,
            use_distributed_optimizer=False,
            num_generations=arguments.responses,
            train_steps=1000,
            max_response_length=arguments.length,
        )
    )
    ranks: ParallelGroups = init_parallel(ParallelSizes(), platform=platform)
    optimizer = SimpleNamespace(
        param_groups=[{"lr": 0.0}], step=lambda: (True, 1.0, 0), zero_grad=lambda: None, scale_loss=lambda loss: loss
    )
    with (
        mock.patch("megatron_ktr.policy.policy.build_optimizer", lambda *_, **__: optimizer),
        mock.patch("megatron_ktr.policy.policy.build_scheduler", lambda *_, **__: mock.Mock()),
    ):
        policy = RandomPolicy(scratch, options=PolicyOptions.of(config), ranks=ranks, platform=platform, num_steps=1000)
    objective = build_objective(config.objective, reward=config.reward)
    if objective.needs_reference:
        policy.add_reference()
    media = media_spec(model_config, patchify=PreprocessSettings().patchify)
    return Trainer(
        options=StepOptions.of(config), policy=policy, source=FixedSource([]), objective=objective, media=media
    )


def _narrow(*, num_layers: int, vision_depth: int) -> Any:
    """The 7B model in the number of its heads, its windows and its token ids; thin, with as many layers as asked."""
    from models.qwen2_5_vl.published import PUBLISHED_CONFIGS

    whole = PUBLISHED_CONFIGS["7B"]
    text = replace(
        whole.text, hidden_size=224, intermediate_size=32, num_hidden_layers=num_layers, mrope_section=(2, 1, 1)
    )
    vision = replace(whole.vision, hidden_size=64, intermediate_size=32, out_hidden_size=224, depth=vision_depth)
    vision = replace(vision, fullatt_block_indexes=tuple(range(7, vision_depth, 8)) or (1,))
    return replace(whole, text=text, vision=vision)


class _Ranks:
    """A group whose other ranks nobody waits for."""

    def __init__(self, number: int) -> None:
        self._number = number

    def size(self) -> int:
        return self._number

    def rank(self) -> int:
        return 0


class _StubHead:
    """``token_statistics_interface.Implementation``, of one operation: every log-prob is 0."""

    def forward(self, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, plan: Any, others: Any = ()) -> Tensor:
        found_NR = hidden_RD.new_zeros(4 + 4 * len(others), len(hidden_RD), dtype=torch.float32)
        found_NR[1::4] = 1.0
        return found_NR

    def backward(self, hidden_RD: Tensor, weight_VD: Tensor, gradient: Any, plan: Any, sums: Any) -> None:
        return None


def _stub_sdpa(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return q * 1


def _stub_forward(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    return torch.zeros_like(q), q.new_empty(q.shape[1], q.shape[0]), (q, q)


def _stub_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def _stub_collective(output: Tensor, given: Tensor, **_: Any) -> None:
    if output.numel() == given.numel():  # a group of one rank
        output.copy_(given.view_as(output))
    else:
        output.zero_()


@contextmanager
def _stubs() -> Iterator[None]:
    """In place of kernels wherever they have been imported, and of collectives of two tensors."""
    import megatron_ktr.policy.policy  # noqa: F401  (brings in all that is replaced)

    stubs = {
        "scaled_dot_product_attention": _stub_sdpa,
        "varlen_forward": _stub_forward,
        "varlen_backward": _stub_backward,
        "can_flash_varlen": lambda q: True,
        "find_implementation": lambda *_, **__: _StubHead(),
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("megatron_ktr.ops")]
    with ExitStack() as stack:
        for name, stub in stubs.items():
            holders = [module for module in modules if hasattr(module, name)]
            assert holders, f"no module of megatron_ktr.ops has a {name} any more"
            for module in holders:
                stack.enter_context(mock.patch.object(module, name, stub))
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            stack.enter_context(mock.patch.object(torch.distributed, name, _stub_collective))
        yield


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['point']}  load {report['machine']['load']:.1f}"]
    rows = [(f"{run}: {name}", value) for run, found in report["seconds"].items() for name, value in found.items()]
    return "\n".join(lines + [f"{name:<24} {value:8.3f} s" for name, value in rows])


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="groups of this rank, one a micro-batch")
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of each response")
    parser.add_argument("--text", type=int, default=200, help="text tokens of each prompt")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--height", type=int, default=280)
    parser.add_argument("--width", type=int, default=364)
    parser.add_argument("--context", type=int, default=1, help="context-parallel ranks, of which this is one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(arguments, start("cpu"))
    text = write_report(report, out=arguments.out, figure=None, draw=_table)
    print(text if arguments.json else _table(report))


if __name__ == "__main__":
    run_cli(_main)
