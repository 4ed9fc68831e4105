"""Errors a user can mend, and how every command reports them: one line, exit code 2, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """Bad input: says what is wrong, what was expected, what was got and which option to change.

    ``is_on_every_rank`` marks an error that every rank of the run raises alike; rank 0 then speaks for all. Any other
    is printed by the rank it happened on, with its number: nobody else knows of it.
    """

    is_on_every_rank = False


@contextmanager
def same_on_every_rank() -> Iterator[None]:
    """For work that every rank does alike from the same input: a ``UserError`` inside is printed once."""
    try:
        yield
    except UserError as error:
        error.is_on_every_rank = True
        raise


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's ``main`` and exits with its code; a ``UserError`` becomes one ``error: ...`` line and code 2.

    So does an ``OSError``, such as a full disk or a directory that cannot be read.
    """
    try:
        code = main()
    except BrokenPipeError:
        code = 1
    except (UserError, OSError) as error:
        rank = int(os.environ.get("RANK", "0"))
        where = "" if rank == 0 else f" [rank {rank}]"
        if rank == 0 or not getattr(error, "is_on_every_rank", False):
            print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code or 0)
