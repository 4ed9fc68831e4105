"""Offline conversion between Hugging Face directories and Megatron distributed checkpoints, one tensor at a time.

The checkpoint holds whole tensors, unpadded, under the keys that the live model's ``sharded_state_dict`` asks for,
so that any tensor x pipeline layout can load it. Its subdirectory ``hf/`` keeps the side files (config, tokenizer,
processor, ...), so that the checkpoint alone can be converted back.

Conversion needs no process group, no GPU, and no more memory than one tensor and a slice of it. It writes checksums
for its output, and first verifies the checksums of its input if there are any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.files.checksums import require_intact, write_manifest
from megatron_ktr.files.hf_files import SafetensorsWriter, TensorInfo, copy_side_files, new_directory
from megatron_ktr.files.intact_checkpoint import require_intact_checkpoint
from megatron_ktr.files.torch_dist_checks import check_chunks
from megatron_ktr.files.torch_dist_files import TorchDistReader, TorchDistWriter
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.conversion import complete_side_files
from models.qwen2_5_vl.hf_weights import list_some, open_hf_weights
from models.qwen2_5_vl.weight_map import TE_NAMES, Shape, WeightSpec, weight_specs

SIDE_FILES = "hf"
"""The subdirectory of a Megatron checkpoint that holds the Hugging Face side files."""
LAYER_NAME = re.compile(r"(?P<block>(language|vision)\.decoder\.layers)\.(?P<layer>\d+)\.(?P<rest>.*)")
FUSED_NAMES = {plain: fused for fused, plain in TE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """The place of a Megatron tensor in a distributed checkpoint."""

    key: str
    layer: int | None
    """The tensor's index on the leading axis along which layers are stacked; None: the tensor is stored by itself."""
    num_layers: int = 1

    def offset(self, shape: Shape) -> Shape:
        zeros = (0,) * len(shape)
        return zeros if self.layer is None else (self.layer, *zeros)

    def global_shape(self, shape: Shape) -> Shape:
        return shape if self.layer is None else (self.num_layers, *shape)


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion."""

    num_tensors: int
    num_bytes: int
    out: str


def stored_tensor(spec: WeightSpec, config: Qwen2_5_VLConfig) -> StoredTensor:
    """The place of a tensor in a checkpoint.

    megatron-core stacks all layers of a block under one key. The language model's norms have Transformer Engine's
    names there.
    """
    match = LAYER_NAME.fullmatch(spec.name)
    if match is None:
        return StoredTensor(spec.name, None)
    is_language = spec.name.startswith("language.")
    rest = FUSED_NAMES.get(match["rest"], match["rest"]) if is_language else match["rest"]
    num_layers = config.text.num_hidden_layers if is_language else config.vision.depth
    return StoredTensor(f"{match['block']}.{rest}", int(match["layer"]), num_layers)


def _stored_specs(config: Qwen2_5_VLConfig) -> list[WeightSpec]:
    return [spec for spec in weight_specs(config) if not spec.is_tied_copy]


def convert_to_megatron(hf_dir: Path | str, out_dir: Path | str) -> ConversionReport:
    """Writes the weights of a Hugging Face directory, in their dtype, as a Megatron distributed checkpoint.

    Raises:
        UserError: bad input (see ``open_hf_weights``), existing target, full disk.
    """
    if not Path(hf_dir).is_dir():
        raise UserError(f"{hf_dir}: no such directory; give --hf a Hugging Face model directory")
    require_intact(hf_dir, option="--hf")
    config = Qwen2_5_VLConfig.from_hf(hf_dir)
    reader = open_hf_weights(hf_dir, config=config)
    specs = _stored_specs(config)
    num_bytes = sum(reader.infos[name].num_bytes for spec in specs for name in spec.hf_names)
    for spec in specs:
        _require_one_dtype(spec, [reader.infos[name] for name in spec.hf_names], hf_dir)
    with new_directory(out_dir, option="--out", need_bytes=num_bytes) as scratch:
        writer = TorchDistWriter(scratch)
        try:
            for spec in specs:
                place = stored_tensor(spec, config)
                writer.write(
                    place.key,
                    spec.read_shard(reader.read, spec.shape),
                    offset=place.offset(spec.shape),
                    global_shape=place.global_shape(spec.shape),
                )
            writer.finish()
        finally:
            writer.close()
        copy_side_files(hf_dir, scratch / SIDE_FILES)
        write_manifest(scratch, known=writer.digests)
    return ConversionReport(sum(len(spec.hf_names) for spec in specs), num_bytes, str(out_dir))


def _require_one_dtype(spec: WeightSpec, infos: list[TensorInfo], hf_dir: Path | str) -> None:
    if len({info.dtype for info in infos}) > 1:
        found = ", ".join(f"{info.name} {info.dtype}" for info in infos)
        raise UserError(f"{hf_dir}: tensors that Megatron stores as one must share a dtype, got {found}")


def convert_to_hf(
    megatron_dir: Path | str,
    out_dir: Path | str,
    *,
    side_files_dir: Path | str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    is_export: bool = False,
) -> ConversionReport:
    """Writes a Hugging Face directory from a Megatron checkpoint that any layout may have saved.

    Optimizer and random states in the checkpoint are ignored; padding is dropped.

    Args:
        megatron_dir: the checkpoint.
        out_dir: new directory.
        side_files_dir: the directory of config.json, tokenizer, ...; default: ``hf/`` in the checkpoint.
        max_shard_bytes: size of one safetensors file.
        is_export: side files are completed as those of a run's own export are, rather than copied byte for byte.

    Raises:
        UserError: not a checkpoint, missing, extra or misshapen tensors, existing target, full disk.
    """
    require_intact_checkpoint(Path(megatron_dir), option="--megatron")
    if side_files_dir:
        require_intact(side_files_dir, option="--hf-config")
    reader = TorchDistReader(megatron_dir)
    check_chunks(Path(megatron_dir))
    side_files = Path(side_files_dir) if side_files_dir else Path(megatron_dir) / SIDE_FILES
    if not (side_files / "config.json").is_file():
        raise UserError(f"{side_files}: no config.json there; give --hf-config a Hugging Face directory of this model")
    config = Qwen2_5_VLConfig.from_hf(side_files)
    specs = _stored_specs(config)
    places = locate_tensors(reader, config=config)
    infos = [
        TensorInfo(name, shape, reader.tensors[places[spec.name].key].properties.dtype)
        for spec in specs
        for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    ]
    num_bytes = sum(info.num_bytes for info in infos)
    with new_directory(out_dir, option="--out", need_bytes=num_bytes) as scratch:
        copy_side_files(side_files, scratch)
        if is_export:
            complete_side_files(scratch, dtype=infos[-1].dtype)
        writer = SafetensorsWriter(scratch, infos, max_shard_bytes=max_shard_bytes)
        write_manifest(scratch, known=writer.write(_hf_tensors(specs, places, reader)))
    return ConversionReport(len(infos), num_bytes, str(out_dir))


def _hf_tensors(
    specs: list[WeightSpec], places: dict[str, StoredTensor], reader: TorchDistReader
) -> Iterator[tuple[str, Tensor]]:
    for spec in specs:
        place = places[spec.name]
        shape = _stored_shape(place, reader)
        region = shape if place.layer is None else (1, *shape)
        whole = reader.read(place.key, offset=place.offset(shape), shape=region).view(shape)
        yield from zip(spec.hf_names, spec.split(whole), strict=True)


def _stored_shape(place: StoredTensor, reader: TorchDistReader) -> Shape:
    size = tuple(reader.tensors[place.key].size)
    return size if place.layer is None else size[1:]


def locate_tensors(reader: TorchDistReader, *, config: Qwen2_5_VLConfig) -> dict[str, StoredTensor]:
    """The place of each Megatron tensor, by its name in the table; layers are stacked, or have one key each.

    Raises:
        UserError: tensors of the model are missing, unexpected or of the wrong shape; the message names them. Other
            tensors (optimizer state) are not checked.
    """
    specs = _stored_specs(config)
    places: dict[str, StoredTensor] = {}
    missing = []
    for spec in specs:
        stacked, single = stored_tensor(spec, config), StoredTensor(_single_key(spec, config), None)
        place = next((place for place in (stacked, single) if place.key in reader.tensors), None)
        if place is None:
            missing.append(stacked.key)
        else:
            places[spec.name] = place
    if missing and any(key.endswith((".lora_a", ".lora_b")) for key in reader.tensors):
        raise UserError(
            f"{reader.directory} holds adapters alone (--lora-rank), beside the model that the run started from; a "
            "run's export directory holds them merged or as PEFT's"
        )
    if missing:
        missing = list(dict.fromkeys(missing))
        raise UserError(f"{reader.directory}: {len(missing)} tensors missing: {list_some(missing)}")
    known = {place.key for place in places.values()}
    extra = [key for key in reader.tensors if key.startswith(("language.", "vision.")) and key not in known]
    if extra:
        raise UserError(
            f"{reader.directory}: {len(extra)} tensors that config.json does not call for: {list_some(extra)}"
        )
    for spec in specs:
        _check_shape(spec, places[spec.name], reader)
    return places


def _single_key(spec: WeightSpec, config: Qwen2_5_VLConfig) -> str:
    """The key of the tensor in a checkpoint saved with ``non_homogeneous_layers`` (one key per layer)."""
    place = stored_tensor(spec, config)
    return place.key if place.layer is None else place.key.replace(".layers.", f".layers.{place.layer}.")


def _check_shape(spec: WeightSpec, place: StoredTensor, reader: TorchDistReader) -> None:
    size = tuple(reader.tensors[place.key].size)
    expected = place.global_shape(spec.shape)
    if size == expected:
        return
    # If a layout's tensor-parallel size does not divide an axis, the axis is saved with padding.
    axis = spec.concat_axis + (place.layer is not None)
    padded = tuple(max(n, size[i]) if i == axis else n for i, n in enumerate(expected)) if len(size) > axis else ()
    if size != padded or not spec.is_padded:
        raise UserError(f"{reader.directory}: tensor {place.key}: expected shape {expected}, got {size}")
