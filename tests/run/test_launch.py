"""Launchers: what they refuse, what they run, and that a run which is asked to leave goes on as if it had not been."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron_ktr
from megatron_ktr.accounting.layout import Layout, why_not
from megatron_ktr.accounting.planner import GB, Request, judge
from megatron_ktr.config import Config, config_from_values, load_config
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.data.video_decord import DecordProcess
from megatron_ktr.data.video_pyav import index_video
from megatron_ktr.doctor.requirements import declared_requirements
from megatron_ktr.errors import UserError
from megatron_ktr.run.directory import list_checkpoints, open_run_directory
from megatron_ktr.run.interruption import EXIT_SAVED, LEAVE_SIGNALS
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.replayed import replay_values
from tests.support.videos import numbered_frames, write_video

LAUNCH = REPOSITORY / "examples" / "launch"
STEPS = 4


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/`` and ``rollouts.jsonl``: text questions with recorded responses, of which some earned more."""
    folder = tmp_path_factory.mktemp("launch")
    save_tiny_model(folder / "model", corpus=corpus(), hidden_size=32, ffn_size=64, num_layers=2, vision_hidden_size=32)
    words = corpus()[0].split()
    with (folder / "rollouts.jsonl").open("w") as file:
        for number in range(8):
            responses = [{"text": " ".join(words[k : k + 4]), "reward": (number + k) % 3} for k in range(3)]
            file.write(json.dumps({"problem_id": str(number), "problem": "red", "responses": responses}) + "\n")
    return folder


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
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "asked") == whole, "bit for bit"
    assert len({norm for _, _, norm in whole}) == STEPS, "a run that moves"
    assert (tmp_path / "asked/export/config.json").is_file()


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
        ({**ONE_NODE, "NNODES": "two"}, ["--config", "x"], "NNODES must be a number of nodes, got 'two'"),
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


# Schedulers


def commands_that_report(folder: Path, *, code: int) -> dict[str, str]:
    """An environment in which SLURM's commands and Python write down what they were asked."""
    folder.mkdir()
    scripts = {
        # srun's own options are taken off, the rest is run as node 0's task.
        "srun": 'while [[ "$1" == --* ]]; do shift; done; export SLURM_NODEID=0; exec "$@"',
        "scontrol": 'if [[ "$1" == show ]]; then printf "node7\nnode8\n"; else echo "scontrol $*" >> "$REPORT"; fi',
        "python": f'echo "NODE_RANK=$NODE_RANK $*" >> "$REPORT"; exit {code}',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": "python",
        "REPORT": str(folder / "report"),
        "NPROC_PER_NODE": "8",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "8",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }


@pytest.mark.parametrize(("code", "is_queued_again"), [(0, False), (EXIT_SAVED, True), (1, False), (139, False)])
def test_slurm_queues_a_job_again_only_if_it_left_saved(tmp_path, code, is_queued_again):
    environment = launch_environment(**commands_that_report(tmp_path / "bin", code=code))
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--run-dir", "runs/with space"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == code, done.stderr
    launched, *queued = (tmp_path / "bin/report").read_text().splitlines()
    assert queued == ["scontrol requeue 4711"] * is_queued_again
    assert launched.startswith("NODE_RANK=0 -m megatron_ktr.launch --nnodes 8 --node-rank 0 --nproc-per-node 8")
    assert "--master-addr node7 --master-port 24711 -m megatron_ktr.train --config examples/launch/" in launched
    assert launched.endswith("--auto-resume --run-dir runs/with space")


def test_slurm_script_says_where_it_must_be_submitted(tmp_path):
    environment = launch_environment(**commands_that_report(tmp_path / "bin", code=0))
    command = ["bash", str(LAUNCH / "slurm.sbatch")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 2 and "submit from the repository's root" in done.stderr


def run_files() -> list[Path]:
    found = sorted(LAUNCH.glob("*gpus.yaml"))
    assert len(found) == 4
    return found


@pytest.mark.parametrize("path", run_files(), ids=lambda path: path.stem)
def test_run_files_hold_a_layout_that_the_planner_finds_to_fit(path):
    size, num_gpus = re.fullmatch(r"qwen2_5_vl_(\d+b)_(\d+)gpus", path.stem).groups()
    config = load_config(["--config", str(path)])
    request = Request(
        config=PUBLISHED_CONFIGS[size.upper()],
        num_gpus=int(num_gpus),
        gpu_memory_gb=80.0,
        num_frames=config.data.video_max_frames,
        pixels_per_frame=config.data.video_max_pixels,
        response_length=config.rollout.max_response_length,
        num_generations=config.rollout.num_generations,
        prompts_per_step=config.trainer.prompts_per_step,
    )
    parallel = config.parallel
    tensor, pipeline, context = (
        getattr(parallel, f"{name}_parallel_size") for name in ("tensor_model", "pipeline_model", "context")
    )
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=int(num_gpus) // (tensor * pipeline * context),
        virtual=request.config.text.num_hidden_layers // pipeline // per_chunk if per_chunk else 1,
        sequence_parallel=parallel.sequence_parallel,
        recompute_vision=parallel.recompute_vision,
    )
    assert layout.num_ranks == int(num_gpus) and why_not(request.config, layout) is None
    plan = judge(request, layout)
    assert plan.memory_gb <= 80
    base = ["--model", "m", "--engine", "hf", "--data-path", "d"]
    assert load_config([*base, *shlex.split(plan.flags)]).parallel == parallel
    # While responses are sampled, the trainer's share stays on the GPU, and the engine gets what is asked for.
    memory = plan.memory
    resident = (memory.weights + memory.gradients + memory.optimizer + memory.reference + memory.reserved) / GB
    assert resident + 80 * config.rollout.rollout_memory_share <= 80
    assert 8 % config.rollout.rollout_tensor_parallel_size == 0
    # The command in the file's header asks the planner just this.
    header = path.read_text().split("model:")[0]
    wanted = f"--model {size} --gpus {num_gpus} --gpu-memory 80 --frames {config.data.video_max_frames}"
    assert f"{wanted} --prompts-per-step {config.trainer.prompts_per_step}\n" in header
    assert config.model.params_dtype == "bf16" and config.trainer.save_interval


