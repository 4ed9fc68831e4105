"""Ranks, launchers and nodes that die in the middle of a step: the run goes on by itself, to the same numbers.

Nodes are network namespaces joined by a virtual switch. One run has one fault after the other, each in another
step, because every start of its ranks costs more than its steps. Limits of time are long and none is checked; a rank
that hangs is made to look old (``support/faulty_ranks.py``). On a busy machine a node may be taken for dead, which
costs one more restart and changes no number.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from megatron_ktr.config import config_from_values
from megatron_ktr.launching.arguments import check_arguments, find_meeting, may_restart, prepare_restarts
from megatron_ktr.launching.lifeline import with_lifeline
from megatron_ktr.run.preflight import restart_notes
from tests.support.nodes import ip, joined_nodes
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.replayed import replay_values, write_text_replay

ADDRESSES = ("10.213.78.1", "10.213.78.2", "10.213.78.3")
PORT = "29621"
STEPS = 7
HANG_MINUTES = 24
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, ...]]:
    """Three; most tests use two of them."""
    with joined_nodes("kte", addresses=ADDRESSES) as names:
        yield names


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/`` and ``rollouts.jsonl``: text questions with recorded responses, of which some earned more."""
    folder = tmp_path_factory.mktemp("elastic")
    return write_text_replay(folder)


def values(inputs: Path, run_dir: Path) -> dict[str, Any]:
    return replay_values(inputs, run_dir, train_steps=STEPS, prompts_per_step=2)


def train_whole(context: Any, *, given: dict[str, Any]) -> int:
    from megatron_ktr.train import train

    return train(config_from_values(given))


@dataclass
class Node:
    """A launcher on a node, and what it and its ranks have printed."""

    process: subprocess.Popen
    output: IO[str]

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()


