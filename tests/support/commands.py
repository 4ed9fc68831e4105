"""Runs a tool inside the process of a test, for what does not depend on a process of its own: its words and its code.

A process costs seconds of imports. Each tool that is called here is started as a process by another test.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
from unittest.mock import patch

from megatron_ktr.errors import run_cli


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``python tools/NAME.py ARGUMENTS`` as far as it can be seen: exit code and both outputs."""
    words = [f"tools/{name}.py", *map(str, arguments)]
    module = importlib.import_module(f"tools.{name}")
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli(module.main)
        except SystemExit as exit_:
            code = exit_.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
