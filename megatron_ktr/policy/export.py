"""What a policy exports: weights for rollout engines, and the directory that is written at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from megatron_ktr.distributed.groups import ParallelGroups
from models.qwen2_5_vl.conversion import GatherTo, export_hf_tensors, save_hf
from models.qwen2_5_vl.lora import LoraSettings, merged_weights, save_adapters
from models.qwen2_5_vl.model import Qwen2_5_VLModel


def export_weights(
    chunks: Sequence[Qwen2_5_VLModel],
    *,
    ranks: ParallelGroups,
    tensor_of: Callable[[Tensor], Tensor | None] | None,
    gather_to: GatherTo,
    with_vision: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Streams the weights of the bare chunks (``export_hf_tensors``) with adapters merged, with or without the vision
    encoder."""
    value_of = tensor_of or merged_weights(chunks)
    encoders = [chunk.vision for chunk in chunks if chunk.vision is not None and not with_vision]
    left_out = {id(parameter) for encoder in encoders for parameter in encoder.parameters()}
    yield from export_hf_tensors(
        chunks,
        ranks=ranks,
        tensor_of=lambda parameter: None if id(parameter) in left_out else value_of(parameter),
        gather_to=gather_to,
    )


def save_export(
    chunks: Sequence[Qwen2_5_VLModel],
    directory: Path,
    *,
    ranks: ParallelGroups,
    hf_source_dir: Path,
    lora: LoraSettings | None,
    only_adapters: bool,
    chat_template: str | None = None,
) -> None:
    """Writes a directory that transformers and vLLM load. It holds the whole model with adapters merged, and all other
    files of ``hf_source_dir``, whose chat template ``chat_template`` replaces. With ``only_adapters`` it holds the
    adapters alone, to be loaded beside that model."""
    if lora is not None and only_adapters:
        save_adapters(chunks, directory, settings=lora, ranks=ranks, base=hf_source_dir)
    else:
        save_hf(
            chunks,
            directory,
            ranks=ranks,
            hf_source_dir=hf_source_dir,
            tensor_of=merged_weights(chunks),
            chat_template=chat_template,
        )
