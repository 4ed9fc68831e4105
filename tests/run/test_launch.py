"""Launchers: what they refuse, what they run, and that a run which is asked to leave goes on as if it had not been."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.config import Config, config_from_values
from megatron_ktr.data.media.video_decord import DecordProcess
from megatron_ktr.data.media.video_pyav import index_video
from megatron_ktr.errors import EXIT_SAVED, UserError
from megatron_ktr.run.directory import RUN_ENTRY, list_checkpoints, open_run_directory
from megatron_ktr.run.interruption import LEAVE_SIGNALS
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.ranks import RankError
from tests.support.replayed import replay_values, write_text_replay
from tests.support.videos import numbered_frames, write_video

LAUNCH = REPOSITORY / "examples" / "launch"
STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/`` and ``rollouts.jsonl``: text questions with recorded responses, of which some earned more."""
    folder = tmp_path_factory.mktemp("launch")
    return write_text_replay(folder)


def values(inputs: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    return replay_values(inputs, run_dir, **({"train_steps": STEPS, "prompts_per_step": 2} | changes))


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


# A run that is asked to leave


def train_asked(context: Any, *, config: Config, asked: dict[int, int]) -> int:
    """The training command's function; after step ``s`` rank ``asked[s]`` alone gets a signal."""
    from megatron_ktr.train import train
    from megatron_ktr.trainer import Trainer

    original = Trainer.train_step

    def step_and_ask(self: Trainer, step: int) -> Any:
        report = original(self, step)
        if asked.get(step) == context.rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return report

    before = signal.getsignal(signal.SIGUSR1)
    Trainer.train_step = step_and_ask
    try:
        code = train(config)
    finally:
        Trainer.train_step = original
    assert signal.getsignal(signal.SIGUSR1) is before
    return code


def test_one_asked_rank_makes_all_leave_saved_and_the_resumed_run_equals_the_uninterrupted(ranks, inputs, tmp_path):
    def run(name: str, *, asked: dict[int, int], **changes: Any) -> list[int]:
        config = config_from_values(values(inputs, tmp_path / name, **changes))
        return ranks(train_asked, world_size=2, config=config, asked=asked)

    assert run("whole", asked={}) == [0, 0]
    # No save interval: the signal alone makes the checkpoint.
    assert run("asked", asked={2: 1}, auto_resume=True) == [EXIT_SAVED, EXIT_SAVED]
    assert [step for step, _ in list_checkpoints(tmp_path / "asked")] == [2]
    assert len(losses(tmp_path / "asked")) == 2 and not (tmp_path / "asked/export").exists()
    # A step whose checkpoint is due anyway is saved once; the last step is not interrupted.
    assert run("asked", asked={3: 0}, auto_resume=True, save_interval=3) == [EXIT_SAVED, EXIT_SAVED]
    assert [step for step, _ in list_checkpoints(tmp_path / "asked")] == [2, 3]
    assert run("asked", asked={4: 1}, auto_resume=True) == [0, 0]
    # A finished run has nothing left to do, not even an export.
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "asked").rglob("*")}
    assert run("asked", asked={}, auto_resume=True) == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "asked").rglob("*")} == left
    # One that is to go on with other data is refused before anything of it is moved.
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(reversed((inputs / "rollouts.jsonl").read_text().splitlines())) + "\n")
    with pytest.raises(RankError, match="records are not those of the saved run"):
        run("asked", asked={}, auto_resume=True, train_steps=STEPS + 1, replay_path=str(other))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "asked").rglob("*") if path.is_file()}
    assert {path: time for path, time in left.items() if path.is_file()} == kept
    assert all(RUN_ENTRY.fullmatch(path.name) for path in (tmp_path / "asked").iterdir()), "what --auto-resume may move"
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "asked") == whole, "bit for bit"
    assert len({norm for _, _, norm in whole}) == STEPS, "a run that moves"
    assert (tmp_path / "asked/export/config.json").is_file()


