"""The process that decodes for a training process: ``python -m megatron_ktr.data.workers.child LIMIT_BYTES``.

It reads requests from its standard input and answers each on its standard output, one after the other:

    request    8 bytes with the length, then a pickled ``MediaJob``, which only the training process sends
    answer     8 bytes with the length, then a JSON object; of media the bytes of the frames follow

The first answer is ``{"kind": "ready"}``. The others have the kind "media", "unusable", "user_error", "memory" or
"bug". What it or a library prints goes to its error stream, which the training process keeps for the case of its death.

It has torch, PyAV, Pillow and a decord child, but neither Megatron nor transformers, and sees no device.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import struct
import sys
import traceback
from typing import IO, Any

LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what prints must not write into the answers
    _end_with_parent()
    _limit_memory(int(sys.argv[1]))
    import torch

    from megatron_ktr.data.media.video_decord import watch_parent

    watch_parent()
    torch.set_num_threads(1)
    _send(answers, {"kind": "ready"})
    requests = sys.stdin.buffer
    while len(head := requests.read(LENGTH.size)) == LENGTH.size:
        (length,) = LENGTH.unpack(head)
        _send(answers, *_answer(pickle.loads(requests.read(length))))


def _answer(job: Any) -> tuple[dict[str, Any], memoryview]:
    from megatron_ktr.data.media.packed import pack_media
    from megatron_ktr.data.unusable import UnusableMedia
    from megatron_ktr.errors import UserError, is_out_of_memory

    nothing = memoryview(b"")
    try:
        facts, frames = pack_media(job.load())
        return {"kind": "media", "facts": facts}, frames
    except UnusableMedia as error:
        return {"kind": "unusable", "source": error.source, "reason": error.reason}, nothing
    except UserError as error:
        return {"kind": "user_error", "text": str(error)}, nothing
    except Exception as error:
        if is_out_of_memory(error):
            return {"kind": "memory"}, nothing
        return {"kind": "bug", "text": traceback.format_exc()}, nothing


def _send(answers: IO[bytes], answer: dict[str, Any], frames: memoryview | None = None) -> None:
    text = json.dumps(answer).encode()
    answers.write(LENGTH.pack(len(text)) + text)
    if frames is not None:
        answers.write(frames)
    answers.flush()


def _end_with_parent() -> None:
    """Lets the kernel kill this process when the thread that started it ends, however it ends and whatever this process
    hangs in. Without such a kernel ``watch_parent`` and the end of the requests do it."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _limit_memory(num_bytes: int) -> None:
    """Makes allocations beyond the limit fail here, before they take the memory of other processes. The training
    process watches the sum of this process and its decord child."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    except (ImportError, AttributeError, OSError, ValueError):
        return


if __name__ == "__main__":
    main()
