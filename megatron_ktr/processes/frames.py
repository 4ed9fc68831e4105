"""Where a thread is, in words: the collective it waits in, if any, and the place in this project that called it."""

from __future__ import annotations

import itertools
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import PurePath

_COMMUNICATING = ("/torch/distributed/", "/megatron/core/")
_WRAPPERS = ("wrapper", "__torch_function__")
"""Functions that only pass a call on: torch's logging of collectives, the CPU platform's substitutes."""
_OWN = ("/megatron_ktr/", "/models/qwen2_5_vl/")
_PASSES_ON = ("/megatron_ktr/distributed/",)
"""Helpers that many call: that one of them waits does not say what for."""


@dataclass(frozen=True)
class Place:
    """A point of a stack. Innermost first, it is ``function`` that ``caller`` waits for."""

    function: str
    """The innermost function, or the collective: the innermost public function of torch.distributed or megatron-core,
    ``recv_forward`` rather than ``_communicate``."""
    caller: str
    """File, line and function of this project's innermost frame, where there is one outside the helpers of
    collectives; "" if this project has no frame."""
    is_collective: bool
    """Whether ``function`` is one of torch.distributed or megatron-core, which waits for other ranks."""

    def __str__(self) -> str:
        at = f" called by {self.caller}" if self.caller and self.caller != self.function else ""
        return f"in {self.function}{at}" if self.is_collective else f"at {self.function}{at}, which is no collective"


def place_of_main_thread() -> Place:
    """Where the main thread is now. Any thread may ask."""
    main = threading.main_thread().ident
    assert main is not None
    frame = sys._current_frames().get(main)
    frames: list[tuple[str, int, str]] = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return _place(frames)


def place_of_error(error: BaseException) -> Place:
    """Where ``error`` was raised."""
    frames: list[tuple[str, int, str]] = []
    traceback: types.TracebackType | None = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append((code.co_filename, traceback.tb_lineno, code.co_name))
        traceback = traceback.tb_next
    return _place(frames[::-1])


def _place(frames: list[tuple[str, int, str]]) -> Place:
    """``frames`` holds (file, line, function), innermost first."""
    frames = [frame for frame in frames if frame[2] not in _WRAPPERS]
    if not frames:
        return Place("no Python code", "", False)
    own = [frame for frame in frames if _is_in(frame, _OWN)]
    callers = [frame for frame in own if not _is_in(frame, _PASSES_ON)] or own
    caller = _words(callers[0]) if callers else ""
    if _is_in(frames[0], _COMMUNICATING):
        inner = itertools.takewhile(lambda frame: not _is_in(frame, _OWN), frames)
        names = [frame[2] for frame in inner if _is_in(frame, _COMMUNICATING)]
        return Place(next((name for name in names if not name.startswith("_")), names[0]), caller, True)
    return Place(_words(frames[0]), caller, False)


def _is_in(frame: tuple[str, int, str], folders: tuple[str, ...]) -> bool:
    return any(folder in frame[0].replace("\\", "/") for folder in folders)


def _words(frame: tuple[str, int, str]) -> str:
    path, line, function = frame
    return f"{'/'.join(PurePath(path).parts[-2:])}:{line} ({function})"
