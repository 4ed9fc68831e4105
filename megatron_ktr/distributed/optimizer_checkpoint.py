"""Optimizer state in a distributed checkpoint: one tensor per parameter and kind of state, whatever the layout.

megatron-core's format "fully_reshardable" is that, but three of its steps do not hold, in 0.16 and in 0.19:

1. Saving and loading put the data-parallel shards together, the whole state of the rank's part of the model on every
   rank: 12 bytes a parameter on the host of each, and 8 on the device. (It does so *without* the padding between
   buckets, then cuts parameters out at their places *with* padding: with more than one bucket state is stored under the
   wrong parameter, or zero; a log line is all there is.) Here each rank writes and reads its shard
   (``optimizer_shards.py``).
2. Loading takes the settings of a parameter group from the checkpoint. 0.16 finds them by weight decay alone: groups
   that differ in their learning rate (``--vision-lr``) are taken for one another, and training goes on with swapped
   rates; without the distributed optimizer they get each other's parameters, too. 0.19 finds them by all settings, and
   still takes what it finds, so that whoever can write a checkpoint decides how a run goes on. Here no settings are
   taken on either: a resumed run has the options of the one that saved (``run_directory.check_same_run``), and builds
   its groups from them. Only the count of steps is the checkpoint's.
3. That count is the first rank's. A pipeline stage may have nothing to train (frozen, or without a layer under LoRA):
   FusedAdam then has counted nothing there, so the checkpoint has no count and Adam's bias correction begins anew on
   old moments; with torch's AdamW core stops at an assertion. Here all ranks agree on the count first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ktr.distributed.optimizer_shards import Shard, locate_shards, read_shards, sharded_tensors
from megatron_ktr.distributed.optimizer_state import prepare_optimizer_for_load
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from megatron_ktr.files.torch_dist_files import TorchDistReader

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
IDENTIFIER = "lr_mult"
"""One of the settings that megatron-core tells groups apart by; it multiplies nothing."""


def optimizer_sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, num_steps: int | None, is_loading: bool = False
) -> dict[Any, Any]:
    """Sharded state of an Adam optimizer; also before its first step (zeros). Views: nothing is copied.

    ``num_steps`` is ``agreed_steps``. ``model_state`` is the model's sharded state, with the parameters themselves as
    data. Of a distributed optimizer only its settings are loaded that way; its state is read by
    ``load_optimizer_state``.
    """
    prepare_optimizer_for_load(optimizer)
    with contextlib.ExitStack() as stack:
        for part in _parts(optimizer):
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(_ours_in_place(part, num_steps=num_steps))
        if is_loading:
            # megatron-core loads the state it has just made, in order to allocate it.
            for part in _parts(optimizer):
                stack.enter_context(_told_apart(part))
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=METADATA)


@contextlib.contextmanager
def _ours_in_place(part: DistributedOptimizer, *, num_steps: int | None) -> Iterator[None]:
    """Within it core's ``sharded_state_dict`` calls our two functions; a count of steps must not outlive the call."""
    replaced: Any = part  # for type checkers a method cannot be replaced
    replaced.sharded_param_state_fully_reshardable = partial(_own_state, part)
    replaced.state_dict = partial(_own_settings, part, num_steps)
    try:
        yield
    finally:
        del replaced.sharded_param_state_fully_reshardable, replaced.state_dict


