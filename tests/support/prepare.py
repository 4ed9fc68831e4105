"""Runs subcommands of ``tools/prepare_dataset.py`` inside the process of a test."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_ktr.errors import Parser


def run_command(module: ModuleType, *arguments: object) -> int:
    parser = Parser(prog="prepare_dataset.py")
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(argument) for argument in arguments]))


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def good_record(number: int, **changes: Any) -> dict[str, Any]:
    """A record that can be used, with ``changes``; a field that becomes ``...`` is left out."""
    record = {"problem_id": f"p{number}", "problem": "Which?", "problem_type": "numerical", "solution": "1"}
    record |= {"video": "clip.mp4", "response": "One.", **changes}
    return {name: value for name, value in record.items() if value is not ...}
