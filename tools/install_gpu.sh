#!/usr/bin/env bash
# Everything a GPU machine needs, in the one order that works, into the environment of PYTHON:
#
#   python3.12 -m venv .venv-gpu && PYTHON=.venv-gpu/bin/python tools/install_gpu.sh
#
#   1. this project with vLLM, which brings exactly its torch     (pip install --editable '.[vllm]')
#   2. what Transformer Engine needs of Python, and to be built; nothing that is there is moved
#   3. a whole cuDNN: the one that torch 2.13.0 pins lacks a library, and cuDNN would load the system's
#   4. Transformer Engine. Its torch extension exists as source only and is compiled here (C++; no GPU is needed),
#      against this torch and its headers
#   5. a check of what came out
#
# Options:    --check   look whether it can be done, and do nothing     --te   steps 2 to 5 alone, after another torch
# From the environment: PYTHON (python), CUDA_HOME (the CUDA 13 toolkit; else where nvcc is, or /usr/local/cuda),
# CXX (c++), MAX_JOBS (compilers at a time: 2 GB of memory each). pip's own settings hold.
#
# Do not let pip install torch's requirements again afterwards: it would put the pinned cuDNN back.
# tools/doctor.py says on the GPU machine whether all of it works. Exit code 2 with one line if something is missing.
set -euo pipefail

TORCH_CUDA=13  # of torch's wheels; Transformer Engine's extra in setup.py says the same
CUDNN=9.21.1.3  # the first version after 9.20.0.48 that is complete
MIN_GB=25 MIN_GB_TE=4  # free space for packages: torch with CUDA is 5 GB; vLLM's kernels and pip's copies are estimated

fail() { echo "error: $1" >&2; exit 2; }
mode=${1-all}
case $mode in
    all | --check | --te) ;;
    *) sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
