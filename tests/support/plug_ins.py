"""Users' reward functions that behave, and that do not. Importing this module imports no torch."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import sys
import time
from typing import Any


def length(response: str, record: dict[str, Any]) -> float:
    return len(response) * record.get("factor", 1.0)


def worth(input: Any) -> float | None:
    """None for the first of a group; what else it is worth depends on all that it sees."""
    if not input.index:
        return None
    return input.length + len(input.group) * 10 + len(input.prompt_token_ids) * 100 + len(input.media) * 1000


def ranked(inputs: list[Any]) -> list[float]:
    """The place of each response in its group by length."""
    return [sorted(given.length for given in inputs).index(given.length) for given in inputs]


def of_trl(prompts: list[str], completions: list[str], solution: list[str], **columns: Any) -> list[float | None]:
    return [
        None if text == "none" else float(text == right) + len(ids) / 100 + len(prompt)
        for prompt, text, right, ids in zip(prompts, completions, solution, columns["completion_ids"], strict=True)
    ]


async def awaited(response: str, record: dict[str, Any]) -> float:
    await asyncio.sleep(3600 if response == "waits" else 0)
    if response == "sleeps":
        time.sleep(3600)
    if response == "cancels":
        raise asyncio.CancelledError
    return 1.0


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def wild(response: str, record: dict[str, Any]) -> Any:
    """Does what the response says."""
    match response:
        case "sleeps":
            time.sleep(3600)
        case "ignores signals":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            while True:
                time.sleep(3600)
        case "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "leaves":
            os._exit(3)
        case "exits":
            sys.exit(0)
        case "raises":
            raise KeyError("no such field")
        case "swells":  # shared memory is no data segment: only a look at the process finds it
            memory = mmap.mmap(-1, 600 << 20)
            memory.write(b"x" * len(memory))
            time.sleep(3600)
        case "forks":  # both come back from the function
            return float(os.fork() == 0 or True)
        case "hides":  # a process in a session of its own, which outlives its parent
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    with open(record["pid_file"], "w", encoding="utf-8") as file:
                        file.write(str(os.getpid()))
                    time.sleep(3600)
                os._exit(0)
            while not (os.path.exists(record["pid_file"]) and open(record["pid_file"]).read()):
                time.sleep(0.01)
            time.sleep(3600)
        case "prints":
            print("x" * 100_000)
            print("y", file=sys.stderr)
            return 1.0 if sys.stdin.read() == "" else 0.0
        case "interrupts":
            raise KeyboardInterrupt
        case "cannot say why":
            raise Speechless
    return {"nan": float("nan"), "text": "1", "huge": 10**400}.get(response, 1.0)


def wild_batch(inputs: list[Any]) -> list[Any]:
    if inputs[0].response == "short":
        return [1.0]
    return [wild(given.response, given.record) for given in inputs]


def no_list(inputs: list[Any]) -> Any:
    """What has as many elements as there are responses, and is no list of numbers."""
    match inputs[0].response:
        case "mapping":
            return {given.index: 0.5 for given in inputs}
        case "set":
            return {0.0, 1.0}
        case "text":
            return "10"
    return (1.0 / (1 - given.index) for given in inputs)


def changes_record(response: str, record: dict[str, Any]) -> float:
    """Reads the solution and overwrites it."""
    right = record["solution"] == response
    record["solution"] = "changed"
    return float(right)


def needs_state(completions: list[str], trainer_state: Any) -> list[float]:
    return []


def three(first: Any, second: Any, third: Any) -> float:
    return 0.0


class Stateful:
    """A reward may be an instance that keeps something between its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, response: str, record: dict[str, Any]) -> float:
        self.num_calls += 1
        return self.num_calls


counting = Stateful()
