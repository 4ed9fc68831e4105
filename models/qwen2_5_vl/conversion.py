"""Loads Hugging Face weights into a live Megatron model and exports them again, in any parallel layout.

Both directions follow the table in ``weight_map``: every rank reads only its own slices, and export moves one tensor
at a time. The offline converter (``dist_checkpoint.py``) follows the same table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.distributed.agreement import raise_on_every_rank
from megatron_ktr.files.checksums import write_manifest
from megatron_ktr.files.hf_files import SafetensorsWriter, TensorInfo, copy_side_files, new_directory
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.fp8 import plain_tensor, set_parameter
from models.qwen2_5_vl.hf_weights import open_hf_weights
from models.qwen2_5_vl.weight_map import TE_NAMES, WeightSpec, weight_specs

if TYPE_CHECKING:
    from models.qwen2_5_vl.model import Qwen2_5_VLModel

TensorOf = Callable[[nn.Parameter], Tensor | None]
GatherTo = Literal["all", "source"]
ADAPTERS = ("lora_a", "lora_b")
"""The names of the parameters that ``lora.py`` adds to layers. They are not part of the published model, so the table
in ``weight_map`` does not list them."""


def named_model_parameters(
    model: nn.Module | Sequence[nn.Module], *, adapters: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters of a model (or of its virtual-pipeline chunks) under the names of the weight table.

    It unwraps DDP, numbers layers over the whole model, and gives Transformer Engine's fused norms their plain names.
    With ``adapters`` it yields the parameters of the adapters instead.
    """
    for chunk in model if isinstance(model, Sequence) else (model,):
        inner = unwrap_model(chunk)
        for name, parameter in inner.named_parameters():
            if (name.rpartition(".")[2] in ADAPTERS) is adapters:
                yield _table_name(inner, name), parameter


def model_config(model: nn.Module | Sequence[nn.Module]) -> Qwen2_5_VLConfig:
    """The architecture from which a model (or its first chunk) was built."""
    return unwrap_model(model[0] if isinstance(model, Sequence) else model).model_config


def unwrap_model(model: nn.Module) -> Qwen2_5_VLModel:
    """The model inside DDP and precision wrappers."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return inner


def _table_name(model: nn.Module, name: str) -> str:
    match = re.fullmatch(r"(.*\.layers\.)(\d+)\.(.*)", name)
    if match is None:
        return name
    prefix, index, rest = match.groups()
    number = getattr(model.get_submodule(prefix + index), "layer_number", int(index) + 1) - 1
    return f"{prefix}{number}.{TE_NAMES.get(rest, rest)}"


@torch.no_grad()
def load_hf_weights(model: nn.Module | Sequence[nn.Module], hf_dir: Path | str, *, ranks: Any = None) -> None:
    """Fills this rank's parameters in place from a Hugging Face directory; padding becomes zero.

    Every rank checks the whole directory, so that all ranks fail together, but reads only its own slices of tensors.
    An optimizer that keeps its own copy of the parameters (fp32 main parameters) must be created afterwards, or must
    reload them afterwards.

    Args:
        model: the model or its virtual-pipeline chunks, wrapped or not.
        ranks: ``ParallelGroups``; None means one process.

    Raises:
        UserError: tensors are missing, unexpected or of the wrong shape (the message names them), or files are damaged.
    """
    chunks = model if isinstance(model, Sequence) else (model,)
    config = model_config(chunks)
    reader = open_hf_weights(hf_dir, config=config)
    specs = {spec.name: spec for spec in weight_specs(config)}
    layout = _Layout.of(ranks)
    for name, parameter in named_model_parameters(chunks):
        spec, shape = specs[name], tuple(parameter.shape)
        index, count = layout.shard(spec, shape)
        set_parameter(parameter, spec.read_shard(reader.read, shape, index=index, count=count))


@dataclass(frozen=True)
class _Layout:
    """This rank's place in the tensor and pipeline groups; the groups are None if there is only one process."""

    tensor: dist.ProcessGroup | None = None
    pipeline: dist.ProcessGroup | None = None
    tensor_size: int = 1
    tensor_rank: int = 0
    pipeline_size: int = 1
    pipeline_rank: int = 0

    @classmethod
    def of(cls, ranks: Any) -> _Layout:
        if ranks is None:
            return cls()
        return cls(
            tensor=ranks.tensor,
            pipeline=ranks.pipeline,
            tensor_size=ranks.sizes.tensor,
            tensor_rank=ranks.tensor_rank,
            pipeline_size=ranks.sizes.pipeline,
            pipeline_rank=ranks.pipeline_rank,
        )

    @property
    def is_source(self) -> bool:
        return self.tensor_rank == self.pipeline_rank == 0

    def shard(self, spec: WeightSpec, local_shape: tuple[int, ...]) -> tuple[int, int]:
        """(index, count) of this rank's shard of a tensor; (0, 1) if the tensor is not split."""
        count = spec.num_shards(local_shape, tensor_size=self.tensor_size)
        return (self.tensor_rank, count) if count > 1 else (0, 1)


