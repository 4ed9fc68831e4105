"""What a checkpoint of a running training holds, and how it comes back: weights, optimizer, data, random states.

``checkpoint.py`` decides when one is written and makes it appear whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ktr.data.reshard import reshard_states
from megatron_ktr.data.source import DatasetSource
from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.distributed.optimizer_checkpoint import (
    agreed_steps,
    load_optimizer_state,
    optimizer_sharded_state,
    optimizer_shards,
)
from megatron_ktr.distributed.optimizer_shards import stored_keys
from megatron_ktr.distributed.random_states import RANDOM_STATES, read_random_states
from megatron_ktr.errors import UserError, is_transient, unreadable
from megatron_ktr.files.intact_checkpoint import FORMAT_VERSION, TRAINING_FILE
from megatron_ktr.files.listing import paths_in
from megatron_ktr.files.safe_pickle import UNREADABLE
from megatron_ktr.files.torch_dist_checks import COMMON_FILE, check_chunks, require_tensors
from megatron_ktr.files.torch_dist_files import TorchDistReader
from megatron_ktr.policy.policy import Policy
from megatron_ktr.rollout.step_source import ResumableSource
from megatron_ktr.run.checkpoint_actions import CheckpointActions
from megatron_ktr.stack import load_strategy
from models.qwen2_5_vl.dist_checkpoint import locate_tensors
from models.qwen2_5_vl.dist_weights import model_sharded_state_dict, require_plain_tensors
from models.qwen2_5_vl.lora import is_adapter

_log = logging.getLogger(__name__)


def sharded_state(policy: Policy, *, is_loading: bool = False) -> dict[str, Any]:
    """This rank's part of weights and optimizer state, as megatron-core's sharded state; nothing is copied. All ranks
    together describe the same tensors in every layout.

    If the model has adapters, only the adapters are included; the other weights are those that the run started from.
    """
    policy.wait_for_parameters()
    state = model_sharded_state_dict(policy.chunks)
    has_optimizer_state = policy.options.optimizer.optimizer != "sgd"
    # ``agreed_steps`` is collective: a rank with nothing to train calls it, too.
    num_steps = agreed_steps(policy.optimizer) if has_optimizer_state else None
    if has_optimizer_state and not getattr(policy.optimizer, "is_stub_optimizer", False):
        state["optimizer"] = optimizer_sharded_state(
            policy.optimizer, dict(state), num_steps=num_steps, is_loading=is_loading
        )
    for part in [name for name in state if name.startswith("model")]:
        # Sharded objects are not needed: they are empty on plain torch layers, and on those of Transformer Engine they
        # hold the history of FP8 scales.
        state[part] = {
            name: value
            for name, value in state[part].items()
            if not isinstance(value, ShardedObject) and (policy.lora is None or is_adapter(name))
        }
    return state


@torch.no_grad()
def load_sharded_state(policy: Policy, checkpoint: Path) -> None:
    """Fills weights and optimizer from a checkpoint of any layout. Each data-parallel rank reads a part of it."""
    state = sharded_state(policy, is_loading=True)
    parts = [name for name in state if name.startswith("model")]
    shards = optimizer_shards(policy.optimizer, {name: state[name] for name in parts}) if "optimizer" in state else []

    def require_plain() -> None:
        require_plain_tensors(state, checkpoint)
        require_tensors(checkpoint, {key for part in shards for key in stored_keys(part)})

    on_every_rank(require_plain, ranks=policy.ranks)
    try:
        strategy = FullyParallelLoadStrategyWrapper(load_strategy(str(checkpoint)), policy.ranks.data_context)
        loaded: Any = dist_checkpointing.load(state, str(checkpoint), sharded_strategy=strategy)
    except (CheckpointingException, CheckpointException, OSError, *UNREADABLE) as error:
        raise UserError(f"--resume: {checkpoint} cannot be loaded: {error}") from _cause_of(error)
    for chunk, name in zip(policy.bare_chunks, parts, strict=True):
        result = chunk.load_state_dict(loaded[name], strict=False)
        missing = [key for key in result.missing_keys if policy.lora is None or is_adapter(key)]
        lost = [key for key in missing if not key.endswith("_extra_state")] + result.unexpected_keys
        if lost:
            raise RuntimeError(f"parameters that the sharded state does not cover: {', '.join(lost)}")
    policy.vision.forget()
    optimizer = policy.optimizer

    def load_optimizer() -> None:
        # A rank that has nothing to train has no optimizer state.
        if "optimizer" in state:
            with as_user_error(checkpoint / COMMON_FILE):
                load_optimizer_state(optimizer, loaded["optimizer"], shards=shards, checkpoint=checkpoint)

    on_every_rank(load_optimizer, ranks=policy.ranks)


def _cause_of(error: BaseException) -> BaseException:
    """Of what the ranks failed by together, an error that may pass, if there is one."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return next((one for one, _ in failures.values() if is_transient(one)), error)


