"""NVIDIA's apex, told by what it has: fused kernels for where Transformer Engine is absent.

The package called ``apex`` on the public Python index is an unrelated project. megatron-core tells apex by that name
(``import apex``, ``from apex.optimizers import FusedAdam``): the unrelated one, or an apex built without its CUDA
extensions, would make it choose classes that cannot be made, or break its import. So before megatron-core is imported,
what goes by the name without being able to serve is hidden, and core falls back to torch by its own rules.

What core then does itself: FusedAdam (``megatron/core/optimizer/__init__.py``), and fused scaling and norms of
gradients (``optimizer.py``, ``clip_grads.py``); Transformer Engine's first, then apex's, then torch's. Its fused norm
is a LayerNorm only; this model's RMSNorm asks here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


def hide_unusable_apex() -> bool:
    """Makes ``import apex`` fail in this process, as if nothing were installed, unless what is installed can serve
    megatron-core; true where something was hidden. Imports nothing; too late once something else has imported it."""
    if "apex" in sys.modules:
        return False
    spec = importlib.util.find_spec("apex")
    if spec is None or (
        _has(spec, "optimizers/fused_adam.py", "multi_tensor_apply/__init__.py") and _is_built("amp_C")
    ):
        return False
    # The import system's own way to say that a module is not there.
    sys.modules["apex"] = None  # type: ignore[assignment]
    return True


def fused_rms_norm() -> Callable[..., Any] | None:
    """``f(x, weight, shape, eps)`` of NVIDIA's apex; None without it, or where Transformer Engine is installed."""
    hide_unusable_apex()
    spec = importlib.util.find_spec("apex")
    is_there = (
        spec is not None
        and _has(spec, "normalization/fused_layer_norm.py")
        and _is_built("fused_layer_norm_cuda")
        and not _is_built("transformer_engine")
    )
    if not is_there:
        return None
    return getattr(importlib.import_module("apex.normalization.fused_layer_norm"), "fused_rms_norm_affine", None)


def _has(spec: ModuleSpec, *files: str) -> bool:
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return any(all((folder / name).is_file() for name in files) for folder in folders)


def _is_built(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
