"""Finds NVIDIA's apex, whose fused kernels are used where Transformer Engine is absent, and hides unusable packages of
that name.

The package called ``apex`` on the public Python index is an unrelated project. megatron-core recognises apex by its
name alone (``import apex``, ``from apex.optimizers import FusedAdam``). With the unrelated package, or with an apex
built without its CUDA extensions, it would choose classes that cannot be constructed, or fail to import. So before
megatron-core is imported, an ``apex`` that is unusable is hidden; megatron-core then falls back to torch.

megatron-core itself uses a usable apex for FusedAdam (``megatron/core/optimizer/__init__.py``), and for fused scaling
and norms of gradients (``optimizer.py``, ``clip_grads.py``). It prefers Transformer Engine, then apex, then torch. Its
fused norm layer is a LayerNorm only, so this model's RMSNorm calls ``fused_rms_norm`` here.
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
    """Makes ``import apex`` fail in this process, as if it were not installed, unless megatron-core can use the
    installed one. Returns whether something was hidden. It imports nothing, and has no effect once apex has been
    imported."""
    if "apex" in sys.modules:
        return False
    spec = importlib.util.find_spec("apex")
    if spec is None or (
        _has(spec, "optimizers/fused_adam.py", "multi_tensor_apply/__init__.py") and _is_built("amp_C")
    ):
        return False
    # None in ``sys.modules`` is the import system's own sign for a module that is absent.
    sys.modules["apex"] = None  # type: ignore[assignment]
    return True


def fused_rms_norm() -> Callable[..., Any] | None:
    """apex's function ``f(x, weight, shape, eps)``; None without apex, or if Transformer Engine is installed."""
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