def test_slurm_asks_for_the_nodes_of_its_run_file():
    text = (LAUNCH / "slurm.sbatch").read_text()
    nodes, gpus = (int(re.search(rf"#SBATCH --{name}=(\d+)", text)[1]) for name in ("nodes", "gpus-per-node"))
    (name,) = re.findall(r"--config (\S+)", text)
    assert (REPOSITORY / name).is_file() and f"_{nodes * gpus}gpus" in name


def test_kubernetes_job_has_the_pods_of_its_run_file_and_starts_a_training():
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert job["kind"] == "PyTorchJob" and replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    num_pods = sum(part["replicas"] for part in replicas.values())
    num_gpus = num_pods * container["resources"]["limits"]["nvidia.com/gpu"]
    assert environment["NNODES"] == str(num_pods)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (line,) = container["args"]
    words = shlex.split(line)
    assert words[:4] == ["NODE_RANK=$RANK", "exec", "bash", "examples/launch/torchrun.sh"]
    config = load_config(words[4:])
    assert config.trainer.auto_resume and f"_{num_gpus}gpus" in words[words.index("--config") + 1]
    ranks_of_replica = (
        config.parallel.tensor_model_parallel_size
        * config.parallel.pipeline_model_parallel_size
        * config.parallel.context_parallel_size
    )
    assert num_gpus % ranks_of_replica == 0


# The Dockerfile, which nobody can build here


def test_dockerfile_copies_what_exists_and_what_dockerignore_lets_through():
    text = (REPOSITORY / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    let_through = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    # A file may come earlier than the directory that it is in.
    early = {source for source in sources if any(source.startswith(f"{other}/") for other in sources)}
    assert sources and set(sources) - early == let_through
    for source in sources:
        assert (REPOSITORY / source).exists(), source
    # What installation and the commands inside need.
    assert {"setup.py", "LICENSE", "README.md", "megatron_ktr", "models", "tools", "examples"} <= set(sources)
    (script,) = re.findall(r'^CMD \["python", "(.*)"\]$', text, re.MULTILINE)
    assert (REPOSITORY / script).is_file()


def test_dockerfile_installs_as_a_gpu_machine_does_and_nvidias_apex():
    text = (REPOSITORY / "Dockerfile").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    declared = declared_requirements(REPOSITORY / "setup.py")
    assert f"torch {declared['cpu'][0].partition('==')[2]}," in text
    # Versions are the script's, which takes them from setup.py; what is copied before it must hold all that it reads.
    before, after = code.split("MAX_JOBS=${MAX_JOBS} tools/install_gpu.sh")
    assert "==" not in code and "COPY setup.py" in before and "COPY tools/install_gpu.sh tools/" in before
    assert "pip install --no-deps --editable ." in after and "import" not in code, "no driver while it is built"
    # In both the system's cuDNN would come first without it (docs/gpu.md).
    folder = "/venv/lib/python3.12/site-packages/nvidia/cudnn"
    assert f"CUDNN_HOME={folder} " in before and f"LD_LIBRARY_PATH={folder}/lib:" in before
    assert "github.com/NVIDIA/apex.git" in code and "APEX_CPP_EXT=1 APEX_CUDA_EXT=1" in code
    assert not re.search(r"pip install [^&|\n]*\bapex\b", code), "the public index holds another apex"
    # Files of the repository that name the image call it what the Dockerfile calls it.
    (tag,) = set(re.findall(r"megatron-ktr:(\S+)", text))
    assert tag == megatron_ktr.__version__ and f"megatron-ktr:{tag}" in (LAUNCH / "kubernetes.yaml").read_text()
