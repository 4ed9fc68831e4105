"""One cuDNN in a process with Transformer Engine: the wheel's, whole, before anything else is found.

cuDNN 9 is a dispatcher and sub-libraries that find each other by bare name. Transformer Engine's kernel library names
seven of them and no folder, and looks for the dispatcher on the system before it looks beside torch
(``transformer_engine/common/__init__.py``, ``_load_cuda_library``). torch has loaded the wheel's dispatcher by then. So
where the machine has a cuDNN of its own, parts of two versions end up in one process, and the first attention fails
with CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH. ``CUDNN_HOME`` alone does not help: it names the dispatcher and leaves
the sub-libraries to the loader, which takes the system's, or none where there are none.

What is loaded already is not searched for. So the wheel's sub-libraries are loaded here, each by its path, in an order
in which none has to look for another.
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
"""All others need the first, and two of them the second."""
NAMED_BY_GRAPH = re.compile(rb"libcudnn_[a-z_]+\.so")


def use_wheels_cudnn(*, load: Callable[[Path], object] | None = None) -> list[Path]:
    """Loads the wheel's cuDNN, where it and Transformer Engine are installed; gives what was loaded. To be called
    before Transformer Engine's import.

    Children are told by ``CUDNN_HOME`` and ``LD_LIBRARY_PATH`` together, which says the same to those that do not call
    this. A ``CUDNN_HOME`` that names another folder is a person's choice: nothing is done. A library that does not
    load is named in a warning; what needs it will say more.
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
    """``lib`` of the package ``nvidia-cudnn-cu13`` (or another CUDA's); None where torch brought none."""
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    places = [] if spec is None else [Path(place) / "lib" for place in spec.submodule_search_locations or ()]
    return next((place for place in places if libraries(place)), None)


def libraries(folder: Path) -> list[Path]:
    """Every cuDNN library in ``folder``, in the order in which they can be loaded; the dispatcher last."""
    found = sorted(folder.glob("libcudnn*.so.[0-9]*"))
    rank = {name: place - len(LOADED_FIRST) for place, name in enumerate(LOADED_FIRST)}
    return sorted(found, key=lambda path: (rank.get(_base(path), 0), _base(path) == "libcudnn.so", path.name))


def missing_libraries(folder: Path) -> list[str]:
    """What the folder's graph library will look for and not find beside itself: then a system's copy is taken."""
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
