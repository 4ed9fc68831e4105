"""Errors a user can mend, command lines that raise them, and how every command ends: with one line, not with a
traceback, for whatever a user did.

exit code   what ended the command
0           nothing
2           ``UserError``, ``OSError`` (a full disk, a directory that cannot be read), memory that ran out
3           another rank: the connection to it is lost, and its own message says why
70          a mistake of the program: traceback, and a last line that says so
74          an error of a disk or of a file server that may pass (``is_transient``): the same command may work later
75          a signal that asked it to leave (``run/interruption.py``); a run has saved its state
76          a guard: an alarm, skipped updates, or replicas that differ (``run/hooks.py``)
77          a hang: the rank stayed in one phase for longer than it may (``run/watchdog.py``)
130         ctrl-C
141         the reader of standard output went away (``| head -1``)

``docs/launching.md`` has the same codes for users. CONTRIBUTING.md says what a new code needs.
"""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from megatron_ktr.terminal import guarded, printable

EXIT_USER = 2
EXIT_OTHER_RANK = 3
EXIT_INTERNAL = 70
EXIT_TRANSIENT = 74
EXIT_SAVED = 75
"""Of a run that left when asked to and is to be started again with ``--resume`` (EX_TEMPFAIL)."""
EXIT_ALARM = 76
"""Of a run that a guard has ended: an alarm, too many skipped updates in a row, or replicas that differ. The state is
saved first if it is sound. A person should look at the run."""
EXIT_HANG = 77
EXIT_INTERRUPTED = 130
EXIT_OUTPUT_CLOSED = 141
MOST_CHARACTERS = 2000


class UserError(Exception):
    """Bad input: says what is wrong, what was expected, what was got and which option to change.

    ``is_on_every_rank`` marks an error that every rank of the run raises alike; rank 0 then speaks for all. Any other
    is printed by the rank it happened on, with its number: nobody else knows of it.
    """

    is_on_every_rank = False


class TransientError(UserError):
    """An error of a disk or of a file server that may pass. Nothing is wrong with the input: a launcher may start the
    ranks again."""


class LostRankError(UserError):
    """Another process of the run is gone. Nothing is wrong with the input: a launcher may start the ranks again."""


class StepAbandoned(UserError):
    """A step that cannot be completed now, for a reason outside of the run: its servers are gone, or it was asked to
    leave while it waited for them. Nothing of the step has happened, so the state before it may be saved, and a resumed
    run does it again.

    ``asked_by`` is the name of the signal that ended the wait; None where waiting was in vain.
    """

    def __init__(self, message: str, *, asked_by: str | None = None) -> None:
        super().__init__(message)
        self.asked_by = asked_by


_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        "EIO EINTR EAGAIN EBUSY ENFILE ENOLCK ESTALE EREMOTEIO ETIMEDOUT ENOTCONN ESHUTDOWN ECOMM ENOLINK ECONNABORTED "
        "ECONNRESET EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH"
    ).split()
    if hasattr(errno, name)
)
"""What the system says where a file server does not answer, or a disk fails to read or to write. It does not hold what
stays as it is until somebody mends it: no room, no permission, no such file."""


def is_transient(error: BaseException | None) -> bool:
    """Whether ``error`` may pass by itself: it is such an error of the system, or was raised from one. A step that was
    given up has rules of its own."""
    for found in _chain(error, with_contexts=False):
        if isinstance(found, StepAbandoned | LostRankError):
            return False
        if isinstance(found, TransientError) or (isinstance(found, OSError) and found.errno in _TRANSIENT):
            return True
    return False


def passing_cause(error: BaseException) -> OSError | None:
    """The error of the system that may pass behind ``error``, whether or not it was named as the cause: a library often
    raises another error than the one of the file server that it got."""
    passing = (e for e in _chain(error, with_contexts=True) if isinstance(e, OSError) and is_transient(e))
    return next(passing, None)


def _chain(error: BaseException | None, *, with_contexts: bool) -> Iterator[BaseException]:
    """``error`` and the errors it was raised from, or with ``with_contexts`` also those it was raised while handling.
    ``raise error from error`` makes a ring, which is gone round once."""
    seen: set[int] = set()
    while error is not None:
        yield error
        seen.add(id(error))
        further = (error.__cause__, error.__context__ if with_contexts else None)
        error = next((one for one in further if one is not None and id(one) not in seen), None)


