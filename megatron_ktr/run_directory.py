"""The directory of one run: resolved config, metrics, rollouts, exports; nothing in it is ever overwritten."""

from __future__ import annotations

from pathlib import Path

from megatron_ktr.config import Config, save_resolved
from megatron_ktr.errors import UserError


def open_run_directory(config: Config) -> Path:
    """Creates ``trainer.run_dir`` and saves the resolved config in it.

    Raises UserError if it holds anything and the run is not a resumed one, or if it cannot be written.
    """
    run_dir = Path(config.trainer.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file, expected a directory")
    if not config.trainer.resume and run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"--run-dir {run_dir} is not empty: choose another, or continue that run with --resume")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir} cannot be created: {error.strerror}") from error
    save_resolved(config, run_dir / "config.yaml")
    return run_dir
