"""What the tools' argument parsers share: bad flags are ``UserError``s, numbers have limits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from megatron_ktr.errors import UserError

MOST = 2**20


class Parser(argparse.ArgumentParser):
    """Reports bad flags like every other user error: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def whole(*, low: int = 1, high: int = MOST, even: bool = False) -> Callable[[str], int]:
    """For ``type=``: a whole number from ``low`` to ``high``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high or (even and number % 2):
            kind = "an even number" if even else "a whole number"
            raise argparse.ArgumentTypeError(f"expected {kind} from {low} to {high}, got {text[:40]!r}")
        return number

    return read


def number(*, low: float = 0.0, above: float | None = None, high: float = 1e12) -> Callable[[str], float]:
    """For ``type=``: a number from ``low``, or above ``above``, to ``high``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        least = low if above is None else above
        if not least <= value <= high or value == above:
            words = f"above {above:g} and at most {high:g}" if above is not None else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"expected a number {words}, got {text[:40]!r}")
        return value

    return read
