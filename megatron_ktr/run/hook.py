"""What looks at every step of a run from outside the training step: guards, watches, exports, displays.

The loop (``loop.py``) calls the hooks of a rank in the same order on every rank. A hook that every rank has may use
collectives; one that only some ranks have, such as a display, must not. A hook changes neither weights nor random
states. ``hooks.py`` lists the hooks of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ktr.run.step_report import StepReport


@dataclass(frozen=True)
class Stop:
    """Why a hook ends the run."""

    reason: str
    """One line for people."""
    is_state_sound: bool = True
    """Whether the state after the step may be saved. Where it may be damaged, only older checkpoints
    are left."""


class StateUnsoundError(Exception):
    """The state after ``step`` must not be saved. Raised on every rank."""

    def __init__(self, step: int, stops: Sequence[Stop]) -> None:
        self.step, self.stops = step, stops
        super().__init__("; ".join(stop.reason for stop in stops))


class StepHook:
    """Does nothing; subclasses override what they need."""

    keeps_state = False
    """Whether it writes the state of the model. It is then passed over if an earlier hook says that the state may be
    damaged."""

    def before_step(self, step: int) -> None:
        """``step`` is about to begin."""

    def after_step(self, report: StepReport) -> Stop | None:
        """The step is trained, and neither recorded nor saved yet; ``report.values`` may be added to.

        Returns the reason to end the run with ``EXIT_ALARM``, the same on every rank; None otherwise.
        """

    def before_save(self, step: int) -> Stop | None:
        """A checkpoint of the state after ``step`` is about to be saved, because it is due or because the run ends.

        Returns the reason to end the run without saving it, the same on every rank; None if it may be saved.
        """

    def on_record(self, step: int, values: Mapping[str, float]) -> None:
        """``values`` went into the record of ``step`` in ``metrics.jsonl``, or would have, on a full disk. Only rank 0
        is told, so nothing collective belongs here. A step comes first with all that training it gave; what is measured
        afterwards, as an evaluation, comes later with the same step."""

    def close(self) -> None:
        """The run ends, also after an error; then not every rank may be there, so nothing collective belongs here."""


def require_sound(step: int, *, hooks: Sequence[StepHook]) -> None:
    """Asks all hooks whether the state after ``step`` may be saved.

    Raises:
        StateUnsoundError: it may not.
    """
    stops = [stop for hook in hooks if (stop := hook.before_save(step)) is not None]
    if stops:
        raise StateUnsoundError(step, stops)


def look_at(report: StepReport, *, hooks: Sequence[StepHook]) -> list[Stop]:
    """Shows a step to all hooks, in their order, and returns the reasons to end the run."""
    stops: list[Stop] = []
    for hook in hooks:
        if hook.keeps_state and not all(stop.is_state_sound for stop in stops):
            continue
        if (stop := hook.after_step(report)) is not None:
            stops.append(stop)
    return stops
