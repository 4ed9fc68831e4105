"""A user's own reward, ``module:function``, and the ways in which it may be written:

    def f(response, record) -> float | None           one response: its text and the record of its question
    def f(input) -> float | None                      one response as a ``RewardInput``
    def f(inputs) -> list[float | None]               all responses of a group at once (the parameter has this name)
    def f(prompts, completions, **columns) -> list    the same, as TRL calls its reward functions
    async def f(...)                                  any of these; the responses of a group are awaited together

None says that the reward does not apply to a response.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import itertools
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ktr.errors import UserError
from megatron_ktr.rewards.inputs import RewardInput

Style = Literal["text", "input", "inputs", "trl"]
_TRL = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class Failed:
    """Why a response has no value. ``kind`` is "error", "timeout", "died" or "memory"."""

    kind: str
    text: str


Value = float | None | Failed
"""What a reward says about one response; None: it does not apply."""
_RAISED = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)
"""What a function may raise; not ``KeyboardInterrupt``, which in the training process is the user's."""


@dataclass(frozen=True)
class Form:
    """How a function of the user's is called."""

    path: str
    """``module:function``"""
    style: Style
    is_async: bool

    @property
    def name(self) -> str:
        return self.path.rpartition(":")[2]

    @property
    def is_batched(self) -> bool:
        return self.style in ("inputs", "trl")

    @property
    def is_one_by_one(self) -> bool:
        """Whether the responses are judged one after the other, so that the first without a value is the one at
        fault."""
        return not self.is_batched and not self.is_async


