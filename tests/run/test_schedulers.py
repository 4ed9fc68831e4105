"""Files for schedulers and images: scripts, run files, the Dockerfile."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import megatron_ktr
from megatron_ktr.accounting.layout import Layout, why_not
from megatron_ktr.accounting.planner import GB, Request, judge
from megatron_ktr.config import load_config
from megatron_ktr.doctor.requirements import declared_requirements
from megatron_ktr.errors import EXIT_SAVED
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tests.run.test_launch import LAUNCH, launch_environment
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS


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
