"""Programs of ``Kernel.find_rows``; ``triton_finding.py`` launches them.

Scores are ranked as int64 numbers: the score's bits, ordered as integers, above the candidate's
number counted down, so that of equal scores the smallest number comes first and a sort needs no
second array. A program's annotations are Triton's own. Letters: see kernels/finding.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="misc"
from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
NOTHING = tl.constexpr(-(2**63))  # ranks below every score


@triton.jit
def ranked(scores, index):
    """Scores, fp32, and their candidates' numbers, below 2^31, as numbers to sort by."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # one zero
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (index ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def number_of(keys):
    """The candidate's number that :func:`ranked` put there, int32."""
    return (keys & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def products(x, weights, sums):
    """``sums + x @ weights^T`` for ``(T, D)`` and ``(O, D)``; one token does without a product."""
    if x.shape[0] == 1:
        terms = x.to(tl.float32) * weights.to(tl.float32)
        return sums + tl.sum(terms, axis=1)[None, :]
    if INTERPRETED:  # the interpreter's product takes bf16 for integers
        x, weights = x.to(tl.float32), weights.to(tl.float32)
    return tl.dot(x, tl.trans(weights), sums, input_precision="ieee")


@triton.jit
def moments(queries, in_batch, d, eps, NORM: tl.constexpr, TILE_D: tl.constexpr):
    """Mean and reciprocal deviation over d of the queries that start at ``queries``."""
    mean = tl.zeros(in_batch.shape, dtype=tl.float32)
    scale = tl.full(in_batch.shape, 1.0, dtype=tl.float32)
    if NORM == "layernorm":
        for first in range(0, d, TILE_D):
            columns = first + tl.arange(0, TILE_D)
            mask = in_batch[:, None] & (columns < d)[None, :]
            query = tl.load(queries[:, None] + columns[None, :], mask=mask, other=0.0)
            mean += tl.sum(query.to(tl.float32), axis=1)
        mean = mean / d
    if NORM != "none":
        squares = tl.zeros(in_batch.shape, dtype=tl.float32)
        for first in range(0, d, TILE_D):
            columns = first + tl.arange(0, TILE_D)
            mask = in_batch[:, None] & (columns < d)[None, :]
            query = tl.load(queries[:, None] + columns[None, :], mask=mask, other=0.0)
            deviation = tl.where(mask, query.to(tl.float32) - mean[:, None], 0.0)
            squares += tl.sum(deviation * deviation, axis=1)
        scale = 1.0 / tl.sqrt(squares / d + eps)
    return mean, scale


@triton.jit
def normalised(
    queries, norm_weight, in_batch, mean, scale, first, d,
    NORM: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Columns ``first`` and on of the normalised queries, rounded to their dtype."""
    columns = first + tl.arange(0, TILE_D)
    mask = in_batch[:, None] & (columns < d)[None, :]
    query = tl.load(queries[:, None] + columns[None, :], mask=mask, other=0.0)
    if NORM != "none":
        weight = tl.load(norm_weight + columns, mask=columns < d, other=0.0).to(tl.float32)
        wide = (query.to(tl.float32) - mean[:, None]) * scale[:, None] * weight[None, :]
        query = wide.to(query.dtype)
    return query


@triton.jit
def convolve_project_program(
    x, state, taps, begins, proj, queries,
    T, D, num_outputs, state_stride_t, state_stride_c,
    REACH: tl.constexpr, HAS_BEGINS: tl.constexpr,
    TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Program (tokens, outputs): the queries' projection of the convolved inputs."""
    token = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    output = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    in_batch = token < T
    token = token.to(tl.int64)
    kept = in_batch
    if HAS_BEGINS:  # nothing precedes the first token of a document
        kept = in_batch & (tl.load(begins + token, mask=in_batch, other=1) == 0)
    sums = tl.zeros((TILE_T, TILE_O), dtype=tl.float32)
    for first in range(0, D, TILE_D):
        columns = first + tl.arange(0, TILE_D)
        in_row = columns < D
        mask = in_batch[:, None] & in_row[None, :]
        own = tl.load(x + token[:, None] * D + columns[None, :], mask=mask, other=0.0)
        tap = tl.load(taps + REACH * D + columns, mask=in_row, other=0.0).to(tl.float32)
        total = own.to(tl.float32) * tap[None, :]
        for c in tl.static_range(REACH):
            place = state + token[:, None] * state_stride_t + c * state_stride_c + columns[None, :]
            past = tl.load(place, mask=kept[:, None] & in_row[None, :], other=0.0)
            tap = tl.load(taps + c * D + columns, mask=in_row, other=0.0).to(tl.float32)
            total += past.to(tl.float32) * tap[None, :]
        weight_mask = (output < num_outputs)[:, None] & in_row[None, :]
        weights = tl.load(proj + output[:, None] * D + columns[None, :], weight_mask, other=0.0)
        sums = products(total.to(own.dtype), weights, sums)
    target = queries + token[:, None] * num_outputs + output[None, :]
    out_mask = in_batch[:, None] & (output < num_outputs)[None, :]
    tl.store(target, sums.to(queries.dtype.element_ty), mask=out_mask)


@triton.jit
def search_program(
    queries, norm_weight, eps, groups, search, candidates,
    T, G, d, n, r,
    NORM: tl.constexpr, DIRECTIONS: tl.constexpr, M: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Program (keys, side and head, tokens): the ``M`` best of a block of keys, ranked, sorted."""
    block = tl.program_id(0)
    list_ = tl.program_id(1)  # side * H + head
    token = tl.program_id(2) * TILE_T + tl.arange(0, TILE_T)
    key = block * TILE_N + tl.arange(0, TILE_N)
    in_batch = token < T
    token = token.to(tl.int64)
    sums = tl.zeros((TILE_T, TILE_N), dtype=tl.float32)
    for direction in range(DIRECTIONS):
        group = tl.load(groups + list_ * r + direction)
        query = queries + (token * G + group) * d
        mean, scale = moments(query, in_batch, d, eps, NORM, TILE_D)
        row = (list_.to(tl.int64) * n + key) * DIRECTIONS + direction
        for first in range(0, d, TILE_D):
            columns = first + tl.arange(0, TILE_D)
            part = normalised(
                query, norm_weight, in_batch, mean, scale, first, d, NORM, TILE_D
            )  # fmt: skip
            mask = (key < n)[:, None] & (columns < d)[None, :]
            keys = tl.load(search + row[:, None] * d + columns[None, :], mask=mask, other=0.0)
            sums = products(part, keys, sums)
    best = tl.topk(tl.where((key < n)[None, :], ranked(sums, key[None, :]), NOTHING), M)
    place = (token * tl.num_programs(1) + list_) * tl.num_programs(0) + block
    tl.store(candidates + place[:, None] * M + tl.arange(0, M)[None, :], best, in_batch[:, None])


@triton.jit
def merge(candidates, lists_stride, count, m, M: tl.constexpr, CHUNK: tl.constexpr):
    """The ``m`` best of ``count`` ranked candidates of each side, ``(2, M)``, sorted."""
    side = tl.arange(0, 2)[:, None]
    place = tl.arange(0, M)[None, :]
    best = tl.full((2, M), NOTHING, dtype=tl.int64)
    for first in range(0, count, CHUNK):
        within = first + tl.arange(0, CHUNK)[None, :]
        more = tl.load(candidates + side * lists_stride + within, within < count, other=NOTHING)
        merged = tl.full((2, M), NOTHING, dtype=tl.int64)
        for i in range(m):
            top = tl.maximum(tl.max(more, axis=1), tl.max(best, axis=1))[:, None]
            merged = tl.where(place == i, top, merged)
            more = tl.where(more == top, NOTHING, more)  # no two are equal
            best = tl.where(best == top, NOTHING, best)
        best = merged
    return best


@triton.jit
def exact(
    queries, norm_weight, eps, groups, keys, index, d, r,
    NORM: tl.constexpr, RANKS: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Scores ``(M, RANKS)`` of the keys ``index``; 0 beyond rank r."""
    rank = tl.arange(0, RANKS)
    scores = tl.zeros((index.shape[0], RANKS), dtype=tl.float32)
    everywhere = tl.full((1,), 1, dtype=tl.int1)
    for a in range(r):
        query = queries + tl.load(groups + a + tl.zeros((1,), dtype=tl.int32)) * d
        mean, scale = moments(query, everywhere, d, eps, NORM, TILE_D)
        dots = tl.zeros(index.shape, dtype=tl.float32)
        row = index.to(tl.int64) * r + a
        for first in range(0, d, TILE_D):
            columns = first + tl.arange(0, TILE_D)
            part = normalised(
                query, norm_weight, everywhere, mean, scale, first, d, NORM, TILE_D
            )  # fmt: skip
            key = tl.load(
                keys + row[:, None] * d + columns[None, :], (columns < d)[None, :], other=0.0
            )
            dots += tl.sum(part.to(tl.float32) * key.to(tl.float32), axis=1)
        scores = tl.where(rank[None, :] == a, dots[:, None], scores)
    return scores


@triton.jit
def turned(rows, core):
    """``rows @ core`` for ``(M, RANKS)`` and ``(RANKS, RANKS)``."""
    return tl.sum(rows[:, :, None] * core[None, :, :], axis=1)


@triton.jit
def select_program(
    candidates, queries, norm_weight, eps, groups, keys, cores, rounds, permutation,
    slots, scores, x, state, state_stride_t, state_stride_c,
    D, G, H, d, n, r, h, m, N, count,
    NORM: tl.constexpr, HAS_CORES: tl.constexpr, SOFTMAX: tl.constexpr, REACH: tl.constexpr,
    ROUNDS: tl.constexpr, PERMUTED: tl.constexpr,
    M: tl.constexpr, RANKS: tl.constexpr, CHUNK: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Program (t, head): a token's best pairs, where they look, and the convolution's next state.

    ``slots`` holds slots, permuted slots, rows and projectors, ``(4, T, H, m)``. The state was read
    by the program before; each head moves its share of the columns on by one token.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.arange(0, M)
    rank = tl.arange(0, RANKS)
    queries += token * G * d
    best = merge(candidates + (token * 2 * H + head) * count, H * count, count, m, M, CHUNK)
    # Beyond m there may be none: any key will do, for no pair takes them.
    number = tl.where((place < m)[None, :], number_of(best), 0)
    is_row = tl.arange(0, 2)[:, None] == 0
    row_index = tl.sum(tl.where(is_row, number, 0), axis=0)
    col_index = tl.sum(tl.where(is_row, 0, number), axis=0)
    lists_of_keys = keys + head.to(tl.int64) * n * r * d
    rows = exact(
        queries, norm_weight, eps, groups + head * r, lists_of_keys, row_index, d, r,
        NORM, RANKS, TILE_D,
    )  # fmt: skip
    behind = tl.num_programs(1).to(tl.int64) * n * r * d  # keys of the columns
    cols = exact(
        queries, norm_weight, eps, groups + (H + head) * r, lists_of_keys + behind, col_index, d, r,
        NORM, RANKS, TILE_D,
    )  # fmt: skip

    matrix = rank[:, None] * r + rank[None, :]
    in_matrix = (rank < r)[:, None] & (rank < r)[None, :]
    if HAS_CORES:
        total = tl.zeros((RANKS, RANKS), dtype=tl.float32)
        for core in range(h):
            total += tl.load(cores + (core * H + head) * r * r + matrix, in_matrix, other=0.0)
        factors = turned(rows, total)
        grid = tl.zeros((M, M), dtype=tl.float32)
        for b in tl.static_range(RANKS):
            factor = tl.sum(tl.where(rank[None, :] == b, factors, 0.0), axis=1)
            col = tl.sum(tl.where(rank[None, :] == b, cols, 0.0), axis=1)
            grid += factor[:, None] * col[None, :]
    else:
        grid = tl.sum(rows, axis=1)[:, None] + tl.sum(cols, axis=1)[None, :]
    pair = place[:, None] * M + place[None, :]
    is_pair = (place < m)[:, None] & (place < m)[None, :]
    left_over = tl.where(is_pair, ranked(grid, pair), NOTHING)
    pairs = tl.zeros((M,), dtype=tl.int32)
    for i in range(m):
        top = tl.max(tl.max(left_over, axis=1), axis=0)
        pairs = tl.where(place == i, number_of(top), pairs)
        left_over = tl.where(left_over == top, NOTHING, left_over)
    row_pick, col_pick = pairs // M, pairs % M

    entry = (token * H + head) * m + place
    wanted = place < m
    picked = tl.gather(rows, tl.broadcast_to(row_pick[:, None], (M, RANKS)), 0)
    picked_cols = tl.gather(cols, tl.broadcast_to(col_pick[:, None], (M, RANKS)), 0)
    for core in range(h):
        if HAS_CORES:
            weight = tl.load(cores + (core * H + head) * r * r + matrix, in_matrix, other=0.0)
            score = tl.sum(turned(picked, weight) * picked_cols, axis=1)
        else:
            score = tl.sum(picked + picked_cols, axis=1)
        if SOFTMAX:
            score = tl.where(wanted, score, float("-inf"))
            score = tl.exp(score - tl.max(score, axis=0))
            score = score / tl.sum(score, axis=0)
        tl.store(scores + entry * h + core, score, mask=wanted)

    left = tl.gather(row_index, row_pick, 0)
    right = tl.gather(col_index, col_pick, 0)
    slot = left.to(tl.int64) * n + right
    permuted = slot
    if PERMUTED:
        permuted = tl.load(permutation + slot, mask=wanted, other=0)
    if ROUNDS > 0:
        for i in tl.static_range(ROUNDS):
            moved = left + tl.load(rounds + i * n + right, mask=wanted, other=0).to(tl.int32)
            left = right
            right = tl.where(moved >= n, moved - n, moved)
        permuted = left.to(tl.int64) * n + right
    size = tl.num_programs(0).to(tl.int64) * H * m
    tl.store(slots + entry, slot, mask=wanted)
    tl.store(slots + size + entry, permuted, mask=wanted)
    tl.store(slots + 2 * size + entry, permuted % N, mask=wanted)
    tl.store(slots + 3 * size + entry, permuted // N, mask=wanted)

    if REACH > 0:
        for first in range(head * TILE_D, D, H * TILE_D):
            columns = first + tl.arange(0, TILE_D)
            in_row = columns < D
            tap = state + token * state_stride_t + columns
            for c in tl.static_range(REACH - 1):
                later = tl.load(tap + (c + 1) * state_stride_c, mask=in_row, other=0.0)
                tl.store(tap + c * state_stride_c, later, mask=in_row)
            newest = tl.load(x + token * D + columns, mask=in_row, other=0.0)
            tl.store(tap + (REACH - 1) * state_stride_c, newest, mask=in_row)
