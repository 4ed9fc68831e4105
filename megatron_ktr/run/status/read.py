"""What a run directory says about its run, read from outside while the run writes.

Nothing here raises for what a run leaves behind: a file that is missing, torn or nonsense counts as not there. Runs of
versions that wrote no ``status/`` are read from their metrics and checkpoints.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import psutil
import yaml

from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import read_yaml_text
from megatron_ktr.files.checksums import MANIFEST, DamagedManifest, read_manifest
from megatron_ktr.files.intact_checkpoint import checkpoint_damage, incompleteness
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.files.listing import paths_below, paths_in
from megatron_ktr.run.directory import CHECKPOINTS, list_checkpoints
from megatron_ktr.run.incidents import FILE as INCIDENTS
from megatron_ktr.run.metrics import FILE as METRICS
from megatron_ktr.run.status.files import FOLDER, RECENT_STEPS

TAIL_BYTES = 4_000_000
"""The end of a file of lines that is read: enough for more than a thousand steps."""
MOST_FILE_BYTES = 1_000_000
MOST_NUMBER = 1e300
"""A number that is larger counts as none: the sum of a thousand such numbers still fits into a float."""
MOST_WORLD_SIZE = 1_000_000

ALIVE, STOPPED, GONE, ELSEWHERE = "alive", "stopped", "gone", "on another host"
"""Stopped: by a signal (SIGSTOP), or by a debugger; it may go on."""


@dataclass(frozen=True)
class RankStatus:
    """One rank's heartbeat."""

    rank: int
    facts: Mapping[str, Any]
    """The file as it is (``heartbeat.py``)."""
    age_seconds: float
    """How long ago it was written, by this machine's clock."""
    process: str
    """ALIVE, STOPPED, GONE or, if its process cannot be seen from here, ELSEWHERE."""

    def number(self, name: str) -> float | None:
        value = self.facts.get(name)
        return float(value) if _is_number(value) else None

    def text(self, name: str) -> str:
        value = self.facts.get(name)
        return value if isinstance(value, str) else ""

    def seconds_since(self, name: str) -> float | None:
        """The time from a moment that the rank noted until it last wrote, and from then until now."""
        then, written = self.number(name), self.number("time")
        return None if then is None or written is None else max(0.0, written - then) + self.age_seconds


@dataclass(frozen=True)
class CheckpointStatus:
    """The newest checkpoint."""

    name: str
    step: int
    age_seconds: float
    num_bytes: int
    verdict: str
    """verified: every byte was read; complete: all files are there with their sizes; no checksums; damaged: ..."""


@dataclass(frozen=True)
class RunFacts:
    """What was read. Times are seconds since 1970."""

    run_dir: Path
    now: float
    ranks: tuple[RankStatus, ...]
    """Those of the newest start that left heartbeats; by rank."""
    num_older_ranks: int
    """Heartbeats of an earlier start that are still there."""
    world_size: int | None
    options: Mapping[str, Any]
    """All options by name, of the newest part of the run; empty if there is no config."""
    num_parts: int
    """How often the run was begun or taken up again; 0 without a config."""
    began: float | None
    """When the newest part wrote its config, before it loaded its model and its checkpoint."""
    records: tuple[Mapping[str, Any], ...]
    """The last records of the metrics, without step 0."""
    last_write: float | None
    """When the metrics were written last."""
    incidents: tuple[Mapping[str, Any], ...]
    """The last incidents, oldest first."""
    checkpoint: CheckpointStatus | None
    num_damaged_checkpoints: int
    """Checkpoints that a run has set aside as damaged."""
    free_bytes: int | None
    has_export: bool

    def option(self, name: str) -> Any:
        return self.options.get(name)

    @property
    def recent(self) -> Sequence[Mapping[str, Any]]:
        return self.records[-RECENT_STEPS:]