def train_on_a_full_disk(context: Any, *, config: Config) -> tuple[str, bool]:
    """The message that the run ends with, and whether it may pass. No tensor of a checkpoint can be written."""
    from megatron_ktr.distributed import checkpoint_writer
    from megatron_ktr.errors import is_transient
    from megatron_ktr.train import train

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO if context.rank else errno.ENOSPC, "as if")

    original, checkpoint_writer.save_tensor = checkpoint_writer.save_tensor, fail
    try:
        train(config)
    except UserError as error:
        return str(error), is_transient(error)
    finally:
        checkpoint_writer.save_tensor = original
    return "", False


def test_a_last_checkpoint_that_is_missing_is_an_error_after_the_export(ranks, inputs, tmp_path):
    """Also where a run goes on without the checkpoints that it cannot write."""
    run_dir = tmp_path / "run"
    changes: dict[str, Any] = dict(train_steps=1, save_interval=1, save_failure="continue")
    config = config_from_values(values(inputs, run_dir, **changes))
    first, second = ranks(train_on_a_full_disk, world_size=2, config=config)
    start = f"the trained model is in {run_dir / 'export'}, but the checkpoint of the last step is missing: "
    assert first == second and first[0].startswith(start) and "cannot save step 1" in first[0], first
    assert "disk full" in first[0] and not first[1], "what no new start mends is said before what may pass"
    assert (run_dir / "export/config.json").is_file() and not (run_dir / "finished.json").exists()


@pytest.mark.skipif(not DecordProcess.is_installed(), reason="decord has no wheel for this machine")
def test_the_decoding_child_outlives_a_signal_to_all_processes(tmp_path):
    """A scheduler signals it too, while its rank finishes the step and may need it."""
    process, path = DecordProcess(), write_video(tmp_path / "clip.mp4", numbered_frames(4))
    index = index_video(path)

    def first_frame() -> Any:
        asked = dict(num_frames=4, size=index.upright_size, is_last=True, timeout_seconds=PATIENCE_SECONDS)
        return process.read_frames(path, [0], **asked)

    before, child = first_frame(), process._child
    for number in LEAVE_SIGNALS:
        child.send_signal(number)
    assert (first_frame() == before).all() and process._child is child and child.poll() is None
    process.close()


def test_auto_resume_begins_anew_where_no_checkpoint_was_completed(inputs, tmp_path):
    config = config_from_values(values(inputs, tmp_path / "run", auto_resume=True))
    assert open_run_directory(config).checkpoint is None
    (tmp_path / "run/metrics.jsonl").write_text("left by a start that was killed")
    (tmp_path / "run/checkpoints/.step_00000001").mkdir(parents=True)
    for number in ("", "_2"):
        assert open_run_directory(config).checkpoint is None
        assert (tmp_path / f"run/abandoned_start{number}/config.yaml").is_file()
    assert (tmp_path / "run/abandoned_start/metrics.jsonl").is_file()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "abandoned_start",
        "abandoned_start_2",
    }


