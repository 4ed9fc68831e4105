"""How commands end: one line for what a user did, traceback and a last line for what we did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.errors import (
    Parser,
    TransientError,
    UserError,
    number,
    run_cli,
    same_on_every_rank,
    told_to_every_rank,
    whole,
)
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS, wait_until


def raising(error: BaseException) -> Any:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (OSError(28, "No space left on device", "/run/x"), 2, "error: [Errno 28] No space left on device: '/run/x'"),
        (OSError(116, "Stale file handle", "/run/x"), 74, "error: [Errno 116] Stale file handle: '/run/x'"),
        (BrokenPipeError(32, "Broken pipe"), 2, "error: [Errno 32] Broken pipe"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "error: out of memory (MemoryError): fewer or smaller frames"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: out of memory (Default"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), 3, "error: lost another rank, "),
        (RuntimeError("[gloo] Timed out waiting 9ms for recv"), 3, "error: waited for another rank for longer than"),
    ],
)
def test_what_is_no_mistake_of_ours_is_one_line(capsys: Any, error: BaseException, code: int, start: str) -> None:
    """A broken pipe that is not standard output's is an error like any other."""
    with pytest.raises(SystemExit) as ended:
        run_cli(raising(error))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == code and line.startswith(start)


def test_a_mistake_of_ours_keeps_its_traceback_and_says_what_to_do(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(raising(KeyError("lost")))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 70 and lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: internal error: KeyError: 'lost'") and "please report it" in lines[-1]


def test_a_rank_speaks_unless_rank_0_says_the_same(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    own, common = UserError("own"), UserError("common")
    passing, heard = TransientError("passing"), TransientError("heard")
    with pytest.raises(UserError), same_on_every_rank():
        raise common
    with pytest.raises(UserError), same_on_every_rank():
        raise passing  # of this rank alone, perhaps
    with pytest.raises(UserError), same_on_every_rank(), told_to_every_rank():
        raise heard
    for error in (own, common, passing, heard):
        with pytest.raises(SystemExit):
            run_cli(raising(error))
    assert capsys.readouterr().err == "error [rank 3]: own\nerror [rank 3]: passing\n"
    monkeypatch.setenv("RANK", "third")
    with pytest.raises(SystemExit):
        run_cli(raising(own))
    assert capsys.readouterr().err == "error [rank third]: own\n"


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    """As ``| head -1`` does. The page is larger than a pipe holds."""
    command = [sys.executable, "-m", "megatron_ktr.config", "--markdown"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    # The page may just fit into the pipe.
    assert process.wait(timeout=PATIENCE_SECONDS) in (0, 141)
    code = "import sys; from megatron_ktr.errors import run_cli\nrun_cli(lambda: print('x' * 10**6))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=PATIENCE_SECONDS)) == ("", 141)


def test_ctrl_c_while_modules_are_imported_is_no_traceback(tmp_path: Path) -> None:
    """Half of a short command's time; the module that is being imported here waits for the signal."""
    (tmp_path / "slow_module.py").write_text(
        f"import megatron_ktr, pathlib, time\npathlib.Path('ready').touch()\ntime.sleep({PATIENCE_SECONDS})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "import slow_module"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"},
        # A shell that starts tests in the background has them ignore it, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGINT)
    assert process.stderr
    assert process.stderr.read() == "interrupted\n"
    assert process.wait(timeout=PATIENCE_SECONDS) in (130, -signal.SIGINT)


@pytest.mark.parametrize("text", ["x", "", "1.5", "nan", "0", "9" * 5000, "-3", "3"])
def test_numbers_of_the_tools_have_limits(text: str) -> None:
    parser = Parser(prog="tool")
    parser.add_argument("--steps", type=whole(low=2, high=8, even=True))
    with pytest.raises(UserError, match="--steps: expected an even number from 2 to 8, got .*; see tool --help"):
        parser.parse_args([f"--steps={text}"])


@pytest.mark.parametrize("text", ["x", "", "nan", "inf", "0", "1e400", "-1"])
def test_fractions_of_the_tools_have_limits(text: str) -> None:
    parser = Parser(prog="tool")
    parser.add_argument("--share", type=number(above=0.0, high=1.0))
    with pytest.raises(UserError, match="--share: expected a number above 0 and at most 1, got"):
        parser.parse_args([f"--share={text}"])
    assert parser.parse_args(["--share=1"]).share == 1.0
