"""Imports megatron-core without ``torch.compile`` where torch is built for CPU alone.

megatron-core decorates its fused activations with ``torch.compile`` while it is imported. That loads the whole
compiler, which takes 2 of the 5 seconds of processor time that a command takes to start, and nothing on CPU may call
what it compiles (``platform_cpu.py``). Many modules import megatron-core before a platform is chosen, so the import
itself is where it is left out. A build of torch for GPUs imports megatron-core as ever: the platform may be the GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CORE = "megatron.core"


def import_core_eagerly() -> None:
    """From now on the first import of megatron-core compiles nothing, unless torch is built for GPUs. It imports
    nothing by itself, and has no effect once megatron-core has been imported."""
    if _CORE not in sys.modules and not any(isinstance(finder, _FindCore) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FindCore())


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Inside, ``torch.compile`` returns what it is given."""
    import torch

    compile_function = torch.compile
    torch.compile = _not_compiled
    try:
        yield
    finally:
        torch.compile = compile_function


def is_compiled(decorator: Any) -> bool:
    """Whether megatron-core's ``jit_fuser`` compiles."""
    import torch

    return decorator is torch.compile


def _not_compiled(model: Any = None, **options: Any) -> Any:
    return model if model is not None else (lambda function: function)


class _FindCore(MetaPathFinder):
    """Finds megatron-core where it is, once, and changes how it is executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _CORE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            # The loader belongs to this one import.
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)
        return spec


def _execute(execute: Any, module: ModuleType) -> None:
    import torch

    is_for_gpus = torch.version.cuda is not None or torch.version.hip is not None
    with contextlib.nullcontext() if is_for_gpus else nothing_compiled():
        execute(module)
