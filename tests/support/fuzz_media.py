"""A fuzzer of the decoders for the night: ``python -m tests.support.fuzz_media --seconds 3600 --seed 1 --out DIR``.

It changes bytes of small videos and pictures of many formats, and has them decoded by a worker process with limits. A
file may give frames, or be unusable for its sample. Anything else is a find: a worker that dies, takes too long or too
much, or says that the program has a mistake. Finds are written to ``--out`` with the seed in their names; a find that
is a fault of ours becomes a case of ``hostile_media.py``. The last line is a JSON object of counts.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from megatron_ktr.data.media.job import Decode
from megatron_ktr.data.media.preprocess import LoadedMedia
from megatron_ktr.data.workers.pool import WorkerPool
from tests.support.hostile_media import CASES, Case
from tests.support.media_jobs import outcome, video_job

_MOST_BYTES = 200_000
"""Larger originals would make mutations rare."""
_SECONDS, _MEMORY_BYTES = 60.0, 2_000_000_000


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Some of: single bytes changed (mostly in headers), a block zeroed, left out, doubled, or the end cut off."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        kind, size = rng.randrange(6), max(len(found), 1)
        start = rng.randrange(min(size, 600) if rng.random() < 0.6 else size)
        length = min(rng.choice([1, 4, 16, 400]), len(found) - start)
        if kind <= 2:
            for place in range(start, start + min(length, 8)):
                found[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 3:
            found[start : start + length] = bytes(length)
        elif kind == 4:
            del found[start : start + length]
        else:
            found[start:start] = found[start : start + length]
    return bytes(found[: rng.randrange(len(found))] if found and rng.random() < 0.15 else found)


def read(case: Case, path: Path, pool: WorkerPool) -> str:
    """What the file ends in: "frames", "unusable", or a find's words."""
    job = replace(video_job(path), kind=case.kind)

    def decode(decoder: Decode) -> LoadedMedia | str:
        return outcome(lambda: decoder(job))

    before = dict(pool.counts())
    try:
        said = pool.submit(decode).result()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if pool.counts() != before:
        return f"worker lost: {said}"
    return "frames" if isinstance(said, LoadedMedia) else "unusable"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for finds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    deadline, number = time.monotonic() + options.seconds, 0
    with tempfile.TemporaryDirectory() as scratch:
        originals = []
        for case in CASES:
            path = Path(scratch) / f"o {case.file}"
            case.write(path)
            if path.is_file() and 0 < path.stat().st_size <= _MOST_BYTES:
                originals.append((case, path.read_bytes()))
        pool = WorkerPool(1, timeout_seconds=_SECONDS, memory_bytes=_MEMORY_BYTES)
        while time.monotonic() < deadline:
            rng = random.Random(f"{options.seed} {number}")
            case, data = rng.choice(originals)
            path = Path(scratch) / case.file
            path.write_bytes(mutate(data, rng))
            said = read(case, path, pool)
            counts[said if said in ("frames", "unusable") else "finds"] += 1
            if said not in ("frames", "unusable"):
                print(f"seed {options.seed}, number {number}, {case.file}: {said}", file=sys.stderr, flush=True)
                (options.out / f"{options.seed} {number} {case.file}").write_bytes(path.read_bytes())
            path.unlink()
            number += 1
        pool.close()
    print(json.dumps({"seed": options.seed, "files": number, **counts}))
    return 1 if counts["finds"] else 0


if __name__ == "__main__":
    sys.exit(main())
