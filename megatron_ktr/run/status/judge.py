"""What state a run is in, and what looks wrong in it, from what its directory says (``read.py``)."""

from __future__ import annotations

import datetime
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from megatron_ktr.run.metrics import NOTEWORTHY_WAIT
from megatron_ktr.run.status.files import FAILED, LEFT, RECENT_STEPS, RUNNING, TRAINED
from megatron_ktr.run.status.read import ALIVE, ELSEWHERE, GONE, STOPPED, RankStatus, RunFacts

STALE_SECONDS = 20.0
"""A heartbeat is old when it is older than three of its intervals and this."""
EXPORT_SECONDS = 1800.0
"""How long a run of another host may take from its last step to its export."""
STARTING_SECONDS = 1800.0
"""How long a run may take from its options to its first heartbeat: it loads model and checkpoint."""
LONG_PHASE_SECONDS = 300.0
LONG_PHASE_STEPS = 10
"""A phase is long when it has lasted longer than this many steps and that many seconds."""
DISK_MARGIN = 1.1
"""Free space, in checkpoints, below which the next one may not fit."""

SCALE_STEPS = 40
"""Steps in which fp16 may still look for its loss scale, which begins at 2^32 and is halved at each overflow."""

WRONG_INCIDENTS = frozenset(
    "alarm hang replica_mismatch save_failure export_failure write_failure damaged_checkpoint "
    "unverified_checkpoint".split()
)
"""Kinds of incidents that somebody should look at; any other kind is noted."""

RECENT_INCIDENT_STEPS = 100
"""So many steps after an incident the run no longer looks wrong for it."""

ALIVE_STATES = frozenset(("starting", "running", "exporting"))
GOOD_STATES = frozenset((*ALIVE_STATES, "finished", "left"))


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know."""

    is_wrong: bool
    """Whether it makes the run one that looks wrong; otherwise it is only noted."""
    text: str


@dataclass(frozen=True)
class Verdict:
    """The state of a run."""

    state: str
    """starting: its options are written, and its ranks have not said anything yet; running; exporting: all steps are
    done, the export is being written; finished; left: saved and ended when asked to, or by an alarm; failed: ended with
    an error; dead: ended without a word; silent: from a version without heartbeats, or of which nothing tells."""
    step: int
    """The last step that is done."""
    num_steps: int | None
    seconds_per_step: float | None
    seconds_left: float | None
    """Until the last step, of a run that is alive and whose ranks nothing holds up."""
    findings: tuple[Finding, ...]

    @property
    def looks_wrong(self) -> bool:
        return self.state not in GOOD_STATES or any(finding.is_wrong for finding in self.findings)


def judge(run: RunFacts) -> Verdict:
    step, num_steps = _last_step(run), _num_steps(run)
    state = _state(run, step=step, num_steps=num_steps)
    per_step = _seconds_per_step(run)
    of_ranks = list(_of_ranks(run, per_step)) if state == "running" else []
    is_held_up = any(finding.is_wrong for finding in of_ranks)
    left = None
    if state == "running" and not is_held_up and per_step is not None and num_steps is not None:
        since = (run.ranks[0].seconds_since("step_since") if run.ranks else None) or 0.0
        left = max(0.0, (num_steps - step) * per_step - min(since, per_step))
    findings = [
        *_of_state(run, state),
        *of_ranks,
        *(_of_heartbeats(run) if state == "running" else ()),
        *_of_metrics(run, per_step),
        *_of_incidents(run, step),
        *_of_storage(run, state),
    ]
    return Verdict(state, step, num_steps, per_step, left, tuple(findings))


def is_stale(rank: RankStatus) -> bool:
    return rank.age_seconds > 3 * (rank.number("heartbeat_seconds") or 0.0) + STALE_SECONDS


def mean_of(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Over the records that have the metric, without those in which it is not finite."""
    found = [float(value) for one in records if _is_number(value := one.get(name)) and math.isfinite(value)]
    return statistics.fmean(found) if found else None


