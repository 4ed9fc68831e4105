"""``linear_token_statistics`` in fused Triton kernels; this file launches ``token_statistics_triton_kernels.py``.

Forward runs ``statistics_kernel`` (one pass over the shard, logits in registers), then ``join_kernel``. Backward runs,
for each chunk of the vocabulary, ``logit_gradient_kernel`` (it recomputes the logits and turns them into their
gradient), then ``product_kernel`` for d hidden and for d weight. These are four matrix products in all. Besides inputs
and results they need memory for partial statistics, 16 or 32 bytes for each row and split of the vocabulary, and for a
chunk of ``CHUNK_BUDGET_BYTES``. (A split has at most 4,096 columns, and fewer if few rows would leave a device idle.)

With one set of other rows, ``statistics_kernel`` computes both products on the same weight tile (or on the two models'
tiles): 2 products. For each further set it runs again, together with the intact rows, and only the set's own four
numbers are kept. So K sets cost 2 K products, although 1 + K would be enough. Two views and a reference are the most
(6 products instead of 4), and a kernel with a third accumulator would have to halve its tiles to fit the registers.
The gradient of a KL adds a second product to ``logit_gradient_kernel``.

Every kernel is tuned once for each process, input dtype, hidden size and power of two of the number of rows. The best
tile size may differ between processes, and with it the order of fp32 sums. Within a process the same inputs give the
same bits, because there are no atomics.

Inputs: fp32, bf16 or fp16, any number of rows, columns and hidden dimensions (loads are wide where the hidden size is a
multiple of 16). fp32 products follow ``torch.set_float32_matmul_precision``. With fp16 inputs, d z is stored in fp16
like any fp16 gradient, so scale the loss.

With TRITON_INTERPRET=1 in the environment before this module is imported, the same kernels run on CPU tensors, with
small tiles so that a small problem has many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from megatron_ktr.ops import token_statistics_triton_kernels as kernels
from megatron_ktr.ops.token_statistics_interface import (
    NUM_STATISTICS,
    GradientSums,
    LogitGradient,
    OtherRows,
    ShardPlan,
    empty_statistics,
)

CHUNK_BUDGET_BYTES = 64 * 2**20
"""The memory for the gradient of the logits of one chunk, [rows, columns of the chunk]."""
MAX_BLOCK_COLUMNS = 256
"""Splits and chunks are multiples of this, so that every ``BLOCK_V`` of the configurations divides them."""
ENOUGH_PROGRAMS = 1024
"""About eight waves on a device of 132 multiprocessors, so that the last, partly idle wave costs little."""

IS_INTERPRETED = not isinstance(kernels.statistics_kernel, triton.JITFunction)


def tile_configs(names: tuple[str, str, str, str], sizes: tuple[tuple[int, ...], ...]) -> list[triton.Config]:
    """The configurations to tune over; each of ``sizes`` is (rows, columns, inner, group, warps, stages).

    A configuration that does not fit a device's shared memory fails to launch and so loses the tuning. (All of them fit
    the devices from sm_80 to sm_100.)
    """
    if IS_INTERPRETED:
        sizes = ((32, 64, 32, 2, 4, 1),)
    return [
        triton.Config(dict(zip(names, size[:4], strict=True)), num_warps=size[4], num_stages=size[5]) for size in sizes
    ]


HALF_SIZES = (
    (128, 256, 64, 8, 8, 3),
    (128, 256, 64, 16, 8, 4),
    (128, 128, 64, 8, 4, 4),
    (128, 128, 64, 8, 8, 3),
    (64, 256, 64, 8, 4, 4),
    (64, 128, 64, 8, 4, 4),
)
"""Sizes for 16-bit inputs: 128 x 256 fp32 sums take half of a multiprocessor's registers."""
HALF_SIZES_OF_TWO_PRODUCTS = (
    (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 8, 4),
    (128, 128, 32, 8, 8, 4),
    (64, 256, 64, 8, 8, 3),
    (64, 128, 64, 8, 4, 4),
)
HALF_SIZES_OF_TWO_WEIGHTS = (
    (128, 128, 32, 8, 8, 4),
    (128, 128, 64, 8, 8, 3),
    (128, 128, 32, 8, 8, 3),
    (64, 128, 64, 8, 4, 3),
)
"""Four tiles instead of three are in shared memory at a time."""
FP32_SIZES = ((128, 128, 32, 8, 8, 3), (64, 128, 32, 8, 4, 3), (64, 64, 32, 8, 4, 3))
FP32_SIZES_OF_TWO_PRODUCTS = ((64, 128, 32, 8, 8, 3), (64, 64, 32, 8, 4, 3))

