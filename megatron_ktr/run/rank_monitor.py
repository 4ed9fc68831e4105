"""Tells NVIDIA's ``ft_launcher`` that this rank lives (nvidia-resiliency-ext, an optional package).

That launcher starts a monitor beside each rank and names its socket in an environment variable. The monitor kills a
rank that sends no heartbeat for ``rank_heartbeat_timeout``; here a rank sends one before and after each step, so the
timeout must exceed the longest step, with evaluation and saving. Under any other launcher nothing is imported or sent.
"""

from __future__ import annotations

import os
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.run.hook import StepHook, Stop
from megatron_ktr.run.step_report import StepReport

_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


def build_rank_monitor() -> list[StepHook]:
    """One hook under ``ft_launcher``; none otherwise. Raises ``UserError`` if its package is not installed here."""
    if _SOCKET not in os.environ:
        return []
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"this rank was started by ft_launcher ({_SOCKET} is set), but nvidia-resiliency-ext cannot be imported: "
            f"{error}"
        ) from error
    return [RankMonitor(RankMonitorClient())]


class RankMonitor(StepHook):
    """Heartbeats of this rank to ``client``, a ``RankMonitorClient``."""

    def __init__(self, client: Any) -> None:
        self._client = client
        client.init_workload_monitoring()

    def before_step(self, step: int) -> None:
        self._client.send_heartbeat()

    def after_step(self, report: StepReport) -> Stop | None:
        self._client.send_heartbeat()
        return None

    def close(self) -> None:
        self._client.shutdown_workload_monitoring()
