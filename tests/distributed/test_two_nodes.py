"""Two nodes on one machine: two network namespaces joined by a virtual cable, each with a loopback of its own.

What only a second node shows: addresses that are no loopback, ranks that find each other through node 0 alone. The same
layout on one node must give the same numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from megatron_ktr.config import load_config
from tests.support.nodes import ip, joined_nodes, must
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

ADDRESSES = ("10.213.77.1", "10.213.77.2")


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, ...]]:
    with joined_nodes("ktr", addresses=ADDRESSES) as names:
        yield names


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two_nodes") / "example"
    size = ["--num-prompts", "4", "--num-generations", "3"]
    command = [sys.executable, "tools/make_replay_example.py", "--out", str(out), *size]
    must(subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS))
    return out


def flags(example: Path, run_dir: Path, layout: dict[str, int]) -> list[str]:
    named = {
        "config": REPOSITORY / "examples" / "replay.yaml",
        "model": example / "model",
        "prompt-template": example / "model" / "prompt_template.txt",
        "replay-path": example / "rollouts.jsonl",
        "num-generations": 3,
        "train-steps": 2,
        "prompts-per-step": 2,
        "distributed-timeout-minutes": 25,
        "run-dir": run_dir,
        **layout,
    }
    return [text for name, value in named.items() for text in (f"--{name}", str(value))]


def run_on_nodes(
    nodes: tuple[str, ...], arguments: list[str], *, ranks_per_node: int, folder: Path, may_fail: bool = False
) -> list[str]:
    """``examples/launch/torchrun.sh`` on both nodes; what each printed. ``may_fail``: this machine's disk may be
    slow, and the doctor says so with its exit code."""
    started = []
    for rank, name in enumerate(nodes):
        environment = {
            **os.environ,
            "NNODES": "2",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29611",
            "NPROC_PER_NODE": str(ranks_per_node),
            "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }
        command = ["ip", "netns", "exec", name, "bash", str(REPOSITORY / "examples/launch/torchrun.sh"), *arguments]
        # From another directory than the repository's: the script finds the code by itself.
        output = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        started.append((process, output))
    try:
        codes = [process.wait(timeout=PATIENCE_SECONDS) for process, _ in started]
    finally:
        for process, _ in started:
            process.kill()
            process.wait()
    texts = []
    for _, output in started:
        output.seek(0)
        texts.append(output.read())
        output.close()
    assert codes == [0, 0] or (may_fail and codes == [1, 0]), "\n".join(text[-2000:] for text in texts)
    return texts


def bytes_sent(node: str) -> int:
    return int(must(ip("netns", "exec", node, "cat", "/sys/class/net/eth0/statistics/tx_bytes")))


def train_here(context: Any, *, arguments: list[str]) -> None:
    from megatron_ktr.train import train

    assert train(load_config(arguments)) == 0


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """The steps' metrics without what measures time."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("second", "ranks/", "tflops", "mfu", "data_wait")
    return [{name: value for name, value in record.items() if not any(t in name for t in timed)} for record in records]


# Pipeline ranks are the slowest to change: each stage is a node, as on a cluster.
LAYOUT = {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2}


@pytest.mark.slow
def test_two_nodes_train_as_one_node_does(nodes, example, ranks, tmp_path) -> None:
    before = bytes_sent(nodes[0])
    arguments = flags(example, tmp_path / "two", LAYOUT)
    first, second = run_on_nodes(nodes, arguments, ranks_per_node=2, folder=tmp_path)
    assert bytes_sent(nodes[0]) - before > 100_000, "tensors went over the cable"
    assert "node 1 of 2, 2 processes; meeting at 10.213.77.1:29611" in second
    assert "step 2/2" in first and "step 1/2" not in second, "rank 0 alone reports"
    assert "Traceback" not in first + second
    ranks(train_here, world_size=4, arguments=flags(example, tmp_path / "one", LAYOUT))
    # The same sums in the same order: to the bit.
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one") and len(numbers(tmp_path / "one")) == 2
    assert (tmp_path / "two/export/model.safetensors").read_bytes() == (
        tmp_path / "one/export/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_the_doctor_looks_at_both_nodes_and_between_them(nodes, tmp_path) -> None:
    before = bytes_sent(nodes[0])
    script = [str(REPOSITORY / "tools" / "doctor.py"), "--json", "--run-dir", str(tmp_path)]
    first, second = run_on_nodes(nodes, script, ranks_per_node=1, folder=tmp_path, may_fail=True)
    assert "checks" not in second, "rank 0 alone reports"
    (report,) = [line for line in first.splitlines() if line.startswith("{")]
    found = {check["name"]: check for check in json.loads(report)["checks"]}
    # Seven all-reduces of 4 MiB, half of each over the cable.
    assert bytes_sent(nodes[0]) - before > 7 * 2 * 2**20
    assert found["all-reduce"]["ok"] and "2 ranks, 2 nodes" in found["all-reduce"]["detail"]
    assert found["shared directory"]["detail"] == f"all 2 nodes see {tmp_path}"
    assert found["megatron-core"]["detail"].startswith(f"all 2 nodes: {version('megatron-core')} ")