def read_run_facts(run_dir: Path, *, verifies: bool = False) -> RunFacts:
    """Reads a run directory. ``verifies`` reads every byte of the newest checkpoint.

    Raises:
        UserError: ``run_dir`` is no directory of a run.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory: expected the --run-dir of a training")
    configs = _configs(run_dir)
    if not configs and not (run_dir / METRICS).is_file() and not (run_dir / FOLDER).is_dir():
        raise UserError(
            f"{run_dir} has neither config.yaml nor {METRICS} nor {FOLDER}/: expected the --run-dir of a training"
        )
    now = time.time()
    ranks = _read_ranks(run_dir, now=now)
    newest = max((one.text("incarnation") for one in ranks), key=_as_time, default="")
    current = [one for one in ranks if one.text("incarnation") == newest]
    sizes = [int(size) for one in current if (size := one.number("world_size")) and size <= MOST_WORLD_SIZE]
    records = [one for one in _read_lines(run_dir / METRICS) if _is_step(one.get("step"))]
    return RunFacts(
        run_dir=run_dir,
        now=now,
        ranks=tuple(current),
        num_older_ranks=len(ranks) - len(current),
        world_size=max(sizes, default=None),
        options=_options(configs),
        num_parts=len(configs),
        began=_changed(configs[-1]) if configs else None,
        records=tuple(records),
        last_write=_changed(run_dir / METRICS),
        incidents=tuple(one for one in _read_lines(run_dir / INCIDENTS) if isinstance(one.get("kind"), str)),
        checkpoint=_checkpoint(run_dir, now=now, verifies=verifies),
        num_damaged_checkpoints=_num_damaged(run_dir / CHECKPOINTS),
        free_bytes=_free_bytes(run_dir),
        has_export=(run_dir / "export" / MANIFEST).is_file(),
    )


def _read_ranks(run_dir: Path, *, now: float) -> list[RankStatus]:
    found = []
    for path in paths_in(run_dir / FOLDER, "rank_*.json"):
        facts = _read_object(path)
        number = path.stem.removeprefix("rank_")
        written = facts.get("time")
        if not number.isdecimal() or not _is_number(written):
            continue
        found.append(RankStatus(int(number), facts, max(0.0, now - written), _process_of(facts)))
    return sorted(found, key=lambda one: one.rank)


def _process_of(facts: Mapping[str, Any]) -> str:
    """Whether the process that wrote a heartbeat lives. A number that another process has got since is told by when
    that one started."""
    if facts.get("host") != socket.gethostname():
        return ELSEWHERE
    pid, started = facts.get("pid"), facts.get("process_started")
    if not isinstance(pid, int) or not isinstance(started, int | float):
        return GONE
    try:
        process = psutil.Process(pid)
        is_same, status = abs(process.create_time() - started) < 2, process.status()
    except (psutil.Error, OSError, ValueError, OverflowError):
        return GONE
    if not is_same or status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return GONE
    return STOPPED if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else ALIVE


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > MOST_FILE_BYTES:  # a pipe would be waited for
            return {}
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _sound(found) if isinstance(found, dict) else {}


def _sound(found: dict[str, Any]) -> dict[str, Any]:
    """``found`` with None for numbers that are not finite or larger than any that means something, which would be
    errors wherever one computes with them."""
    return {name: None if _is_any_number(value) and not _is_number(value) else value for name, value in found.items()}


def _is_any_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    return _is_any_number(value) and abs(value) <= MOST_NUMBER  # false for NaN, too


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of the last lines of a file, without what is torn or no object."""
    if not path.is_file():
        return []
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = parse_json(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(_sound(value))
    return found


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _as_time(incarnation: str) -> float:
    try:
        return float(incarnation)
    except ValueError:
        return 0.0


def _configs(run_dir: Path) -> list[Path]:
    """The options of all parts of the run, the newest part last."""
    paths = [*paths_in(run_dir, "config.yaml"), *paths_in(run_dir, "config_from_step_*.yaml")]
    return sorted(paths, key=lambda path: _changed(path) or 0.0)


def _options(configs: Sequence[Path]) -> dict[str, Any]:
    if not configs:
        return {}
    try:
        if not configs[-1].is_file():
            return {}
        content = yaml.safe_load(read_yaml_text(configs[-1]))
        sections = [section for section in content.values() if isinstance(section, dict)]
    except (OSError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, yaml.YAMLError):
        return {}
    return _sound({str(name): value for section in sections for name, value in section.items()})


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _checkpoint(run_dir: Path, *, now: float, verifies: bool) -> CheckpointStatus | None:
    try:
        checkpoints = list_checkpoints(run_dir)
    except UserError as error:
        return CheckpointStatus(CHECKPOINTS, 0, 0.0, 0, f"cannot be read: {error}")
    if not checkpoints:
        return None
    step, path = checkpoints[-1]
    try:
        sizes = {one.relative_to(path).as_posix(): one.stat().st_size for one in paths_below(path) if one.is_file()}
        verdict = _verdict(path, sizes, verifies=verifies)
    except OSError as error:  # it is being removed
        sizes, verdict = {}, f"cannot be read: {error.strerror}"
    except UserError as error:  # which says nothing about its content
        sizes, verdict = {}, f"cannot be read: {error}"
    return CheckpointStatus(path.name, step, max(0.0, now - (_changed(path) or now)), sum(sizes.values()), verdict)


def _num_damaged(checkpoints: Path) -> int:
    try:
        return len(paths_in(checkpoints, "damaged_step_*"))
    except UserError:  # ``_checkpoint`` says so
        return 0


def _verdict(path: Path, sizes: Mapping[str, int], *, verifies: bool) -> str:
    if damage := checkpoint_damage(path) if verifies else incompleteness(path):
        return f"damaged: {damage[0]}"
    try:
        manifest = read_manifest(path)
    except DamagedManifest as error:
        return f"damaged: {error}"
    if manifest is None:
        return "no checksums"
    for name, digest in manifest.items():
        if sizes.get(name) != digest.num_bytes:
            return f"damaged: {name}: {sizes.get(name, 0)} bytes, expected {digest.num_bytes}"
    return "verified" if verifies else "complete"


def _free_bytes(run_dir: Path) -> int | None:
    try:
        return shutil.disk_usage(run_dir).free
    except OSError:
        return None
