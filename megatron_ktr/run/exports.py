"""Exports of a running training in Hugging Face format: ``exports/step_00000010`` in the run directory, every
``--export-interval`` steps. Each appears by a rename, with checksums; the model after the last step is in ``export``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config.words import SaveFailure
from megatron_ktr.errors import UserError
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.directory import EXPORTS, step_name
from megatron_ktr.run.hook import StepHook, Stop
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.step_report import StepReport


@dataclass(frozen=True)
class ExportTimes:
    """After which steps a run exports its model."""

    interval: int
    """Between the first step and the last, after every step that it divides; 0 means never."""
    num_steps: int
    """After the last step a run always exports, outside of the steps (``train.py``)."""

    def is_between(self, step: int) -> bool:
        """Whether ``step`` has an export of its own in ``exports``."""
        return bool(self.interval) and step % self.interval == 0 and step != self.num_steps

    def is_due(self, step: int) -> bool:
        """Whether the weights after ``step`` are exported."""
        return step == self.num_steps or self.is_between(step)


class ExportHook(StepHook):
    """Exports the model where that is due. Collective: every rank holds one."""

    keeps_state = True

    def __init__(
        self,
        run_dir: Path,
        *,
        policy: Policy,
        times: ExportTimes,
        on_failure: SaveFailure,
        incidents: Incidents,
    ) -> None:
        self._directory = run_dir / EXPORTS
        self._policy = policy
        self._times = times
        self._on_failure = on_failure
        self._incidents = incidents
        self._num_failures = 0

    def after_step(self, report: StepReport) -> Stop | None:
        """Adds ``export_failures`` to the step's values once an export has failed.

        Raises:
            UserError: on every rank, if the export cannot be written and ``save_failure`` is "stop". An ``OSError`` is
                raised by the rank that writes, and a ``UserError`` by the others.
        """
        step = report.step
        if self._times.is_between(step):
            try:
                self._policy.save_hf(self._directory / step_name(step))
            except (UserError, OSError) as error:
                if self._on_failure == "stop":
                    raise
                self._num_failures += 1
                self._incidents.add("export_failure", f"the export failed: {error}", step=step)
        if self._num_failures:
            report.values["export_failures"] = float(self._num_failures)
        return None
