"""A file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ktr.files.atomic import write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old, with an é")
    assert path.read_text(encoding="utf-8") == "old, with an é"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_text(encoding="utf-8") == "old, with an é" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half of a pair: \ud83d")
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
