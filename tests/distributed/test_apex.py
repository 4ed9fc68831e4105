"""NVIDIA's apex is told by what it has; the unrelated package of that name changes nothing and breaks nothing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ktr.distributed.nvidia_apex import fused_rms_norm, hide_unusable_apex
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS

USABLE = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "",
    "apex/optimizers/fused_adam.py": "",
    "apex/multi_tensor_apply/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "def fused_rms_norm_affine(x, weight, shape, eps):\n    return 'fused'\n",
    "amp_C.py": "",
    "fused_layer_norm_cuda.py": "",
}
"""The files that are asked for, of an apex built with its extensions."""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Makes files importable; what was imported or hidden is forgotten afterwards."""
    # Importing our package may have hidden what is installed here.
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        importlib.invalidate_caches()
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda"):
            del sys.modules[name]


def test_an_apex_with_its_extensions_is_left_to_megatron_core(install) -> None:
    install(USABLE)
    assert not hide_unusable_apex()
    assert fused_rms_norm()(None, None, None, 1e-6) == "fused"


@pytest.mark.parametrize(
    "missing", ["amp_C.py", "apex/optimizers/fused_adam.py", "apex/multi_tensor_apply/__init__.py"]
)
def test_what_cannot_serve_is_hidden_without_being_imported(install, missing: str) -> None:
    install(
        {name: text for name, text in USABLE.items() if name != missing} | {"apex/__init__.py": "raise SystemError"}
    )
    assert hide_unusable_apex()
    with pytest.raises(ImportError):
        importlib.import_module("apex.optimizers")
    assert fused_rms_norm() is None


def test_an_apex_without_fused_norms_leaves_the_norm_to_torch(install) -> None:
    install({name: text for name, text in USABLE.items() if name != "fused_layer_norm_cuda.py"})
    assert fused_rms_norm() is None and not hide_unusable_apex()


def test_the_unrelated_package_breaks_no_import_and_no_optimizer(install) -> None:
    """In a process of its own: what fails there fails at import. SystemError is none that megatron-core expects."""
    folder = install({"apex/__init__.py": "raise SystemError('pyramid is not configured')"})
    code = (
        "import models.qwen2_5_vl.layer_specs, megatron.core.optimizer as optimizer, torch, transformers\n"
        "assert optimizer.Adam is torch.optim.AdamW, optimizer.Adam\n"
        "print('sound')"
    )
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", ""), str(REPOSITORY)])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0 and result.stdout.strip().endswith("sound"), result.stderr


def test_the_norm_on_a_gpu_takes_the_fused_function(install, monkeypatch: pytest.MonkeyPatch, one_rank) -> None:
    from types import SimpleNamespace

    from models.qwen2_5_vl import norm

    seen = []

    def fused(x: torch.Tensor, weight: torch.Tensor, shape: torch.Size, eps: float) -> torch.Tensor:
        seen.append((shape, eps))
        return torch.nn.functional.rms_norm(x, shape, weight, eps)

    config = SimpleNamespace(params_dtype=torch.float32, use_cpu_initialization=True, sequence_parallel=False)
    plain = norm.RMSNorm(config, 8, 1e-5)
    monkeypatch.setattr(norm, "current", lambda: SimpleNamespace(name="gpu"))
    monkeypatch.setattr(norm, "fused_rms_norm", lambda: fused)
    x = torch.randn(3, 8)
    # One multiplication and one rounding in another order.
    torch.testing.assert_close(norm.RMSNorm(config, 8, 1e-5)(x), plain(x), rtol=1e-6, atol=1e-6)
    assert seen == [((8,), 1e-5)] and plain.fused is None