def newest(run: RunFacts, name: str) -> float | None:
    """The last value of a metric that is not in every record."""
    for record in reversed(run.records):
        if _is_number(record.get(name)):
            return float(record[name])
    return None


def incidents_of_this_part(run: RunFacts) -> list[Mapping[str, Any]]:
    """Those since the run was started or taken up last; without heartbeats all that were read."""
    began = min((then for one in run.ranks if (then := _began(one)) is not None), default=None)
    return [one for one in run.incidents if began is None or _moment(one) >= began - 1]


def _began(rank: RankStatus) -> float | None:
    try:
        return float(rank.text("incarnation"))
    except ValueError:
        return None


def _moment(incident: Mapping[str, Any]) -> float:
    try:
        return datetime.datetime.fromisoformat(str(incident.get("time"))).timestamp()
    except (ValueError, OverflowError, OSError):
        return math.inf  # of an unknown time: better shown than lost


def _last_step(run: RunFacts) -> int:
    told = [int(done) for one in run.ranks if (done := one.number("last_done")) is not None]
    recorded = run.records[-1]["step"] if run.records else 0
    return max([*told, int(recorded), 0])


def _num_steps(run: RunFacts) -> int | None:
    told = [int(number) for one in run.ranks if (number := one.number("num_steps")) is not None]
    given = run.option("train_steps")
    return told[0] if told else given if isinstance(given, int) else None


def _seconds_per_step(run: RunFacts) -> float | None:
    told = run.ranks[0].number("mean_step_seconds") if run.ranks else None
    if told is not None:
        return told
    sums = [
        math.fsum(value for name, value in one.items() if name.startswith("seconds/") and _is_number(value))
        for one in run.recent[1:] or run.recent
    ]
    return statistics.fmean(sums) if any(sums) else None


def _state(run: RunFacts, *, step: int, num_steps: int | None) -> str:
    is_done = num_steps is not None and step >= num_steps
    if _is_newer_than_ranks(run) and run.began is not None and run.now - run.began < STARTING_SECONDS:
        return "starting"
    if not run.ranks:
        return "finished" if is_done and run.has_export else "silent"
    states = {one.text("state") for one in run.ranks}
    lives = [one for one in run.ranks if one.process in (ALIVE, STOPPED) or (one.process != GONE and not is_stale(one))]
    if FAILED in states:
        return "failed"
    if RUNNING in states:
        return "running" if any(one.text("state") == RUNNING for one in lives) else "dead"
    if LEFT in states:
        return "left"
    if states == {TRAINED}:
        if run.has_export:
            return "finished"
        may_export = [one for one in run.ranks if one.process != GONE and one.age_seconds < EXPORT_SECONDS]
        return "exporting" if may_export or any(one.process in (ALIVE, STOPPED) for one in run.ranks) else "dead"
    return "silent"


def _is_newer_than_ranks(run: RunFacts) -> bool:
    """Whether the newest part has left no heartbeat yet. Those that are there are then of a part before it."""
    told = [began for one in run.ranks if (began := _began(one)) is not None]
    if told:
        return run.began is not None and run.began > max(told)
    return not run.records and not run.ranks


def _of_state(run: RunFacts, state: str) -> Iterator[Finding]:
    if state == "failed":
        names = [f"rank {one.rank}" for one in run.ranks if one.text("state") == FAILED]
        yield Finding(True, f"ended with an error on {_some(names)}: its message is on the error stream of the run")
    elif state == "dead":
        first = run.ranks[0]
        heard = f"its last heartbeat, {duration(first.age_seconds)} ago, was in {_where(first)}"
        yield Finding(True, f"ended without a word (killed, out of memory, a machine lost?): {heard}")
    elif state == "starting":
        age = duration(run.now - (run.began or run.now))
        yield Finding(False, f"started {age} ago: it loads its model, its checkpoint and its engines")
    elif state == "silent":
        if run.last_write is None:
            yield Finding(True, "no step was recorded, and no heartbeats are there: it never came to its first step")
        else:
            age = duration(run.now - run.last_write)
            yield Finding(
                run.now - run.last_write > LONG_PHASE_SECONDS,
                f"no heartbeats (an earlier version?): the last step was recorded {age} ago, more is not known",
            )
    if state in ("dead", "failed", "left") and run.checkpoint is not None:
        yield Finding(False, f"to go on after step {run.checkpoint.step}: the same command again, with --resume")
    hosts = sorted({one.text("host") for one in run.ranks if one.process == ELSEWHERE})
    if hosts and state in ALIVE_STATES:
        yield Finding(False, f"processes of {_some(hosts)} cannot be seen from here: judged by their heartbeats alone")


