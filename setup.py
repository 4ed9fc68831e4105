"""Installation of Megatron-KTR. Tool settings are in pyproject.toml, environments in the Makefile."""

from __future__ import annotations

import ast
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def _version() -> str:
    """``__version__`` of the package, read without importing it."""
    for node in ast.parse((HERE / "megatron_ktr" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__version__" for target in node.targets
        ):
            return ast.literal_eval(node.value)
    raise RuntimeError("megatron_ktr/__init__.py has no __version__")


DECORD_HAS_WHEELS = (
    "(platform_system == 'Linux' and platform_machine == 'x86_64')"
    " or (platform_system == 'Windows' and platform_machine == 'AMD64')"
)

TRITON_HAS_WHEELS = "platform_system == 'Linux' and platform_machine == 'x86_64'"

INSTALL_REQUIRES = [
    "torch>=2.11",
    # The platform layer redirects functions of exactly these versions. 0.17 and newer want Python 3.12.
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core==0.19.2; python_version >= '3.12'",
    "transformers>=5.18,<5.20",  # older ones cut seconds per grid to integers; vLLM 0.32 ends at 5.20
    "numpy",
    "safetensors",
    "sentencepiece",
    "pyyaml",
    "pillow",
    "httpx",
    "psutil",  # without it megatron-core's checkpoint writer hangs silently
    "av",
    f"decord>=0.6; {DECORD_HAS_WHEELS}",
    "tensorboard",
    "nltk",  # Porter's stemmer, as in rouge-score
    "rapidfuzz",  # edit distance and longest common subsequence of the rewards
    "xxhash>=3",
    "pyarrow>=20",  # the store of records
    "tqdm",
]

MATH_VERIFY = "math-verify>=0.9"

EXTRAS_REQUIRE = {
    # vLLM 0.32 pins this torch exactly, so core and engine can share an environment.
    "cpu": ["torch==2.13.0"],
    "vllm": ["vllm==0.32.0"],
    # Whether two mathematical answers are the same (problem_type math, the reward math).
    "math": [MATH_VERIFY],
    # What --wandb-project sends metrics with (docs/watching.md). Nothing else needs it.
    "wandb": ["wandb>=0.19"],
    # NVIDIA's ft_launcher, which watches the heartbeats of ranks (docs/launching.md). Our own needs none of it.
    "resiliency": ["nvidia-resiliency-ext>=0.4.1"],
    # For CUDA 13, as torch's wheels are: the newest that 0.16.1 accepts, and the middle of 0.19.2's 2.14 to 2.20. Here
    # for its versions: tools/install_gpu.sh installs it, as its torch extension must be compiled against the torch that
    # is there. CUDA only: on a CPU machine its wheel breaks megatron-core.
    "te": [
        "transformer-engine[core-cu13,pytorch]==2.11.0; python_version < '3.12'",
        "transformer-engine[core-cu13,pytorch]==2.17.1; python_version >= '3.12'",
    ],
    # Triton's interpreter runs the kernels' tests without a GPU, its compiler the checks that they compile. CUDA builds
    # of torch name their own version of it; CPU builds name none. Its interpreter loops to a runtime bound from 3.7 on.
    # rouge-score and jiwer are what the rewards' numbers are compared with.
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6",
        "ruff==0.17.5",
        "pyright[nodejs]==1.1.414",  # with Node from a wheel: nothing is fetched when it runs
        "rouge-score",
        "jiwer",
        MATH_VERIFY,
        f"triton>=3.7; {TRITON_HAS_WHEELS}",
    ],
}
# NVIDIA's apex is not listed on purpose: the public index holds an unrelated project under that name (docs/install.md).

setup(
    name="megatron-ktr",
    version=_version(),
    description="Token-level selective reinforcement learning for video-reasoning models on Megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_ktr", "megatron_ktr.*", "models", "models.*"]),
    package_data={"megatron_ktr": ["data/wordings/*", "evaluation/results/paper_rows.json"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["megatron-ktr-train=megatron_ktr.train:cli"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
