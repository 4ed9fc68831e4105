"""Checks of optional software: Transformer Engine, FP8, apex, Triton, video decoders, vLLM."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_ktr import stack as stacks
from megatron_ktr.config.fp8_rules import DEVICE_NEEDED, why_not_on_device
from megatron_ktr.data.media.video_decord import DecordProcess
from megatron_ktr.distributed.nvidia_apex import hide_unusable_apex
from megatron_ktr.distributed.platform_probe import GpuFacts
from megatron_ktr.doctor.check import Check, error_of_import
from megatron_ktr.doctor.requirements import installed_version
from megatron_ktr.ops.te_attention import why_not_fused

TRITON_RANGE = ">=3.5"
INSTALL_TE = "tools/install_gpu.sh --te"
"""The command that installs Transformer Engine. It compiles it against the installed torch; a plain ``pip install``
would not, and might replace torch."""


@dataclass(frozen=True)
class Library:
    """The state of an optional library: its version, and the reason why it cannot be imported, if it cannot."""

    version: str | None = None
    """None if it is not installed; empty if it was installed by other means than pip, so that the version is unknown.
    """
    error: str = ""


def read_library(module: str, *distributions: str, imports: str | None = None) -> Library:
    """Reads the state of the library ``module``. ``imports`` is the module to import in its place; an empty string
    means that nothing is imported."""
    if importlib.util.find_spec(module) is None:
        return Library()
    versions = (installed_version(name) for name in (module, *distributions))
    version = next((version for version in versions if version), "")
    target = module if imports is None else imports
    return Library(version, error_of_import(target) if target else "")


def _is_in(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return not version or SpecifierSet(wanted).contains(version, prereleases=True)


def check_transformer_engine(library: Library, *, has_gpu: bool, core: str | None = None) -> Check:
    """Checks Transformer Engine. ``core`` is the version of megatron-core; None means the installed one."""
    name = "transformer engine"
    stack = stacks.of_core(core) if core else stacks.installed()
    if library.version is None:
        if not has_gpu:
            return Check(name, True, "not installed, as it should be on a CPU machine")
        advice = f"{INSTALL_TE} builds it (fused kernels and FP8; docs/gpu.md)"
        return Check(name, True, "not installed: layers of plain torch, no FP8", advice)
    if not has_gpu:
        remedy = "pip uninstall transformer-engine: without a GPU it breaks the import of megatron-core"
        return Check(name, False, f"{library.version} on a CPU machine", remedy)
    if not _is_in(library.version, stack.transformer_engine_range):
        detail = f"{library.version}; megatron-core {core or stack.core} takes {stack.transformer_engine_range}"
        return Check(name, False, detail, _rebuild(stack.transformer_engine))
    if library.error:
        return Check(name, False, f"{library.version}: {library.error}", _rebuild(stack.transformer_engine))
    return Check(name, True, library.version or "version unknown")


def _rebuild(version: str) -> str:
    """The remedy that rebuilds Transformer Engine. It excludes dependencies, because torch is one of them, and pip's
    cache, because that may hold the extension for another torch."""
    names = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
    packages = " ".join(f"'{name}=={version}'" for name in names)
    options = "--force-reinstall --no-deps --no-cache-dir --no-build-isolation"
    return f"{INSTALL_TE}, which sets what a build needs and runs pip install {options} {packages}"


def check_fp8(facts: GpuFacts, *, has_te: bool) -> Check:
    """Says which FP8 recipes run on this machine. The check fails only if its GPUs are of different generations."""
    capabilities = {gpu.capability for gpu in facts.seen}
    if not capabilities:
        return Check("fp8", True, "needs a GPU")
    if len(capabilities) > 1:
        texts = ", ".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
        remedy = "choose GPUs of one generation with CUDA_VISIBLE_DEVICES"
        return Check("fp8", False, f"GPUs of different generations: {texts}", remedy)
    (capability,) = capabilities
    reasons = {
        recipe: why_not_on_device(recipe, capability=capability, toolkit=facts.toolkit) for recipe in DEVICE_NEEDED
    }
    good = [recipe for recipe, reason in reasons.items() if reason is None]
    bad = [f"{recipe} ({reason})" for recipe, reason in reasons.items() if reason]
    detail = f"recipes: {', '.join(good) or 'none'}" + (f"; not {'; '.join(bad)}" if bad else "")
    return Check("fp8", True, detail, "" if has_te or not good else "they need Transformer Engine")


def check_te_attention(facts: GpuFacts, *, has_te: bool, flash_attn: str | None) -> Check:
    """Says whether Transformer Engine computes packed attention in 16 bits; otherwise another implementation does."""
    name = "te attention"
    if not (has_te and facts.seen):
        return Check(name, True, "needs Transformer Engine and a GPU")
    problem = why_not_fused(capability=facts.seen[0].capability, is_half=True, flash_attn=flash_attn)
    if problem is None:
        return Check(name, True, "fused for packed sequences")
    return Check(name, True, f"not used: {problem}", "none needed: --attention-impl auto takes varlen instead")


def check_apex(is_usable: bool | None) -> Check:
    """Checks apex. ``is_usable`` says whether it is NVIDIA's, with its CUDA extensions; None means that no package of
    that name is installed."""
    if is_usable is None:
        return Check("apex", True, "not installed; optional")
    if not is_usable:
        remedy = (
            "pip uninstall apex; the one on the public index is unrelated: build NVIDIA's from its source (Dockerfile)"
        )
        return Check("apex", False, "not NVIDIA's, or built without its CUDA extensions; it is not used", remedy)
    return Check("apex", True, "NVIDIA's, with CUDA extensions")


def read_apex() -> bool | None:
    # Our package hides an unusable apex on import: its entry in ``sys.modules`` is then None.
    is_hidden = hide_unusable_apex() or sys.modules.get("apex", sys) is None
    return False if is_hidden else None if importlib.util.find_spec("apex") is None else True


def check_triton(library: Library, *, has_gpu: bool) -> Check:
    if library.version is None:
        if not has_gpu:
            return Check("triton", True, "not installed; only tests use it on a CPU machine")
        remedy = f"pip install 'triton{TRITON_RANGE}': without it the vocabulary head runs in torch, in tiles"
        return Check("triton", False, "not installed", remedy)
    if library.error or not _is_in(library.version, TRITON_RANGE):
        detail = f"{library.version}" + (f": {library.error}" if library.error else f"; needed is {TRITON_RANGE}")
        return Check("triton", False, detail, f"pip install 'triton{TRITON_RANGE}', as torch names it")
    return Check("triton", True, library.version or "version unknown")


def read_decoder(backend: Literal["pyav", "decord"], folder: Path) -> str:
    """The reason why ``backend`` cannot decode a clip that was just encoded; empty if it can. For decord the reason may
    be "not installed", which is no failure."""
    if backend == "decord" and not DecordProcess.is_installed():
        return "not installed"
    try:
        from megatron_ktr.data.media.frames import read_frames
        from megatron_ktr.data.media.video import FrameSampling
        from megatron_ktr.data.synthetic import write_video

        # Every frame has another grey. A wrong frame is then off by 20 or more, while the encoder's error is about 2.
        frames = np.stack([np.full((64, 64, 3), 20 + 20 * number, dtype=np.uint8) for number in range(8)])
        path = folder / f"{backend}.mp4"
        write_video(path, frames)
        sampling = FrameSampling(num_frames=8, max_frames=8)
        video = read_frames(path, kind="video", sampling=sampling, backend=backend)
        found = video.frames_FCHW.float().mean(dim=(1, 2, 3)).tolist()
    except Exception as error:  # a broken decoder may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    off = max(abs(value - 20 - 20 * number) for number, value in enumerate(found))
    return "" if len(found) == 8 and off < 8 else f"decoded other pictures than were encoded (off by {off:.0f} of 255)"


def read_decoders() -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        return {"pyav": read_decoder("pyav", Path(folder)), "decord": read_decoder("decord", Path(folder))}


def check_decoders(errors: dict[str, str]) -> list[Check]:
    """Checks the video decoders. PyAV is needed; decord is optional and faster."""
    pyav, decord = errors["pyav"], errors["decord"]
    remedy = "pip install --force-reinstall av"
    checks = [Check("pyav", not pyav, pyav or "decodes", remedy if pyav else "")]
    if decord == "not installed":
        advice = "pip install decord (Linux and Windows on x86-64)"
        return [*checks, Check("decord", True, "not installed: PyAV decodes, somewhat slower", advice)]
    remedy = "pip install --force-reinstall decord, or pip uninstall decord: PyAV decodes as well"
    return [*checks, Check("decord", not decord, decord or "decodes", remedy if decord else "")]


def check_vllm(library: Library, *, wanted: Sequence[str]) -> Check:
    """Checks vLLM. ``wanted`` is the extra for it in setup.py, e.g. ``["vllm==0.32.0"]``."""
    specifier = wanted[0].removeprefix("vllm")
    if library.version is None:
        advice = f"pip install '{wanted[0]}' (CPU: make setup-vllm) for --engine vllm_colocated; servers have their own"
        return Check("vllm", True, "not installed: --engine hf and vllm_server work", advice)
    if not _is_in(library.version, specifier):
        remedy = f"pip install '{wanted[0]}': weights are handed over by functions of exactly this version"
        return Check("vllm", False, f"{library.version}, expected {specifier}", remedy)
    if library.error:
        return Check("vllm", False, f"{library.version}: {library.error}", "reinstall it beside this torch")
    return Check("vllm", True, library.version or "version unknown")
