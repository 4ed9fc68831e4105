"""Tries a chat template in a process of its own, because a template is a program: it may run for ever, or ask for more
memory than there is. That it cannot reach files or run code is the sandbox's work, here and in transformers.

A template that ends within its limits may still raise, as where it uses an extension that only transformers has. That
is no verdict here: the caller tries it again with the tokenizer.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

from megatron_ktr.errors import UserError

CPU_SECONDS = 10
MEMORY_BYTES = 1 << 30
MOST_CHARACTERS = 1 << 20
"""Of the text that four short turns may become."""
_WAIT_SECONDS = 600.0
"""For a machine that is busy; a template that computes ends by ``CPU_SECONDS``."""
_CHILD = Path(__file__).with_name("template_probe_child.py")
_TOO_LONG, _TOO_LARGE, _TOO_MUCH_TEXT = 81, 82, 83
"""Exit codes of the child."""


@functools.lru_cache(maxsize=32)
def require_bounded(template: str, *, where: str) -> None:
    """Raises ``UserError``, naming ``where`` it is from, if the template does not end within its limits."""
    limits = map(str, (CPU_SECONDS, MEMORY_BYTES, MOST_CHARACTERS))
    call = [sys.executable, "-I", str(_CHILD), *limits]
    try:
        ended = subprocess.run(call, input=json.dumps(template).encode(), capture_output=True, timeout=_WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        code = _TOO_LONG
    else:
        code = ended.returncode
    if code in (_TOO_LONG, -24, -9):  # SIGXCPU, and SIGKILL at the hard limit
        raise UserError(f"{where}: the chat template does not end: more than {CPU_SECONDS} s for four short turns")
    if code == _TOO_LARGE:
        raise UserError(f"{where}: the chat template needs more than {MEMORY_BYTES >> 20} MB for four short turns")
    if code == _TOO_MUCH_TEXT:
        raise UserError(f"{where}: the chat template makes more than {MOST_CHARACTERS} characters of four short turns")
