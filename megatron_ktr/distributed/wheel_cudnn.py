"""Loads the whole cuDNN of the wheel before Transformer Engine can find another one, so that a process has one version.

cuDNN 9 consists of a dispatcher and sub-libraries that find each other by bare name. Transformer Engine's kernel
library names seven of them without a folder, and looks for the dispatcher on the system before it looks beside torch
(``transformer_engine/common/__init__.py``, ``_load_cuda_library``). By then torch has loaded the wheel's dispatcher. So
if the machine has a cuDNN of its own, parts of two versions end up in one process, and the first attention fails with
CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH. ``CUDNN_HOME`` alone does not help: it names the dispatcher but leaves the
sub-libraries to the loader, which takes those of the system, or finds none.

The loader does not search for a library that is loaded already. So this file loads the wheel's sub-libraries, each by
its path, in an order in which none has to look for another.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

LOADED_FIRST = ("libcudnn_graph.so", "libcudnn_ops.so")
"""The libraries that others need: all others need the first one, and two of them need the second."""
NAMED_BY_GRAPH = re.compile(rb"libcudnn_[a-z_]+\.so")


def use_wheels_cudnn(*, load: Callable[[Path], object] | None = None) -> list[Path]:
    """Loads the wheel's cuDNN, if it and Transformer Engine are installed, and returns the loaded files. Call it before
    Transformer Engine is imported.

    ``CUDNN_HOME`` and ``LD_LIBRARY_PATH`` are set for child processes; together they have the same effect in children
    that do not call this function. If ``CUDNN_HOME`` names another folder, that is the user's choice and nothing is
    done. A library that cannot be loaded is named in a warning; the code that needs it will fail with details.
    """
    folder = wheels_folder()
    if folder is None or importlib.util.find_spec("transformer_engine") is None:
        return []
    if os.environ.setdefault("CUDNN_HOME", str(folder.parent)) != str(folder.parent):
        return []
    places = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    if str(folder) not in places:
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([str(folder), *filter(None, places)])
    loaded = []
    for path in libraries(folder):
        try:
            (load or _load)(path)
        except OSError as error:
            warnings.warn(f"cuDNN: {path.name} beside torch cannot be loaded ({error})", stacklevel=2)
        else:
            loaded.append(path)
    return loaded


def wheels_folder() -> Path | None:
    """The folder ``lib`` of the package ``nvidia-cudnn-cu13`` (or that of another CUDA); None if it is not
    installed."""
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    places = [] if spec is None else [Path(place) / "lib" for place in spec.submodule_search_locations or ()]
    return next((place for place in places if libraries(place)), None)


def libraries(folder: Path) -> list[Path]:
    """Every cuDNN library in ``folder``, in an order in which they can be loaded; the dispatcher is last."""
    found = sorted(folder.glob("libcudnn*.so.[0-9]*"))
    rank = {name: place - len(LOADED_FIRST) for place, name in enumerate(LOADED_FIRST)}
    return sorted(found, key=lambda path: (rank.get(_base(path), 0), _base(path) == "libcudnn.so", path.name))


def missing_libraries(folder: Path) -> list[str]:
    """The libraries that the folder's graph library needs and that are not beside it. The loader would take the
    system's copies of them."""
    by_base = {_base(path): path for path in libraries(folder)}
    if "libcudnn_graph.so" not in by_base:
        return []
    named = set(NAMED_BY_GRAPH.findall(by_base["libcudnn_graph.so"].read_bytes()))
    return sorted(name.decode() for name in named if name.decode() not in by_base)


def _base(path: Path) -> str:
    """``libcudnn_ops.so`` of ``libcudnn_ops.so.9``."""
    return path.name.partition(".so")[0] + ".so"


def _load(path: Path) -> object:
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
