"""Writes the numbers of a run: one line per step on the console, ``metrics.jsonl`` and TensorBoard events.

The names of the numbers are stable:

- of every step, as far as the run has them: reward_mean, reward/<name>, key_token_ratio, key_token_ratio/<signal>,
  loss, kl, grad_norm, learning_rate, num_skipped, num_prompts, tokens_per_second, tflops_per_gpu, mfu
  (``accounting/rates.py``), seconds/<phase>
- if the sampler's log-probs are known: sampler_trainer_logprob_gap, importance_ratio_mean, importance_ratio_max and
  clipped_fraction (``objectives/importance.py``)
- data_wait_fraction: the time in which the reading rank drew the step's prompts (with lag 1 during the step before),
  as a share of the step's time, at most 1; the largest of all replicas
- ranks/device_memory_peak_gb and ranks/host_memory_gb; with several ranks ranks/slowest and
  ranks/slowest_behind_seconds (``run/status/rank_figures.py``)
- in the first record of a run: sampler_check/gap_mean and sampler_check/gap_max, in nats (``rollout/check/sampler.py``)
- with several replicas: flops_imbalance/before, flops_imbalance/after and groups_moved (``step/plan.py``)
- under a bound on tokens: num_micro_batches and oversized_groups (``step/plan.py``)
- counted since the run began: skipped/<kind>, decoder/<name>, "decoder/pyav: <why not decord>", repeated_frames,
  substituted_media
- where responses are sampled: reward_seconds/<part>, the seconds in which a part of the reward was computed, of all
  replicas together; counted since the process began, as far as there are any: reward_timeouts/<part> and
  reward_errors/<part>, responses, and reward_skipped_groups (``rewards/rewarder.py``)
- of a mixture: reward_mean/<source> of the step's prompts, and source/<source>, the prompts drawn since the run began
- with data workers or a frame cache, counted since the process began: data_workers/replaced, "data_workers/replaced:
  <why>" (``data/workers/pool.py``), frame_cache/<event> (``data/frame_cache.py``)
- of steps that were evaluated (``evaluation/training/in_training.py``): eval/<set>/accuracy and others,
  seconds/evaluate; a run that is evaluated at its start has them as step 0
- with several signals: selection_overlap/<signal>+<signal>; with advantage_shaping: dependence, advantage_factor_max
  (``attribution/key_tokens.py``)
- with temporal_bonus: reward/temporal_bonus and temporal_rule, the share of the groups asked twice whose rule holds
  (``objectives/bonuses/temporal.py``); of the second prompts (``rollout/second_prompt.py``) shuffled/prompts,
  shuffled/tokens, shuffled/token_share of all tokens sampled, shuffled/response_length, shuffled/accuracy, and
  shuffled/seconds_alone, the part of seconds/rollout in which only they were still answered, of the slowest replica
- with filter_groups, of the step over all replicas (``rollout/filtering.py``): filter/rejected, filter/kept and
  filter/refilled, filter/rejected_<reason>, filter/filled_up, filter/surplus, filter/rounds, filter/is_short,
  filter/tokens_rejected, filter/tokens_surplus, filter/reward_mean
- with retire_above: retirement/retired, the records that are passed over in the present epoch or the next, and
  retirement/passed_over, the draws that passed one over since the run began
- of steps at which the loss of held-out responses was measured (``evaluation/training/held_out_loss.py``): eval_loss,
  eval/<set>/loss, eval/<set>/loss_skipped
- counted since the process began, as far as there are any: save_failures and damaged_checkpoints (``checkpoint.py``),
  export_failures (``exports.py``) and write_failures/<kind> (``optional_writes.py``)
- skipped_updates and, of those that were, skipped_updates/<reason> and skipped_in_a_row (``batch/skips.py``)
- only while something is wrong: alarm/<name> (``run/alarms.py``), vision/<fault> (``policy/vision_watch.py``)
- after comparisons of the weights that ranks hold alike: replica_check/differences (``run/replica_check.py``)
- with original_compat: responses_without_key_tokens, a share of the step's responses

Numbers in the file have 8 significant digits. A number that is not finite is null there.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ktr.errors import unreadable
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.json_files import parse_json, to_json
from megatron_ktr.files.line_log import LineLog
from megatron_ktr.processes.frames import place_of_error
from megatron_ktr.run.optional_writes import OptionalWrites

FILE = "metrics.jsonl"
MOST_STEPS = 10**12
"""A step of a record is below this."""


class PhaseTimer:
    """Measures the wall seconds of each phase of the current step. Phases do not nest.

    ``synchronize`` waits for the device at the end of a phase, so that work the phase has launched counts for it and
    not for the next phase.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self.listeners: list[Callable[[str | None], None]] = []
        """Are told the name of each phase when it begins, and None when it ends. They must neither raise nor wait."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self._tell(name)
        try:
            yield
            self._synchronize()
        except Exception as error:
            error.add_note(f"in phase {name}, {place_of_error(error)}")
            raise
        finally:
            self._tell(None)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _tell(self, name: str | None) -> None:
        for listener in self.listeners:
            listener(name)

    def pop(self) -> dict[str, float]:
        """Returns the seconds so far as ``{"seconds/<phase>": value}``, and starts again from zero."""
        taken, self.seconds = self.seconds, {}
        return {f"seconds/{name}": value for name, value in taken.items()}


class MetricsWriter:
    """Writes one record per step; does nothing on ranks that do not report (``run_dir`` None).

    A resumed run first drops the records of ``first_step`` and later steps, so that every step appears once. The file
    is replaced by a rename, so that a crash meanwhile leaves the old file.
    """

    def __init__(self, run_dir: Path | None, *, first_step: int = 0, optional: OptionalWrites | None = None) -> None:
        """``optional`` takes note of what cannot be written. Records wait in memory until there is room again;
        TensorBoard's events are given up."""
        self._file: LineLog | None = None
        self._optional = optional or OptionalWrites()
        self._path: Path | None = None
        self._events = None
        self._late: list[tuple[int, Mapping[str, float]]] = []
        """Steps and what is to be added to their records."""
        self.listeners: list[Callable[[int, Mapping[str, float]], None]] = []
        """Are told on rank 0 what goes into the record of a step: displays show the same as the file."""
        self._hook_before: Callable[[Any], object] | None = None
        if run_dir is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = path = run_dir / FILE
        if (lines := _lines_of_run(path)) is not None:
            kept = [line for line in lines if _step_of(line) < first_step]
            write_atomically(path, "".join(line + "\n" for line in kept))
        self._file = LineLog(path)
        self._hook_before = threading.excepthook
        threading.excepthook = partial(_say_but_of_events, say=self._hook_before)
        try:
            self._events = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=first_step or None)
        except OSError as error:
            self._optional.fail("tensorboard", error)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        try:
            self._file.add(to_json({"step": step, **_rounded(values | self._optional.counts())}))
        except OSError as error:
            self._optional.fail(FILE, error, step=step)
        else:
            self._settle()
        self._show(step, values)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values to the record of a step that is written already, or waits to be; seconds of the same phase add
        up. The file is replaced as a whole; where it cannot be, the values wait for the next record. The record is made
        if it is lost, as when the file was removed before a run was resumed."""
        if self._file is None:
            return
        self._late.append((step, values))
        self._settle()
        self._show(step, values)

    def _settle(self) -> None:
        """Writes the values that came late, if any, into their records."""
        if not self._late or self._path is None or self._file is None:
            return
        try:
            self._file.flush()
            records = {one["step"]: one for one in _records_in(_lines(self._path))}
            for step, values in self._late:
                _join(records.setdefault(step, {"step": step}), values)
            ordered = sorted(records.values(), key=lambda one: one["step"])
            write_atomically(self._path, "".join(to_json(one) + "\n" for one in ordered))
        except OSError as error:
            self._optional.fail(FILE, error, step=self._late[-1][0])
            return
        self._late.clear()
        self._file.close()
        self._file = LineLog(self._path)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        values = {**values, **self._optional.counts()}
        for tell in self.listeners:
            tell(step, values)
        if self._events is None:
            return
        try:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        except OSError as error:  # of its thread, some steps later
            self._events = None
            self._optional.fail("tensorboard", error, step=step)

    def close(self) -> None:
        if self._file is not None:
            self._settle()
            self._file.close()
        if self._events is not None:
            try:
                self._events.close()
            except OSError as error:
                self._optional.fail("tensorboard", error)
            self._events = None
        if self._hook_before is not None:
            threading.excepthook, self._hook_before = self._hook_before, None


def _join(record: dict[str, Any], values: Mapping[str, float]) -> None:
    """Adds ``values`` to ``record``; seconds of the same phase add up."""
    for name, value in values.items():
        before = record.get(name, 0.0) if name.startswith("seconds/") else 0.0
        record[name] = rounded(value + before)


def _say_but_of_events(ended: Any, *, say: Callable[[Any], object]) -> None:
    """A hook for threads that end with an error. That of TensorBoard's thread is said in words already."""
    is_of_events = type(ended.thread).__module__.startswith("tensorboard.")
    if not (is_of_events and issubclass(ended.exc_type, OSError)):
        say(ended)


