"""Optimizer state in a distributed checkpoint: one tensor per parameter and kind of state, whatever the layout.

megatron-core's format "fully_reshardable" is that, but three of its steps do not hold, in 0.16 and in 0.19:

1. Saving gathers the data-parallel shards into one flat tensor *without* the padding between buckets, then cuts
   parameters out of it at their places *with* padding. With more than one bucket (a large model, tied embeddings over
   pipeline stages) state is stored under the wrong parameter, or zero; a log line is all there is. Here the flat
   tensor keeps the padding.
2. Loading sets every entry of a parameter's state from the checkpoint; plain torch optimizers have a ``step`` there
   that is not stored: KeyError.
3. Loading takes the settings of a parameter group from the checkpoint. 0.16 finds them by weight decay alone: groups
   that differ in their learning rate (``--vision-lr``) are taken for one another, and training goes on with swapped
   rates; without the distributed optimizer they get each other's parameters, too. 0.19 finds them by all settings, and
   still takes what it finds, so that whoever can write a checkpoint decides how a run goes on. Here no settings are
   taken on either: a resumed run has the options of the one that saved (``run_directory.check_same_run``), and builds
   its groups from them. Only the count of steps is the checkpoint's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_ktr.distributed.optimizer_state import prepare_optimizer_for_load
from megatron_ktr.errors import UserError

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
KINDS = ("param", "exp_avg", "exp_avg_sq")
IDENTIFIER = "lr_mult"
"""One of the settings that megatron-core tells groups apart by; it multiplies nothing."""


def optimizer_sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool = False
) -> dict[Any, Any]:
    """Sharded state of an Adam optimizer; also before its first step (zeros). Collective over data-parallel ranks.

    ``model_state`` is the model's sharded state, with the parameters themselves as data.
    """
    prepare_optimizer_for_load(optimizer)
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part.get_parameter_state_dp_zero = partial(_gather_state, part)
    with contextlib.ExitStack() as stack:
        if is_loading:
            # megatron-core loads the state it has just made, in order to allocate it.
            for part in _parts(optimizer):
                stack.enter_context(_told_apart(part))
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=METADATA)


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Takes what was loaded into the structure of ``optimizer_sharded_state``."""
    parts = _parts(optimizer)
    for index, part in enumerate(parts):
        own = dict(state if len(parts) == 1 else state[index])
        parameter_state = own.pop("param_state", None)
        with _told_apart(part) as settings:
            inner = own.get("optimizer", own)
            inner["param_groups"] = _with_own_settings(inner["param_groups"], settings)
            part.load_state_dict(own)
        if parameter_state is None:
            continue
        entries = [entry for entry in part.optimizer.state.values() if "step" in entry]
        steps = [entry.pop("step") for entry in entries]
        part.load_parameter_state_from_fully_reshardable(parameter_state)
        for entry, step in zip(entries, steps, strict=True):
            entry["step"] = step


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


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _gather_state(part: DistributedOptimizer, *, empty_data: bool = False, **_: Any) -> dict[Any, Any]:
    """Stands in for ``get_parameter_state_dp_zero``: per gradient buffer and kind, fp32 [elements of the buffer, with
    padding] on the host, on every rank; zeros with ``empty_data``."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(part.gbuf_ranges):
        buffer = part.buffers[index]
        ((dtype, bucket_ranges),) = ranges.items()
        flat = {kind: torch.zeros(buffer.numel, dtype=torch.float32, device="cpu") for kind in KINDS}
        if not empty_data:
            for bucket, bucket_range in zip(buffer.buckets, bucket_ranges, strict=True):
                stop = bucket.offset + bucket.grad_data.numel()
                for kind, whole in flat.items():
                    whole[bucket.offset : stop] = _gather_bucket(part, bucket, bucket_range, kind=kind)
        state[index] = {dtype: flat}
    return state


def _gather_bucket(part: DistributedOptimizer, bucket: Any, bucket_range: dict[str, Any], *, kind: str) -> Tensor:
    """One kind of state of a whole bucket, from the equal shards of all data-parallel ranks."""
    group = part.data_parallel_group
    shard = torch.zeros(bucket.grad_data.numel() // group.size(), dtype=torch.float32, device=bucket.grad_data.device)
    for parameter, places in bucket_range["param_map"].items():
        place = places["gbuf_local"]
        shard[place.start : place.end] = part._get_main_param_and_optimizer_states(parameter)[kind].detach()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    torch.distributed.all_gather(shards, shard, group=group)
    return torch.cat(shards).cpu()
