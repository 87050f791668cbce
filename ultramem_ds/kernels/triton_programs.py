"""Programs of the Triton kernels; ``triton.py`` launches them.

A program's annotations are Triton's own. Letters: see kernels/base.py. C = V / h columns of one
core's chunk.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_rectangular_program(
    values, rows, projectors, scores, pooled,
    V, C, h, K, E,
    ACCUMULATE: tl.constexpr, TILE_E: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (t, tile): ``pooled[t, :, tile]``."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    bags = tl.arange(0, TILE_E)
    in_row = columns < V
    sums = tl.zeros((TILE_E, TILE_V), dtype=ACCUMULATE)
    for k in range(K):
        entry = token * K + k
        row = tl.load(rows + entry)
        projector = tl.load(projectors + entry)
        score = tl.load(scores + entry * h + columns // C, mask=in_row, other=0.0)
        value = tl.load(values + row * V + columns, mask=in_row, other=0.0).to(ACCUMULATE)
        sums += tl.where(bags[:, None] == projector, (score * value)[None, :], 0.0)
    target = pooled + (token * E + bags[:, None]) * V + columns[None, :]
    tl.store(target, sums.to(pooled.dtype.element_ty), mask=(bags[:, None] < E) & in_row[None, :])


@triton.jit
def pool_ragged_program(
    values, rows, offsets, scores, pooled,
    V, C, h,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (b, tile): ``pooled[b, tile]``."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    sums = tl.zeros((TILE_V,), dtype=ACCUMULATE)
    for entry in range(tl.load(offsets + bag), tl.load(offsets + bag + 1)):
        row = tl.load(rows + entry)
        score = tl.load(scores + entry * h + columns // C, mask=in_row, other=0.0)
        sums += score * tl.load(values + row * V + columns, mask=in_row, other=0.0).to(ACCUMULATE)
    tl.store(pooled + bag * V + columns, sums.to(pooled.dtype.element_ty), mask=in_row)


@triton.jit
def entry_dots_program(
    values, rows, bags, grad, dots,
    V, C, h,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (m, core): dot product of the entry's row and its bag's gradient on that core."""
    entry = tl.program_id(0).to(tl.int64)
    core = tl.program_id(1)
    row = tl.load(rows + entry)
    bag = tl.load(bags + entry)
    products = tl.zeros((TILE_V,), dtype=ACCUMULATE)
    for first in range(0, C, TILE_V):
        within = first + tl.arange(0, TILE_V)
        columns = core * C + within
        value = tl.load(values + row * V + columns, mask=within < C, other=0.0).to(ACCUMULATE)
        bag_grad = tl.load(grad + bag * V + columns, mask=within < C, other=0.0).to(ACCUMULATE)
        products += value * bag_grad
    tl.store(dots + entry * h + core, tl.sum(products, axis=0))


@triton.jit
def row_runs_program(
    sorted_rows, order, bags, scores, grad, grad_values, partials,
    M, V, C, h,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (c, tile): sums of the rows of sorted entries ``c * RUN`` to ``(c + 1) * RUN``.

    A row whose entries all lie inside is added to the table. What a row has here of entries that
    began before goes to ``partials[2 c]``; what begins here and goes on, to ``partials[2 c + 1]``.
    """
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    begin = chunk * RUN
    end = tl.minimum(begin + RUN, M)
    row = tl.load(sorted_rows + begin)
    began_before = tl.load(sorted_rows + begin - 1, mask=begin > 0, other=-1) == row
    sums = tl.zeros((TILE_V,), dtype=ACCUMULATE)
    for j in range(begin, end):
        next_row = tl.load(sorted_rows + j)
        if next_row != row:
            if began_before:
                tl.store(partials + 2 * chunk * V + columns, sums, mask=in_row)
            else:
                target = grad_values + row * V + columns
                tl.store(target, tl.load(target, mask=in_row, other=0.0) + sums, mask=in_row)
            sums = tl.zeros((TILE_V,), dtype=ACCUMULATE)
            began_before = next_row == -1  # no
            row = next_row
        entry = tl.load(order + j)
        bag = tl.load(bags + entry)
        score = tl.load(scores + entry * h + columns // C, mask=in_row, other=0.0)
        sums += score * tl.load(grad + bag * V + columns, mask=in_row, other=0.0).to(ACCUMULATE)
    goes_on = tl.load(sorted_rows + end, mask=end < M, other=-1) == row
    if began_before:
        tl.store(partials + 2 * chunk * V + columns, sums, mask=in_row)
    else:
        if goes_on:
            tl.store(partials + (2 * chunk + 1) * V + columns, sums, mask=in_row)
        else:
            target = grad_values + row * V + columns
            tl.store(target, tl.load(target, mask=in_row, other=0.0) + sums, mask=in_row)


@triton.jit
def join_runs_program(
    sorted_rows, partials, grad_values,
    M, V,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (c, tile): add up, in order, the parts of the row that begins in c and goes on."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    begin = chunk * RUN
    end = tl.minimum(begin + RUN, M)
    row = tl.load(sorted_rows + end - 1)
    goes_on = tl.load(sorted_rows + end, mask=end < M, other=-1) == row
    began_before = tl.load(sorted_rows + begin - 1, mask=begin > 0, other=-1) == row
    if goes_on and not began_before:
        sums = tl.load(partials + (2 * chunk + 1) * V + columns, mask=in_row, other=0.0)
        part = chunk + 1
        while tl.load(sorted_rows + part * RUN, mask=part * RUN < M, other=-1) == row:
            sums += tl.load(partials + 2 * part * V + columns, mask=in_row, other=0.0)
            part += 1
        target = grad_values + row * V + columns
        tl.store(target, tl.load(target, mask=in_row, other=0.0) + sums, mask=in_row)


@triton.jit
def row_adam_program(
    rows, grad, values, exp_avg, exp_avg_sq,
    V, grad_scale, step_size, root_correction, decay, beta1, beta2, eps,
    TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (u, tile): AdamW on one row's tile; see ``row_adam.AdamStep``."""
    listed = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    place = tl.load(rows + listed) * V + columns
    scaled = grad_scale * tl.load(grad + listed * V + columns, mask=in_row, other=0.0)
    avg = tl.load(exp_avg + place, mask=in_row, other=0.0)
    avg = beta1 * avg + (1.0 - beta1) * scaled
    avg_sq = tl.load(exp_avg_sq + place, mask=in_row, other=0.0)
    avg_sq = beta2 * avg_sq + (1.0 - beta2) * scaled * scaled
    update = step_size * avg / (tl.sqrt(avg_sq) / root_correction + eps)
    value = tl.load(values + place, mask=in_row, other=0.0).to(tl.float32)
    tl.store(exp_avg + place, avg, mask=in_row)
    tl.store(exp_avg_sq + place, avg_sq, mask=in_row)
    tl.store(values + place, (decay * value - update).to(values.dtype.element_ty), mask=in_row)


@triton.jit
def row_backward_atomic_program(
    rows, bags, scores, grad, grad_values,
    V, C, h,
    ACCUMULATE: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Program (m, tile): add entry m's part to its row's gradient."""
    entry = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    in_row = columns < V
    row = tl.load(rows + entry)
    bag = tl.load(bags + entry)
    score = tl.load(scores + entry * h + columns // C, mask=in_row, other=0.0)
    bag_grad = tl.load(grad + bag * V + columns, mask=in_row, other=0.0).to(ACCUMULATE)
    tl.atomic_add(grad_values + row * V + columns, score * bag_grad, mask=in_row)