def _own_state(
    part: DistributedOptimizer, model_state: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> list[Any]:
    """Stands in for ``sharded_param_state_fully_reshardable``."""
    return [] if is_loading else sharded_tensors(part, locate_shards(part, model_state))


def agreed_steps(optimizer: MegatronOptimizer) -> int | None:
    """How many steps the optimizer has taken, by those ranks that have something to train; None: none has counted yet.
    Collective over the world."""
    counted = [-1]
    for part in _parts(optimizer):
        # None around a rank without trainable parameters.
        groups = [] if part.optimizer is None else [group for group in part.optimizer.param_groups if group["params"]]
        counted += [int(group["step"]) for group in groups if group.get("step") is not None]
        states = [part.optimizer.state.get(parameter, {}) for group in groups for parameter in group["params"]]
        counted += [int(state["step"]) for state in states if "step" in state]
    most = torch.tensor(max(counted), device=current().device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most) if int(most) >= 0 else None


def _own_settings(part: DistributedOptimizer, num_steps: int | None) -> dict[str, Any]:
    """Stands in for ``state_dict``, with the count of steps that all ranks agree on."""
    if _trains(part):
        state = type(part).state_dict(part)
    else:
        own = [{name: value for name, value in group.items() if name != "params"} for group in part.param_groups]
        state: dict[str, Any] = {"optimizer": {"param_groups": own}}
        if part.grad_scaler:
            state["grad_scaler"] = part.grad_scaler.state_dict()
    if num_steps is None and isinstance(part.optimizer, torch.optim.Adam):
        num_steps = 0  # made to count from here by ``prepare_optimizer_for_load``
    if num_steps is not None:
        for group in state["optimizer"]["param_groups"]:
            group["step"] = num_steps
    return state


def optimizer_shards(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> list[list[Shard]]:
    """For each of the optimizers inside: where this rank's state belongs. To be asked before the model is loaded, which
    puts other tensors in ``model_state``."""
    return [
        locate_shards(part, model_state) if isinstance(part, DistributedOptimizer) else [] for part in _parts(optimizer)
    ]


def load_optimizer_state(
    optimizer: MegatronOptimizer, state: dict[Any, Any], *, shards: Sequence[list[Shard]], checkpoint: Path
) -> None:
    """Takes what was loaded into the structure of ``optimizer_sharded_state``, and reads ``optimizer_shards``."""
    parts = _parts(optimizer)
    has_count = False
    for index, (part, own_shards) in enumerate(zip(parts, shards, strict=True)):
        own = dict(state if len(parts) == 1 else state[index])
        own.pop("param_state", None)
        if not _trains(part) and not isinstance(part, DistributedOptimizer):
            # Nothing is stored for it; core would look for state all the same. The loss scale is everybody's.
            scaler = getattr(part, "grad_scaler", None)
            if scaler and "grad_scaler" in own:
                scaler.load_state_dict(own["grad_scaler"])
            continue
        with _told_apart(part) as settings:
            inner = own.get("optimizer", own)
            inner["param_groups"] = _with_own_settings(inner["param_groups"], settings)
            has_count = has_count or any(group.get("step") is not None for group in inner["param_groups"])
            part.load_state_dict(own)
        if isinstance(part, DistributedOptimizer):
            read_shards(part, own_shards, TorchDistReader(checkpoint))
            if not has_count and _has_moments(part):
                raise UserError(
                    f"--resume: {checkpoint} has moments of the optimizer and no count of its steps, so they cannot be "
                    "continued; it is of a version that lost the count where the first pipeline stage trains nothing"
                )


def _has_moments(part: DistributedOptimizer) -> bool:
    """Whether a step was taken: gradients that are all zero leave no trace, and no harm."""
    return any(bool(state["exp_avg"].any()) for state in part.optimizer.state.values() if "exp_avg" in state)


@contextlib.contextmanager
def _told_apart(part: MegatronOptimizer) -> Iterator[list[dict[str, Any]]]:
    """Within it each parameter group has a name of its own, by which megatron-core finds it and no other; afterwards
    the groups have the settings they had, whatever was loaded. Gives these settings, with the names."""

    def settings_of(group: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in group.items() if name not in ("params", "step")}

    own = [settings_of(group) for group in part.param_groups]
    for index, group in enumerate(part.param_groups):
        group[IDENTIFIER] = index
    try:
        yield [settings_of(group) for group in part.param_groups]
    finally:
        # Loading makes new groups.
        for group, settings in zip(part.param_groups, own, strict=True):
            group.update(settings)


def _with_own_settings(stored: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``settings`` of this run's groups, with what the checkpoint alone knows: the count of steps."""
    if len(stored) != len(settings):
        raise UserError(f"--resume: the checkpoint has {len(stored)} groups of parameters, this run {len(settings)}")
    # megatron-core keeps them equal. FusedAdam has none before its first step, and none in a group without parameters.
    steps = {int(group["step"]) for group in stored if group.get("step") is not None}
    if len(steps) > 1:
        raise UserError(
            f"--resume: the checkpoint's groups of parameters have taken different numbers of steps: {steps}"
        )
    counted = {"step": steps.pop()} if steps else {}
    # Without the distributed optimizer the numbers of the parameters are there, in the order of this run's groups.
    numbers = [{"params": group["params"]} if "params" in group else {} for group in stored]
    return [{**own, **counted, **listed} for own, listed in zip(settings, numbers, strict=True)]


def _trains(part: MegatronOptimizer) -> bool:
    return part.optimizer is not None and any(group["params"] for group in part.optimizer.param_groups)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
