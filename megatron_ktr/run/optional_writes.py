"""Files that a run can do without: rollouts, TensorBoard events. If they cannot be written (a full disk), the run goes
on; it says so once for each kind, and counts."""

from __future__ import annotations

from collections import Counter

from megatron_ktr.run.incidents import Incidents


class OptionalWrites:
    """Counts what could not be written, by kind."""

    def __init__(self, incidents: Incidents | None = None) -> None:
        self._incidents = incidents or Incidents(None)
        self._counts: Counter[str] = Counter()

    def fail(self, kind: str, error: Exception, *, step: int | None = None) -> None:
        """Takes note that a file of ``kind`` could not be written."""
        self._counts[kind] += 1
        if self._counts[kind] == 1:
            text = f"{kind} cannot be written, the run goes on without: {error}"
            self._incidents.add("write_failure", text, step=step, file=kind)

    def counts(self) -> dict[str, float]:
        """Metrics ``write_failures/<kind>``, since the process began, as far as there are any."""
        return {f"write_failures/{kind}": float(count) for kind, count in self._counts.items()}
