"""Where Transformer Engine's attention over packed sequences has a fused kernel, as a plain rule; nothing is imported.

Without one Transformer Engine falls back, without a word, to an attention that unpacks the rows and keeps all scores:
memory of the longest sequence squared. Its own choice is ``get_attention_backend`` (2.17.1,
``attention/dot_product_attention/utils.py``; cuDNN's part ``nvte_get_fused_attn_backend``, in ``fused_attn.cpp``):

=====================  ==============================  ============================================
kernel                 numbers                         device, for packed rows (``thd``)
=====================  ==============================  ============================================
cuDNN's                16 bits                         compute capability 9.0 and newer
flash-attn's           16 bits                         8.0 and newer, with the package flash-attn
its own, not fused     any                             any
=====================  ==============================  ============================================
"""

from __future__ import annotations

import importlib.metadata
import re

CUDNN_CAPABILITY = (9, 0)
FLASH_CAPABILITY = (8, 0)
FLASH_ATTN_RANGE = ((2, 1, 1), (2, 8, 3))
"""Lowest and highest version that Transformer Engine 2.17.1 takes."""


def why_not_fused(*, capability: tuple[int, int] | None, is_half: bool, flash_attn: str | None) -> str | None:
    """Why packed attention would not be fused, in words; None where it is, or where no GPU is asked about.

    Args:
        capability: compute capability of the device; None on CPU.
        is_half: whether queries, keys and values have 16 bits.
        flash_attn: version of the package flash-attn; None where it is not installed.
    """
    if capability is None:
        return None
    if not is_half:
        return "it has no fused kernel for fp32, and keeps all scores"
    if capability >= CUDNN_CAPABILITY:
        return None
    has_flash = flash_attn is not None and FLASH_ATTN_RANGE[0] <= _numbers(flash_attn) <= FLASH_ATTN_RANGE[1]
    if has_flash and capability >= FLASH_CAPABILITY:
        return None
    device = ".".join(map(str, capability))
    lowest, highest = (".".join(map(str, version)) for version in FLASH_ATTN_RANGE)
    found = "none is installed" if flash_attn is None else f"{flash_attn} is installed"
    return (
        f"on compute capability {device} its fused kernel for packed sequences is that of flash-attn {lowest} to "
        f"{highest}, and {found}; without it all scores are kept"
    )


def flash_attn_version() -> str | None:
    """Of the package flash-attn, as Transformer Engine asks for it; None where it is not installed."""
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    # "2.8.3.post1+cu13" counts as 2.8.3.post1, which is newer than 2.8.3.
    public = version.partition("+")[0]
    return tuple(int(number) for number in re.findall(r"\d+", public))
