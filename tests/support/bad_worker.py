"""A data worker that does what the name of the file says. It speaks the protocol of ``data/workers/child.py`` without
torch, so that it starts at once."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from typing import Any

from megatron_ktr.processes.child import LENGTH

FACTS: dict[str, Any] = {
    "shape": [2, 3, 28, 28],
    "visual": {"kind": "video", "grid_thw": [1, 2, 2], "seconds_per_grid": 1.0},
    "media": {"backend": "pyav", "num_repeated_frames": 0, "fallback_reason": "", "frame_seconds": [0.0, 0.5]},
}
FRAMES = bytes(2 * 3 * 28 * 28)


def send(answer: dict[str, Any], frames: bytes = b"") -> None:
    text = json.dumps(answer).encode()
    sys.stdout.buffer.write(LENGTH.pack(len(text)) + text + frames)
    sys.stdout.buffer.flush()


def serve(request: bytes) -> None:
    if b"sleeps" in request:
        time.sleep(3600)
    elif b"dies" in request:
        os.kill(os.getpid(), signal.SIGKILL)
    elif b"stops halfway" in request:
        send({"kind": "media", "facts": FACTS}, FRAMES[:100])
        time.sleep(3600)
    elif b"leaves" in request:
        print("no such codec", file=sys.stderr)
        os._exit(3)
    elif b"swells" in request:  # shared memory is no data segment: only a look at the process finds it
        grow()
        time.sleep(3600)
    elif b"child swells" in request:
        subprocess.run([sys.executable, __file__, "grow"])
    elif b"allocates" in request:
        send({"kind": "memory"})
    elif b"has a bug" in request:
        send({"kind": "bug", "text": "KeyError: 'x'"})
    else:
        send({"kind": "media", "facts": FACTS}, FRAMES)


def grow() -> None:
    memory = mmap.mmap(-1, 300 << 20)
    memory.write(b"x" * len(memory))
    time.sleep(3600)


if sys.argv[1] == "grow":
    grow()
if sys.argv[1] == "no start":
    raise ImportError("no module named codec")
send({"kind": "ready"})
while len(head := sys.stdin.buffer.read(LENGTH.size)) == LENGTH.size:
    serve(sys.stdin.buffer.read(LENGTH.unpack(head)[0]))