@torch.no_grad()
def export_hf_tensors(
    model: nn.Module | Sequence[nn.Module],
    *,
    ranks: Any = None,
    tensor_of: TensorOf | None = None,
    gather_to: GatherTo = "all",
    adapters: Sequence[WeightSpec] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (published Hugging Face name, whole tensor) one by one: vision, embedding, layers, norm, head.

    Collective over the tensor and pipeline groups: every rank of a replica must exhaust the iterator. Besides the
    model, at most one tensor and its shards are in memory. A tied head is not exported. Parameters kept in FP8 are
    exported in their nominal dtype, with the values that the model multiplies with.

    Args:
        model: the model or its virtual-pipeline chunks, wrapped or not.
        ranks: ``ParallelGroups``; None means one process.
        tensor_of: returns the tensor to export for a parameter, in the parameter's shape; the default is the parameter
            itself. Pass e.g. ``lambda p: p.main_grad`` to get gradients under Hugging Face names (they are complete
            only after ``finalize_model_grads``). A parameter for which it returns None is left out.
        gather_to: "all": every rank gets every tensor. "source": only the replica's source rank (tensor and pipeline
            rank 0) gets them; the other ranks take part in the collectives and yield nothing.
        adapters: a table of adapters, which are exported instead of the model (``lora.py``).
    """
    layout = _Layout.of(ranks)
    tensor_of = tensor_of or (lambda parameter: parameter)
    local = dict(named_model_parameters(model, adapters=adapters is not None))
    specs = weight_specs(model_config(model)) if adapters is None else adapters
    if unknown := sorted(set(local) - {spec.name for spec in specs}):
        raise RuntimeError(f"parameters that the table of names does not know: {', '.join(unknown)}")
    owners = _stage_and_dtype(local, tensor_of, layout)
    device = next(unwrap_model(model[0] if isinstance(model, Sequence) else model).parameters()).device
    for spec in specs:
        if spec.is_tied_copy or spec.name not in owners:
            continue
        stage, dtype = owners[spec.name]
        wants = gather_to == "all" or layout.is_source
        hf_tensors = None
        if stage == layout.pipeline_rank:
            tensor = tensor_of(local[spec.name])
            assert tensor is not None, f"{spec.name} is asked for after it was said to have a tensor"
            shard = plain_tensor(tensor.detach())
            hf_tensors = _gather_shards(spec, shard, layout, gather_to=gather_to)
        elif wants:
            hf_tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape in spec.hf_shapes)
        _move_over_pipeline(hf_tensors, stage, layout, gather_to=gather_to)
        if wants and hf_tensors is not None:
            yield from zip(spec.hf_names, hf_tensors, strict=True)


def _stage_and_dtype(
    local: dict[str, nn.Parameter], tensor_of: TensorOf, layout: _Layout
) -> dict[str, tuple[int, torch.dtype]]:
    """The pipeline stage that holds each exported tensor, and the tensor's dtype; every stage gets the same result."""
    mine = {name: tensor.dtype for name, p in local.items() if (tensor := tensor_of(p)) is not None}
    stages: list[dict[str, torch.dtype]] = [mine] * layout.pipeline_size
    if layout.pipeline_size > 1:
        dist.all_gather_object(stages, mine, group=layout.pipeline)
    owners: dict[str, tuple[int, torch.dtype]] = {}
    for stage, names in enumerate(stages):
        for name, dtype in names.items():
            owners.setdefault(name, (stage, dtype))
    return owners


def _gather_shards(
    spec: WeightSpec, shard: Tensor, layout: _Layout, *, gather_to: GatherTo
) -> tuple[Tensor, ...] | None:
    """The Hugging Face tensors of one Megatron tensor, on every tensor rank or on rank 0 (None on the others)."""
    _, count = layout.shard(spec, tuple(shard.shape))
    shards = [shard]
    if count > 1:
        shard = shard.contiguous()
        receives = gather_to == "all" or layout.tensor_rank == 0
        shards = [torch.empty_like(shard) for _ in range(count)] if receives else None
        if gather_to == "all":
            dist.all_gather(shards, shard, group=layout.tensor)
        else:
            dist.gather(shard, shards, group=layout.tensor, group_dst=0)
    if shards is None or (gather_to == "source" and layout.tensor_rank != 0):
        return None
    hf_tensors = tuple(torch.empty(shape, dtype=shard.dtype, device=shard.device) for shape in spec.hf_shapes)
    for index, piece in enumerate(shards):
        spec.write_shard(piece, hf_tensors, index=index, count=count)
    return hf_tensors


