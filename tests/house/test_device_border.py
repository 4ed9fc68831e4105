"""No tensor of a training step is on the wrong side of the border between host and device, as far as CPU can tell."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.device_border import DEVICE, BorderError, device_border
from tests.support.ranks import RankContext, RankPool
from tests.support.tiny import save_tiny_hf

NAMES = ("mixed", "text", "long video")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_hf(directory, num_layers=2)
    return directory


def losses_of_steps(
    context: RankContext, *, hf_dir: Path, sizes: dict[str, Any], values: dict[str, Any], has_border: bool
) -> list[float]:
    from megatron_ktr.distributed.groups import ParallelSizes
    from tests.support.steps import example_groups, run_steps

    parallel = context.init(ParallelSizes(**sizes))
    if not has_border:
        records = run_steps(parallel, hf_dir=hf_dir, rollout_groups=example_groups(*NAMES), values=values, num_steps=2)
    else:
        with device_border() as sides:
            records = run_steps(
                parallel, hf_dir=hf_dir, rollout_groups=example_groups(*NAMES), values=values, num_steps=2
            )
        assert sides.num_crossings > 50, "the border saw parameters and batches move"
    return [update.loss for record in records for update in record.updates]


CASES = {
    "video_ktr": ({}, {}),
    "adam, everything early": (
        {},
        dict(
            optimizer="adam",
            lr=1e-4,
            use_distributed_optimizer=True,
            updates_per_rollout=2,
            shift="kl",
            num_shuffles=2,
            importance_sampling="none",
            length_bonus=0.2,
        ),
    ),
    "recompute": (
        {},
        dict(
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
            recompute_vision=True,
            shuffle_unit="temporal_patch",
        ),
    ),
    "tw_grpo": ({}, dict(objective="tw_grpo", loss_aggregation="token")),
    "frozen vision": ({}, dict(freeze=("vision", "merger"), attention_impl="torch", loss_aggregation="token")),
    "tensor 2": (dict(tensor=2, sequence_parallel=True), dict(vision_parallel="frame")),
    "context 2": (dict(context=2), {}),
    "pipeline 2": (dict(pipeline=2), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_stays_on_its_side_and_computes_the_same(name: str, model: Path, ranks: RankPool) -> None:
    sizes, values = CASES[name]
    world_size = 2 if sizes else 1
    expected, found = (
        ranks(losses_of_steps, world_size, hf_dir=model, sizes=sizes, values=values, has_border=has_border)
        for has_border in (False, True)
    )
    assert found == expected


def waits_of_a_step(
    context: RankContext, *, hf_dir: Path, sizes: dict[str, Any], values: dict[str, Any], names: tuple[str, ...]
) -> dict[str, int]:
    """By function, without those of the tests' own recording, of the first step after everything is built."""
    from megatron_ktr.distributed.groups import ParallelSizes
    from tests.support.steps import example_groups, run_steps

    parallel = context.init(ParallelSizes(**sizes))
    groups = [group for index, name in enumerate(names) for group in example_groups(name, problem_suffix=str(index))]
    with device_border() as sides:
        run_steps(
            parallel,
            hf_dir=hf_dir,
            rollout_groups=groups,
            values=values,
            before=lambda policy: sides.traffic.clear(),
        )
    return {place: number for place, number in sides.waits().items() if not place.startswith("tests/")}


HEAD = "megatron_ktr/ops/token_statistics.py:backward"
"""Counts the rows that have a gradient: the one number of a micro-batch that the host needs before it can go on."""
OF_A_STEP = {
    # Counts of groups, responses, tokens and media that replicas agree on.
    "megatron_ktr/distributed/replicas.py:global_counts": 7,
    # Everything that the update has counted, at once.
    "megatron_ktr/sums.py:_read": 1,
    # Of the report, where somebody looks: key tokens, log-probs, marks.
    "megatron_ktr/trainer.py:<listcomp>": 3,
    "megatron_ktr/trainer.py:_selections": 3,
    # The gradient norm.
    "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": 1,
    "megatron/core/utils.py:local_multi_tensor_l2_norm": 1,
    # Whether any rank has found a gradient that is not finite, which decides whether all of them step.
    "megatron_ktr/policy/guarded_step.py:_is_finite_everywhere": 1,
    # What ranks tell each other: groups' metrics and the report.
    "megatron_ktr/distributed/collectives.py:broadcast_object": 4,
    "megatron_ktr/distributed/collectives.py:reduce_metrics": 8,
}
"""At most so often in a step, whatever it consists of."""


@pytest.mark.parametrize("size", ["one rank", "context 2"])
def test_the_host_waits_once_for_a_micro_batch_and_never_for_a_layer(
    size: str, model: Path, tmp_path: Path, ranks: RankPool
) -> None:
    """Four layers wait as often as two. Of two micro-batches each waits once more, in the head's backward."""
    sizes = {} if size == "one rank" else dict(context=2)
    save_tiny_hf(tmp_path, num_layers=4)
    cases = {"base": (model, ("mixed",)), "layers": (tmp_path, ("mixed",)), "micro-batches": (model, ("mixed",) * 2)}
    found = {
        name: ranks(waits_of_a_step, sizes.get("context", 1), hf_dir=hf_dir, sizes=sizes, values={}, names=names)[0]
        for name, (hf_dir, names) in cases.items()
    }
    assert found["layers"] == found["base"]
    assert found["base"].pop(HEAD) == 1 and found["micro-batches"].pop(HEAD) == 2
    assert found["micro-batches"] == found["base"]
    assert {place: number for place, number in found["base"].items() if number > OF_A_STEP.get(place, 0)} == {}


