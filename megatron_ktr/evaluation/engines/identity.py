"""Tells one model directory from another: digests of its weights, its config and its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_ktr.errors import UserError
from megatron_ktr.files.checksums import file_digest, require_intact
from megatron_ktr.files.listing import paths_in

_WEIGHTS = ("*.safetensors",)
_CONFIG = ("config.json", "generation_config.json", "*preprocessor_config.json", "processor_config.json")
_TOKENIZER = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)
_THREADS = 4
"""Files that are read at the same time."""


def model_identity(directory: Path | str) -> dict[str, str]:
    """{"weights", "config", "tokenizer"}: a digest each, which changes if a byte of one of its files does.

    All weights are read once, as loading them does anyway: sizes, dates or samples would miss a weight that was
    changed in place. A directory with checksums is compared with them.

    Raises:
        UserError: there are no weights, a file cannot be read, or a file differs from its checksum.
    """
    directory = Path(directory)
    if not paths_in(directory, "*.safetensors"):
        raise UserError(f"--model: {directory} has no weights (*.safetensors)")
    require_intact(directory, option="--model")
    parts = {"weights": _WEIGHTS, "config": _CONFIG, "tokenizer": _TOKENIZER}
    return {name: _digest(directory, patterns) for name, patterns in parts.items()}


def _digest(directory: Path, patterns: Iterable[str]) -> str:
    paths = sorted({path for pattern in patterns for path in paths_in(directory, pattern) if path.is_file()})
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = [
                (path.name, one.num_bytes, one.value)
                for path, one in zip(paths, pool.map(file_digest, paths), strict=True)
            ]
    except OSError as error:
        raise UserError(f"--model: {error.filename} cannot be read: {error.strerror}") from error
    return hashlib.blake2b(repr(found).encode(), digest_size=16).hexdigest()
