"""Opens a Hugging Face directory's weights and checks them against the table of ``weight_map`` before any is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_ktr.errors import UserError
from megatron_ktr.files.hf_files import SafetensorsReader
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.weight_map import weight_specs

DERIVED_TENSORS = (".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq")
"""Endings of the names of constants that old releases stored; the model computes them."""


def canonical_hf_name(name: str) -> str:
    """The published name of a tensor: in memory, transformers 5 nests vision and language model under ``model.``.

    >>> canonical_hf_name("model.language_model.layers.0.input_layernorm.weight")
    'model.layers.0.input_layernorm.weight'
    """
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def open_hf_weights(directory: Path | str, *, config: Qwen2_5_VLConfig) -> SafetensorsReader:
    """Opens a directory's weights and checks them against the table: names and shapes must match exactly.

    Raises:
        UserError: tensors are missing, unexpected or of the wrong shape (the message names them), or the head of a tied
            model differs from the embedding.
    """
    reader = SafetensorsReader(directory, rename=canonical_hf_name)
    expected = {
        name: shape for spec in weight_specs(config) for name, shape in zip(spec.hf_names, spec.hf_shapes, strict=True)
    }
    missing = [name for name in expected if name not in reader.infos]
    extra = [name for name in reader.infos if name not in expected and not name.endswith(DERIVED_TENSORS)]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        _require_equal_head(reader)
        extra.remove("lm_head.weight")
    if missing:
        raise UserError(f"{directory}: {_count(missing, 'tensor')} missing: {list_some(missing)}{_hint(missing)}")
    if extra:
        raise UserError(
            f"{directory}: {_count(extra, 'tensor')} that config.json does not call for: {list_some(extra)}"
        )
    for name, shape in expected.items():
        if reader.infos[name].shape != shape:
            raise UserError(f"{directory}: tensor {name}: expected shape {shape}, got {reader.infos[name].shape}")
    return reader


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''}"


def list_some(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _hint(missing: Sequence[str]) -> str:
    return " (config.json says tie_word_embeddings: false)" if "lm_head.weight" in missing else ""


def _require_equal_head(reader: SafetensorsReader, rows: int = 8192) -> None:
    """Checks that a tied model's stored head, which is redundant, equals the embedding; else config.json is wrong."""
    shape = reader.infos["model.embed_tokens.weight"].shape if "model.embed_tokens.weight" in reader.infos else None
    num_rows = shape[0] if shape is not None and reader.infos["lm_head.weight"].shape == shape else None
    same = num_rows is not None
    for start in range(0, num_rows or 0, rows):
        length = min(rows, (num_rows or 0) - start)
        embedding, head = (reader.read(n, 0, start, length) for n in ("model.embed_tokens.weight", "lm_head.weight"))
        same = same and torch.equal(embedding, head)
    if not same:
        raise UserError(
            f"{reader.directory}: lm_head.weight differs from model.embed_tokens.weight, "
            "but config.json says tie_word_embeddings: true"
        )