TILE_NAMES = ("BLOCK_R", "BLOCK_V", "BLOCK_D", "GROUP_R")
PRODUCT_NAMES = ("BLOCK_M", "BLOCK_D", "BLOCK_N", "GROUP_M")


def _tuned(kernel, names: tuple[str, str, str, str], sizes: tuple[tuple[int, ...], ...], **options):
    return triton.autotune(configs=tile_configs(names, sizes), key=["row_bucket", "D"], **options)(kernel)


# The keys are (inputs are 16-bit, there are other rows, they have a weight of their own).
_STATISTICS = {
    (True, False, False): _tuned(kernels.statistics_kernel, TILE_NAMES, HALF_SIZES),
    (True, True, False): _tuned(kernels.statistics_kernel, TILE_NAMES, HALF_SIZES_OF_TWO_PRODUCTS),
    (True, True, True): _tuned(kernels.statistics_kernel, TILE_NAMES, HALF_SIZES_OF_TWO_WEIGHTS),
    (False, False, False): _tuned(kernels.statistics_kernel, TILE_NAMES, FP32_SIZES),
    (False, True, False): _tuned(kernels.statistics_kernel, TILE_NAMES, FP32_SIZES_OF_TWO_PRODUCTS),
    (False, True, True): _tuned(kernels.statistics_kernel, TILE_NAMES, FP32_SIZES_OF_TWO_PRODUCTS),
}
# The keys are (inputs are 16-bit, a KL has a gradient).
_LOGIT_GRADIENT = {
    (True, False): _tuned(kernels.logit_gradient_kernel, TILE_NAMES, HALF_SIZES),
    (True, True): _tuned(kernels.logit_gradient_kernel, TILE_NAMES, HALF_SIZES_OF_TWO_PRODUCTS),
    (False, False): _tuned(kernels.logit_gradient_kernel, TILE_NAMES, FP32_SIZES),
    (False, True): _tuned(kernels.logit_gradient_kernel, TILE_NAMES, FP32_SIZES_OF_TWO_PRODUCTS),
}
# The keys are (inputs are 16-bit, product is d weight): the two products differ in size and so in their best tile.
# Tuning runs a kernel many times; the tensor into which it accumulates is restored after each run.
_PRODUCT = {
    (is_half, is_weight_grad): _tuned(
        kernels.product_kernel, PRODUCT_NAMES, HALF_SIZES if is_half else FP32_SIZES, restore_value=["out_ptr"]
    )
    for is_half in (True, False)
    for is_weight_grad in (True, False)
}


def leave_untuned() -> None:
    """Makes every kernel run in its first configuration from now on, for checks and for measurements of other things.

    The results stay right, and the time is within some tens of percent of the best. It saves the minute that compiling
    all configurations takes.
    """
    for tuner in (*_STATISTICS.values(), *_LOGIT_GRADIENT.values(), *_PRODUCT.values()):
        tuner.configs = tuner.configs[:1]


