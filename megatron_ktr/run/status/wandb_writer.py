"""Metrics to Weights & Biases as well, for ``--wandb-project NAME``; the package ``wandb`` is optional.

The run's id is kept in ``run_dir/wandb.json``, so that a resumed run continues the same curves. wandb takes steps only
in rising order, so steps that are done again keep the values that were sent first. What an evaluation adds to the step
that was sent last joins that step. wandb's own environment variables hold (``WANDB_MODE=offline``, ``WANDB_API_KEY``);
no key passes through this program. Its files go to ``run_dir/wandb``.

A thread talks to wandb, through a queue of bounded length: a server that is slow, away or refuses never slows or stops
a run. What is lost that way is counted and is an incident once. The end of a run waits for wandb for at most
``CLOSING_SECONDS``.
"""

from __future__ import annotations

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

FILE = "wandb.json"
MOST_WAITING = 1000
CLOSING_SECONDS = 60.0


class WandbWriter(StepHook):
    """Sends each record; built on rank 0 alone."""

    def __init__(self, run_dir: Path, *, project: str, incidents: Incidents) -> None:
        self._run_dir, self._project, self._incidents = run_dir, project, incidents
        self.num_lost = 0
        """Records that did not reach wandb."""
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
            try:
                run.log(values, step=step)
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
        return wandb.init(
            project=self._project,
            id=run_id(self._run_dir),
            name=self._run_dir.resolve().name,
            dir=str(self._run_dir),
            resume="allow",
            config=newest_options(self._run_dir),
            settings=wandb.Settings(console="off", init_timeout=60),
        )

    def _lose(self, reason: str, *, step: int | None) -> None:
        self.num_lost += 1
        if self.num_lost == 1:
            self._incidents.add("wandb", f"wandb did not take what it was sent: {reason}; training goes on", step=step)


def run_id(run_dir: Path) -> str:
    """The id by which wandb knows the run; made at its first start.

    Raises:
        OSError: the file cannot be read or written. Another id would cut the curves of the run in two.
    """
    path = run_dir / FILE
    try:
        found = json.loads(read_text(path, most_bytes=MOST_OPTIONS_BYTES))["id"]
        if isinstance(found, str) and found.isalnum():
            return found
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        pass
    made = secrets.token_hex(8)
    write_atomically(path, json.dumps({"id": made}) + "\n")
    return made


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