@pytest.mark.parametrize(
    "wait", ["item", "mask", "nonzero", "tolist", "tensor", "to", "unpinned", "copy_", "host index"]
)
def test_what_makes_a_host_wait_is_counted(wait: str, one_rank: object) -> None:
    from megatron_ktr.transfer import send

    host = torch.arange(3.0)
    with device_border() as sides:
        device = send(host, DEVICE)
        device[device > 1] = 0.0  # filled in, not counted
        assert sides.waits() == {} and sum(sides.traffic.values()) == 1
        if wait == "item":
            float(device.sum())
        elif wait == "mask":
            device[device > 0]
        elif wait == "nonzero":
            device.nonzero()
        elif wait == "tolist":
            device.tolist()
        elif wait == "tensor":
            torch.tensor([1.0], device=DEVICE)
        elif wait == "to":
            host.pin_memory().to(DEVICE)
        elif wait == "unpinned":
            host.to(DEVICE, non_blocking=True)
        elif wait == "copy_":
            device.copy_(host)
        else:
            device[torch.tensor([0, 1])]
        assert list(sides.waits().values()) == [1]


def test_transformers_generates_on_the_device(tmp_path: Path, one_rank: object) -> None:
    from megatron_ktr.data.synthetic import corpus
    from megatron_ktr.data.template import load_tokenizer
    from megatron_ktr.data.tiny_model import save_tiny_model
    from megatron_ktr.rollout.hf import HFEngine
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec
    from tests.rollout.test_hf_rollout import SETTINGS, _patchify, prompts_of

    save_tiny_model(tmp_path / "model", corpus=corpus(), num_layers=2, hidden_size=64, ffn_size=96)
    tokenizer = load_tokenizer(tmp_path / "model")
    media = media_spec(Qwen2_5_VLConfig.from_hf(tmp_path / "model"), patchify=_patchify)
    found = []
    for border in (contextlib.nullcontext(), device_border()):
        with border:
            engine = HFEngine(tmp_path / "model", tokenizer=tokenizer, media=media, sampling=SETTINGS)
            found.append(engine.generate(prompts_of(media, tokenizer), step=1))
    plain, behind = ([[rollout.token_ids for rollout in group.rollouts] for group in groups] for groups in found)
    assert plain == behind


@pytest.mark.parametrize("mistake", ["operation", "stack", "index into host", "numpy", "generator", "backward"])
def test_what_a_gpu_refuses_is_refused(mistake: str, one_rank: object) -> None:
    with device_border():
        host, device = torch.ones(3), torch.ones(3, device=DEVICE)
        assert (host.device.type, device.device, (device * 2).device, device.cpu().device.type) == (
            "cpu",
            DEVICE,
            DEVICE,
            "cpu",
        )
        device[torch.tensor([0, 1])] = device.new_tensor([1.0, 2.0]) * torch.tensor(3.0)
        weight = torch.ones(3, device=DEVICE, requires_grad=True)
        with pytest.raises(BorderError):
            if mistake == "operation":
                host + device
            elif mistake == "stack":
                torch.stack([device.sum(), host.sum()])
            elif mistake == "index into host":
                host[torch.tensor([0, 1], device=DEVICE)]
            elif mistake == "numpy":
                device.numpy()
            elif mistake == "generator":
                torch.randn(3, device=DEVICE, generator=torch.Generator())
            else:
                _MixesInBackward.apply(weight, host).sum().backward()


class _MixesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(host)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def steps_with_fusions(context: RankContext, *, hf_dir: Path, fuses: bool) -> Any:
    from models.qwen2_5_vl import transformer_config
    from tests.support.steps import example_groups, run_steps

    original = transformer_config.current
    # What chooses them is the platform's name; here they run uncompiled.
    transformer_config.current = lambda: SimpleNamespace(**{**vars(original()), "name": "fusing" if fuses else "cpu"})
    try:
        return run_steps(context.init(), hf_dir=hf_dir, rollout_groups=example_groups(*NAMES), num_steps=1)
    finally:
        transformer_config.current = original


def test_fusions_that_only_a_gpu_run_uses_compute_the_same(model: Path, ranks: RankPool) -> None:
    """The same formulas in another order of operations: fp32 rounding."""
    from safetensors.torch import load_file

    from tests.support.steps import compare_steps

    [fused], [plain] = (ranks(steps_with_fusions, 1, hf_dir=model, fuses=fuses) for fuses in (True, False))
    found = compare_steps(fused, plain, initial=load_file(model / "model.safetensors"))
    assert max(found.loss, found.score) < 1e-5 and max(found.gradient, found.update) < 1e-4
