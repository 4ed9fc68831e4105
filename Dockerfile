# Megatron-KTR on CUDA 13: NVIDIA's PyTorch image for compilers, the CUDA toolkit and the libraries of RDMA networks, and beside
# its Python an environment of our own with the versions of setup.py.
#
#   docker build --tag megatron-ktr:0.1.0 .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 megatron-ktr:0.1.0   # tools/doctor.py
#
# Its Python is 3.12, so this is the newer of the two stacks (docs/install.md): megatron-core 0.19.2. The image's own torch and
# Transformer Engine are not used: vLLM 0.32 takes exactly torch 2.13.0, and setup.py names Transformer Engine 2.17.1.
# Building compiles for long (not measured). It has not been built yet (docs/launching.md).
# CUDA 13.0 like torch's wheels: apex refuses to be built with another than torch's. Later images have 13.1.
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}

# GPU generations to compile for: Ampere, Hopper, Blackwell.
ARG CUDA_ARCHS="8.0;9.0;10.0"
ARG APEX_TAG=26.09
ARG MAX_JOBS=16

# The image pins every package it was made with, and puts its own libtorch before that of any wheel. Neither is wanted. It
# has a cuDNN, too; of two versions in a process the sub-libraries do not fit: torch's comes first (docs/gpu.md).
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    CUDNN_HOME=/venv/lib/python3.12/site-packages/nvidia/cudnn \
    LD_LIBRARY_PATH=/venv/lib/python3.12/site-packages/nvidia/cudnn/lib:/usr/local/cuda/compat/lib:/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    CUDA_HOME=/usr/local/cuda \
    VIRTUAL_ENV=/venv \
    PATH=/venv/bin:/usr/local/cuda/bin:/usr/local/nvidia/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

WORKDIR /srv/megatron-ktr
# What takes long, before what changes every day: a package without code is enough to install what it requires.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY tools/install_gpu.sh tools/
RUN python3 -m venv /venv \
    && pip install --upgrade pip setuptools wheel \
    && mkdir megatron_ktr models \
    && echo '__version__ = "0"' > megatron_ktr/__init__.py \
    && MAX_JOBS=${MAX_JOBS} tools/install_gpu.sh

# NVIDIA's apex exists as source only. The package of this name on the public index is an unrelated project.
RUN git clone --depth 1 --branch "${APEX_TAG}" --recurse-submodules --shallow-submodules \
        https://github.com/NVIDIA/apex.git /usr/src/apex \
    && cd /usr/src/apex \
    && TORCH_CUDA_ARCH_LIST="${CUDA_ARCHS}" MAX_JOBS=${MAX_JOBS} APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        pip install --no-build-isolation . \
    && rm -rf /usr/src/apex

COPY megatron_ktr megatron_ktr
COPY models models
COPY tools tools
COPY examples examples
# Editable: runs use the files here, also where they are replaced by a mounted checkout. Without dependencies: they are
# there, and pip would put back the cuDNN that torch pins. Nothing is imported here: there is no driver until it runs.
RUN pip install --no-deps --editable .

CMD ["python", "tools/doctor.py"]