def start_node(node: str, rank: int, arguments: list[str], *, nnodes: str = "2") -> Node:
    launcher = [sys.executable, "-m", "megatron_ktr.launch", "--nnodes", nnodes, "--nproc-per-node", "1"]
    launcher += ["--node-rank", str(rank), "--master-addr", ADDRESSES[0], "--master-port", PORT]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    output = tempfile.TemporaryFile("w+", errors="replace")
    process = subprocess.Popen(
        ["ip", "netns", "exec", node, *launcher, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    return Node(process, output)


def faulty(inputs: Path, folder: Path, faults: list[dict[str, Any]]) -> list[str]:
    """Arguments of a launcher: more restarts than faults, since a busy machine may need some itself."""
    (folder / "plan.json").write_text(json.dumps(faults))
    options = values(inputs, folder / "run") | {
        "save_interval": 1,
        "keep_checkpoints": 3,
        "hang_timeout_minutes": HANG_MINUTES,
        "distributed_timeout_minutes": 25,
    }
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    script = str(REPOSITORY / "tests/support/faulty_ranks.py")
    return ["--max-restarts", "40", script, str(folder / "plan.json"), *flags, "--auto-resume"]


@contextlib.contextmanager
def running(*started: Node) -> Iterator[None]:
    try:
        yield
    finally:
        for node in started:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(node.process.pid).children(recursive=True):
                    child.kill()
            node.process.kill()
            node.process.wait()


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def assert_equal_to_whole(run_dir: Path, whole: Path) -> None:
    assert losses(run_dir) == losses(whole) and len(losses(whole)) == STEPS, "bit for bit, every step once"
    weights = "export/model.safetensors"
    assert (run_dir / weights).read_bytes() == (whole / weights).read_bytes()


def ranks_of(plan: Path) -> list[str]:
    """Processes that run a rank of this plan."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if str(plan) in words and "megatron_ktr.launch" not in words:
                found.append(" ".join(words))
    return found


@pytest.fixture(scope="module")
def whole(ranks: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without faults."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert ranks(train_whole, world_size=2, given=values(inputs, run_dir)) == [0, 0]
    return run_dir


def run_with(faults: list[dict[str, Any]], nodes: tuple[str, ...], inputs: Path, folder: Path) -> list[str]:
    """What both nodes have printed, when the run has ended well."""
    arguments = faulty(inputs, folder, faults)
    first, second = (start_node(node, rank, arguments) for rank, node in enumerate(nodes[:2]))
    with running(first, second):
        codes = [node.process.wait(timeout=PATIENCE_SECONDS) for node in (first, second)]
    texts = [first.text(), second.text()]
    assert codes == [0, 0], "\n".join(text[-3000:] for text in texts)
    assert not ranks_of(folder / "plan.json"), "no rank outlives its launcher"
    return texts


@pytest.mark.slow
def test_killed_stopped_and_looping_ranks_and_a_killed_agent_change_no_number(nodes, inputs, whole, tmp_path) -> None:
    faults = [
        {"step": 2, "rank": 1, "fault": "kill"},
        {"step": 3, "rank": 0, "fault": "loop"},
        {"step": 4, "rank": 1, "fault": "stop"},
        {"step": 6, "rank": 1, "fault": "kill the agent"},
    ]
    first, second = run_with(faults, nodes, inputs, tmp_path)
    for fault in faults:
        assert f"fault: {fault['fault']} in step {fault['step']}" in first + second
    assert "rank 1 (process " in second and "was killed by SIGKILL; all ranks start again" in second
    assert "the launcher (process " in second and "was killed by SIGKILL, and its ranks with it" in second
    assert "Traceback" not in first + second
    told = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    hangs = "\n".join(incident["text"] for incident in told if incident["kind"] == "hang")
    assert "rank 0 hangs for 24 minutes (hang_timeout_minutes) in phase update of step 3" in hangs
    assert "at support/faulty_ranks.py" in hangs and "which is no collective" in hangs, "the rank that loops"
    # On a busy machine it may have been stopped before its first sign of life.
    assert re.search("rank 1 (shows no|has never shown a) sign of life", hangs), "the rank that is stopped"
    assert "called by policy/policy.py" in hangs, "where the other one waits"
    assert_equal_to_whole(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_node_that_is_cut_off_and_a_killed_node_0_change_no_number(nodes, inputs, whole, tmp_path) -> None:
    faults = [{"step": 3, "rank": 1, "fault": "cut"}, {"step": 5, "rank": 0, "fault": "kill the agent"}]
    arguments = faulty(inputs, tmp_path, faults)
    first, second = (start_node(node, rank, arguments) for rank, node in enumerate(nodes[:2]))
    with running(first, second):
        wait_until(lambda: "node 0 does not answer" in second.text(), pause_seconds=0.2)
        wait_until(lambda: f"node {ADDRESSES[1]} shows no sign of life" in first.text(), pause_seconds=0.2)
        wait_until(lambda: not ranks_of(tmp_path / "plan.json"), pause_seconds=0.2)  # on either node
        assert ip("-n", nodes[1], "link", "set", "eth0", "up").returncode == 0
        codes = [node.process.wait(timeout=PATIENCE_SECONDS) for node in (first, second)]
    assert codes == [0, 0], first.text()[-3000:] + second.text()[-3000:]
    assert "and its ranks with it; starting again" in first.text(), "node 0 comes back by itself"
    assert_equal_to_whole(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_goes_on_with_the_nodes_that_are_left(nodes, inputs, tmp_path) -> None:
    arguments = faulty(inputs, tmp_path, [{"step": 4, "rank": 1, "fault": "kill the launcher"}])
    first, second = (start_node(node, rank, arguments, nnodes="1:2") for rank, node in enumerate(nodes[:2]))
    with running(first, second):
        code = first.process.wait(timeout=PATIENCE_SECONDS)
    assert code == 0, first.text()[-3000:]
    assert not ranks_of(tmp_path / "plan.json"), "the ranks of the killed launcher ended with it"
    assert [step for step, _, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("fault", ["kill the launcher", "cut"])
def test_a_spare_node_takes_the_place_of_a_lost_one(nodes, inputs, whole, tmp_path, fault: str) -> None:
    """Which two of the three nodes begin is left to chance: it changes no number."""
    arguments = faulty(inputs, tmp_path, [{"step": 4, "rank": 1, "fault": fault}])
    started = [start_node(node, rank, arguments) for rank, node in enumerate(nodes)]
    with running(*started):
        # A node that is cut off waits for node 0 far longer than the others need.
        wait_until(lambda: sum(node.process.poll() == 0 for node in started) == 2, pause_seconds=0.2)
        lost = next(node for node in started if node.process.poll() != 0)
        assert f"fault: {fault} in step 4" in lost.text(), "\n".join(node.text()[-3000:] for node in started)
        address = ADDRESSES[started.index(lost)]
        # The connections of a process that is killed are closed, so the other rank notices, mostly before its launcher.
        told = "(lost another rank in phase|" if fault == "kill the launcher" else "("
        assert any(re.search(f"{told}node {address} shows no sign of life)", node.text()) for node in started)
    assert_equal_to_whole(tmp_path / "run", whole)


def run_torchrun(arguments: list[str], *, restarts: int) -> subprocess.CompletedProcess:
    """Two ranks under torch's own launcher. ``arguments`` are those of our launcher."""
    script = arguments[arguments.index("--max-restarts") + 2 :]
    return subprocess.run(
        [*TORCHRUN, "--max-restarts", str(restarts), *script],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


@pytest.mark.slow
@pytest.mark.nightly
def test_plain_torchrun_restarts_to_the_same_numbers(inputs, whole, tmp_path) -> None:
    faults = [{"step": 3, "rank": 1, "fault": "kill"}, {"step": 5, "rank": 0, "fault": "stop"}]
    arguments = faulty(inputs, tmp_path, faults)
    done = run_torchrun(arguments, restarts=40)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fault: kill in step 3" in done.stdout and "fault: stop in step 5" in done.stdout
    assert "rank 0 shows no sign of life" in (tmp_path / "run/events.jsonl").read_text()
    assert "give --auto-resume" not in done.stdout
    assert_equal_to_whole(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.nightly
def test_plain_torchrun_without_auto_resume_says_so_and_touches_nothing(inputs, tmp_path) -> None:
    arguments = faulty(inputs, tmp_path, [{"step": 3, "rank": 1, "fault": "kill"}])[:-1]
    done = run_torchrun(arguments, restarts=1)
    assert done.returncode == 1
    before = done.stdout.partition("fault: kill")[0]
    assert "(--max-restarts 1)" in before and "give --auto-resume" in before, "before anything has failed"
    assert "run is not empty" in done.stderr, "of the ranks that were started again"
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2]


FAILING = """
import os, pathlib, subprocess, sys, time
folder, code = pathlib.Path(sys.argv[1]), int(sys.argv[2])
child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
(folder / f"child_{os.environ['RANK']}_{os.getpid()}").write_text(str(child.pid))
if os.environ["RANK"] == "1":
    while not list(folder.glob("child_0_*")):
        time.sleep(0.01)
    sys.exit(code)
time.sleep(3600)
"""
"""Ranks without torch; each leaves a child in a session of its own behind."""


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (76, 1), (74, 2)])
def test_only_what_a_restart_can_help_is_restarted(tmp_path: Path, code: int, starts: int) -> None:
    (tmp_path / "ranks.py").write_text(FAILING)
    launcher = [sys.executable, "-m", "megatron_ktr.launch", "--nnodes", "1", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--max-restarts", "1", str(tmp_path / "ranks.py"), str(tmp_path), str(code)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == code
    *restarts, last = done.stderr.splitlines()
    assert last.startswith("error: rank 1 ") and f"ended with code {code}" in last
    assert len(restarts) == starts - 1 and all("start again from the newest intact checkpoint" in r for r in restarts)
    children = list(tmp_path.glob("child_1_*"))
    assert len(children) == starts
    assert not any(is_alive(int(child.read_text())) for child in tmp_path.glob("child_*")), "no orphans"


def is_alive(pid: int) -> bool:
    """One that was killed is dead, though whoever it was left to may not have asked for its exit code."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def parsed(*arguments: str) -> Any:
    from torch.distributed import run as torchrun

    found = torchrun.parse_args([*arguments, "-m", "megatron_ktr.train", "--config", "x.yaml"])
    check_arguments(found)
    return found


def test_training_that_may_be_restarted_resumes_and_meets_where_nodes_may_leave(capfd: Any) -> None:
    place = ("--master-addr", "127.0.0.1", "--master-port", "29999")
    assert not may_restart(parsed("--nnodes", "2", *place)) and not may_restart(parsed("--nnodes", "2:2", *place))
    # A spare node beyond those that are needed.
    arguments = parsed("--nnodes", "2", "--max-restarts", "3", "--node-rank", "2", *place)
    assert may_restart(arguments) and may_restart(parsed("--nnodes", "1:2", *place))
    meeting = find_meeting(arguments)
    assert meeting is not None and not meeting.is_host and meeting.port == 29999
    prepare_restarts(arguments, meeting)
    assert arguments.rdzv_backend == "c10d" and arguments.rdzv_endpoint == "127.0.0.1:29999"
    assert arguments.local_addr == "127.0.0.1"
    assert "is_host=false" in arguments.rdzv_conf and "join_timeout=600" in arguments.rdzv_conf
    assert arguments.training_script_args[-1] == "--auto-resume"
    again = parsed("--nnodes", "1", "--max-restarts", "1", *place)
    again.training_script_args.append("--resume")
    prepare_restarts(again, find_meeting(again))
    assert "--auto-resume" not in again.training_script_args and "is_host=true" in again.rdzv_conf
    assert capfd.readouterr().err == "", "node 0 alone says what it has added, and only if it has"


def test_ranks_that_may_be_restarted_without_resuming_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert not restart_notes(resumes=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert not restart_notes(resumes=True)
    (note,) = restart_notes(resumes=False)
    assert "--max-restarts 3" in note and note.endswith("give --auto-resume")


def test_a_rank_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import pathlib, subprocess, sys, time\n"
        "from megatron_ktr.launching.lifeline import with_lifeline\n"
        "command, arguments = with_lifeline('sleep', ['3600'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(subprocess.Popen([command, *arguments]).pid))\n"
        "time.sleep(3600)\n"
    )
    pid_file = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", program, str(pid_file)], cwd=REPOSITORY) as parent:
        wait_until(lambda: pid_file.exists() and bool(pid_file.read_text()))
        child = psutil.Process(int(pid_file.read_text()))
        wait_until(lambda: child.name() == "sleep")  # it has become the command
        parent.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    command, arguments = with_lifeline("true", [])
    # Started by another process than the one that made the command, it does not even begin.
    done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", command, *arguments], timeout=PATIENCE_SECONDS)
    assert done.returncode == 1
