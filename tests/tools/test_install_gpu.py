"""tools/install_gpu.sh with stand-ins for Python and pip: what it refuses before anything is fetched, and its order."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

PYTHON = r"""#!/bin/sh
# Answers what the script asks of Python, and writes down what it tells pip.
home=$(dirname "$0")
case "$1 $2" in
"-m pip")
    shift 3
    echo "$* CPATH=$CPATH" >> "$home/pip.log"
    case "$*" in
    *--dry-run*) [ -z "$OFFLINE" ] || { echo "ERROR: No matching distribution found"; exit 1; } ;;
    list*) echo torch==2.13.0 ;;
    wheel*) [ -z "$BROKEN_BUILD" ] || exit 1
        while [ "$1" != --wheel-dir ]; do shift; done; touch "$2/transformer_engine_torch-0-cp312.whl" ;;
    esac ;;
"-c "*version_info*) echo "${VERSION:-3.12}" ;;
"-c "*purelib*) echo "$home/site" ;;
"-c "*'get_path("include")'*) echo "$home/include" ;;
"-c "*sys.executable*) echo "$home" ;;
"-c "*"version('torch')"*) if grep -q '^install --force' "$home/pip.log"; then echo "${TORCH_AFTER:-2.13.0}"
    else echo 2.13.0; fi ;;
