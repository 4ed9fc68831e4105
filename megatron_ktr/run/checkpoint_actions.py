"""Actions on the files of a run's checkpoints, whose errors become one line for the user on every rank."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ktr.distributed.agreement import on_every_rank
from megatron_ktr.distributed.groups import ParallelGroups
from megatron_ktr.errors import UserError
from megatron_ktr.run.directory import list_checkpoints


class CheckpointActions:
    """Runs actions on ``directory``, which holds the checkpoints of a run. Every method is collective over the world,
    and raises ``UserError`` on every rank if the action fails on any."""

    def __init__(self, directory: Path, *, ranks: ParallelGroups) -> None:
        self._directory = directory
        self._ranks = ranks

    def on_rank_zero(self, what: str, action: Callable[[], Any]) -> None:
        """Runs ``action`` on rank 0 alone; ``what`` says in an error message what cannot be done to the directory."""
        self.on_each_rank(what, lambda: action() if self._ranks.rank == 0 else None)

    def on_each_rank(self, what: str, action: Callable[[], Any]) -> Any:
        """Runs ``action`` on every rank and returns this rank's result; ``what`` is as in ``on_rank_zero``."""

        def guarded() -> Any:
            try:
                return action()
            except OSError as error:
                reason = error.strerror or str(error)
                if error.errno == errno.ENOSPC:  # a quota is no full disk: who looks would find room there
                    reason = "disk full"
                line = f"checkpoints: cannot {what} {self._directory}: {reason}"
                raise UserError(f"{line}; {_last_complete(self._directory)}") from error

        return on_every_rank(guarded, ranks=self._ranks)


def _last_complete(directory: Path) -> str:
    """What is said of the checkpoints that are there, also where the directory cannot be listed for the same reason."""
    try:
        kept = list_checkpoints(directory.parent)
    except UserError:
        return "older checkpoints stay as they are"
    return f"the last complete checkpoint is {kept[-1][1]}" if kept else "there is no older checkpoint"
