"""A file server or a disk that fails, at one path: whoever opens or lists it gets an error of the system."""

from __future__ import annotations

import builtins
import functools
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def failing(path: Path, code: int) -> Iterator[None]:
    """Inside, opening or looking at the file, or listing the directory ``path``, raises ``OSError`` with ``code``."""
    wanted = os.path.abspath(path)

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(name: Any = ".", *arguments: Any, **options: Any) -> Any:
            if isinstance(name, str | os.PathLike) and os.path.abspath(os.fspath(name)) == wanted:
                raise OSError(code, os.strerror(code), str(path))
            return call(name, *arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        calls = [(os, name) for name in ("open", "listdir", "scandir", "lstat")] + [(io, "open"), (builtins, "open")]
        for module, name in calls:
            patch.setattr(module, name, guarded(getattr(module, name)))
        yield
