"""The only place that imports transformers' model classes. They import torchvision, which needs help on CPU."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ktr.errors import UserError, is_out_of_memory, passing_cause, unreadable

_TORCHVISION_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_LIBRARIES: list[torch.library.Library] = []
"""The library objects, kept alive because an operator disappears with the object that declared it."""


def hf_model_class() -> Any:
    """transformers' ``Qwen2_5_VLForConditionalGeneration``, in any environment."""
    make_torchvision_importable()
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration


@contextlib.contextmanager
def reading_model(model_dir: Path | str) -> Iterator[None]:
    """A context for calls in which transformers reads a user's files, because it may then raise any exception.

    Raises:
        UserError: transformers raised an exception; the message names the directory and quotes transformers.
            ``TransientError`` where an error that may pass was behind it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if (passing := passing_cause(error)) is not None:
            raise unreadable(model_dir, passing, option="model") from passing
        text = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(f"model: transformers cannot read {model_dir}: {type(error).__name__}: {text}") from error


def make_torchvision_importable() -> None:
    """Declares torchvision's operators if its own native library cannot.

    The public index has only CUDA builds of torchvision, whose library does not load with a CPU build of torch. If the
    library loads, or if torchvision is not installed, nothing is declared.

    Call this before the first import of torchvision, or of a transformers model, which imports it. The declared
    operators have no implementation; the parts of torchvision that are plain torch, such as resizing, work.
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
