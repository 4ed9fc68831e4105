"""What every child of ``process.py`` does first, and how it speaks.

    request    8 bytes with the length, then bytes that only the parent writes
    answer     8 bytes with the length, then a JSON object

The first answer is ``{"kind": "ready"}``. The parent reads JSON and nothing else, because what runs in a child may be
anybody's code.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
from collections.abc import Mapping
from typing import IO, Any

LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """(requests, answers) of a child: its standard input and output, which from then on are empty and lead to its
    error stream. What prints then writes nothing into the answers, and what reads input takes no request."""
    answers = os.fdopen(os.dup(1), "wb")
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return requests, answers


def receive(requests: IO[bytes]) -> bytes | None:
    """The next request; None when the parent has closed the pipe."""
    head = requests.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    return requests.read(length)


def send(answers: IO[bytes], answer: Mapping[str, Any], payload: memoryview | None = None) -> None:
    """Writes an answer, and ``payload`` behind it."""
    text = json.dumps(answer).encode()
    answers.write(LENGTH.pack(len(text)) + text)
    if payload is not None:
        answers.write(payload)
    answers.flush()


def end_with_parent() -> None:
    """Lets the kernel kill this process when the thread that started it ends, however it ends and whatever this process
    hangs in. Without such a kernel the end of the requests does it, between two of them."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def adopt_orphans() -> None:
    """Makes the descendants of this process its children when their own parents end, so that the parent finds and kills
    them with this process. Without such a kernel they stay behind if they have left the process group."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (AttributeError, OSError):
        return


def limit_memory(num_bytes: int) -> None:
    """Makes allocations beyond the limit fail here, before they take the memory of other processes. The parent watches
    the sum of this process and its descendants."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    except (ImportError, AttributeError, OSError, ValueError):
        return
