"""Saves and loads the weights of a live model as a Megatron distributed checkpoint, independent of the layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch import Tensor, nn

from megatron_ktr.distributed.checks import check_checkpoint_packages
from megatron_ktr.errors import UserError
from megatron_ktr.files.safe_pickle import UNREADABLE
from megatron_ktr.files.torch_dist_checks import check_chunks, require_tensors
from megatron_ktr.files.torch_dist_files import TorchDistReader
from megatron_ktr.stack import load_strategy
from models.qwen2_5_vl.conversion import model_config, unwrap_model
from models.qwen2_5_vl.dist_checkpoint import locate_tensors

if TYPE_CHECKING:
    from models.qwen2_5_vl.model import Qwen2_5_VLModel

VISION_MLP = "vision.decoder.layers.mlp."


def model_sharded_state_dict(model: nn.Module | Sequence[nn.Module]) -> dict[str, Any]:
    """megatron-core's sharded state of one chunk (``{"model": ...}``) or several (``{"model0": ..., ...}``).

    The contents of a checkpoint must not depend on the layout, but core would store the vision MLP with the padding
    for this tensor-parallel size. So each rank contributes only the unpadded part of its shard. (Core itself handles
    the padding of the vocabulary.)
    """
    chunks = list(model) if isinstance(model, Sequence) else [model]
    states = {}
    for i, chunk in enumerate(chunks):
        inner = unwrap_model(chunk)
        state = inner.sharded_state_dict()
        if inner.vision is not None:
            _trim_vision_mlp(state, inner)
            if inner.vision.tensor_group.size() != inner.tensor_group.size():
                _mark_copies(state, tensor_rank=inner.tensor_group.rank())
        states["model" if len(chunks) == 1 else f"model{i}"] = state
    return states


def _mark_copies(state: dict[str, Any], *, tensor_rank: int) -> None:
    """Marks the encoder's tensors as copies, if every tensor rank holds the whole encoder; rank 0's copy is saved."""
    for value in state.values():
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.key.startswith("vision."):
            assert isinstance(value.replica_id, tuple), "core numbers copies of a tensor by three axes"
            pipeline_copy, _, data_copy = value.replica_id
            value.replica_id = (pipeline_copy, tensor_rank, data_copy)


def _trim_vision_mlp(state: dict[str, Any], model: Qwen2_5_VLModel) -> None:
    true_size = model.model_config.vision.intermediate_size
    assert model.vision is not None, "called for a stage that has the encoder"
    group = model.vision.tensor_group
    if model.vision.config.ffn_hidden_size == true_size:
        return
    for name, value in state.items():
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.key.startswith(VISION_MLP):
            part = value.key.removeprefix(VISION_MLP)
            if part in ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight"):
                layer = _layer_offset(value)
                state[name] = _trimmed(value, layer=layer, true_size=true_size, part=part, rank=group.rank())


def _layer_offset(value: ShardedTensor | ShardedTensorFactory) -> tuple[int, int]:
    """(index of the layer, number of layers) on the stacked axis."""
    built: Any = None if isinstance(value, ShardedTensor) else value.build()
    whole = value if isinstance(value, ShardedTensor) else built[0]
    return whole.global_offset[0], whole.global_shape[0]


def _trimmed(
    value: ShardedTensor | ShardedTensorFactory, *, layer: tuple[int, int], true_size: int, part: str, rank: int
) -> ShardedTensorFactory:
    """A factory that saves the shard's unpadded rows (gate and up separately) or columns; loading restores the zeros.

    The shards are then of unequal size. Core supports that only without prepended axes, so this function makes the
    layer axis a normal axis of the tensor.
    """
    axis = 1 if part == "linear_fc2.weight" else 0
    halves = 1 if axis == 1 else 2
    data = value.data
    assert data is not None, f"{value.key} has no tensor"

    def pieces_of(tensor: Tensor) -> list[tuple[Tensor, int]]:
        """For each half of the shard: its unpadded part, and where that starts on the global axis.

        The list is empty if the shard is all padding.
        """
        shard_size = tensor.shape[axis] // halves
        start = rank * shard_size
        length = min(shard_size, true_size - start)
        return [
            (tensor.narrow(axis, half * shard_size, length), half * true_size + start)
            for half in range(halves)
            if length > 0
        ]

    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        built = []
        for piece, start in pieces_of(tensor):
            shape = list(tensor.shape)
            shape[axis] = halves * true_size
            offset = [start if i == axis else 0 for i in range(tensor.ndim)]
            built.append(
                ShardedTensor(
                    key,
                    piece.detach()[None],
                    tensor.dtype,
                    (1, *piece.shape),
                    (layer[1], *shape),
                    (layer[0], *offset),
                    axis_fragmentations=None,
                    replica_id=replica_id,
                )
            )
        return built

    def merge(loaded: list[Tensor]) -> Tensor:
        # Use the loaded dtype, not the parameter's: the fp32 optimizer state of half-precision parameters passes here.
        whole = torch.zeros_like(data, dtype=loaded[0].dtype if loaded else None)
        for (target, _), piece in zip(pieces_of(whole), loaded, strict=True):
            target.copy_(piece[0])
        return whole

    # megatron-core's annotations say that the two functions exchange a state dictionary. Its own factories also
    # exchange a list of shards and a list of what was loaded for them.
    return ShardedTensorFactory(value.key, data, cast(Any, build), cast(Any, merge), value.replica_id)


@torch.no_grad()
def load_megatron_weights(model: nn.Module | Sequence[nn.Module], directory: Path | str) -> None:
    """Fills this rank's parameters from a distributed checkpoint, converted or trained, saved in any layout.

    Every rank must call this. It does not read optimizer state; an optimizer that keeps its own copy of the parameters
    must reload them afterwards.

    Raises:
        UserError: ``directory`` is not a checkpoint, or tensors are missing or of the wrong shape.
    """
    chunks = list(model) if isinstance(model, Sequence) else [model]
    states = model_sharded_state_dict(chunks)
    locate_tensors(TorchDistReader(directory), config=model_config(chunks))
    check_chunks(Path(directory))
    for state in states.values():
        # These objects are empty in the local layers and hold FP8 scaling history in TE's. A converted checkpoint has
        # neither.
        for name in [name for name, value in state.items() if isinstance(value, ShardedObject)]:
            del state[name]
    require_plain_tensors(states, Path(directory))
    try:
        loaded: Any = dist_checkpointing.load(states, str(directory), sharded_strategy=load_strategy(str(directory)))
    except (CheckpointingException, *UNREADABLE) as error:
        raise UserError(f"{directory}: {error}") from error
    for chunk, name in zip(chunks, states, strict=True):
        result = unwrap_model(chunk).load_state_dict(loaded[name], strict=False)
        lost = [key for key in result.missing_keys if not key.endswith("_extra_state")] + result.unexpected_keys
        if lost:
            raise RuntimeError(f"parameters that the sharded state does not cover: {', '.join(lost)}")


def require_plain_tensors(states: dict[str, Any], directory: Path) -> None:
    """Checks, before megatron-core loads ``states``, that all of them are stored as tensors.

    Anything else would be unpickled, which can run arbitrary code.

    Raises:
        UserError: some are stored otherwise; the message names the file. Raised on every rank.
    """
    values = [value for value in nested_values(states) if isinstance(value, ShardedBase)]
    factories = [value for value in values if isinstance(value, ShardedTensorFactory)]
    plain = [value for value in values if not isinstance(value, ShardedTensorFactory)]
    built = [part for factory in factories for part in nested_values(factory.build())]
    require_tensors(directory, {part.key for part in (*plain, *built)})


def save_megatron_weights(model: nn.Module | Sequence[nn.Module], directory: Path | str) -> None:
    """Writes only the model as a distributed checkpoint to an existing empty directory; every rank must call this."""
    check_checkpoint_packages()
    states = model_sharded_state_dict(model)
    force_all_tensors_to_non_fp8(states)
    dist_checkpointing.save(states, str(directory))
