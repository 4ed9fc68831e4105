"""What the checksums of checkpoints cost, beside the writing and reading that they go with.

    python benchmarks/checkpoint/checksums.py [--gigabytes 1] [--repeats 5] [--directory DIR] [--json] [--out FILE]

Seconds per 10^9 bytes, the least of some repeats: hashing alone (in memory, by several hashes), writing a file and
writing it through ``HashingFile`` (both until it is on the disk), reading a file and verifying it, from the disk and
from the system's memory. The ratios are what counts: how much longer writing and reading take with checksums. On a disk
that others use, the first ratios are noisy; hashing over writing, or reading, is the most that it can add.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import xxhash  # noqa: E402

from benchmarks.harness import write_report  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from megatron_ktr.distributed import platform as platforms  # noqa: E402
from megatron_ktr.errors import UserError, run_cli  # noqa: E402
from megatron_ktr.files.checksums import HashingFile, file_digest  # noqa: E402

PIECE_BYTES = 64_000_000
"""A weight matrix of a large model: what ``torch.save`` hands to the file at once."""
HASHES: dict[str, Callable[[Any], Any]] = {
    "xxh3_128": xxhash.xxh3_128,
    "xxh3_64": xxhash.xxh3_64,
    "xxh64": xxhash.xxh64,
    "crc32": zlib.crc32,
    "blake2b": hashlib.blake2b,
    "sha256": hashlib.sha256,
}


def seconds_of(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def write(path: Path, pieces: list[Any], *, is_hashed: bool) -> None:
    with open(path, "wb") as opened:
        file = HashingFile(opened) if is_hashed else opened
        for piece in pieces:
            file.write(piece)
        opened.flush()
        os.fsync(opened.fileno())


def read(path: Path) -> None:
    block = bytearray(4_000_000)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def forget(path: Path) -> None:
    """The system's copy of the file in memory is dropped."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(directory: Path, *, num_bytes: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    piece = torch.randint(0, 256, (PIECE_BYTES,), dtype=torch.uint8, generator=generator).numpy().data
    pieces = [piece] * max(1, num_bytes // PIECE_BYTES)
    path, times = directory / "checkpoint", dict[str, list[float]]()

    def note(name: str, seconds: float, size: int) -> None:
        times.setdefault(name, []).append(seconds / size * 1e9)

    total = len(pieces) * PIECE_BYTES
    for _ in range(repeats):
        for name, hasher in HASHES.items():
            note(f"hash {name}", seconds_of(lambda hasher=hasher: hasher(piece)), PIECE_BYTES)
        for name, is_hashed in (("write", False), ("write hashed", True)):
            note(name, seconds_of(lambda is_hashed=is_hashed: write(path, pieces, is_hashed=is_hashed)), total)
        for name, action in (("read", read), ("verify", file_digest)):
            forget(path)
            note(f"{name} from disk", seconds_of(lambda action=action: action(path)), total)
            note(f"{name} from memory", seconds_of(lambda action=action: action(path)), total)
        path.unlink()
    return {name: min(values) for name, values in times.items()}


def summarise(results: dict[str, float]) -> dict[str, float]:
    return {
        "write_with_checksums_over_write": results["write hashed"] / results["write"],
        "verify_over_read_from_disk": results["verify from disk"] / results["read from disk"],
        "verify_over_read_from_memory": results["verify from memory"] / results["read from memory"],
        "hash_over_write": results["hash xxh3_128"] / results["write"],
        "hash_over_read_from_disk": results["hash xxh3_128"] / results["read from disk"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, metavar="N", help="size of the file in 10^9 bytes (1)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="the least of so many counts (5)")
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="on the disk to measure (the system's for scratch)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report there")
    options = parser.parse_args(argv)
    if options.gigabytes <= 0 or options.repeats < 1:
        raise UserError("--gigabytes and --repeats must be positive")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        results = measure(Path(scratch), num_bytes=int(options.gigabytes * 1e9), repeats=options.repeats)
    report = {
        "machine": about_machine(platforms.start("cpu")),
        "settings": {"gigabytes": options.gigabytes, "repeats": options.repeats, "piece_bytes": PIECE_BYTES},
        "seconds_per_gigabyte": results,
        "summary": summarise(results),
    }
    text = write_report(report, out=options.out, figure=None, draw=lambda report: "")
    if options.json:
        print(text)
    else:
        for name, seconds in results.items():
            print(f"{name:20} {seconds:8.3f} s/GB")
        for name, ratio in report["summary"].items():
            print(f"{name:34} {ratio:8.3f}")
    return 0


if __name__ == "__main__":
    run_cli(main)
