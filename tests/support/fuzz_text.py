"""A coverage-guided fuzzer of readers of text, for the night. It needs atheris, which nothing else here does:

    python -m tests.support.fuzz_text DIR -max_total_time=3600

DIR is the corpus, which begins with ``hostile_text.HOSTILE_BYTES`` and grows. A reader may give a value or raise what
its contract names; anything else ends the fuzzer with the input in a file ``crash-...``, which becomes a case of
``hostile_text.py``. What comes behind DIR are libFuzzer's options.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["megatron_ktr", "yaml", "json"]):
    from megatron_ktr.config.cli import read_yaml
    from megatron_ktr.config.load import OPTIONS
    from megatron_ktr.data.raw_records import iter_raw_entries, iter_raw_records
    from megatron_ktr.errors import UserError, one_line
    from megatron_ktr.evaluation.asking.store import answers_in
    from megatron_ktr.web.chat import read_reply

from tests.support.hostile_text import HOSTILE_BYTES

_SCRATCH = Path(tempfile.mkdtemp()) / "file"
READERS: list[Callable[[bytes], object]] = [
    lambda data: read_yaml(_written(data), options=OPTIONS, notes={}),
    lambda data: list(iter_raw_records(_written(data))),
    lambda data: list(iter_raw_entries(_written(data))),
    lambda data: answers_in(data, path=_SCRATCH),
    lambda data: read_reply(data),
]


def _written(data: bytes) -> Path:
    _SCRATCH.write_bytes(data)
    return _SCRATCH


def one_input(data: bytes) -> None:
    """The first byte chooses the reader."""
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except UserError as error:
        assert one_line(error).isprintable()
    except ValueError:  # the contract of ``read_reply``
        assert data[0] % len(READERS) == 4


def main() -> None:
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(HOSTILE_BYTES.values()):
        for reader in range(len(READERS)):
            (corpus / f"hostile {number} {reader}").write_bytes(bytes([reader]) + content[:20_000])
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
