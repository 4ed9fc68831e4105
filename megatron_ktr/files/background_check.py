"""Reads a checkpoint again after it was published, in a thread, and compares it with its checksums.

Its files were hashed while they were written, so this finds damage by a failing disk, a full one or a file server. Each
rank reads a share. What the system keeps of the files in memory is dropped first, where that is possible (Linux, local
disks), so that the disk itself is read.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.errors import UserError, is_transient
from megatron_ktr.files.checksums import MANIFEST, Damage, DamagedManifest, file_shares, find_damage, forget_cached
from megatron_ktr.files.intact_checkpoint import incompleteness


@dataclass(frozen=True)
class CheckResult:
    """What one rank found in its share."""

    damage: tuple[Damage, ...] = ()
    error: str | None = None
    """Why the share could not be read, for a reason other than damage, such as a file server that is away."""
    may_pass: bool = False
    """Whether that reason may pass by itself."""


class BackgroundCheck:
    """One check in progress; the constructor starts its thread."""

    def __init__(self, checkpoint: Path, *, share: int, num_shares: int) -> None:
        """This process reads share ``share`` of ``num_shares``; share 0 also looks whether files are missing."""
        self._checkpoint = checkpoint
        self._share, self._num_shares = share, num_shares
        self.result = CheckResult()
        """Valid once the thread has ended."""
        # A daemon thread: a run that fails does not wait for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint check", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self.result = CheckResult(tuple(self._find()))
        except (UserError, OSError) as error:
            self.result = CheckResult(error=str(error), may_pass=is_transient(error))
        except Exception as error:  # whatever it is, the checkpoint is not verified, and the run goes on
            self.result = CheckResult(error=repr(error))

    def _find(self) -> list[Damage]:
        if self._share == 0 and (missing := incompleteness(self._checkpoint)):
            return missing
        try:
            names = file_shares(self._checkpoint, self._num_shares)[self._share]
        except DamagedManifest as error:
            return [Damage(MANIFEST, str(error))]
        except IndexError:
            return [Damage(MANIFEST, "missing")]
        for name in names:
            with suppress(OSError):  # ``find_damage`` says what is wrong with the file
                forget_cached(self._checkpoint / name)
        return find_damage(self._checkpoint, names=names) if names else []