def _of_ranks(run: RunFacts, per_step: float | None) -> Iterator[Finding]:
    """What holds up a running run: ranks that are gone, have ended, are missing, or stay where they are."""
    running = [one for one in run.ranks if one.text("state") == RUNNING]
    gone = [one for one in running if one.process in (GONE, STOPPED) or is_stale(one)]
    for one in gone[:8]:
        silent = f"no heartbeat for {duration(one.age_seconds)}"
        why = f"its process is {one.process}" if one.process in (GONE, STOPPED) else silent
        yield Finding(True, f"rank {one.rank} ({one.text('host')}): {why}, {_place(one)}")
    if len(gone) > 8:
        yield Finding(True, f"and {len(gone) - 8} further ranks")
    ended = [f"rank {one.rank}" for one in run.ranks if one.text("state") != RUNNING]
    if ended:
        yield Finding(True, f"{_some(ended)} has ended, while others run")
    known = {one.rank for one in run.ranks}
    missing = [f"rank {rank}" for rank in range(run.world_size or 0) if rank not in known]
    if missing:
        yield Finding(True, f"no heartbeat file of {_some(missing)}")
    limit = max(LONG_PHASE_SECONDS, LONG_PHASE_STEPS * (per_step or 0.0))
    stuck = [one for one in run.ranks if one not in gone and (one.seconds_since("step_since") or 0.0) > limit]
    if stuck:
        steps = f"steps take {duration(per_step)}" if per_step is not None else "no step is done yet"
        yield Finding(
            per_step is not None, f"{_place(stuck[0])} on {_some([f'rank {one.rank}' for one in stuck])}: {steps}"
        )


def _of_heartbeats(run: RunFacts) -> Iterator[Finding]:
    missed = sum(int(one.number("missed") or 0) for one in run.ranks)
    if missed:
        yield Finding(True, f"{missed} heartbeats could not be written: is the disk full?")


def _of_metrics(run: RunFacts, per_step: float | None) -> Iterator[Finding]:
    recent = run.recent
    if not recent:
        return
    last = recent[-1]
    broken = [name for name in ("loss", "grad_norm", "kl", "reward_mean") if name in last and last[name] is None]
    if broken == ["grad_norm"] and _only_scales(last):
        broken = []  # of an overflow it is not known
    if broken:
        yield Finding(True, f"{_some(broken)} of step {last['step']} is not a finite number")
    skipped = [one["step"] for one in recent if _is_number(one.get("skipped_updates")) and one["skipped_updates"] > 0]
    if skipped:
        text = f"updates skipped in {len(skipped)} of the last {len(recent)} steps"
        if all(_only_scales(one) for one in recent if one["step"] in skipped):
            text += ", for the loss scale of fp16 alone"
            is_wrong = len(skipped) * 2 >= len(recent) and last["step"] > SCALE_STEPS
        else:
            is_wrong = len(skipped) * 2 >= len(recent) or skipped[-1] == last["step"]
        yield Finding(is_wrong, f"{text}, last in {skipped[-1]}")
    idle = [one for one in recent if one.get("has_stepped") == 0 and not one.get("skipped_updates")]
    if len(idle) == len(recent) > 1:
        text = f"none of the last {len(recent)} steps had anything to learn: the rewards within each group are equal"
        yield Finding(len(recent) >= RECENT_STEPS, text)
    wait = mean_of(recent[1:] if recent[0].get("step") == 1 else recent, "data_wait_fraction")
    if wait is not None and wait >= NOTEWORTHY_WAIT:
        yield Finding(False, f"{wait:.0%} of the recent steps' time is waiting for data: more --data-workers")
    yield from _of_slowest(recent, per_step)


