"""Optimizer state in a distributed checkpoint: one tensor per parameter and kind of state, in every layout.

megatron-core's format "fully_reshardable" has this form, but three parts of its code are wrong or too costly, in 0.16
and in 0.19:

1. Saving and loading gather the data-parallel shards, so that every rank holds the whole state of its part of the
   model: 12 bytes per parameter on its host, and 8 on its device. (Besides, megatron-core gathers *without* the padding
   between buckets, then cuts parameters out at their positions *with* padding. With more than one bucket, state is
   stored under the wrong parameter, or as zero, and only a log line tells.) Here each rank writes and reads its own
   shard (``optimizer_shards.py``).
2. Loading takes the settings of a parameter group from the checkpoint. 0.16 matches groups by weight decay alone, so
   groups that differ in their learning rate (``--vision-lr``) are confused, and training continues with swapped rates;
   without the distributed optimizer they swap parameters, too. 0.19 matches by all settings, but still applies what it
   finds, so that anybody who can write a checkpoint controls how a run continues. Here no settings are loaded, with
   either version: a resumed run has the options of the run that saved (``run/directory.py``, ``check_same_run``), and
   builds its groups from them. Only the count of steps comes from the checkpoint.
3. The stored count is that of the first rank. A pipeline stage may have nothing to train (it is frozen, or has no layer
   with LoRA). FusedAdam then has counted no steps there, so the checkpoint has no count, and Adam's bias correction
   starts anew on old moments; with torch's AdamW, megatron-core fails an assertion. Here all ranks agree on the count
   first.
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
"""One of the settings by which megatron-core tells parameter groups apart. Despite its name it multiplies nothing."""


def optimizer_sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, num_steps: int | None, is_loading: bool = False
) -> dict[Any, Any]:
    """The sharded state of an Adam optimizer; before its first step the state is zeros. It consists of views: nothing
    is copied.

    ``num_steps`` is the result of ``agreed_steps``. ``model_state`` is the model's sharded state, with the parameters
    themselves as data. When loading, this covers only the settings of a distributed optimizer;
    ``load_optimizer_state`` reads its state.
    """
    prepare_optimizer_for_load(optimizer)
    with contextlib.ExitStack() as stack:
        for part in _parts(optimizer):
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(_ours_in_place(part, num_steps=num_steps))
        if is_loading:
            # megatron-core allocates the state by loading the state it has just made.
            for part in _parts(optimizer):
                stack.enter_context(_told_apart(part))
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=METADATA)


@contextlib.contextmanager
def _ours_in_place(part: DistributedOptimizer, *, num_steps: int | None) -> Iterator[None]:
    """Makes core's ``sharded_state_dict`` call our two functions while the context is open. They are removed
    afterwards, because the count of steps is valid for this call only."""
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
    """Replaces ``sharded_param_state_fully_reshardable``."""
    return [] if is_loading else sharded_tensors(part, locate_shards(part, model_state))


def agreed_steps(optimizer: MegatronOptimizer) -> int | None:
    """The number of steps that the optimizer has taken, according to the ranks that train something; None if no rank
    has counted a step yet. Collective over the world."""
    counted = [-1]
    for part in _parts(optimizer):
        # On a rank without trainable parameters the inner optimizer is None.
        groups = [] if part.optimizer is None else [group for group in part.optimizer.param_groups if group["params"]]
        counted += [int(group["step"]) for group in groups if group.get("step") is not None]
        states = [part.optimizer.state.get(parameter, {}) for group in groups for parameter in group["params"]]
        counted += [int(state["step"]) for state in states if "step" in state]
    most = torch.tensor(max(counted), device=current().device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most) if int(most) >= 0 else None


def _own_settings(part: DistributedOptimizer, num_steps: int | None) -> dict[str, Any]:
    """Replaces ``state_dict``; the count of steps in it is the one that all ranks agree on."""
    if _trains(part):
        state = type(part).state_dict(part)
    else:
        own = [{name: value for name, value in group.items() if name != "params"} for group in part.param_groups]
        state: dict[str, Any] = {"optimizer": {"param_groups": own}}
        if part.grad_scaler:
            state["grad_scaler"] = part.grad_scaler.state_dict()
    if num_steps is None and isinstance(part.optimizer, torch.optim.Adam):
        num_steps = 0  # ``prepare_optimizer_for_load`` has set its step tensors to 0
    if num_steps is not None:
        for group in state["optimizer"]["param_groups"]:
            group["step"] = num_steps
    return state


def optimizer_shards(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> list[list[Shard]]:
    """The places of this rank's state in the checkpoint, for each of the optimizers inside. Call it before the model is
    loaded, because loading puts other tensors into ``model_state``."""
    return [
        locate_shards(part, model_state) if isinstance(part, DistributedOptimizer) else [] for part in _parts(optimizer)
    ]


def load_optimizer_state(
    optimizer: MegatronOptimizer, state: dict[Any, Any], *, shards: Sequence[list[Shard]], checkpoint: Path
) -> None:
    """Applies ``state``, which was loaded into the structure of ``optimizer_sharded_state``. Then reads ``shards``, the
    result of ``optimizer_shards``, from the checkpoint."""
    parts = _parts(optimizer)
    has_count = False
    for index, (part, own_shards) in enumerate(zip(parts, shards, strict=True)):
        own = dict(state if len(parts) == 1 else state[index])
        own.pop("param_state", None)
        if not _trains(part) and not isinstance(part, DistributedOptimizer):
            # Nothing is stored for an optimizer that trains nothing, but megatron-core would look for its state. Only
            # the loss scale, which all ranks share, is loaded.
            scaler = getattr(part, "grad_scaler", None)
            if scaler and "grad_scaler" in own:
                scaler.load_state_dict(own["grad_scaler"])
            continue
        with _told_apart(part) as settings:
            inner = own.get("optimizer", own)
            inner["param_groups"] = _with_own_settings(inner["param_groups"], settings)
            has_count = has_count or any(group.get("step") is not None for group in inner["param_groups"])
            has_count = has_count or "common_step" in inner.get("state", {})
            if not isinstance(part, DistributedOptimizer):
                _fill_count(inner, part)
            part.load_state_dict(own)
        if isinstance(part, DistributedOptimizer):
            read_shards(part, own_shards, TorchDistReader(checkpoint))
        if not has_count and _has_moments(part):
            raise UserError(
                f"--resume: {checkpoint} has moments of the optimizer and no count of its steps, so they cannot be "
                "continued; it is of a version that lost the count where the first pipeline stage trains nothing"
            )


def _fill_count(inner: dict[str, Any], part: MegatronOptimizer) -> None:
    """Gives torch's Adam a count of steps where none is stored. megatron-core leaves out a count of 0: that of a run
    whose updates were all skipped so far, or had nothing to learn."""
    state = inner.get("state")
    if not state or "common_step" in state or not isinstance(part.optimizer, torch.optim.Adam):
        return
    counts = [group["step"] for group in inner["param_groups"] if group.get("step") is not None]
    state["common_step"] = torch.tensor(float(counts[0] if counts else 0))


def _has_moments(part: Any) -> bool:
    """Whether a step was taken, as far as the moments show. A step whose gradients were all zero does not show, but
    does no harm either."""
    return any(bool(state["exp_avg"].any()) for state in part.optimizer.state.values() if "exp_avg" in state)


@contextlib.contextmanager
def _told_apart(part: MegatronOptimizer) -> Iterator[list[dict[str, Any]]]:
    """Gives each parameter group a unique identifier while the context is open, so that megatron-core cannot confuse
    groups. Afterwards the groups have their previous settings again, whatever was loaded. Yields these settings, with
    the identifiers."""

    def settings_of(group: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in group.items() if name not in ("params", "step")}

    own = [settings_of(group) for group in part.param_groups]
    for index, group in enumerate(part.param_groups):
        group[IDENTIFIER] = index
    try:
        yield [settings_of(group) for group in part.param_groups]
    finally:
        # The groups are looked up again, because loading makes new ones.
        for group, settings in zip(part.param_groups, own, strict=True):
            group.update(settings)


def _with_own_settings(stored: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ``settings`` of this run's groups, together with the count of steps, which only the checkpoint has."""
    if len(stored) != len(settings):
        raise UserError(f"--resume: the checkpoint has {len(stored)} groups of parameters, this run {len(settings)}")
    # megatron-core keeps the counts equal. FusedAdam has none before its first step, nor in a group without parameters.
    steps = {int(group["step"]) for group in stored if group.get("step") is not None}
    if len(steps) > 1:
        raise UserError(
            f"--resume: the checkpoint's groups of parameters have taken different numbers of steps: {steps}"
        )
    counted = {"step": steps.pop()} if steps else {}
    # Without the distributed optimizer, groups also list the numbers of their parameters, in this run's order of
    # groups.
    numbers = [{"params": group["params"]} if "params" in group else {} for group in stored]
    return [{**own, **counted, **listed} for own, listed in zip(settings, numbers, strict=True)]


def _trains(part: MegatronOptimizer) -> bool:
    return part.optimizer is not None and any(group["params"] for group in part.optimizer.param_groups)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
