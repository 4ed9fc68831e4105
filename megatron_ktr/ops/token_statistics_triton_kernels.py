"""The Triton kernels of ``token_statistics``; ``token_statistics_triton`` launches them.

Letters: R rows, Vs real vocabulary rows of this shard, D hidden size. All matrices are row-major and dense. Every sum
is fp32: a bf16 sum over 152,064 exponentials would stall after 256 equal terms, and bf16 logits are off by 0.06 at 20.

1. ``statistics_kernel``: one program processes ``BLOCK_R`` rows and ``SPLIT_COLUMNS`` vocabulary rows. For each tile of
   ``BLOCK_V`` vocabulary rows it multiplies over D (the logits exist in registers only) and updates four running
   numbers per row (eight with other rows to compare with, whose product reads the same weight tile, or, with
   ``HAS_OWN_WEIGHT``, that of the model they come from):

       m = max z                   s = sum exp(z - m)        u = sum exp(z - m) (z - m)     t = z[target], else 0
       m' = max z'                 s' = sum exp(z' - m')     t' = z'[target], else 0
       w = sum exp(z - m) ((z - m) - (z' - m'))

   Splits of the vocabulary write separate partial results, which ``join_kernel`` joins. So there are enough programs
   even for few rows, there are no atomics, and every run gives the same bits. Only these 4 or 8 floats for each row and
   split are written.

2. ``logit_gradient_kernel``: recomputes the tile's product and turns it into the gradient of the logits

       d z = scale (g 1[target] + exp(z - m) (offset + slope (z - m) + kl_slope ((z - m) - (z' - m'))))

   (The last term, with a second product, only if a KL has a gradient.)

   It stores d z in the inputs' dtype, for one chunk of the vocabulary that fits a memory budget. d hidden of a row
   (D fp32 numbers) fits neither registers nor shared memory, and every way without this buffer costs more. Recomputing
   the logits for each slice of D takes D / slice times the work. Adding tile after tile into d hidden moves 8 bytes for
   each BLOCK_V terms of a sum. The chunk is written once and read twice, with 2 bytes per logit, and no product is
   computed again.

3. ``product_kernel``: computes out += a @ b for a chunk. d hidden [R, D] is the sum over chunks of d z @ W, in fp32.
   d weight of the chunk is d z^T @ hidden; it is complete after one pass over the rows, so it is rounded once (or not
   at all, if it goes into the fp32 ``main_grad``). Each output tile belongs to one program, so there are no atomics.

Rows and vocabulary rows beyond the end read the last row instead, so that the product needs no mask; they are masked
after it. Pointers into matrices start from 64-bit offsets per tile, because R D, Vs D and R chunk may exceed 2^31.
Column ids and targets are 32-bit.

``UPCAST`` is for bf16 in Triton's interpreter, which multiplies bf16 wrongly and truncates instead of rounding.
``PRECISION`` is the precision of fp32 products: "ieee" or "tf32". No kernel reads ``row_bucket``; it is the autotuner's
key for the number of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-8.0e37)
"""A finite number below any real logit, as in the chunked implementation; differences neither overflow nor give
0 * inf."""


@triton.jit
def _block_of(program, num_row_blocks, num_column_blocks, GROUP_R: tl.constexpr):
    """(row block, column block): GROUP_R row blocks share a column block before the next, to meet in the L2 cache."""
    programs_per_group = GROUP_R * num_column_blocks
    first_row_block = (program // programs_per_group) * GROUP_R
    group_size = tl.minimum(num_row_blocks - first_row_block, GROUP_R)
    inside = program % programs_per_group
    return first_row_block + inside % group_size, inside // group_size


@triton.jit
def _tile_pointers(ptr, first, num_total, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [BLOCK, BLOCK_D] to rows first .. first + BLOCK - 1 of a [num_total, D] matrix, its last one repeated
    beyond the end."""
    inside = tl.minimum(tl.arange(0, BLOCK), num_total - 1 - first)
    start = ptr + tl.cast(first, tl.int64) * D
    return start + inside[:, None] * D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_slice(ptrs, start, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """The next BLOCK_D hidden dimensions; zeros beyond D."""
    if D % BLOCK_D == 0:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(start + tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _rounded_for(ptr, value, UPCAST: tl.constexpr):
    """fp32 ``value`` in the dtype ``ptr`` points to, rounded to nearest even."""
    if UPCAST and ptr.dtype.element_ty == tl.bfloat16:
        # The interpreter cuts the last 16 bits off; after this nothing is lost with them.
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(ptr.dtype.element_ty)


@triton.jit
def _fold(z, is_column, maximum, total):
    """(new maximum, decay of old sums, step, x = z - maximum, exp(x) or 0, new total) after one more tile."""
    new_maximum = tl.maximum(maximum, tl.max(z, axis=1))
    step = maximum - new_maximum
    decay = tl.exp(step)
    x = z - new_maximum[:, None]
    exp_x = tl.where(is_column, tl.exp(x), 0.0)
    return new_maximum, decay, step, x, exp_x, total * decay + tl.sum(exp_x, axis=1)


@triton.jit(do_not_specialize=["num_rows", "first_id", "row_bucket"])
def statistics_kernel(
    hidden_ptr,  # [R, D] fp32, bf16 or fp16
    counterfactual_ptr,  # [R, D], same dtype; not read unless HAS_COUNTERFACTUAL
    weight_ptr,  # [>= Vs, D], same dtype
    counterfactual_weight_ptr,  # [>= Vs, D], same dtype; not read unless HAS_OWN_WEIGHT
    target_ptr,  # [R] int64, ids in the whole vocabulary
    partial_ptr,  # [ceil(Vs / SPLIT_COLUMNS), 4 or 8, R] fp32: m, s, u, t, (m', s', w, t')
    num_rows,  # R > 0
    num_columns,  # Vs > 0
    first_id,  # vocabulary id of this shard's first row
    scale,  # 1 / temperature
    row_bucket,
    D: tl.constexpr,
    SPLIT_COLUMNS: tl.constexpr,
    HAS_COUNTERFACTUAL: tl.constexpr,
    HAS_OWN_WEIGHT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_R: tl.constexpr,
):
    num_splits = tl.cdiv(num_columns, SPLIT_COLUMNS)
    row_block, split = _block_of(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), num_splits, GROUP_R)
    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < num_rows
    target = (tl.load(target_ptr + rows, mask=is_row, other=-1) - first_id).to(tl.int32)

    m = tl.full([BLOCK_R], LOWEST, tl.float32)
    s = tl.zeros([BLOCK_R], tl.float32)
    u = tl.zeros([BLOCK_R], tl.float32)
    t = tl.zeros([BLOCK_R], tl.float32)
    m2 = tl.full([BLOCK_R], LOWEST, tl.float32)
    s2 = tl.zeros([BLOCK_R], tl.float32)
    t2 = tl.zeros([BLOCK_R], tl.float32)
    w = tl.zeros([BLOCK_R], tl.float32)
    first_column = split * SPLIT_COLUMNS
    for start in range(first_column, tl.minimum(first_column + SPLIT_COLUMNS, num_columns), BLOCK_V):
        hidden_ptrs = _tile_pointers(hidden_ptr, row_block * BLOCK_R, num_rows, D, BLOCK_R, BLOCK_D)
        weight_ptrs = _tile_pointers(weight_ptr, start, num_columns, D, BLOCK_V, BLOCK_D)
        z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        if HAS_COUNTERFACTUAL:
            counterfactual_ptrs = _tile_pointers(counterfactual_ptr, row_block * BLOCK_R, num_rows, D, BLOCK_R, BLOCK_D)
            z2 = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
            if HAS_OWN_WEIGHT:
                own_weight_ptrs = _tile_pointers(counterfactual_weight_ptr, start, num_columns, D, BLOCK_V, BLOCK_D)
        for d in range(0, D, BLOCK_D):
            weight = _load_slice(weight_ptrs, d, D, BLOCK_D, UPCAST)
            hidden = _load_slice(hidden_ptrs, d, D, BLOCK_D, UPCAST)
            z = tl.dot(hidden, tl.trans(weight), z, input_precision=PRECISION)
            if HAS_COUNTERFACTUAL:
                counterfactual = _load_slice(counterfactual_ptrs, d, D, BLOCK_D, UPCAST)
                if HAS_OWN_WEIGHT:
                    weight2 = _load_slice(own_weight_ptrs, d, D, BLOCK_D, UPCAST)
                    own_weight_ptrs += BLOCK_D
                else:
                    weight2 = weight
                z2 = tl.dot(counterfactual, tl.trans(weight2), z2, input_precision=PRECISION)
                counterfactual_ptrs += BLOCK_D
            hidden_ptrs += BLOCK_D
            weight_ptrs += BLOCK_D

        columns = start + tl.arange(0, BLOCK_V)
        is_column = (columns < num_columns)[None, :]
        # Without the edge a target in the next shard would find the repeated last column's copies.
        is_target = (columns[None, :] == target[:, None]) & is_column
        z = tl.where(is_column, z * scale, LOWEST)
        t += tl.sum(tl.where(is_target, z, 0.0), axis=1)
        old_s = s
        m, decay, step, x, exp_x, s = _fold(z, is_column, m, s)
        u = (u + old_s * step) * decay + tl.sum(exp_x * x, axis=1)
        if HAS_COUNTERFACTUAL:
            z2 = tl.where(is_column, z2 * scale, LOWEST)
            t2 += tl.sum(tl.where(is_target, z2, 0.0), axis=1)
            m2, decay2, step2, x2, exp_x2, s2 = _fold(z2, is_column, m2, s2)
            w = (w + old_s * (step - step2)) * decay + tl.sum(exp_x * (x - x2), axis=1)

    size: tl.constexpr = 8 if HAS_COUNTERFACTUAL else 4  # pyright: ignore[reportAssignmentType]  # Triton's syntax
    out_ptrs = partial_ptr + tl.cast(split, tl.int64) * size * num_rows + rows
    tl.store(out_ptrs, m, mask=is_row)
    tl.store(out_ptrs + num_rows, s, mask=is_row)
    tl.store(out_ptrs + 2 * num_rows, u, mask=is_row)
    tl.store(out_ptrs + 3 * num_rows, t, mask=is_row)
    if HAS_COUNTERFACTUAL:
        tl.store(out_ptrs + 4 * num_rows, m2, mask=is_row)
        tl.store(out_ptrs + 5 * num_rows, s2, mask=is_row)
        tl.store(out_ptrs + 6 * num_rows, w, mask=is_row)
        tl.store(out_ptrs + 7 * num_rows, t2, mask=is_row)


@triton.jit
def _load_statistic(ptr, index, inside, num_rows, is_inside, other):
    return tl.load(ptr + tl.cast(index, tl.int64) * num_rows + inside, mask=is_inside, other=other)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "vocab_size"])
