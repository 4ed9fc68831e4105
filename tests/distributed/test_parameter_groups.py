"""A resumed optimizer has its own groups of parameters, whatever megatron-core would take for one another.

Each case trains on the same random gradients: some steps, a checkpoint, some more; and from the checkpoint the same
again. Rates that were swapped would show in every weight.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ktr.config import config_from_values
from megatron_ktr.config.part_options import CheckpointOptions, PolicyOptions
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.distributed.optimizer_checkpoint import agreed_steps
from megatron_ktr.distributed.platform import current
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.checkpoint import Checkpoints
from megatron_ktr.run.checkpoint_state import load_sharded_state
from megatron_ktr.run.directory import step_name
from models.qwen2_5_vl.conversion import named_model_parameters
from tests.run.test_checkpoint import NoData
from tests.support.tiny import save_tiny_hf

VISION = dict(vision_lr=1e-4, lr=1e-3, min_lr=1e-4)
CASES: dict[str, dict[str, Any]] = {
    "vision lr": VISION,
    "vision lr, bf16, frozen encoder": dict(VISION, params_dtype="bf16", freeze=("vision",)),
    "vision lr, replicated optimizer": dict(VISION, use_distributed_optimizer=False),
    "vision lr, replicated optimizer, bf16": dict(
        VISION, use_distributed_optimizer=False, params_dtype="bf16", weight_decay=0.0
    ),
    "adapters": dict(lr=1e-3, lora_rank=2),
}
LAYOUTS: dict[str, ParallelSizes] = {
    "replicas": ParallelSizes(),
    "stages": ParallelSizes(pipeline=2),
}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "hf"
    save_tiny_hf(out, vision_depth=2, num_layers=2)
    return out


def build(hf_dir: Path, run_dir: Path, groups: Any, values: dict[str, Any]) -> Policy:
    defaults = dict(model=str(hf_dir), run_dir=str(run_dir), lr_warmup_steps=0, train_steps=8, prompts_per_step=2)
    config = config_from_values(defaults | values)
    return Policy(hf_dir, options=PolicyOptions.of(config), ranks=groups, platform=current(), num_steps=8)


def noise_step(policy: Policy, seed: int) -> None:
    """One optimizer step on random gradients, the same in every layout that splits no parameter."""
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    for adapters in (False, True):
        for name, parameter in named_model_parameters(policy.chunks, adapters=adapters):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            if parameter.requires_grad:
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    policy.optimizer.step()
    policy.scheduler.step(increment=1)


def resumed_and_whole(
    context,
    *,
    hf_dir: Path,
    folder: Path,
    cases: dict[str, dict[str, Any]],
    saved: ParallelSizes,
    loaded: ParallelSizes,
) -> dict[str, dict[str, float]]:
    """By case: for each weight the largest difference of the resumed from the uninterrupted run; the rates; a step."""
    found = {}
    for number, values in enumerate(cases.values()):
        run_dir = folder / str(number)
        policy = build(hf_dir, run_dir, context.init(saved), values)
        for seed in (1, 2):
            noise_step(policy, seed)
        checkpoints = Checkpoints(run_dir, policy=policy, source=NoData(), options=CheckpointOptions(resolved=""))
        checkpoints.save_and_wait(2)
        before = {name: tensor.clone() for name, tensor in policy.export()}
        for seed in (3, 4):
            noise_step(policy, seed)
        whole = {name: tensor.clone() for name, tensor in policy.export()}
        rates = settings(policy)

        resumed = build(hf_dir, run_dir, context.init(loaded), values)
        load_sharded_state(resumed, run_dir / "checkpoints" / step_name(2))
        resumed.scheduler.step(increment=2)
        for seed in (3, 4):
            noise_step(resumed, seed)
        again = dict(resumed.export())
        assert settings(resumed) == rates
        found[list(cases)[number]] = {
            "difference": max(float((whole[name] - tensor).abs().max()) for name, tensor in again.items()),
            "moved": max(float((whole[name] - before[name]).abs().max()) for name in whole),
        }
    return found


def settings(policy: Policy) -> list[dict[str, Any]]:
    names = ("lr", "weight_decay", "max_lr", "min_lr", "wd_mult", "lr_mult", "betas", "eps")
    return [{name: group[name] for name in names} for group in policy.optimizer.param_groups]


def test_a_resumed_run_keeps_the_rate_of_every_group(ranks, hf_dir, tmp_path):
    layout = ParallelSizes()
    options = dict(hf_dir=hf_dir, folder=tmp_path, cases=CASES, saved=layout, loaded=layout)
    (found,) = ranks(resumed_and_whole, world_size=1, **options)
    # bf16 resumes bit for bit, too: its fp32 main weights are in the checkpoint.
    assert {name: values["difference"] for name, values in found.items()} == dict.fromkeys(CASES, 0.0)
    assert all(values["moved"] > 1e-4 for values in found.values()), "a run that moves"


@pytest.mark.parametrize("saved, loaded", [("replicas", "stages"), ("stages", "replicas")])
def test_groups_keep_their_rates_in_another_layout(ranks, hf_dir, tmp_path, saved, loaded):
    cases = {name: CASES[name] for name in ("vision lr", "vision lr, replicated optimizer")}
    options = dict(hf_dir=hf_dir, folder=tmp_path, cases=cases, saved=LAYOUTS[saved], loaded=LAYOUTS[loaded])
    for found in ranks(resumed_and_whole, world_size=2, **options):
        for values in found.values():
            # The gradient norm that clips is a sum in another order: some 1e-7 of steps of 1e-3. A swapped rate would
            # be 1e-3 off.
            assert values["difference"] <= 1e-6 and values["moved"] > 1e-4


class LazyAdam(torch.optim.Optimizer):
    """Keeps its state as FusedAdam does: none before the first step, and the count of steps in the group."""

    def __init__(
        self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, adam_w_mode: bool, **_: Any
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = step = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - beta2)
                scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_() + group["eps"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"] / (1 - beta1**step), scale, value=-group["lr"])


def resume_lazily(context, *, hf_dir: Path, folder: Path) -> dict[str, float]:
    """Difference of a resumed from an uninterrupted run, by the step after which it was saved; bound on what moved."""
    found = {}
    with _lazy_adam():
        for is_distributed in (True, False):
            for step in (0, 2):
                folder_of_case = folder / f"{is_distributed}{step}"
                values = dict(VISION, use_distributed_optimizer=is_distributed)
                found[f"{is_distributed} {step}"] = _resume_one(context, hf_dir, folder_of_case, values, step=step)
    return found


@contextlib.contextmanager
def _lazy_adam() -> Iterator[None]:
    import megatron.core.optimizer as core
    from megatron.core.optimizer import distrib_optimizer

    patches = [(core, "Adam", LazyAdam), (core, "USING_PYTORCH_OPTIMIZER", False)]
    patches += [(distrib_optimizer, "HAVE_APEX_OR_TE", True), (distrib_optimizer, "USING_TE_OPTIMIZER", True)]
    patches += [(distrib_optimizer, "Adam", LazyAdam)]
    with contextlib.ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, value, create=True))
        yield


IDLE = {
    "first stage": dict(lora_rank=2, lr=1e-2, account_for_vision_in_pipeline_split=2),  # it has the encoder alone
    "last stage": dict(freeze=("language",), lr=1e-2),
}


def resume_with_an_idle_stage(context, *, hf_dir: Path, folder: Path) -> dict[str, float]:
    """As ``resume_lazily``, with a stage that trains nothing, by optimizer and stage."""
    found = {}
    for is_lazy in (False, True):
        with _lazy_adam() if is_lazy else contextlib.nullcontext():
            for is_distributed in (True, False):
                for name, values in IDLE.items():
                    case = f"{'lazy' if is_lazy else 'torch'} {is_distributed} {name}"
                    values = dict(values, use_distributed_optimizer=is_distributed, pipeline_model_parallel_size=2)
                    sizes = ParallelSizes(pipeline=2)
                    found[case] = _resume_one(context, hf_dir, folder / case, values, step=2, sizes=sizes)
    return found


def _resume_one(
    context, hf_dir: Path, run_dir: Path, values: dict[str, Any], *, step: int, sizes: ParallelSizes | None = None
) -> float:
    sizes = sizes or ParallelSizes()
    policy = build(hf_dir, run_dir, context.init(sizes), values)
    for seed in range(step):
        noise_step(policy, seed)
    Checkpoints(run_dir, policy=policy, source=NoData(), options=CheckpointOptions(resolved="")).save_and_wait(step)
    for seed in (3, 4):
        noise_step(policy, seed)
    whole = {name: tensor.clone() for name, tensor in policy.export()}
    resumed = build(hf_dir, run_dir, context.init(sizes), values)
    load_sharded_state(resumed, run_dir / "checkpoints" / step_name(step))
    resumed.scheduler.step(increment=step)
    for seed in (3, 4):
        noise_step(resumed, seed)
    assert agreed_steps(resumed.optimizer) == step + 2
    return max(float((whole[name] - tensor).abs().max()) for name, tensor in resumed.export())


def test_a_stage_with_nothing_to_train_loses_nobodys_count_of_steps(ranks, hf_dir, tmp_path):
    """The count that is stored must not be that of a first rank which has none; and core asserts that each has one."""
    for found in ranks(resume_with_an_idle_stage, world_size=2, hf_dir=hf_dir, folder=tmp_path):
        assert len(found) == 8 and set(found.values()) == {0.0}, found


def test_an_optimizer_without_state_before_its_first_step_can_be_saved_and_resumed(ranks, hf_dir, tmp_path):
    """FusedAdam's KeyError, without a GPU: a run whose first steps are skipped is saved all the same."""
    for found in ranks(resume_lazily, world_size=2, hf_dir=hf_dir, folder=tmp_path):
        assert found == dict.fromkeys(("True 0", "True 2", "False 0", "False 2"), 0.0)