def unreadable(path: object, error: OSError, *, option: str = "") -> UserError:
    """The error to raise from ``error``, which says nothing about the content of ``path``: ``TransientError`` if it may
    pass, else ``UserError``. ``option`` is the command-line option that names the file."""
    kind = TransientError if is_transient(error) else UserError
    return kind(f"{option and f'{option}: '}{path} cannot be read: {error.strerror or error}")


@contextmanager
def same_on_every_rank() -> Iterator[None]:
    """For work that every rank does alike from the same input: a ``UserError`` inside is printed once. An error that
    may pass does not come from the input. One rank alone may have it, and says so."""
    try:
        yield
    except UserError as error:
        error.is_on_every_rank |= not is_transient(error)
        raise


@contextmanager
def told_to_every_rank() -> Iterator[None]:
    """For raising what all ranks have heard from one of them: a ``UserError`` inside is printed once."""
    try:
        yield
    except UserError as error:
        error.is_on_every_rank = True
        raise


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's ``main`` and exits with its code, or as the table above says. What it prints and logs holds no
    control sequences (``terminal.py``)."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that does not know a character shows its number; a path may hold bytes that are no text.
        with suppress(AttributeError, ValueError):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    with guarded():
        code = _code_of(main)
        with suppress(OSError, ValueError):
            sys.stderr.flush()
    sys.exit(code)


def _code_of(main: Callable[[], int | None]) -> int:
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        if _rank() == "0":
            _say("interrupted")
        code = EXIT_INTERRUPTED
    except Exception as error:
        code = EXIT_OUTPUT_CLOSED if _is_output_closed(error) else _explain(error)
    return code or 0


def _explain(error: Exception) -> int:
    """Prints what happened and returns the exit code."""
    if isinstance(error, UserError | OSError):
        _say_error(error)
        if is_transient(error):
            return EXIT_TRANSIENT
        return EXIT_OTHER_RANK if isinstance(error, LostRankError) else EXIT_USER
    if is_out_of_memory(error):
        _say_error(
            f"out of memory ({_first_line(error)}): fewer or smaller frames, shorter responses, more ranks "
            "(tools/plan_parallelism.py), recomputation or offloading (docs/memory.md)"
        )
        return EXIT_USER
    if _is_connection_lost(error):
        where = "".join(f" {note}" for note in getattr(error, "__notes__", [])[:1])
        what = f"lost another rank{where}, whose own message says why it ended"
        if _TIMED_OUT in str(error):
            what = f"waited for another rank{where} for longer than --distributed-timeout-minutes"
        _say_error(f"{what}: {_first_line(error)}")
        return EXIT_OTHER_RANK
    _say("".join(traceback.format_exception(error)).rstrip())
    _say_error(
        f"internal error: {type(error).__name__}: {_first_line(error)}. This is a mistake of the program, not of its "
        "input: please report it to the project's issue tracker with the command and the lines above"
    )
    return EXIT_INTERNAL


def _say_error(error: object) -> None:
    rank = _rank()
    if rank == "0" or not getattr(error, "is_on_every_rank", False):
        _say(f"error{'' if rank == '0' else f' [rank {rank}]'}: {one_line(error)}")


def one_line(error: object) -> str:
    """What a user reads of it; of endless text, such as a file given as a flag, the beginning and the end."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 500]} ... {text[-500:]}"


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _rank() -> str:
    return os.environ.get("RANK", "").strip() or "0"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _is_output_closed(error: Exception) -> bool:
    """Whether nobody reads standard output any more; it then leads nowhere, so that nothing else fails for it.

    Other pipes break too, to a child process or a server: those are errors.
    """
    if not isinstance(error, BrokenPipeError) or sys.stdout is None:
        return False
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
    return False


def is_out_of_memory(error: Exception) -> bool:
    """On the host or on a GPU; torch's CPU allocator has no error of its own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


_TIMED_OUT = "Timed out waiting"


def _is_connection_lost(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone: one backend says so by a type, the other by a text."""
    if "DistError" in {base.__name__ for base in type(error).__mro__}:
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", _TIMED_OUT)
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


# What the argument parsers of tools share: bad flags are errors of the user, and numbers have limits.

MOST_NUMBER = 2**20


class Parser(argparse.ArgumentParser):
    """Reports bad flags like every other user error: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def whole(*, low: int = 1, high: int = MOST_NUMBER, even: bool = False) -> Callable[[str], int]:
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
