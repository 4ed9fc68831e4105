"""Errors a user can mend, and how every command reports them: one line, exit code 2, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Bad input: says what is wrong, what was expected, what was got and which option to change."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's ``main`` and exits with its code; a ``UserError`` becomes one ``error: ...`` line and code 2.

    Under torchrun every rank raises the same error (``rollout.source.on_every_rank``), and rank 0 alone prints it.
    """
    try:
        code = main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 2
    except BrokenPipeError:
        code = 1
    sys.exit(code or 0)