"-c "*"version('transformer"*) echo "${TE:-2.17.1}" ;;
"-c "*torch.version.cuda*) echo "${BUILT_FOR-13.0}" ;;
"-c "*libcuda*) [ -n "$DRIVER" ] ;;
"-c "*) [ -z "$BROKEN_IMPORT" ] ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine that has everything; tests take things away."""

    def command(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    command(tmp_path / "python", PYTHON)
    command(tmp_path / "bin" / "c++", "#!/bin/sh\n")
    command(tmp_path / "bin" / "df", '#!/bin/sh\necho header\necho "disk 0 0 ${FREE:-900}000000 0% /"\n')
    command(tmp_path / "cuda" / "bin" / "nvcc", '#!/bin/sh\necho "Cuda compilation tools, release ${CUDA:-13.0}, V1"\n')
    for header in ("cuda/include/cuda_runtime.h", "cuda/include/crt/host_config.h", "include/Python.h"):
        (tmp_path / header).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / header).touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "pip.log").touch()
    return tmp_path


def run(machine: Path, *options: str, **environment: str) -> tuple[int, str, list[str]]:
    """(exit code, last line said, what pip was told)."""
    (machine / "pip.log").write_text("")
    env = {
        "PATH": f"{machine / 'bin'}:/usr/bin:/bin",
        "PYTHON": str(machine / "python"),
        "CUDA_HOME": str(machine / "cuda"),
        "TMPDIR": str(machine),
        "HOME": os.environ.get("HOME", "/"),
    }
    command = ["bash", str(REPOSITORY / "tools" / "install_gpu.sh"), *options]
    done = subprocess.run(command, env={**env, **environment}, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    errors = done.stderr.splitlines()
    assert len(errors) <= 1, done.stderr
    told = [line for line in (machine / "pip.log").read_text().splitlines() if not line.startswith("--version")]
    return done.returncode, (errors or done.stdout.splitlines())[-1], told


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PYTHON": "/nonexistent"}, "PYTHON=/nonexistent does not run"),
        ({"VERSION": "3.10"}, "is Python 3.10; 3.12 is the one for GPUs"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler"),
        ({"CUDA_HOME": "/nonexistent"}, "CUDA_HOME=/nonexistent is no CUDA toolkit"),
        ({"CUDA": "12.8"}, "is CUDA 12.8; torch's wheels are built with 13"),
        ({"FREE": "7"}, "has 7 GB free; 25 are needed"),
        ({"OFFLINE": "1"}, "pip finds no transformer-engine==2.17.1 (no network?"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS=many"),
        ({"TMPDIR": "/nonexistent"}, "no temporary folder can be made"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_fetched(
    machine: Path, environment: dict[str, str], words: str
) -> None:
    code, line, told = run(machine, **environment)
    assert code == 2 and line.startswith("error: ") and words in line
    assert all("--dry-run" in text for text in told) and not list(machine.glob("tmp.*"))


def test_headers_and_options_that_are_not_there_are_named(machine: Path) -> None:
    (machine / "include" / "Python.h").unlink()
    assert "the extension needs Python's headers" in run(machine)[1]
    (machine / "cuda" / "include" / "crt" / "host_config.h").unlink()
    (machine / "include" / "Python.h").touch()
    assert "is no CUDA toolkit" in run(machine)[1], "a toolkit without its headers would take those of another"
    code, line, told = run(machine, "--all")
    assert code == 2 and "error" not in line and not told, "its own help"


def test_a_check_alone_fetches_nothing(machine: Path) -> None:
    code, line, told = run(machine, "--check", MAX_JOBS="3")
    assert code == 0 and line.endswith("Transformer Engine 2.17.1, compilers at a time: 3: it can be installed")
    assert len(told) == 1 and "--dry-run" in told[0]


@pytest.mark.parametrize(("version", "te"), [("3.12", "2.17.1"), ("3.11", "2.11.0")])
def test_vllm_comes_first_and_what_follows_moves_nothing(machine: Path, version: str, te: str) -> None:
    code, line, told = run(machine, VERSION=version, TE=te)
    assert code == 0 and line.startswith("installed. Its import needs a driver")
    steps = [text.partition(" CPATH=")[0] for text in told]
    assert [re.split(r" (?=[./\w])", step)[0] for step in steps] == [
        "install --dry-run --no-deps --ignore-installed --retries",
        "install --editable",
        "list --format=freeze --exclude-editable",
        "install --constraint",
        "install --no-deps --no-cache-dir",
        "wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir",
        "install --force-reinstall --no-deps --no-cache-dir",
    ]
    assert steps[1].endswith(f"{REPOSITORY}[vllm]") and "nvidia-cudnn-cu13==" in steps[4]
    assert steps[5].endswith(f"transformer-engine-torch=={te}")
    assert f"transformer-engine=={te} transformer-engine-cu13=={te} " in steps[6]
    headers = told[5].partition(" CPATH=")[2].split(":")
    assert headers == [str(machine / "site" / "nvidia" / name / "include") for name in ("cudnn", "nccl", "cu13")]


def test_a_whole_cudnn_stays_and_te_alone_leaves_the_project(machine: Path) -> None:
    library = machine / "site" / "nvidia" / "cudnn" / "lib" / "libcudnn_engines_tensor_ir.so.9"
    library.parent.mkdir(parents=True)
    library.touch()
    # As docs/install.md writes it; the last check runs in the repository.
    relative = os.path.relpath(machine / "python")
    code, line, told = run(machine, "--te", DRIVER="1", FREE="5", PYTHON=relative)
    assert code == 0 and "and it imports; now:" in line
    assert not [text for text in told if "--editable" in text.split() or "cudnn-cu13" in text]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"BUILT_FOR": "none"}, "torch 2.13.0 is built for CUDA: none, not 13"),
        ({"BROKEN_BUILD": "1"}, "extension was not built"),
        ({"TORCH_AFTER": "2.14.1"}, "torch became 2.14.1, was 2.13.0"),
        ({"TE": "2.16.0"}, "transformer-engine is 2.16.0, expected 2.17.1"),
        ({"DRIVER": "1", "BROKEN_IMPORT": "1"}, "what was installed does not import"),
    ],
)
def test_what_goes_wrong_on_the_way_ends_it(machine: Path, environment: dict[str, str], words: str) -> None:
    code, line, _ = run(machine, **environment)
    assert code == 2 and words in line
