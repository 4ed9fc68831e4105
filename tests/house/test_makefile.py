"""The Makefile removes and overwrites nothing that it did not make, and tests with the Python it was told to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.dear_files import DEAREST_FIRST, place_of
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def refusal(*arguments: str) -> str:
    """The line that a make command ends with; it must fail."""
    command = ["make", "--no-print-directory", *arguments]
    # Of the make that runs the tests: its options and variables are not for this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 2, done.stdout[-2000:]
    return next(line for line in done.stderr.splitlines() if "rror" in line or "***" in line)


def test_a_directory_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    for target, name in (("setup", "VENV"), ("setup-vllm", "VENV_VLLM")):
        folder = tmp_path / target
        folder.mkdir()
        (folder / "thesis.txt").write_text("important")
        assert f"{folder} is there and is no Python environment" in refusal(
            target, f"{name}={folder}", f"PYTHON={sys.executable}"
        )
        assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["VENV", "VENV_VLLM", "VENV_312"])
def test_paths_with_spaces_are_refused(name: str) -> None:
    assert f"{name} must be one path without spaces" in refusal("distclean", "--dry-run", f"{name}=a b")


def test_an_environment_of_another_python_is_refused_by_name(tmp_path: Path) -> None:
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\necho 3.9\n")
    fake.chmod(0o755)
    found = refusal("setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}")
    assert "is of Python 3.9, and PYTHON=" in found and f"rm -rf {tmp_path / 'venv'}" in found
    assert "does not run" in refusal("setup", f"VENV={tmp_path / 'none'}", "PYTHON=/nonexistent")


def test_the_newer_stack_is_not_tested_with_an_older_python(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for target in ("test-3.12", "test-both-stacks"):
        assert "3.12" in refusal(target, f"PYTHON_312={old}", f"VENV={tmp_path / 'none'}")


def test_the_files_that_are_started_first_are_there() -> None:
    assert not [name for name in DEAREST_FIRST if not (REPOSITORY / "tests" / name).is_file()]
    assert len(set(DEAREST_FIRST)) == len(DEAREST_FIRST)
    first = REPOSITORY / "tests" / DEAREST_FIRST[0]
    assert place_of(first) == 0 < place_of(first.with_name("test_of_another_name.py"))