@dataclass(frozen=True)
class PlugIn(Form):
    """A function of the user's that was loaded into this process."""

    function: Callable[..., Any]

    @classmethod
    def load(cls, path: str) -> PlugIn:
        """Imports the module, which may run anything.

        Raises:
            UserError: there is no such function, or it is not written in one of the ways above.
        """
        module_name, _, function_name = path.partition(":")
        try:
            function: Any = getattr(importlib.import_module(module_name), function_name)
        except (Exception, SystemExit) as error:  # a user's module can raise anything
            raise UserError(f"reward {path!r} cannot be loaded: {type(error).__name__}: {error}") from error
        if not callable(function) or inspect.isclass(function):
            kind = "a class: name a function, or an instance of it" if callable(function) else type(function).__name__
            raise UserError(f"reward {path!r} is no function but {kind}")
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an instance may have an async one
        )
        return cls(path, _style_of(path, function), is_async, function)

    def score(self, inputs: Sequence[RewardInput], *, timeout_seconds: float) -> Iterator[tuple[int, Value]]:
        """(index, value) of each of ``inputs``, as soon as it is known. Whatever the function raises becomes
        ``Failed``. ``timeout_seconds`` ends what is awaited; what does not wait is ended by the process around it."""
        # What a function writes into a record reaches no other response, and no other part of the reward.
        inputs = [dataclasses.replace(given, record=dict(given.record)) for given in inputs]
        if self.is_async:
            found = _attempt(lambda: asyncio.run(self._awaited(inputs, timeout_seconds)))
            yield from enumerate([found] * len(inputs) if isinstance(found, Failed) else found)
        elif self.is_batched:
            found = _attempt(lambda: _values_of(self._called(inputs), len(inputs)))
            yield from enumerate([found] * len(inputs) if isinstance(found, Failed) else found)
        else:
            for index, given in enumerate(inputs):
                yield index, _attempt(lambda given=given: _value_of(self._called([given])))

    async def _awaited(self, inputs: Sequence[RewardInput], timeout_seconds: float) -> Sequence[Value]:
        async def attempt(part: Sequence[RewardInput], read: Callable[[Any], Any]) -> Any:
            try:
                async with asyncio.timeout(timeout_seconds) as limit:
                    return read(await self._called(part))
            except TimeoutError as error:
                return timed_out(timeout_seconds) if limit.expired() else _failure(error)
            except _RAISED as error:
                return _failure(error)

        if self.is_batched:
            found = await attempt(inputs, lambda values: _values_of(values, len(inputs)))
            return [found] * len(inputs) if isinstance(found, Failed) else found
        return await asyncio.gather(*(attempt([given], _value_of) for given in inputs))

    def _called(self, inputs: Sequence[RewardInput]) -> Any:
        match self.style:
            case "text":
                return self.function(inputs[0].response, inputs[0].record)
            case "input":
                return self.function(inputs[0])
            case "inputs":
                return self.function(list(inputs))
            case "trl":
                return self.function(**self._columns(inputs))

    def _columns(self, inputs: Sequence[RewardInput]) -> dict[str, Any]:
        """TRL's arguments: lists with an element for each response. Of the record's fields those that the function
        takes."""
        columns: dict[str, Any] = {
            "prompts": [given.question for given in inputs],
            "completions": [given.response for given in inputs],
            "completion_ids": [list(given.token_ids) for given in inputs],
        }
        for name in set().union(*(given.record for given in inputs)) - set(_TRL):
            columns[name] = [given.record.get(name) for given in inputs]
        parameters = inspect.signature(self.function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return columns
        return {name: value for name, value in columns.items() if name in parameters}


def _attempt(call: Callable[[], Any]) -> Any:
    """What ``call`` gives, or why it gives nothing."""
    try:
        return call()
    except UserError as error:
        return Failed("error", f"failed: {error}")
    except _RAISED as error:
        return _failure(error)


def _values_of(found: Any, number: int) -> Sequence[Value] | Failed:
    """The values of ``number`` responses. A mapping, a set or a text is no list of numbers, though Python could walk
    through it: its elements are keys, in no order, or characters."""
    walks = isinstance(found, Iterable) and not isinstance(found, str | bytes | bytearray | Mapping | Set)
    values = list(itertools.islice(found, number + 1)) if walks else None
    if values is None or len(values) != number:
        got = _short(found) if values is None else f"{len(values)} values" if len(values) < number else "more values"
        return Failed("error", f"gave {got}, expected a list with {number} numbers")
    return [_value_of(value) for value in values]


def _value_of(found: Any) -> Value:
    if found is None:
        return None
    try:
        value = math.nan if isinstance(found, str | bytes | bytearray) else float(found)
    except Exception:  # a user's object may raise anything here, too
        value = math.nan
    return value if math.isfinite(value) else Failed("error", f"gave {_short(found)}, expected a finite number")


def _style_of(path: str, function: Callable[..., Any]) -> Style:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return "text"  # a builtin without a signature
    names = [parameter.name for parameter in parameters]
    required = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if "completions" in names:
        if "trainer_state" in [parameter.name for parameter in required]:
            raise UserError(f"reward {path!r} needs TRL's trainer_state, which does not exist here")
        return "trl"
    if all(parameter.kind is not parameter.KEYWORD_ONLY for parameter in required):
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters) and len(required) <= 2:
            return "text"
        if len(required) == 2 or (len(required) < 2 <= len(positional)):
            return "text"
        if len(positional) == 1:
            return "inputs" if names[0] == "inputs" else "input"
    raise UserError(
        f"reward {path!r} takes ({', '.join(names)}), expected (response, record), (input), (inputs), or TRL's "
        "(prompts, completions, **columns)"
    )


def timed_out(seconds: float) -> Failed:
    """What a response has whose function gave no answer in time."""
    return Failed("timeout", f"gave no answer within {seconds:g} s (--reward-timeout)")


def _failure(error: BaseException) -> Failed:
    if isinstance(error, MemoryError):
        return Failed("memory", "ran out of memory")
    *_, last = traceback.extract_tb(error.__traceback__)
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # an exception of the user's may be unable to say what it is
        text = type(error).__name__
    # The innermost frame of the traceback says where it failed.
    return Failed("error", f"failed: {text} ({last.filename}, line {last.lineno})")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        return type(value).__name__
    return text if len(text) <= 200 else text[:197] + "..."
