# Megatron-KTR on CUDA 13: NVIDIA's PyTorch image for compilers, cuDNN, NCCL and the libraries of RDMA networks, and beside
# its Python an environment of our own with the versions of setup.py.
#
#   docker build --tag megatron-ktr:0.1.0 .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 megatron-ktr:0.1.0   # tools/doctor.py
#
# Its Python is 3.12, so this is the newer of the two stacks (README): megatron-core 0.19.2. The image's own torch and
# Transformer Engine are not used: vLLM 0.32 takes exactly torch 2.13.0, and setup.py names Transformer Engine 2.17.1.
# Building compiles for about an hour. It has not been built yet (docs/launching.md).
# CUDA 13.0 like torch's wheels: apex refuses to be built with another than torch's. Later images have 13.1.
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}

# GPU generations to compile for: Ampere, Hopper, Blackwell.
ARG CUDA_ARCHS="8.0;9.0;10.0"
ARG APEX_TAG=26.09
ARG MAX_JOBS=16

# The image pins every package it was made with, and puts its own libtorch before that of any wheel. Neither is wanted.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    LD_LIBRARY_PATH=/usr/local/cuda/compat/lib:/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    CUDA_HOME=/usr/local/cuda \
    VIRTUAL_ENV=/venv \
    PATH=/venv/bin:/usr/local/cuda/bin:/usr/local/nvidia/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

RUN python3 -m venv /venv \
    && pip install --upgrade pip setuptools wheel ninja packaging pybind11 \
    && pip install 'torch==2.13.0' 'vllm==0.32.0'

# Its torch extension is built here, against the torch above; the kernels come as a wheel.
RUN TORCH_CUDA_ARCH_LIST="${CUDA_ARCHS}" NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS} \
    pip install --no-build-isolation 'transformer-engine[core-cu13,pytorch]==2.17.1'

# NVIDIA's apex exists as source only. The package of this name on the public index is an unrelated project.
RUN git clone --depth 1 --branch "${APEX_TAG}" --recurse-submodules --shallow-submodules \
        https://github.com/NVIDIA/apex.git /usr/src/apex \
    && cd /usr/src/apex \
    && TORCH_CUDA_ARCH_LIST="${CUDA_ARCHS}" MAX_JOBS=${MAX_JOBS} APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        pip install --no-build-isolation . \
    && rm -rf /usr/src/apex

WORKDIR /srv/megatron-ktr
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_ktr megatron_ktr
COPY models models
COPY tools tools
COPY examples examples
# Editable: runs use the files here, also where they are replaced by a mounted checkout.
RUN pip install --editable '.[vllm]' \
    && python -c "import megatron.core, transformer_engine, amp_C, vllm"

CMD ["python", "tools/doctor.py"]