class TritonTokenStatistics:
    """See ``token_statistics_interface.Implementation``. Raises ValueError for fp64 and for tensors on a CPU."""

    @torch.no_grad()
    def forward(
        self, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, plan: ShardPlan, others: Sequence[OtherRows] = ()
    ) -> Tensor:
        _check(hidden_RD)
        if hidden_RD.shape[0] == 0 or plan.num_columns == 0:
            return empty_statistics(hidden_RD, target_R, plan, num_others=len(others))
        hidden_RD, weight_VD, target_R = hidden_RD.contiguous(), weight_VD.contiguous(), target_R.contiguous()
        first, *further = (
            reduce_logits(hidden_RD, weight_VD, target_R, plan, other) for other in (others if others else (None,))
        )
        return torch.cat([first, *(found[NUM_STATISTICS:] for found in further)]) if further else first

    @torch.no_grad()
    def backward(
        self, hidden_RD: Tensor, weight_VD: Tensor, gradient: LogitGradient, plan: ShardPlan, sums: GradientSums
    ) -> None:
        _check(hidden_RD)
        num_rows = hidden_RD.shape[0]
        if num_rows == 0 or plan.num_columns == 0 or (sums.hidden_RD is None and sums.weight_VD is None):
            return
        hidden_RD, weight_VD = hidden_RD.contiguous(), weight_VD.contiguous()
        # The sums must be dense, because the kernels compute addresses from the hidden size alone.
        assert all(grad is None or grad.is_contiguous() for grad in (sums.hidden_RD, sums.weight_VD))
        chunk_columns = choose_chunk_columns(num_rows, plan.num_columns, itemsize=hidden_RD.itemsize)
        chunk_buffer = hidden_RD.new_empty(num_rows, chunk_columns)
        for start in range(0, plan.num_columns, chunk_columns):
            columns = slice(start, min(start + chunk_columns, plan.num_columns))
            chunk = chunk_buffer[:, : columns.stop - start]
            write_logit_gradient(chunk, hidden_RD, weight_VD, gradient, plan, first_column=start)
            if sums.hidden_RD is not None:
                add_product(sums.hidden_RD, chunk, weight_VD[columns], num_rows=num_rows)
            if sums.weight_VD is not None:
                add_product(sums.weight_VD[columns], chunk, hidden_RD, num_rows=num_rows, is_weight_grad=True)


IMPLEMENTATION = TritonTokenStatistics()


def row_bucket(num_rows: int) -> int:
    """The number of rows as a key for tuning. It is rounded, because a training run has a new number of rows in each
    step and must not tune again."""
    return min(max(triton.next_power_of_2(num_rows), 64), 8192)


def choose_split_columns(num_rows: int, num_columns: int) -> int:
    """The number of columns that one program of the forward pass processes.

    More columns mean fewer partial results, but there must be enough programs to fill the device.
    """
    if IS_INTERPRETED:
        return 128
    row_blocks = triton.cdiv(num_rows, 128)
    for columns in (4096, 2048, 1024):
        if row_blocks * triton.cdiv(num_columns, columns) >= ENOUGH_PROGRAMS:
            return columns
    return 512


