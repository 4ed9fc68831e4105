"""Some steps as a Chrome trace, one file per rank: ``run_dir/profile/rank_N.json``, for ``--profile-steps FIRST,LAST``.

torch.profiler records the operators on the host and, on a GPU, its kernels; the phases of the step stand above them as
``phase: update`` and so on, and each step as ``step 12``. The files load in https://ui.perfetto.dev and in
chrome://tracing. Recording costs time and host memory: a few steps are enough, and their seconds are not those of other
steps. A trace that is there stays: a resumed run that records again writes ``rank_N_2.json``. A run without the option
builds nothing of this. A trace that cannot be written is an incident and ends no run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function, supported_activities

from megatron_ktr.files.intact_checkpoint import unused_path
from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.metrics import PhaseTimer
from megatron_ktr.run.step_report import StepReport

FOLDER = "profile"


class StepTrace(StepHook):
    """Records the steps ``first`` to ``last`` of this rank. A resumed run that starts after ``first`` records the rest,
    and one that starts after ``last`` nothing."""

    def __init__(
        self, run_dir: Path, *, first: int, last: int, rank: int, timer: PhaseTimer, incidents: Incidents
    ) -> None:
        self._first, self._last = first, last
        self._path = run_dir / FOLDER / f"rank_{rank}.json"
        self._rank, self._incidents = rank, incidents
        self._profile: profile | None = None
        self._open: list[Any] = []
        """The annotations that are open: the step's, and inside it the phase's."""
        timer.listeners.append(self.on_phase)

    def before_step(self, step: int) -> None:
        if self._profile is None and self._first <= step <= self._last:
            self._profile = profile(activities=supported_activities())
            self._profile.start()
        if self._profile is not None:
            self._enter(f"step {step}")

    def on_phase(self, name: str | None) -> None:
        if self._profile is None:
            return
        if name is not None:
            self._enter(f"phase: {name}")
        elif len(self._open) > 1:
            self._leave()

    def after_step(self, report: StepReport) -> None:
        if self._profile is None:
            return
        while self._open:
            self._leave()
        if report.step >= self._last:
            self._finish(report.step)

    def close(self) -> None:
        while self._open:
            self._leave()
        if self._profile is not None:  # the run ends before the last step
            self._finish(None)

    def _enter(self, name: str) -> None:
        annotation = record_function(name)
        annotation.__enter__()
        self._open.append(annotation)

    def _leave(self) -> None:
        self._open.pop().__exit__(None, None, None)

    def _finish(self, step: int | None) -> None:
        found, self._profile = self._profile, None
        assert found is not None
        found.stop()
        scratch = self._path.with_name(f".{self._path.name}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            found.add_metadata("rank", str(self._rank))
            found.export_chrome_trace(str(scratch))
            scratch.replace(unused_path(self._path))
        except (OSError, RuntimeError) as error:
            self._incidents.add("profile", f"the trace {self._path} cannot be written: {error}", step=step)