NOTEWORTHY_WAIT = 0.1
"""The share of a step spent waiting for data from which the console and ``tools/run_status.py`` mention it; the latter
also takes it for waiting for the slowest rank. The first step always waits."""


def step_line(step: int, num_steps: int, values: Mapping[str, float]) -> str:
    """The console line of one step, for people."""
    bar = "#" * round(10 * step / max(num_steps, 1))
    parts = [f"[{bar:<10}] step {step}/{num_steps}"]
    for name, text in (("reward_mean", "reward"), ("loss", "loss"), ("grad_norm", "grad_norm"), ("kl", "kl")):
        if name in values:
            parts.append(f"{text} {values[name]:.4g}")
    if "key_token_ratio" in values:
        signals = ", ".join(
            f"{name.removeprefix('key_token_ratio/')} {value:.2f}"
            for name, value in sorted(values.items())
            if name.startswith("key_token_ratio/")
        )
        parts.append(f"key tokens {values['key_token_ratio']:.2f}" + (f" ({signals})" if signals else ""))
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:.0f} tokens/s")
    if "filter/rejected" in values:
        short = ", too few" if values["filter/is_short"] else ""
        parts.append(f"groups {values['filter/kept']:.0f} ({values['filter/rejected']:.0f} rejected{short})")
    if values.get("retirement/retired"):
        parts.append(f"retired {values['retirement/retired']:.0f}")
    if step > 1 and values.get("data_wait_fraction", 0.0) >= NOTEWORTHY_WAIT:
        parts.append(f"waited {values['data_wait_fraction']:.0%} for data")
    if values.get("num_skipped"):
        parts.append(f"skipped {values['num_skipped']:.0f}")
    if values.get("skipped_updates"):
        parts.append(f"updates skipped {values['skipped_updates']:.0f}")
    return "  ".join(parts)