[ $# -le 1 ] || fail "one option at a time: $*"

python=${PYTHON:-python}
# Do not resolve links: an environment's Python is a link to a Python that does not know the environment.
[[ $python != */* || $python == /* ]] || python=$PWD/$python
repository=$(realpath "$(dirname "$0")/..")
ask() { "$python" -c "import os, sys, sysconfig; print($1)"; }
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# --- before anything is fetched -------------------------------------------------------------------------------------

version=$(ask '"%d.%d" % sys.version_info[:2]' 2> /dev/null) || fail "PYTHON=${PYTHON:-python} does not run; name the environment's"
[[ $version =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] || fail "$python is Python $version; 3.12 is the one for GPUs (3.11 works)"
[ "$(uname -s)" = Linux ] || fail "$(uname -s): torch's CUDA wheels are for Linux"
pip --version > /dev/null 2>&1 || fail "$python has no pip: $python -m ensurepip, or python3.12 -m venv"
site=$(ask 'sysconfig.get_path("purelib")')
[ -w "$site" ] || fail "$site cannot be written to; make an environment: python3.12 -m venv .venv-gpu"
pin() {  # of setup.py: two lines where the Python decides, the older first
    local found
    found=$(sed -n "s/^ *\"$1==\([^;\"]*\).*/\1/p; s/.*\[\"$1==\([^;\"]*\)\"\].*/\1/p" "$repository/setup.py")
    [ -n "$found" ] || fail "setup.py names no version of $1"
    if [ "$version" = 3.11 ]; then head -n 1 <<< "$found"; else tail -n 1 <<< "$found"; fi
}
te=$(pin 'transformer-engine\[core-cu13,pytorch\]')

compiler=${CXX:-c++}
command -v "$compiler" > /dev/null || fail "no C++ compiler: $compiler is not there (apt install g++), or set CXX"
headers=$(ask 'sysconfig.get_path("include")')
[ -f "$headers/Python.h" ] || fail "no $headers/Python.h: the extension needs Python's headers (apt install python$version-dev)"

is_toolkit() { [ -x "$1/bin/nvcc" ] && [ -f "$1/include/cuda_runtime.h" ] && [ -f "$1/include/crt/host_config.h" ]; }
if [ -n "${CUDA_HOME:-}" ]; then
    is_toolkit "$CUDA_HOME" || fail "CUDA_HOME=$CUDA_HOME is no CUDA toolkit: expected bin/nvcc and include/crt in it"
else
    # nvcc may be a script that calls another, so its place alone proves nothing.
    nvcc=$(command -v nvcc || true)
    for CUDA_HOME in ${nvcc:+"$(dirname "$(dirname "$(realpath "$nvcc")")")"} /usr/local/cuda /usr/local/cuda-13*; do
        ! is_toolkit "$CUDA_HOME" || break
    done
    is_toolkit "$CUDA_HOME" || fail "no CUDA toolkit (nvcc and its headers) found; install CUDA $TORCH_CUDA.0's, or set CUDA_HOME"
fi
release=$("$CUDA_HOME/bin/nvcc" --version 2> /dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')
[ "${release%%.*}" = "$TORCH_CUDA" ] ||
    fail "$CUDA_HOME is CUDA ${release:-of unknown version}; torch's wheels are built with $TORCH_CUDA: set CUDA_HOME to such a toolkit"

free_gb() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1000000) }'; }
if [ "$mode" = --te ]; then needed=$MIN_GB_TE; else needed=$MIN_GB; fi
free=$(free_gb "$site")
((free >= needed)) || fail "$site has $free GB free; $needed are needed"
scratch=$(mktemp -d 2> /dev/null) || fail "no temporary folder can be made; set TMPDIR"
trap 'rm -rf "$scratch"' EXIT
free=$(free_gb "$scratch")
((free >= MIN_GB_TE)) || fail "$(dirname "$scratch") has $free GB free; $MIN_GB_TE are needed: set TMPDIR"

# Ask for the smallest of the packages only, because resolving all takes minutes; --no-deps asks for nothing else.
words=$(pip install --dry-run --no-deps --ignore-installed --retries 1 --timeout 20 "transformer-engine==$te" 2>&1) ||
    fail "pip finds no transformer-engine==$te (no network? an index without it?): $(grep ERROR <<< "$words" | tail -n 1)"

installed() { ask "__import__('importlib.metadata').metadata.version('$1')" 2> /dev/null || true; }
check_torch() {
    local cuda
    cuda=$("$python" -c 'import torch; print(torch.version.cuda or "none")' 2> "$scratch/torch.err") ||
        fail "torch does not import: $(tail -n 1 "$scratch/torch.err")"
    [ "${cuda%%.*}" = "$TORCH_CUDA" ] ||
        fail "torch $(installed torch) is built for CUDA: $cuda, not $TORCH_CUDA; look at pip's extra indexes (pip config list)"
}
[ "$mode" != --te ] || check_torch

memory_gb=$(awk '/MemAvailable/ { print int($2 / 1000000) }' /proc/meminfo)
jobs=$((memory_gb / 2 < 1 ? 1 : memory_gb / 2))
cores=$(nproc)
export MAX_JOBS=${MAX_JOBS:-$((jobs < cores ? jobs : cores))}
[[ $MAX_JOBS =~ ^[1-9][0-9]*$ ]] || fail "MAX_JOBS=$MAX_JOBS: expected a number of compilers"
echo "Python $version, CUDA $release at $CUDA_HOME, Transformer Engine $te, compilers at a time: $MAX_JOBS: it can be installed"
[ "$mode" != --check ] || exit 0

# --- installing -----------------------------------------------------------------------------------------------------

[ "$mode" = --te ] || pip install --editable "$repository[vllm]"
check_torch
torch_before=$(installed torch)

pip list --format=freeze --exclude-editable > "$scratch/there.txt"
pip install --constraint "$scratch/there.txt" setuptools wheel ninja packaging pybind11 \
    einops onnx onnxscript pydantic nvdlfw-inspect importlib-metadata

if [ ! -e "$site/nvidia/cudnn/lib/libcudnn_engines_tensor_ir.so.9" ]; then
    pip install --no-deps --no-cache-dir "nvidia-cudnn-cu$TORCH_CUDA==$CUDNN"
fi

# Use no cache, because pip would reuse a wheel built against another torch. The toolkit's own headers come first;
# torch's packages have those that it may lack: cuDNN and NCCL, and in a small toolkit cuBLAS, cuSOLVER and cuSPARSE.
cu=$site/nvidia
export CUDA_HOME NVTE_PYTORCH_FORCE_BUILD=TRUE
export CPATH=$cu/cudnn/include:$cu/nccl/include:$cu/cu$TORCH_CUDA/include${CPATH:+:$CPATH}
PATH=$(ask 'os.path.dirname(sys.executable)'):$CUDA_HOME/bin:$PATH
pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$scratch" "transformer-engine-torch==$te" ||
    fail "Transformer Engine's torch extension was not built; what stood in the way is above"
pip install --force-reinstall --no-deps --no-cache-dir "transformer-engine==$te" "transformer-engine-cu$TORCH_CUDA==$te" \
    "$scratch"/transformer_engine_torch-*.whl

# --- what came out --------------------------------------------------------------------------------------------------

[ "$(installed torch)" = "$torch_before" ] || fail "torch became $(installed torch), was $torch_before"
for name in transformer-engine "transformer-engine-cu$TORCH_CUDA" transformer-engine-torch; do
    [ "$(installed "$name")" = "$te" ] || fail "$name is $(installed "$name"), expected $te"
done
# A container may have the driver's library without the driver.
if "$python" -c 'import ctypes, sys; sys.exit(ctypes.CDLL("libcuda.so.1").cuInit(0))' 2> /dev/null; then
    # Import torch first, which loads CUDA's libraries. The project's own import makes them find one cuDNN.
    (cd "$repository" && "$python" -c 'import torch, megatron_ktr, transformer_engine.pytorch, megatron.core, vllm') ||
        fail "what was installed does not import; see above"
    echo "installed, and it imports; now: $python tools/doctor.py"
else
    echo "installed. Its import needs a driver, and there is none here; on the GPU machine: $python tools/doctor.py"
fi