def test_auto_resume_moves_nothing_that_is_not_a_run(inputs, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        open_run_directory(config_from_values(values(inputs, tmp_path, auto_resume=True)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# torchrun.sh


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """torchrun.sh as a user runs it; nothing it reads is left over from this process."""
    return subprocess.run(
        ["bash", str(LAUNCH / "torchrun.sh"), *arguments],
        env=launch_environment(**environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def launch_environment(**environment: str) -> dict[str, str]:
    left_out = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE"}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}


ONE_NODE = dict(NNODES="1", NODE_RANK="0", MASTER_ADDR="127.0.0.1")


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, ["--config", "x"], "not set: NNODES NODE_RANK MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, ["--config", "x"], "not set: NODE_RANK;"),
        ({**ONE_NODE, "NNODES": "two"}, ["--config", "x"], "NNODES must be a number of nodes, or MIN:MAX, got 'two'"),
        ({**ONE_NODE, "NODE_RANK": "1"}, ["--config", "x"], "NODE_RANK must be 0 .. 0 (NNODES=1), got '1'"),
        (ONE_NODE, [], "nothing to run"),
        ({**ONE_NODE, "PATH": "/usr/bin:/bin"}, ["--config", "x"], "set NPROC_PER_NODE"),
    ],
)
def test_torchrun_script_says_in_one_line_what_is_missing(environment, arguments, expected):
    done = shell(*arguments, **environment)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and expected in line


def flags(inputs: Path, run_dir: Path) -> list[str]:
    options = values(inputs, run_dir)
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_the_run_and_the_same_command_continues_it(ranks, inputs, tmp_path, free_port):
    environment = dict(ONE_NODE, MASTER_PORT=str(free_port), NPROC_PER_NODE="1")
    # Long enough to be interrupted on any machine; the second start is told to end soon.
    command = [*flags(inputs, tmp_path / "run"), "--auto-resume"]
    started = subprocess.Popen(
        ["bash", str(LAUNCH / "torchrun.sh"), *command, "--train-steps", "100000", "--lr-decay-style", "constant"],
        env=launch_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"

        def has_done_two_steps() -> bool:
            assert started.poll() is None, started.communicate()[1][-2000:]
            return metrics.is_file() and metrics.read_text().count("\n") >= 2

        wait_until(has_done_two_steps)
        started.terminate()
        output, errors = started.communicate(timeout=PATIENCE_SECONDS)
    finally:
        started.kill()
    assert started.returncode == EXIT_SAVED, errors[-2000:]
    assert "SIGTERM: saved after step" in output and "Traceback" not in errors
    ((saved, _),) = list_checkpoints(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == saved >= 2
    steps = saved + 2
    done = shell(*command, "--train-steps", str(steps), "--lr-decay-style", "constant", **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    config = config_from_values(values(inputs, tmp_path / "whole", train_steps=steps, lr_decay_style="constant"))
    ranks(train_asked, world_size=1, config=config, asked={})
    assert losses(tmp_path / "run") == losses(tmp_path / "whole"), "bit for bit"


RANKS_THAT_LEAVE = """
import os, signal, sys, time
from pathlib import Path

def leave(number, frame):
    sys.exit(75)

if "late" not in sys.argv:
    signal.signal(signal.SIGTERM, leave)
(Path(sys.argv[1]) / os.environ["RANK"]).touch()
time.sleep(3600)
"""
"""Ranks without torch: what the launcher does with them does not depend on what they compute."""


@pytest.mark.parametrize("state", ["ready", "late"])
def test_the_launcher_hands_signals_to_every_rank_and_passes_their_code_on(tmp_path, free_port, state):
    """Also for ranks that are not yet ready to catch it: they had nothing to save."""
    (tmp_path / "ranks.py").write_text(RANKS_THAT_LEAVE)
    started = subprocess.Popen(
        ["bash", str(LAUNCH / "torchrun.sh"), str(tmp_path / "ranks.py"), str(tmp_path), state],
        env=launch_environment(**ONE_NODE, MASTER_PORT=str(free_port), NPROC_PER_NODE="2"),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:

        def have_begun() -> bool:
            assert started.poll() is None
            return (tmp_path / "0").exists() and (tmp_path / "1").exists()

        wait_until(have_begun)
        started.terminate()
        errors = started.communicate(timeout=PATIENCE_SECONDS)[1]
    finally:
        started.kill()
    assert started.returncode == EXIT_SAVED and errors == ""


def test_a_launcher_that_waits_for_other_nodes_leaves_when_asked(tmp_path, free_port):
    started = subprocess.Popen(
        ["bash", str(LAUNCH / "torchrun.sh"), "script.py"],
        env=launch_environment(
            NNODES="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port), NPROC_PER_NODE="1"
        ),
        stderr=subprocess.DEVNULL,
    )
    try:

        def listens() -> bool:
            assert started.poll() is None
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", free_port)):
                return True
            return False

        wait_until(listens)  # then it waits for node 1
        started.terminate()
        assert started.wait(timeout=PATIENCE_SECONDS) == EXIT_SAVED
    finally:
        started.kill()


def test_the_code_of_a_failing_rank_is_the_launchers_and_takes_one_line(tmp_path, free_port):
    script = tmp_path / "ranks.py"
    script.write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(3600)\n")
    done = shell(str(script), **ONE_NODE, MASTER_PORT=str(free_port), NPROC_PER_NODE="2")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 3 and line.startswith("error: rank 1 ") and "ended with code 3" in line