def evaluation_line(step: int, values: Mapping[str, float], *, note: str = "") -> str:
    """The console line of an evaluation after ``step``, with ``note`` at its end."""
    names = [name.split("/")[1] for name in values if name.startswith("eval/") and name.count("/") == 2]
    sets = list(dict.fromkeys(names))
    parts = [f"evaluation after step {step}" if step else "evaluation before the first step"]
    if "eval_loss" in values:
        parts.append(f"loss {values['eval_loss']:.4g}")
    losses = [name for name in sets if f"eval/{name}/loss" in values]
    for name in losses if len(losses) > 1 else ():
        parts.append(f"{name} {values[f'eval/{name}/loss']:.4g}")
    for name in (name for name in sets if f"eval/{name}/accuracy" in values):
        share = values[f"eval/{name}/accuracy"]
        others = {word: values.get(f"eval/{name}/{word}") for word in ("strict", "lenient", "truncated", "unusable")}
        usual = {"strict": share, "lenient": share, "truncated": 0.0, "unusable": 0.0}
        noted = ", ".join(f"{word} {value:.1%}" for word, value in others.items() if value not in (None, usual[word]))
        parts.append(f"{name} {share:.1%}" + (f" ({noted})" if noted else ""))
    parts.append(f"{values.get('seconds/evaluate', 0.0):.0f} s")
    return "  ".join([*parts, *([note] if note else [])])


def rounded(value: float) -> float:
    """A number as the file holds it."""
    return float(f"{value:.8g}")


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: rounded(value) for name, value in values.items()}


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run so far, without a torn last one; empty if it has none.

    Raises:
        UserError: the file cannot be read; ``TransientError`` where that may pass.
    """
    return _records_in(_lines_of_run(run_dir / FILE) or ())


def figures_of_step(run_dir: Path, *, step: int) -> frozenset[str]:
    """The names of all numbers that are recorded of ``step``; none if it has no record."""
    return frozenset(name for record in read_records(run_dir) if record["step"] == step for name in record)


def _records_in(lines: Iterable[str]) -> list[dict[str, Any]]:
    return [parse_json(line) for line in lines if math.isfinite(_step_of(line))]


def _lines_of_run(path: Path) -> list[str] | None:
    """The lines of an earlier part of the run; None if there is no file."""
    try:
        return _lines(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error, option="--run-dir") from error


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _step_of(line: str) -> float:
    """The record's step; infinite for what is no record: the torn last line of a run that died while writing it, or
    what a damaged disk has made of one. A resumed run drops such lines."""
    try:
        record = parse_json(line)
    except ValueError:
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and abs(step) < MOST_STEPS else math.inf