def join_kernel(
    partial_ptr,  # [num_splits, 4 or 8, R] fp32
    target_ptr,  # [R] int64
    out_ptr,  # [4 or 8, R] fp32: the statistics of all splits together
    num_rows,
    num_splits,
    vocab_size,  # of the whole vocabulary; t (and t') of a target outside it is NaN
    HAS_COUNTERFACTUAL: tl.constexpr,
    BLOCK_S: tl.constexpr,  # power of two, at least num_splits
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    splits = tl.arange(0, BLOCK_S)
    is_row = rows < num_rows
    is_inside = is_row[None, :] & (splits < num_splits)[:, None]
    size: tl.constexpr = 8 if HAS_COUNTERFACTUAL else 4  # pyright: ignore[reportAssignmentType]  # Triton's syntax
    inside = splits.to(tl.int64)[:, None] * size * num_rows + rows[None, :]

    m = _load_statistic(partial_ptr, 0, inside, num_rows, is_inside, LOWEST)
    s = _load_statistic(partial_ptr, 1, inside, num_rows, is_inside, 0.0)
    u = _load_statistic(partial_ptr, 2, inside, num_rows, is_inside, 0.0)
    t = _load_statistic(partial_ptr, 3, inside, num_rows, is_inside, 0.0)
    joined_m = tl.max(m, axis=0)
    step = m - joined_m[None, :]  # pyright: ignore[reportCallIssue, reportArgumentType]  # Triton's syntax
    decay = tl.exp(step)
    target = tl.load(target_ptr + rows, mask=is_row, other=0)
    is_known = (target >= 0) & (target < vocab_size)
    out_ptrs = out_ptr + rows
    tl.store(out_ptrs, joined_m, mask=is_row)
    tl.store(out_ptrs + num_rows, tl.sum(decay * s, axis=0), mask=is_row)
    tl.store(out_ptrs + 2 * num_rows, tl.sum(decay * (u + s * step), axis=0), mask=is_row)
    # One split holds the target, the others hold 0.
    tl.store(out_ptrs + 3 * num_rows, tl.where(is_known, tl.sum(t, axis=0), float("nan")), mask=is_row)
    if HAS_COUNTERFACTUAL:
        m2 = _load_statistic(partial_ptr, 4, inside, num_rows, is_inside, LOWEST)
        s2 = _load_statistic(partial_ptr, 5, inside, num_rows, is_inside, 0.0)
        w = _load_statistic(partial_ptr, 6, inside, num_rows, is_inside, 0.0)
        t2 = _load_statistic(partial_ptr, 7, inside, num_rows, is_inside, 0.0)
        joined_m2 = tl.max(m2, axis=0)
        step2 = m2 - joined_m2[None, :]  # pyright: ignore[reportCallIssue, reportArgumentType]  # Triton's syntax
        tl.store(out_ptrs + 4 * num_rows, joined_m2, mask=is_row)
        tl.store(out_ptrs + 5 * num_rows, tl.sum(tl.exp(step2) * s2, axis=0), mask=is_row)
        tl.store(out_ptrs + 6 * num_rows, tl.sum(decay * (w + s * (step - step2)), axis=0), mask=is_row)
        tl.store(out_ptrs + 7 * num_rows, tl.where(is_known, tl.sum(t2, axis=0), float("nan")), mask=is_row)


@triton.jit
def _product(
    hidden_ptrs,
    weight_ptrs,
    D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden . weight of one tile, [BLOCK_R, BLOCK_V] in fp32; the pointers are at the first hidden dimensions."""
    z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for d in range(0, D, BLOCK_D):
        hidden = _load_slice(hidden_ptrs, d, D, BLOCK_D, UPCAST)
        weight = _load_slice(weight_ptrs, d, D, BLOCK_D, UPCAST)
        z = tl.dot(hidden, tl.trans(weight), z, input_precision=PRECISION)
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    return z


@triton.jit(do_not_specialize=["num_rows", "first_id", "row_bucket"])
def logit_gradient_kernel(
    hidden_ptr,  # [R, D] fp32, bf16 or fp16
    weight_ptr,  # [>= chunk, D], same dtype: the chunk's first row
    target_ptr,  # [R] int64, ids in the whole vocabulary
    grad_ptr,  # [R] fp32: g
    maximum_ptr,  # [R] fp32: m of the whole vocabulary
    offset_ptr,  # [R] fp32
    slope_ptr,  # [R] fp32; not read unless HAS_SLOPE
    other_ptr,  # [R, D], dtype of hidden; this and the next three are not read unless HAS_OTHER
    other_weight_ptr,  # [>= chunk, D], same dtype: the chunk's first row
    other_maximum_ptr,  # [R] fp32: m' of the whole vocabulary
    kl_slope_ptr,  # [R] fp32
    out_ptr,  # [R, out_stride], dtype of the inputs: d z of the chunk in its first num_columns columns
    num_rows,  # R > 0
    num_columns,  # real columns of the chunk, > 0
    first_id,  # vocabulary id of the chunk's first row
    scale,  # 1 / temperature
    out_stride,
    row_bucket,
    D: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_R: tl.constexpr,
):
    row_block, column_block = _block_of(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.cdiv(num_columns, BLOCK_V), GROUP_R
    )
    hidden_ptrs = _tile_pointers(hidden_ptr, row_block * BLOCK_R, num_rows, D, BLOCK_R, BLOCK_D)
    weight_ptrs = _tile_pointers(weight_ptr, column_block * BLOCK_V, num_columns, D, BLOCK_V, BLOCK_D)
    z = _product(hidden_ptrs, weight_ptrs, D, UPCAST, PRECISION, BLOCK_R, BLOCK_V, BLOCK_D)
    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    is_row = rows < num_rows
    target = (tl.load(target_ptr + rows, mask=is_row, other=-1) - first_id).to(tl.int32)
    grad = tl.load(grad_ptr + rows, mask=is_row, other=0.0)
    maximum = tl.load(maximum_ptr + rows, mask=is_row, other=0.0)
    coefficient = tl.load(offset_ptr + rows, mask=is_row, other=0.0)[:, None]
    x = z * scale - maximum[:, None]
    if HAS_SLOPE:
        coefficient = coefficient + tl.load(slope_ptr + rows, mask=is_row, other=0.0)[:, None] * x
    if HAS_OTHER:
        hidden_ptrs = _tile_pointers(other_ptr, row_block * BLOCK_R, num_rows, D, BLOCK_R, BLOCK_D)
        weight_ptrs = _tile_pointers(other_weight_ptr, column_block * BLOCK_V, num_columns, D, BLOCK_V, BLOCK_D)
        z2 = _product(hidden_ptrs, weight_ptrs, D, UPCAST, PRECISION, BLOCK_R, BLOCK_V, BLOCK_D)
        maximum2 = tl.load(other_maximum_ptr + rows, mask=is_row, other=0.0)
        kl_slope = tl.load(kl_slope_ptr + rows, mask=is_row, other=0.0)
        coefficient = coefficient + kl_slope[:, None] * (x - (z2 * scale - maximum2[:, None]))
    # Rounding can lift x above 0 by a few units in the last place of z where this product sums in another order than
    # the forward's; exp stays near 1.
    z_grad = tl.exp(x) * coefficient + tl.where(columns[None, :] == target[:, None], grad[:, None], 0.0)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    is_inside = is_row[:, None] & (columns < num_columns)[None, :]
    tl.store(out_ptrs, _rounded_for(out_ptr, z_grad * scale, UPCAST), mask=is_inside)


@triton.jit(do_not_specialize=["row_bucket"])
def product_kernel(
    a_ptr,  # A_TRANSPOSED: [N, a_stride], the first M columns; else [M, a_stride], the first N columns; 16 or 32 bits
    b_ptr,  # [N, D], dtype of a
    out_ptr,  # [M, D], fp32 or the inputs' dtype: grows by a @ b
    num_out,  # M > 0: rows (d hidden) or columns of the chunk (d weight)
    num_inner,  # N > 0: columns of the chunk (d hidden) or rows (d weight); the sum runs over it
    a_stride,
    row_bucket,
    D: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block, d_block = _block_of(tl.program_id(0), tl.cdiv(num_out, BLOCK_M), tl.cdiv(D, BLOCK_D), GROUP_M)
    outs = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inners = tl.arange(0, BLOCK_N)
    ds = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    is_out = outs < num_out
    is_d = ds < D
    b_ptrs = b_ptr + inners[:, None] * D + ds[None, :]
    # Repeated instead of masked only where they are strided: along memory a mask keeps wide loads.
    if A_TRANSPOSED:
        a_ptrs = a_ptr + inners[:, None] * a_stride + outs[None, :]
    else:
        a_ptrs = a_ptr + tl.minimum(outs, num_out - 1).to(tl.int64)[:, None] * a_stride + inners[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, num_inner, BLOCK_N):
        is_inner = start + inners < num_inner
        b = tl.load(b_ptrs, mask=is_inner[:, None] & is_d[None, :], other=0.0)
        if A_TRANSPOSED:
            a = tl.trans(tl.load(a_ptrs, mask=is_inner[:, None] & is_out[None, :], other=0.0))
            a_ptrs += tl.cast(BLOCK_N, tl.int64) * a_stride
        else:
            a = tl.load(a_ptrs, mask=is_inner[None, :], other=0.0)
            a_ptrs += BLOCK_N
        b_ptrs += BLOCK_N * D
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    out_ptrs = out_ptr + tl.cast(block, tl.int64) * BLOCK_M * D + (tl.arange(0, BLOCK_M)[:, None] * D + ds[None, :])
    is_inside = is_out[:, None] & is_d[None, :]
    total += tl.load(out_ptrs, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, _rounded_for(out_ptr, total, UPCAST), mask=is_inside)
