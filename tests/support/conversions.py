"""Runs ``tools/prepare_dataset.py convert`` inside the process of a test."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from tests.support.paths import REPOSITORY
from tests.support.published import (
    write_published,
)

_SPEC = importlib.util.spec_from_file_location("prepare_dataset", REPOSITORY / "tools" / "prepare_dataset.py")
assert _SPEC is not None and _SPEC.loader is not None
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


def convert(capsys: Any, *arguments: Any) -> list[dict[str, Any]]:
    """The reports of a conversion, one for each file."""
    assert tool.main(["convert", "--json", *map(str, arguments)]) == 0
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 1
    return json.loads(output[0])["files"]


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def converted(capsys: Any, folder: Path, layout: str, *arguments: Any) -> list[dict[str, Any]]:
    """The records of a layout's sample."""
    (report,) = convert(capsys, "--from", layout, write_published(folder, layout), "--out", folder / "out", *arguments)
    assert report["num_skipped"] == 0
    return lines(report["out"])


def put(folder: Path, rows: Any, *, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows))
    return path
