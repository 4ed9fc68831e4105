"""The program of ``template_probe.py``: reads a chat template from standard input, tries it within limits, and ends
with the code that says how it went. It imports nothing of this project, so that it starts fast."""

from __future__ import annotations

import json
import resource
import sys

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOO_LARGE, TOO_MUCH_TEXT = 82, 83


def main(cpu_seconds: int, memory_bytes: int, most_characters: int) -> int:
    template = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # As transformers makes it, without what a template may only call.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = json.dumps
    turns = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    length = 0
    try:
        compiled = environment.from_string(template)
        for part in compiled.generate(messages=messages, add_generation_prompt=True):
            length += len(part)
            if length > most_characters:
                return TOO_MUCH_TEXT
    except MemoryError:
        return TOO_LARGE
    except Exception:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
