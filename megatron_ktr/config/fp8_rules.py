"""The requirements of FP8 on a run: rows per rank, device and sizes of matrices. These are plain rules, without a model
or megatron.

Transformer Engine (2.11 and 2.17 alike) quantises the inputs of a linear layer by one of four recipes. The table gives
the number that the packed rows T must be a multiple of, and the compute capability that the recipe needs.

    recipe      scales                               rows of T          the same under           device
                                                     without SP         sequence parallelism
    tensorwise  one per tensor, from its values      16                 16 per rank              8.9
    delayed     one per tensor, from earlier passes  16                 16 per rank              8.9
    blockwise   one per 1 x 128 (weights 128 x 128)  16                 128 per rank             9.0, CUDA 12.9
    mxfp8       one per 1 x 32, powers of two        32                 32 per rank              10.0 and 10.x

The reasons for the multiples: the forward needs a multiple of 8 rows only. The weights' gradient, however, sums over
the rows, so rows are the inner dimension of its transposed operand, which must be a multiple of 16 (whole blocks of 32
for mxfp8). Under sequence parallelism each rank quantises its own rows before they are gathered, which again takes
whole blocks, now of 128 rows for blockwise. (Rows that are no whole blocks are refused by 2.11; 2.17 gathers them
unquantised, with a warning at every layer. Per-tensor recipes would accept 8 per rank there; megatron-core aligns to 16
everywhere, and so do we.) 128 rows per rank satisfy every recipe.
"""

from __future__ import annotations

import math

from megatron_ktr.config.words import Fp8Recipe

NUMBERS_PER_ROW = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
"""Every dimension of a matrix on one rank must be a multiple of this, because each is the inner dimension of some
product."""
GATHERED_BLOCK = {"tensorwise": 1, "delayed": 1, "blockwise": 128, "mxfp8": 32}
"""When rows are quantised before they are gathered, both the number of rows on a rank and the numbers in a row must be
multiples of this block side."""
DEVICE_NEEDED: dict[Fp8Recipe, tuple[int, int]] = {
    "tensorwise": (8, 9),
    "delayed": (8, 9),
    "blockwise": (9, 0),
    "mxfp8": (10, 0),
}
"""The least compute capability of each recipe."""


def rows_per_rank(recipe: Fp8Recipe, *, sequence_parallel: bool) -> int:
    """The number that the rows of one rank, padding included, must be a multiple of."""
    return math.lcm(NUMBERS_PER_ROW[recipe], GATHERED_BLOCK[recipe] if sequence_parallel else 1)


def why_not_on_device(
    recipe: Fp8Recipe, *, capability: tuple[int, int] | None, toolkit: tuple[int, int] | None
) -> str | None:
    """Why the recipe cannot run on a device, in words; None if it can.

    Args:
        capability: the compute capability of the device; None on CPU.
        toolkit: the version of CUDA that torch was built with; None on CPU.
    """
    if capability is None:
        return "FP8 products need Transformer Engine on a GPU, and this platform is cpu"
    needed = DEVICE_NEEDED[recipe]
    if capability < needed:
        return f"it needs compute capability {_dotted(needed)}, and this GPU has {_dotted(capability)}"
    if recipe == "blockwise" and (toolkit is None or toolkit < (12, 9)):
        return f"it needs CUDA 12.9, and torch was built with {'none' if toolkit is None else _dotted(toolkit)}"
    if recipe == "mxfp8" and capability >= (12, 0):
        return f"Transformer Engine does not offer it on compute capability {_dotted(capability)} yet"
    return None


def why_not_of_sizes(recipe: Fp8Recipe, *, sizes: dict[str, int], hidden_size: int, gathers: bool) -> str | None:
    """Names the first size that the recipe cannot quantise, in words; None if all sizes fit.

    Args:
        sizes: every dimension on one tensor rank, by name, of the matrices that would be in FP8.
        hidden_size: how many numbers a gathered row has.
        gathers: whether rows are quantised before they are gathered (sequence parallelism).
    """
    multiple = NUMBERS_PER_ROW[recipe]
    for name, size in sizes.items():
        if size % multiple:
            return f"{name} is {size} on each tensor rank, which is not a multiple of {multiple}"
    block = GATHERED_BLOCK[recipe]
    if gathers and hidden_size % block:
        return f"the hidden size {hidden_size} is not a multiple of {block}, as sequence parallelism needs it"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(str(part) for part in version)