def _only_scales(record: Mapping[str, Any]) -> bool:
    """Whether updates of the step were skipped, and all of them for the loss scale of fp16."""
    return bool(record.get("skipped_updates")) and record.get("skipped_updates/loss_scale") == record["skipped_updates"]


def _of_slowest(recent: Sequence[Mapping[str, Any]], per_step: float | None) -> Iterator[Finding]:
    slowest = Counter(int(one["ranks/slowest"]) for one in recent if _is_number(one.get("ranks/slowest")))
    if not slowest or not per_step:
        return
    rank, times = slowest.most_common(1)[0]
    behind = mean_of([one for one in recent if one.get("ranks/slowest") == rank], "ranks/slowest_behind_seconds")
    if behind is not None and behind > NOTEWORTHY_WAIT * per_step and times * 2 > len(recent) >= 5:
        yield Finding(
            False,
            f"rank {rank} was the slowest in {times} of the last {len(recent)} steps, {behind:.2g} s behind the others",
        )


def _of_incidents(run: RunFacts, step: int) -> Iterator[Finding]:
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for one in incidents_of_this_part(run):
        name = one.get("name")
        by_kind.setdefault(f"{one['kind']} {name}" if isinstance(name, str) else str(one["kind"]), []).append(one)
    for title, found in by_kind.items():
        last = found[-1]
        at = last.get("step")
        where = f" in step {at}" if isinstance(at, int) else ""
        times = f"{len(found)} times, last" if len(found) > 1 else "once,"
        is_recent = not isinstance(at, int) or at > step - RECENT_INCIDENT_STEPS
        is_wrong = last["kind"] in WRONG_INCIDENTS and is_recent
        yield Finding(is_wrong, f"{title} ({times}{where}): {last.get('text', '')}")


def _of_storage(run: RunFacts, state: str) -> Iterator[Finding]:
    checkpoint = run.checkpoint
    if checkpoint is not None and checkpoint.verdict.startswith(("damaged", "cannot")):
        yield Finding(True, f"checkpoint {checkpoint.name}: {checkpoint.verdict}")
    if run.num_damaged_checkpoints:
        yield Finding(False, f"{run.num_damaged_checkpoints} damaged checkpoints were set aside (damaged_step_...)")
    saves = run.option("save_interval")
    if state in ALIVE_STATES and run.free_bytes is not None:
        needed = checkpoint.num_bytes * DISK_MARGIN if checkpoint is not None and saves else 0.0
        if run.free_bytes < max(needed, 1e6):
            yield Finding(
                True,
                f"{size(run.free_bytes)} are free on the disk of the run"
                + (f", and a checkpoint takes {size(checkpoint.num_bytes)}" if checkpoint is not None else ""),
            )
    if state == "running" and saves == 0:
        yield Finding(False, "no checkpoints (--save-interval 0): if it dies, everything is lost")


def _where(rank: RankStatus) -> str:
    step, phase = rank.number("step"), rank.text("phase")
    return f"step {int(step or 0)}, " + (f"in phase {phase}" if phase else "between phases")


def _place(rank: RankStatus) -> str:
    seconds = rank.seconds_since("phase_since")
    return _where(rank) + ("" if seconds is None else f" for {duration(seconds)}")


def duration(seconds: float) -> str:
    """For people.

    >>> [duration(value) for value in (0.25, 59.0, 61.0, 7300.0, 200000.0)]
    ['0.2 s', '59 s', '1 min 1 s', '2 h 1 min', '2 d 7 h']
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (name, unit), (lower, small) in zip(units, units[1:], strict=False):
        if seconds >= unit:
            return f"{seconds // unit:.0f} {name} {seconds % unit // small:.0f} {lower}"
    raise AssertionError("below a minute is above")


def size(num_bytes: float) -> str:
    """For people, in units of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
