"""Lets the kernel kill a rank when its launcher ends, however the launcher ends and whatever the rank hangs in.

The command of a rank is wrapped into a small Python program that asks the kernel for it and then becomes the command
itself. So it holds from the first moment, for any command, and before anything slow is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_PROGRAM = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
except (AttributeError, OSError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""1 is PR_SET_PDEATHSIG, 9 is SIGKILL. It stays set over the exec. The launcher may have ended before it was set."""


def with_lifeline(command: str, arguments: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The command and arguments that run ``command`` as a child of this process which does not outlive the thread that
    starts it. On systems without such a kernel the command runs as it would without."""
    return sys.executable, ("-S", "-E", "-c", _PROGRAM, str(os.getpid()), command, *arguments)