def choose_chunk_columns(num_rows: int, num_columns: int, *, itemsize: int) -> int:
    """The number of columns whose gradient fits the budget, but at least one tile."""
    block = 64 if IS_INTERPRETED else MAX_BLOCK_COLUMNS
    budget = 2**14 if IS_INTERPRETED else CHUNK_BUDGET_BYTES
    columns = max(budget // (num_rows * itemsize) // block, 1) * block
    return min(columns, triton.cdiv(num_columns, block) * block)


def reduce_logits(
    hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, plan: ShardPlan, other: OtherRows | None
) -> Tensor:
    """The statistics [4, R] of the shard, or [8, R] with one set of other rows."""
    num_rows, hidden_size = hidden_RD.shape
    has_counterfactual = other is not None
    own_weight_VD = None if other is None or other.weight_VD is None else other.weight_VD.contiguous()
    size = NUM_STATISTICS * (1 + has_counterfactual)
    split_columns = choose_split_columns(num_rows, plan.num_columns)
    num_splits = triton.cdiv(plan.num_columns, split_columns)
    partial_XNR = hidden_RD.new_empty(num_splits, size, num_rows, dtype=torch.float32)
    statistics_NR = hidden_RD.new_empty(size, num_rows, dtype=torch.float32)
    _STATISTICS[_is_half(hidden_RD), has_counterfactual, own_weight_VD is not None][
        lambda meta: (triton.cdiv(num_rows, meta["BLOCK_R"]) * num_splits,)
    ](
        hidden_RD,
        other.hidden_RD.contiguous() if other is not None else hidden_RD,
        weight_VD,
        own_weight_VD if own_weight_VD is not None else weight_VD,
        target_R,
        partial_XNR,
        num_rows,
        plan.num_columns,
        plan.first_id,
        plan.scale,
        row_bucket(num_rows),
        D=hidden_size,
        SPLIT_COLUMNS=split_columns,
        HAS_COUNTERFACTUAL=has_counterfactual,
        HAS_OWN_WEIGHT=own_weight_VD is not None,
        **_arithmetic(hidden_RD),
    )
    block_rows = 16
    kernels.join_kernel[(triton.cdiv(num_rows, block_rows),)](
        partial_XNR,
        target_R,
        statistics_NR,
        num_rows,
        num_splits,
        plan.vocab_size,
        HAS_COUNTERFACTUAL=has_counterfactual,  # pyright: ignore[reportArgumentType]  # Triton makes a constexpr of it
        BLOCK_S=triton.next_power_of_2(num_splits),  # pyright: ignore[reportArgumentType]  # likewise
        BLOCK_R=block_rows,  # pyright: ignore[reportArgumentType]  # likewise
    )
    return statistics_NR


def write_logit_gradient(
    chunk_RX: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    gradient: LogitGradient,
    plan: ShardPlan,
    *,
    first_column: int,
) -> None:
    """Writes d z of the chunk, whose first column is column ``first_column`` of the shard."""
    num_rows, num_columns = chunk_RX.shape
    other, fp32 = gradient.other, gradient.maximum  # ``fp32`` stands in for tensors that are not read
    other_weight_VD = weight_VD if other is None or other.weight_VD is None else other.weight_VD.contiguous()
    _LOGIT_GRADIENT[_is_half(hidden_RD), other is not None][
        lambda meta: (triton.cdiv(num_rows, meta["BLOCK_R"]) * triton.cdiv(num_columns, meta["BLOCK_V"]),)
    ](
        hidden_RD,
        weight_VD[first_column:],
        gradient.target.contiguous(),
        gradient.grad.contiguous(),
        gradient.maximum.contiguous(),
        gradient.offset.contiguous(),
        fp32 if gradient.slope is None else gradient.slope.contiguous(),
        hidden_RD if other is None else other.hidden_RD.contiguous(),
        other_weight_VD[first_column:],
        fp32 if other is None else other.maximum.contiguous(),
        fp32 if other is None else other.slope.contiguous(),
        chunk_RX,
        num_rows,
        num_columns,
        plan.first_id + first_column,
        plan.scale,
        chunk_RX.stride(0),
        row_bucket(num_rows),
        D=hidden_RD.shape[1],
        HAS_SLOPE=gradient.slope is not None,
        HAS_OTHER=other is not None,
        **_arithmetic(hidden_RD),
    )


def add_product(
    out_MD: Tensor, chunk_RX: Tensor, factor_ND: Tensor, *, num_rows: int, is_weight_grad: bool = False
) -> None:
    """Adds chunk @ weight (d hidden) or chunk^T @ hidden (d weight) to ``out``; the second operand is ``factor``."""
    num_out, hidden_size = out_MD.shape
    _PRODUCT[_is_half(factor_ND), is_weight_grad][
        lambda meta: (triton.cdiv(num_out, meta["BLOCK_M"]) * triton.cdiv(hidden_size, meta["BLOCK_D"]),)
    ](
        chunk_RX,
        factor_ND,
        out_MD,
        num_out,
        factor_ND.shape[0],
        chunk_RX.stride(0),
        row_bucket(num_rows),
        D=hidden_size,
        A_TRANSPOSED=is_weight_grad,
        **_arithmetic(factor_ND),
    )


def _arithmetic(tensor: Tensor) -> dict[str, object]:
    """The kernels' options UPCAST and PRECISION for these inputs."""
    is_exact = _is_half(tensor) or torch.get_float32_matmul_precision() == "highest"
    return {
        "UPCAST": IS_INTERPRETED and tensor.dtype == torch.bfloat16,
        "PRECISION": "ieee" if is_exact else "tf32",
    }


def _is_half(tensor: Tensor) -> bool:
    return tensor.itemsize == 2


def _check(hidden_RD: Tensor) -> None:
    if hidden_RD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            "linear_token_statistics: impl='triton' takes fp32, bf16 or fp16, "
            f"got {hidden_RD.dtype}; use impl='chunked'"
        )
    if hidden_RD.device.type == "cpu" and not IS_INTERPRETED:
        raise ValueError(
            "linear_token_statistics: impl='triton' takes tensors on a GPU, got a CPU tensor; use impl='chunked' or "
            "'auto' (or, to test, set TRITON_INTERPRET=1 before the first import)"
        )
