"""Metrics to Weights & Biases as well, for ``--wandb-project NAME``; the package ``wandb`` is optional.

The run's id is kept in ``run_dir/wandb.json``, so that a resumed run continues the same curves. wandb numbers the rows
that it is sent, and drops a row whose number is not above the last one's. A resumed run may send steps that an earlier
part has sent: an evaluation that it makes up for, and the steps that it does again. So every row says its step in the
column ``step``, which is the axis of all curves, and its number is only usually the same: it is the next free one where
it must be. ``wandb.json`` has the last number, because wandb does not know it offline. Steps that are done again have
two rows. What an evaluation adds to the step that was sent last joins the row of that step.

wandb's own environment variables hold (``WANDB_MODE=offline``, ``WANDB_API_KEY``); no key passes through this program.
Its files go to ``run_dir/wandb``.

A thread talks to wandb, through a queue of bounded length: a server that is slow, away or refuses never slows or stops
a run. What is lost that way is counted and is an incident once. The end of a run waits for wandb for at most
``CLOSING_SECONDS``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import queue
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.bounded import MOST_OPTIONS_BYTES, read_text, read_yaml_text
from megatron_ktr.run.hook import StepHook
from megatron_ktr.run.incidents import Incidents
from megatron_ktr.run.metrics import MOST_STEPS

FILE = "wandb.json"
AXIS = "step"
"""The column that says to which step a row belongs, as in ``metrics.jsonl``."""
MOST_WAITING = 1000
CLOSING_SECONDS = 60.0


class WandbWriter(StepHook):
    """Sends each record; built on rank 0 alone."""

    def __init__(self, run_dir: Path, *, project: str, incidents: Incidents) -> None:
        self._run_dir, self._project, self._incidents = run_dir, project, incidents
        self.num_lost = 0
        """Records that did not reach wandb."""
        self._row, self._step_of_row = -1, -1
        """The number of the row that was sent last, and its step; no step: a row of an earlier part."""
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._thread.start()

    def on_record(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._queue.put_nowait((step, dict(values)))
        except queue.Full:
            self._lose(f"{MOST_WAITING} records wait for it", step=step)

    def close(self) -> None:
        try:
            self._queue.put(None, timeout=CLOSING_SECONDS)
        except queue.Full:
            return
        self._thread.join(CLOSING_SECONDS)

    def _send(self) -> None:
        run = None
        try:
            run = self._open()
        except Exception as error:  # whatever a library or a server may raise
            self._lose(_words(error), step=None)
        while (item := self._queue.get()) is not None:
            step, values = item
            if run is None:
                self.num_lost += 1
                continue
            if step != self._step_of_row:
                self._row, self._step_of_row = max(step, self._row + 1), step
                with contextlib.suppress(OSError):  # a full disk; the next row has the number again
                    _write(self._run_dir, id=run_id(self._run_dir), row=self._row)
            try:
                run.log({**values, AXIS: step}, step=self._row)
            except Exception as error:
                self._lose(_words(error), step=step)
        if run is not None:
            try:
                run.finish()
            except Exception as error:
                self._lose(_words(error), step=None)

    def _open(self) -> Any:
        wandb = importlib.import_module("wandb")
        folder = self._run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        run = wandb.init(
            project=self._project,
            id=run_id(self._run_dir),
            name=self._run_dir.resolve().name,
            dir=str(self._run_dir),
            resume="allow",
            config=newest_options(self._run_dir),
            settings=wandb.Settings(console="off", init_timeout=60),
        )
        run.define_metric(AXIS, hidden=True)
        run.define_metric("*", step_metric=AXIS)
        self._row = max(run.step - 1, _last_row(self._run_dir))
        return run

    def _lose(self, reason: str, *, step: int | None) -> None:
        self.num_lost += 1
        if self.num_lost == 1:
            self._incidents.add("wandb", f"wandb did not take what it was sent: {reason}; training goes on", step=step)


def run_id(run_dir: Path) -> str:
    """The id by which wandb knows the run; made at its first start.

    Raises:
        OSError: the file cannot be read or written. Another id would cut the curves of the run in two.
    """
    found = _kept(run_dir).get("id")
    if isinstance(found, str) and found.isalnum():
        return found
    made = secrets.token_hex(8)
    _write(run_dir, id=made)
    return made


def _last_row(run_dir: Path) -> int:
    """The number of the last row of earlier parts; -1 if none is known."""
    found = _kept(run_dir).get("row")
    return found if isinstance(found, int) and 0 <= found < MOST_STEPS else -1


def _kept(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(run_dir / FILE, most_bytes=MOST_OPTIONS_BYTES))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(run_dir: Path, **values: Any) -> None:
    write_atomically(run_dir / FILE, json.dumps(values) + "\n")


def newest_options(run_dir: Path) -> dict[str, Any]:
    """The options by section of the newest part of a run, as it wrote them; empty if they cannot be read."""
    paths = [*run_dir.glob("config.yaml"), *run_dir.glob("config_from_step_*.yaml")]
    try:
        found = yaml.safe_load(read_yaml_text(max(paths, key=lambda path: path.stat().st_mtime)))
    except (OSError, ValueError, LookupError, AttributeError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