def restore(checkpoint: Path, *, policy: Policy, source: ResumableSource, actions: CheckpointActions) -> int:
    """Fills policy, source and random states from an intact checkpoint of any layout; returns its step. Collective.

    Raises:
        UserError: the checkpoint is of another model or of other data, or holds something else than a run writes.
    """
    ranks = policy.ranks
    training = actions.on_each_rank("read", lambda: read_training_state(checkpoint))
    with as_user_error(checkpoint / TRAINING_FILE):
        # The source comes before the weights, so that a checkpoint of other data is refused early.
        source.load_state_dict(reshard_states(training["sources"], rank=ranks.data_rank, size=ranks.data_size))
    actions.on_each_rank("read", lambda: check_tensors(policy, checkpoint))
    load_sharded_state(policy, checkpoint)
    scheduler = policy.scheduler
    scheduler.num_steps = 0
    scheduler.step(increment=training["scheduler_steps"])
    if training["layout"] == layout_of(policy):
        states = actions.on_each_rank("read", lambda: read_random_states(checkpoint))
        path = checkpoint / RANDOM_STATES
        actions.on_each_rank("read", lambda: _set_random_state(policy, states, path=path))
    elif ranks.rank == 0:
        _log.info("the layout changed since %s was saved: random states start from the seed", checkpoint)
    return int(training["step"])


def _set_random_state(policy: Policy, states: list[dict[str, Any]], *, path: Path) -> None:
    with as_user_error(path):
        try:
            policy.platform.set_rng_state(states[policy.ranks.rank])
        except RuntimeError as error:  # torch raises it for a state of another length
            raise ValueError(str(error)) from error


def layout_of(policy: Policy) -> dict[str, Any]:
    """How the ranks share the model and the data; random states continue only in the same layout."""
    ranks = policy.ranks
    return {**dataclasses.asdict(ranks.sizes), "world": ranks.world_size, "platform": policy.platform.name}


def training_state(policy: Policy, source: ResumableSource, *, step: int) -> dict[str, Any]:
    """The content of ``training.json``. Collective."""
    ranks = policy.ranks
    sources: list[Any] = [None] * ranks.data_size
    torch.distributed.all_gather_object(sources, source.state_dict(), group=ranks.data)
    return {
        "version": FORMAT_VERSION,
        "step": step,
        "layout": layout_of(policy),
        "scheduler_steps": policy.scheduler.num_steps,
        "sources": sources,
    }


def gather_random_states(policy: Policy) -> list[Any] | None:
    """The random states of all ranks, on rank 0. Collective."""
    states = [None] * policy.ranks.world_size if policy.ranks.rank == 0 else None
    torch.distributed.gather_object(policy.platform.rng_state(), states, dst=0)
    return states


def state_to_save(policy: Policy) -> tuple[dict[str, Any], dict[str, Any]]:
    """This rank's sharded tensors, and what rank 0 writes into ``common.pt``. Collective."""
    state = sharded_state(policy)
    # Weights kept in FP8 are written as plain numbers. Replacing them must come after ``sharded_state``, which finds
    # the optimizer's state by the parameters themselves.
    force_all_tensors_to_non_fp8(state)
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    assert isinstance(sharded, dict), type(sharded)  # as the state that it is made of
    return sharded, _common_of_all(policy, common)


def _common_of_all(policy: Policy, common: dict[str, Any]) -> dict[str, Any]:
    """The common state for rank 0 to write. Its optimizer settings come from the first rank that trains something,
    because ranks that train nothing have none to save."""
    ranks = policy.ranks
    settings = [None] * ranks.world_size if ranks.rank == 0 else None
    trains = any(p.requires_grad for chunk in policy.chunks for p in chunk.parameters())
    torch.distributed.gather_object(common.get("optimizer") if trains else None, settings, dst=0)
    found = next((one for one in settings or [] if one is not None), None)
    return common if found is None else common | {"optimizer": found}


def check_tensors(policy: Policy, checkpoint: Path) -> None:
    """Refuses chunks that are no plain tensors (each rank checks a part), and a checkpoint of another model."""
    reader = TorchDistReader(checkpoint)
    files = [path.name for path in paths_in(checkpoint, "*.distcp")]
    check_chunks(checkpoint, files=files[policy.ranks.rank :: policy.ranks.world_size])
    if policy.lora is None:
        locate_tensors(reader, config=policy.model_config)


def read_training_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / TRAINING_FILE
    with as_user_error(path):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise unreadable(path, error, option="--resume") from error
        missing = {"step", "layout", "scheduler_steps", "sources"} - state.keys()
        if missing:
            raise UserError(f"--resume: {path} lacks {', '.join(sorted(missing))}")
        if int(state.get("version", 1)) > FORMAT_VERSION:
            raise UserError(f"--resume: {path} was written by a later version of this program")
    return state


def require_same_data(checkpoint: Path, source: DatasetSource, *, ranks: ParallelGroups) -> None:
    """Raises ``UserError`` if the run that saved ``checkpoint`` had other data than ``source``; changes nothing."""
    training = read_training_state(checkpoint)
    with as_user_error(checkpoint / TRAINING_FILE):
        source.require_same(reshard_states(training["sources"], rank=ranks.data_rank, size=ranks.data_size))


@contextlib.contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turns errors of reading ``path`` into ``UserError``. A file that matches its checksum may still hold anything."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"--resume: {path} does not hold what a run writes there: {error!r}") from error
