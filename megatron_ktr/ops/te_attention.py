"""Says where Transformer Engine has a fused kernel for attention over packed sequences, without importing it.

Where it has none, Transformer Engine silently falls back to an attention that unpacks the rows and keeps all scores,
which takes memory in proportion to the square of the longest sequence. Transformer Engine 2.17.1 makes this choice in
``get_attention_backend`` (``attention/dot_product_attention/utils.py``), for cuDNN's kernel in
``nvte_get_fused_attn_backend`` (``fused_attn.cpp``):

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
"""The lowest and the highest version of flash-attn that Transformer Engine 2.17.1 accepts."""


def why_not_fused(*, capability: tuple[int, int] | None, is_half: bool, flash_attn: str | None) -> str | None:
    """The reason, in words, why packed attention would not be fused; None if it is fused, or on CPU.

    Args:
        capability: compute capability of the device; None on CPU.
        is_half: whether queries, keys and values have 16 bits.
        flash_attn: version of the package flash-attn; None if it is not installed.
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
    """The version of the package flash-attn, queried as Transformer Engine does; None if it is not installed."""
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    # "2.8.3.post1+cu13" counts as 2.8.3.post1, which is newer than 2.8.3.
    public = version.partition("+")[0]
    return tuple(int(number) for number in re.findall(r"\d+", public))
