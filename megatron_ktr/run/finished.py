"""Whether a run has nothing left to do: ``finished.json`` names the step whose weights ``export`` holds.

    {"step": 40, "checksums": "…"}

It is written after the export of the last step, if the checkpoint of that step is there too. ``checksums`` is the
checksum of ``export/checksums.json``, so another export in that place is not taken for this one. A run that was
finished by an earlier version has no such file, and is exported again when it is resumed.

A run that is asked for an evaluation which its last step lacks is not finished: it is resumed, and makes up for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ktr.config import Config
from megatron_ktr.errors import UserError, is_transient, unreadable
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.bounded import MOST_JSON_BYTES, read_text
from megatron_ktr.files.checksums import MANIFEST, Damage, file_digest
from megatron_ktr.files.intact_checkpoint import CONFIG_FILE
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.run.directory import EXPORT, FINISHED_FILE, Agree, list_checkpoints, require_same_options
from megatron_ktr.run.kept import FILE as BEST_FILE
from megatron_ktr.run.kept import named_best

_log = logging.getLogger(__name__)


def write_finished(run_dir: Path, *, step: int) -> None:
    """Notes that ``run_dir/export`` is complete and of the last step. Without the file, which a full disk may prevent,
    a resumed run only exports again."""
    path = run_dir / FINISHED_FILE
    try:
        content = {"step": step, "checksums": file_digest(run_dir / EXPORT / MANIFEST).value}
        write_atomically(path, json.dumps(content) + "\n")
    except OSError as error:
        _log.warning("%s cannot be written: %s; a resumed run would export again", path, error.strerror)


def finished_line(
    config: Config,
    *,
    verify: Callable[[Path], list[Damage]],
    agree: Agree,
    lacking_sets: Callable[[int], Sequence[str]] = lambda step: (),
) -> str | None:
    """What to say of the run that ``config`` resumes if it is finished: its last step is done, and its export is what
    was written. None for any other run, and while the length is known in epochs alone: data, which may have become
    more, tell how many steps those are (``config/run_length.py``). Nothing is changed. ``verify`` and ``agree``
    are those of ``distributed/shared_verification.py``; then this is collective. ``lacking_sets`` gives the held-out
    sets that the model of a step has yet to be evaluated on. It is collective too, and called only if all else says
    that the run is finished.

    Raises:
        UserError: a file exists and cannot be read; or the evaluation cannot be made up for, as the last step has no
            checkpoint.
    """
    if not (config.trainer.resume or config.trainer.auto_resume) or config.trainer.train_steps is None:
        return None
    step = agree(lambda: _finished_step(config))
    if step is None:
        return None
    if config.evaluation.has_anything and config.trainer.eval_interval and (lacking := lacking_sets(step)):
        agree(lambda: _require_checkpoint(Path(config.trainer.run_dir), step, lacking))
        return None
    export = Path(config.trainer.run_dir) / EXPORT
    if damage := verify(export):
        agree(lambda: _log.warning("%s is damaged (%s): the model is exported again", export, damage[0]))
        return None
    return f"the run is finished: all {step} steps are done, and its export is in {export}{_best_note(config)}"


def _best_note(config: Config) -> str:
    """What becomes of a ``--keep-best`` that the run did not have: nothing, since no checkpoint is to be written."""
    metric, named = config.evaluation.keep_best, named_best(Path(config.trainer.run_dir))
    if metric is None or (named is not None and named.metric == metric):
        return ""
    what = f"there is no {BEST_FILE}" if named is None else f"{BEST_FILE} names the best by {named.metric}"
    return f"; --keep-best {metric} changes nothing any more, {what}"


def _finished_step(config: Config) -> int | None:
    """The last step of the run that ``config`` describes, if ``finished.json`` says that it is done; else None."""
    trainer, run_dir = config.trainer, Path(config.trainer.run_dir)
    try:
        content = _read(run_dir / FINISHED_FILE)
        digest = _digest_of(run_dir / EXPORT / MANIFEST)
    except OSError as error:
        raise unreadable(error.filename or run_dir / FINISHED_FILE, error, option="--run-dir") from error
    if content is None or digest is None or digest != content.get("checksums"):
        return None
    step = content.get("step")
    if not isinstance(step, int) or step != trainer.train_steps:
        return None
    saved = [saved_step for saved_step, _ in list_checkpoints(run_dir)]
    if saved and trainer.save_interval and step not in saved:
        return None  # somebody took it away, so that the run goes on from an older one
    try:
        require_same_options(config, run_dir / CONFIG_FILE)
    except UserError as error:  # what resumes says so, once it has found a checkpoint
        if is_transient(error):  # ... but it reads another copy, and a run that goes on makes its export anew
            raise
        return None
    return step


def _require_checkpoint(run_dir: Path, step: int, sets: Sequence[str]) -> None:
    """Without the checkpoint of the last step, its evaluation would cost the steps since an older one, or all."""
    if step not in [saved_step for saved_step, _ in list_checkpoints(run_dir)]:
        raise UserError(
            f"--resume: the run is finished, but was not evaluated on {', '.join(sets)} after step {step}, of which it "
            f"has no checkpoint: leave them out, or ask questions of {run_dir / EXPORT} with tools/evaluate.py"
        )


def _read(path: Path) -> dict[str, Any] | None:
    """The content; None if there is no such file, or it is no note of this kind."""
    try:
        content = parse_json(read_text(path, most_bytes=MOST_JSON_BYTES))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _digest_of(path: Path) -> str | None:
    try:
        return file_digest(path).value
    except (FileNotFoundError, NotADirectoryError):
        return None
