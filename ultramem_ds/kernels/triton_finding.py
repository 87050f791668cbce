"""``Kernel.find_rows`` in three launches; see ``triton_finding_programs.py``.

1. The queries: one program walks a tile of outputs over D, convolving as it goes. Without a
   convolution it is torch's product.
2. The search: a block of keys of one side and head, for a tile of tokens. The query's norm is done
   on the way; scores stay in registers, each block's best go to memory, sorted.
3. The selection, one program per (token, head): the blocks' best are merged, the candidates scored
   exactly at all ranks, the best pairs of their grid taken, scored per core, permuted and split.
   It also moves the convolution's state on, in place: nothing reads it by then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ultramem_ds.kernels.finding import FoundRows, RowFinder
from ultramem_ds.kernels.tiles import Settings, gpu_name, power_of_two, settings
from ultramem_ds.kernels.triton_finding_programs import (
    convolve_project_program,
    search_program,
    select_program,
)

# Letters: see kernels/finding.py.

DTYPES = (torch.float32, torch.bfloat16)
_LEAST = 16  # rows and columns of a product


def find_rows(
    finder: RowFinder, x_TD: Tensor, state_TCD: Tensor | None, begins_T: Tensor | None
) -> FoundRows:
    """See :class:`ultramem_ds.kernels.base.Kernel`."""
    x_TD = x_TD.contiguous()
    _, num_heads, num_keys, rank, width = finder.keys_2Hnrd.shape
    num_tokens, top_m = x_TD.shape[0], finder.top_m
    num_cores = 1 if finder.core_hHrr is None else finder.core_hHrr.shape[0]
    shape = (num_tokens, num_heads * top_m)
    placed = torch.empty(4, *shape, dtype=torch.int64, device=x_TD.device)
    scores_TKh = torch.empty(*shape, num_cores, dtype=torch.float32, device=x_TD.device)
    slots_TK, permuted_TK, rows_TK, projectors_TK = placed.unbind(0)
    found = FoundRows(slots_TK, permuted_TK, rows_TK, projectors_TK, scores_TKh)
    if num_tokens == 0:
        return found
    queries_TO = _queries(finder, x_TD, state_TCD, begins_T)
    candidates = _search(finder, queries_TO)
    num_blocks, best = candidates.shape[2:]
    count = num_blocks * best
    words = f"d{power_of_two(width)} m{best}"
    tiles = settings("select_program", words, gpu_name(x_TD.device))
    rounds, permutation = finder.rounds, finder.permutation
    with torch.cuda.device_of(x_TD):
        select_program[(num_tokens, num_heads)](
            candidates,
            queries_TO,
            finder.norm_d,
            finder.eps,
            finder.groups_2Hr,
            finder.keys_2Hnrd,
            finder.core_hHrr,
            rounds,
            permutation,
            placed,
            scores_TKh,
            x_TD,
            state_TCD,
            0 if state_TCD is None else state_TCD.stride(0),
            0 if state_TCD is None else state_TCD.stride(1),
            x_TD.shape[1],
            finder.num_queries,
            num_heads,
            width,
            num_keys,
            rank,
            num_cores,
            top_m,
            finder.num_rows,
            count,
            NORM=finder.norm,
            HAS_CORES=finder.core_hHrr is not None,
            SOFTMAX=finder.softmax,
            REACH=0 if state_TCD is None else state_TCD.shape[1],
            ROUNDS=0 if rounds is None else rounds.shape[0],
            PERMUTED=rounds is None and permutation is not None,
            M=best,
            RANKS=power_of_two(rank),
            **_within(tiles, CHUNK=count, TILE_D=width),
        )
    return found


def _tile_of_tokens(num_tokens: int) -> int:
    """One token alone needs no matrix product; several share what they multiply with."""
    return 1 if num_tokens == 1 else _LEAST


def _within(tiles: Settings, **sizes: int) -> Settings:
    """Settings whose tiles are no larger than what covers these sizes."""
    return tiles | {
        name: min(tiles[name], power_of_two(size, _LEAST)) for name, size in sizes.items()
    }


def _queries(
    finder: RowFinder, x_TD: Tensor, state_TCD: Tensor | None, begins_T: Tensor | None
) -> Tensor:
    """The projected queries ``(T, G * d)``, not normalised."""
    if finder.conv_kD is None or state_TCD is None:
        return F.linear(x_TD, finder.proj_OD)
    (num_tokens, hidden), num_outputs = x_TD.shape, finder.proj_OD.shape[0]
    queries_TO = x_TD.new_empty(num_tokens, num_outputs)
    tile_T = _tile_of_tokens(num_tokens)
    words = f"T{tile_T} D{power_of_two(hidden)}"
    tiles = settings("convolve_project_program", words, gpu_name(x_TD.device))
    tiles = _within(tiles, TILE_O=num_outputs, TILE_D=hidden)
    grid = (triton.cdiv(num_tokens, tile_T), triton.cdiv(num_outputs, tiles["TILE_O"]))
    with torch.cuda.device_of(x_TD):
        convolve_project_program[grid](
            x_TD,
            state_TCD,
            finder.conv_kD,
            begins_T,
            finder.proj_OD,
            queries_TO,
            num_tokens,
            hidden,
            num_outputs,
            state_TCD.stride(0),
            state_TCD.stride(1),
            REACH=state_TCD.shape[1],
            HAS_BEGINS=begins_T is not None,
            TILE_T=tile_T,
            **tiles,
        )
    return queries_TO


def _search(finder: RowFinder, queries_TO: Tensor) -> Tensor:
    """Ranked candidates ``(T, 2 * H, blocks of keys, M)``, int64, sorted within a block."""
    _, num_heads, num_keys, directions, width = finder.search_2Hnsd.shape
    num_tokens = queries_TO.shape[0]
    best, tile_T = power_of_two(finder.top_m, 2), _tile_of_tokens(num_tokens)
    words = f"T{tile_T} d{power_of_two(width)} m{best}"
    tiles = settings("search_program", words, gpu_name(queries_TO.device))
    tiles = _within(tiles, TILE_N=num_keys, TILE_D=width)
    tiles["TILE_N"] = max(tiles["TILE_N"], best)
    num_blocks = triton.cdiv(num_keys, tiles["TILE_N"])
    candidates = torch.empty(
        num_tokens, 2 * num_heads, num_blocks, best, dtype=torch.int64, device=queries_TO.device
    )
    grid = (num_blocks, 2 * num_heads, triton.cdiv(num_tokens, tile_T))
    with torch.cuda.device_of(queries_TO):
        search_program[grid](
            queries_TO,
            finder.norm_d,
            finder.eps,
            finder.groups_2Hr,
            finder.search_2Hnsd,
            candidates,
            num_tokens,
            finder.num_queries,
            width,
            num_keys,
            finder.groups_2Hr.shape[2],
            NORM=finder.norm,
            DIRECTIONS=directions,
            M=best,
            TILE_T=tile_T,
            **tiles,
        )
    return candidates
