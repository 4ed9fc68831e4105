"""Tells how far an evaluation is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from megatron_ktr.terminal import printable

_LINE_SECONDS = 30.0


class Progress:
    """Counts answers. Standard output is left to results."""

    def __init__(self, *, num_done: int, num_wanted: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._num_done, self._num_wanted = num_done, num_wanted
        self._num_new = self._num_failed = 0
        self._started = self._told = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=num_wanted, initial=num_done, unit="answer", file=self._stream, dynamic_ncols=True)

    def set_wanted(self, num_wanted: int) -> None:
        """The number of answers that are known to be needed; further rounds of votes add to it."""
        self._num_wanted = num_wanted
        if self._bar is not None:
            self._bar.total = num_wanted
            self._bar.refresh()

    def answered(self) -> None:
        self._num_new += 1
        self._num_done += 1
        if self._bar is not None:
            self._bar.update(1)
        elif time.monotonic() - self._told >= _LINE_SECONDS:
            self._told = time.monotonic()
            self.say(self.line(self._told - self._started))

    def failed(self, reason: str) -> None:
        """The engine gave no answer. The first failures are told at once."""
        self._num_failed += 1
        if self._num_failed <= 3:
            self.say(f"no answer: {reason}")

    def line(self, seconds: float) -> str:
        """How far it is after so many seconds."""
        share = f"{100 * self._num_done / self._num_wanted:.1f} %" if self._num_wanted else "nothing to do"
        text = f"{self._num_done} of {self._num_wanted} answers ({share})"
        if self._num_new and seconds > 0:
            rate = self._num_new / seconds
            text += f", {rate:.3g} a second, {_duration((self._num_wanted - self._num_done) / rate)} left"
        return text + (f", {self._num_failed} failed so far" if self._num_failed else "")

    def say(self, line: str) -> None:
        line = printable(line)
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    """>>> _duration(5), _duration(200), _duration(9000)
    ('5 s', '3 min', '2 h 30 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
