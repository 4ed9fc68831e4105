"""The one door to transformers' model classes: beside vLLM they import torchvision, which has to be helped on CPU."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.errors import UserError, is_out_of_memory

_TORCHVISION_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_LIBRARIES: list[torch.library.Library] = []
"""Kept alive: an operator disappears with the library object that declared it."""


def hf_model_class() -> Any:
    """transformers' ``Qwen2_5_VLForConditionalGeneration``, in any environment."""
    make_torchvision_importable()
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration


@contextlib.contextmanager
def reading_model(model_dir: Path | str) -> Iterator[None]:
    """For what transformers does with a user's files: it raises whatever it stumbles over.

    Raises:
        UserError: names the directory, and what transformers said.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(f"model: transformers cannot read {model_dir}: {type(error).__name__}: {text}") from error


def make_torchvision_importable() -> None:
    """Declares torchvision's operators where its own native library cannot: the public index has CUDA builds only,
    whose library does not load beside a CPU torch. Nothing happens where it does, or where there is no torchvision.

    Call before the first import of torchvision, or of a transformers model, which imports it. Declared operators have
    no implementation; what is plain torch inside torchvision, such as resizing, works.
    """
    spec = importlib.util.find_spec("torchvision")
    if _LIBRARIES or spec is None or not spec.submodule_search_locations:
        return
    for native in Path(spec.submodule_search_locations[0]).glob("_C.*"):
        try:
            torch.ops.load_library(str(native))
        except OSError:
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _TORCHVISION_SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _LIBRARIES.append(library)