def _move_over_pipeline(
    hf_tensors: tuple[Tensor, ...] | None, stage: int, layout: _Layout, *, gather_to: GatherTo
) -> None:
    """Sends tensors from the pipeline stage that holds them to all stages ("all") or to the first one ("source")."""
    if layout.pipeline_size == 1 or hf_tensors is None:
        return
    if gather_to == "all":
        for tensor in hf_tensors:
            dist.broadcast(tensor, group=layout.pipeline, group_src=stage)
    elif stage != 0:
        # Send and receive, so that only the two ranks concerned wait for each other.
        for tensor in hf_tensors:
            if layout.pipeline_rank == stage:
                dist.send(tensor, group=layout.pipeline, group_dst=0)
            elif layout.pipeline_rank == 0:
                dist.recv(tensor, group=layout.pipeline, group_src=stage)


def save_hf(
    model: nn.Module | Sequence[nn.Module],
    out_dir: Path | str,
    *,
    ranks: Any = None,
    hf_source_dir: Path | str,
    tensor_of: TensorOf | None = None,
    max_shard_bytes: int = 5_000_000_000,
    chat_template: str | None = None,
) -> None:
    """Writes a directory that transformers and ``vllm serve`` load: the weights, and every side file of the source.

    Every rank must call this. The first replica's source rank writes tensor by tensor into a scratch directory, which
    is renamed at the end. ``dtype`` in config.json becomes the dtype of the written weights. ``tensor_of`` is as in
    ``export_hf_tensors``, and must return the parameters' dtype. ``chat_template`` takes the place of the source's.

    Raises:
        UserError: ``out_dir`` exists, or the disk is full; raised on every rank.
    """
    layout = _Layout.of(ranks)
    takes_part = ranks is None or ranks.data_rank == ranks.context_rank == 0
    failure: Exception | None = None
    if takes_part:
        infos = _export_infos(model, layout)
        tensors = export_hf_tensors(model, ranks=ranks, tensor_of=tensor_of, gather_to="source")
        if layout.is_source:
            try:
                with new_directory(
                    out_dir, option="--run-dir", need_bytes=sum(info.num_bytes for info in infos)
                ) as new:
                    copy_side_files(hf_source_dir, new, chat_template=chat_template)
                    _write_hf_directory(new, tensors, infos, max_shard_bytes=max_shard_bytes)
            except Exception as error:
                failure = error
        # After a failed write the other ranks still wait in the collectives of the remaining tensors, so go through
        # all of them.
        for _ in tensors:
            pass
    raise_on_every_rank(failure, group=None if ranks is None else ranks.world)


def _export_infos(model: nn.Module | Sequence[nn.Module], layout: _Layout) -> list[TensorInfo]:
    """Name, shape and dtype of every exported tensor, in order; collective over the pipeline group."""
    owners = _stage_and_dtype(dict(named_model_parameters(model)), lambda parameter: parameter, layout)
    return [
        TensorInfo(name, shape, owners[spec.name][1])
        for spec in weight_specs(model_config(model))
        if not spec.is_tied_copy
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    ]


def _write_hf_directory(
    directory: Path, tensors: Iterator[tuple[str, Tensor]], infos: list[TensorInfo], *, max_shard_bytes: int
) -> None:
    """Completes a directory that has all side files."""
    complete_side_files(directory, dtype=infos[-1].dtype)
    digests = SafetensorsWriter(directory, infos, max_shard_bytes=max_shard_bytes).write(tensors)
    write_manifest(directory, known=digests)


def complete_side_files(directory: Path, *, dtype: torch.dtype) -> None:
    """Makes the copied side files those of an export: config.json names the dtype of the weights that were written, and
    processor files say what they left to defaults."""
    _set_config_dtype(directory / "config.json", dtype)
    _complete_processor_files(directory)


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Sets the dtype in config.json: a bf16 run may start from an fp32 directory, and loaders trust config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for section in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if section and key in section:
                section[key] = name
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _complete_processor_files(directory: Path) -> None:
    """Adds the pixels' mean and standard deviation to processor files that rely on transformers' defaults for them.

    With a file that lacks them, ``vllm serve`` would silently skip the normalisation.
    """
    values = PreprocessSettings.from_model(directory)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = {"image_mean": list(values.image_mean), "image_std": list(values.image_std)}
        missing = {key: value for key, value in found.items() if stored.get(key) is None}
        if missing:
            path.write_text(json.dumps(stored | missing, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
