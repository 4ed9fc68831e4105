"""Watches for updates that were skipped because a number was not finite: dumps the step, and ends the run in time.

After a single one the run goes on, because the update is dropped on all ranks (``batch/skips.py``). Each is an
incident, and the first of a row leaves a dump. More than ``max_skipped_in_a_row`` in a row end the run, with a dump of
the last one. The state is then not saved, because these weights give such numbers again and again.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ktr.batch.skips import IN_A_ROW, NOT_FINITE
from megatron_ktr.config.sections import ResilienceSection
from megatron_ktr.distributed.agreement import result_of_rank_zero
from megatron_ktr.files.listing import paths_in
from megatron_ktr.policy.policy import Policy
from megatron_ktr.run.dumps import DUMPS, write_dump
from megatron_ktr.run.hook import StepHook, Stop
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.step_report import StepReport

MOST_DUMPS = 20
"""Dumps that a run leaves of updates that it survives."""
_WORDS = {
    "log_prob": "the trainer's log-probs are not finite",
    "loss": "the loss is not finite",
    "gradient": "the gradient is not finite",
}


class SkippedUpdates(StepHook):
    """The watch. Collective over the world where it writes a dump."""

    def __init__(
        self,
        options: ResilienceSection,
        *,
        run_dir: Path,
        policy: Policy,
        incidents: Incidents,
        resolved: str,
        replay_obstacle: str | None = None,
        first_step: int,
    ) -> None:
        """Collective. ``replay_obstacle`` says why a dump of this run cannot be run again, if it cannot."""
        self._most = options.max_skipped_in_a_row
        self._run_dir, self._policy, self._incidents, self._resolved = run_dir, policy, incidents, resolved
        self._last_change = first_step - 1
        self._obstacle = replay_obstacle
        # Of one rank: whether a dump is written, which is collective, must not hang on what each machine sees there.
        self._num_dumps = result_of_rank_zero(lambda: len(paths_in(run_dir / DUMPS, "step_*")), ranks=policy.ranks)

    def after_step(self, report: StepReport) -> Stop | None:
        values = report.values
        in_a_row = round(values.get(IN_A_ROW, 0.0))
        stop = self._skipped(report, in_a_row) if in_a_row else None
        if values.get("has_stepped"):
            self._last_change = report.step
        return stop

    def _skipped(self, report: StepReport, in_a_row: int) -> Stop | None:
        found = [reason for reason in sorted(NOT_FINITE) if report.values.get(f"skipped_updates/{reason}")]
        why = " and ".join(_WORDS[reason] for reason in found)
        is_last = in_a_row > self._most
        is_first = in_a_row <= round(sum(report.values[f"skipped_updates/{reason}"] for reason in found))
        facts = {"reason": found, "in_a_row": in_a_row}
        where = ""
        # Every rank decides alike, so the bound is on what this run has written, not on what is there now.
        if is_last or (is_first and self._num_dumps < MOST_DUMPS):
            self._num_dumps += 1
            written = write_dump(
                self._run_dir,
                report,
                policy=self._policy,
                resolved=self._resolved,
                about={**facts, "text": why},
                last_change=self._last_change,
            )
            where = f"; {written}" if isinstance(written, str) else f"; {self._use_of(written)}"
        count = f"{in_a_row} updates in a row were" if in_a_row > 1 else "an update was"
        text = f"{count} skipped, because {why}{where}"
        self._incidents.add("skipped_update", text, step=report.step, **facts)
        if not is_last:
            return None
        advice = f"--max-skipped-in-a-row {self._most} allows no more: lower --lr or --clip-grad, or look at the dump"
        return Stop(f"step {report.step}: {text}; {advice}", is_state_sound=False)

    def _use_of(self, dump: Path) -> str:
        if self._obstacle is None:
            return f"tools/replay_step.py {dump} runs it again"
        return f"its numbers are in {dump}; {self._obstacle}"
