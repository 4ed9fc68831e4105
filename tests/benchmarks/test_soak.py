"""benchmarks/soak: growth is found, in what it is told and in a process that grows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import psutil
import pytest

from benchmarks.soak.measures import Holding, growth_of, holding_of

GROWTH = {
    "steady": (lambda step: {}, True),
    "memory within 2%": (lambda step: {"own_bytes": 10**9 + 50_000 * step}, True),
    "memory by 5%": (lambda step: {"own_bytes": 10**9 + 200_000 * step}, False),
    "memory before step 20 alone": (lambda step: {"own_bytes": 10**9 + 10**8 * min(step, 20)}, True),
    "one step with long responses": (lambda step: {"own_bytes": 10**9 + 10**9 * (step == 290)}, True),
    "a file in 100 steps": (lambda step: {"num_files": 50 + step // 100}, False),
    "a thread": (lambda step: {"num_threads": 9 + (step > 200)}, False),
    "processes go": (lambda step: {"num_processes": 3 - (step > 200)}, True),
}


@pytest.mark.parametrize("name", GROWTH)
def test_growth_after_step_20(name: str) -> None:
    change: Callable[[int], dict[str, int]]
    change, is_steady = GROWTH[name]
    base = {"rss_bytes": 2 * 10**9, "own_bytes": 10**9, "num_files": 50, "num_threads": 9, "num_processes": 3}
    found = growth_of([Holding(step=step, **{**base, **change(step)}) for step in range(1, 301)])
    assert found["is_steady"] == is_steady


def test_too_few_steps_say_nothing() -> None:
    with pytest.raises(ValueError, match="more than 60 steps"):
        growth_of([Holding(step, 1, 1, 1, 1, 1) for step in range(1, 51)])


GROWING = """
import subprocess, sys, threading
print("ready", flush=True); sys.stdin.readline()
kept = [bytearray(b"x" * 50_000_000)]
files = [open("/dev/null") for _ in range(7)]
threading.Thread(target=threading.Event().wait, daemon=True).start()
child = subprocess.Popen([sys.executable, "-c", "x = bytearray(b'x' * 20_000_000); print(1, flush=True); input()"], \
    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print("grown", flush=True); sys.stdin.readline()
"""


def test_what_a_process_and_its_child_take_is_seen() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", GROWING], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        root = psutil.Process(process.pid)
        before = holding_of(root, step=1)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "grown\n"
        after = holding_of(root, step=2)
        process.stdin.close()
    assert before is not None and after is not None
    assert after.own_bytes - before.own_bytes > 70_000_000
    assert after.num_files - before.num_files >= 7 + 2 and after.num_processes - before.num_processes == 1
    assert after.num_threads - before.num_threads == 2, "a thread, and the child's"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    watched = psutil.Process(gone.pid)
    gone.wait()
    assert holding_of(watched, step=3) is None
