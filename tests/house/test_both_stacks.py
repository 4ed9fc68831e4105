"""The same seeded run on both stacks: the same losses, and each reads what the other wrote.

``OTHER_PYTHON`` names the interpreter of an environment with the other stack (``make test-both-stacks`` sets it).
Without it there is nothing to compare with.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ktr import stack
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

OTHER = os.environ.get("OTHER_PYTHON", "")
pytestmark = pytest.mark.skipif(not OTHER, reason="OTHER_PYTHON names no interpreter with the other stack")

COMPARED = ("loss", "grad_norm", "key_token_ratio", "entropy", "learning_rate", "num_skipped")
LAYOUTS: dict[str, list[str]] = {
    "alone, a rate for each part": ["--vision-lr", "1e-4", "--weight-decay", "0.1"],
    "TP2 x PP2, bf16, recomputing": [
        *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--params-dtype", "bf16"),
        *("--sequence-parallel", "--recompute-granularity", "selective", "--recompute-modules", "mlp,layernorm"),
    ],
}
NUM_RANKS = dict(zip(LAYOUTS, (1, 4), strict=True))


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [python, *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE_SECONDS
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
    return done


@dataclass(frozen=True)
class Runs:
    """Where the runs of one layout are."""

    folder: Path
    layout: str

    def train(self, python: str, name: str, *options: str, steps: int = 4) -> list[dict[str, Any]]:
        """The compared metrics of each step that is in the run's directory afterwards."""
        ranks = NUM_RANKS[self.layout]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        example, out = self.folder / "example", self.folder / name
        flags = ["-m", "megatron_ktr.train", "--config", "examples/replay.yaml", "--model", str(example / "model")]
        flags += ["--replay-path", str(example / "rollouts.jsonl"), "--num-generations", "4"]
        flags += ["--prompt-template", str(example / "model" / "prompt_template.txt"), "--prompts-per-step", "2"]
        flags += ["--train-steps", str(steps), "--save-interval", "2", "--keep-checkpoints", "9", *LAYOUTS[self.layout]]
        run(python, *launcher, *flags, "--run-dir", str(out), *options)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [{key: line[key] for key in ("step", *COMPARED) if key in line} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def other_is_the_other_stack() -> None:
    said = run(OTHER, "-c", "from megatron_ktr import stack; print(stack.installed().core)").stdout.strip()
    assert {said, stack.installed().core} == {stack.OLD.core, stack.NEW.core}


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    example = ["tools/make_replay_example.py", "--out", str(folder / "example")]
    run(sys.executable, *example, "--num-prompts", "8", "--num-generations", "4")
    return Runs(folder, request.param)


def test_losses_are_equal_and_each_resumes_from_the_other(runs: Runs) -> None:
    ours, theirs = runs.train(sys.executable, "ours"), runs.train(OTHER, "theirs")
    assert [line["step"] for line in ours] == [1, 2, 3, 4] and len(ours[0]) == 1 + len(COMPARED)
    assert ours == theirs
    for python, source, expected in ((OTHER, "ours", ours), (sys.executable, "theirs", theirs)):
        half = runs.folder / f"half-of-{source}"
        shutil.copytree(runs.folder / source, half)
        shutil.rmtree(half / "checkpoints" / "step_00000004")
        assert runs.train(python, half.name, "--resume") == expected, f"{python} from the first half of {source}"


def test_converted_models_are_the_same_bytes(tmp_path: Path) -> None:
    run(sys.executable, "tools/make_replay_example.py", "--out", str(tmp_path / "example"), "--num-prompts", "1")
    model = tmp_path / "example" / "model"
    for name, python, reader in (("ours", sys.executable, OTHER), ("theirs", OTHER, sys.executable)):
        stored, back = str(tmp_path / name), str(tmp_path / f"{name}-back")
        run(python, "tools/convert_checkpoint.py", "to-megatron", "--hf", str(model), "--out", stored)
        run(reader, "tools/convert_checkpoint.py", "to-hf", "--megatron", stored, "--out", back)
        # The live model on the other stack, against transformers, with the weights of the checkpoint.
        run(reader, "tools/verify_checkpoint.py", "--hf", str(model), "--megatron", stored)
    backs = [tmp_path / f"{name}-back" / "model.safetensors" for name in ("ours", "theirs")]
    assert filecmp.cmp(*backs, shallow=False)
    # The order of tensors in the file is the writer's own.
    first, last = load_file(model / "model.safetensors"), load_file(backs[0])
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
