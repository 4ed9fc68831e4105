"""Lets torchvision be imported beside a CPU build of torch, in the vllm environment only.

The torchvision wheel of the public index is a CUDA build: its native library does not load here, and its Python half
then fails to register shape functions for operators that nobody declared. Declaring them (without an implementation)
is enough for everything that is plain torch inside, such as resizing.
"""

from __future__ import annotations

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_LIBRARY: list[torch.library.Library] = []


def declare_torchvision_operators() -> None:
    """Call before the first import of torchvision (or of anything that imports it)."""
    if _LIBRARY:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _LIBRARY.append(library)
