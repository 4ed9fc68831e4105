"""The process that decodes for a training process: ``python -m megatron_ktr.data.workers.child LIMIT_BYTES``.

It reads requests from its standard input and answers each on its standard output, one after the other:

    request    8 bytes with the length, then a pickled ``MediaJob``, which only the training process sends
    answer     8 bytes with the length, then a JSON object; of media the bytes of the frames follow

The first answer is ``{"kind": "ready"}``. The others have the kind "media", "unusable", "user_error", "memory" or
"bug". What it or a library prints goes to its error stream, which the training process keeps for the case of its death.

It has torch, PyAV, Pillow and a decord child, but neither Megatron nor transformers, and sees no device.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from typing import Any

from megatron_ktr.processes.child import end_with_parent, limit_memory, receive, send, take_pipes


def main() -> None:
    requests, answers = take_pipes()
    end_with_parent()
    limit_memory(int(sys.argv[1]))
    import torch

    from megatron_ktr.data.media.video_decord import watch_parent

    watch_parent()
    torch.set_num_threads(1)
    send(answers, {"kind": "ready"})
    while (request := receive(requests)) is not None:
        send(answers, *_answer(pickle.loads(request)))


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


if __name__ == "__main__":
    main()
