"""Initialisation: every standard deviation of the project, in one table (docs/initialisation.md).

A parameter carries the name of its line in ``INITIALISERS`` (``model.roles.tag``; by default its
role). Any process can fill any parameter alone: the numbers depend on (seed, name) only, those of a
value table on (seed, table, global row) only, so every split over ranks builds the same model.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import Architecture, MemoryConfig
from ultramem_ds.kernels.pairs import best_pairs, top_candidates
from ultramem_ds.model.memory.scores import ScoreForm, leading_singular_vectors

# D hidden, L layers, H memory heads, r Tucker rank, h cores, m top-m, n keys per side, E expansion,
# V value width, d kdim, T tokens, R rows. Y is the mean of the top-m of the candidate scores.

TABLE_BLOCK_ROWS = 4096  # rows that one generator draws
_SAMPLES = 1024  # Monte-Carlo draws behind E[Y]


@dataclass(frozen=True, kw_only=True)
class Fill:
    """N(mean, std^2).

    Attributes:
        unit_norm: a head's cores are shifted until their sum has norm 1.
        taps: rows that are not zero, the last ones: 1 in the last, +1 or -1 (the sign of its draw)
            in those before; 0 = all rows as drawn.
    """

    mean: float = 0.0
    std: float = 0.0
    unit_norm: bool = False
    taps: int = 0


def _matrix(config: Architecture) -> Fill:
    return Fill(std=config.model.init_std)


def _embedding(config: Architecture) -> Fill:
    return Fill(std=config.model.embedding_std)


def _residual(config: Architecture) -> Fill:
    return Fill(std=config.model.init_std / math.sqrt(2 * config.model.num_layers))


def _ones(_: Architecture) -> Fill:
    return Fill(mean=1.0)


def _memory_conv(_: Architecture) -> Fill:
    return Fill(std=1.0, taps=1)  # queries begin as they are without the convolution


def _memory_query(config: Architecture) -> Fill:
    memory = config.memory
    if memory.qk_norm == "none" and memory.init != "pkm":  # takes over the query norm's scale
        return Fill(std=query_gain(memory) / math.sqrt(config.model.hidden_size))
    return _matrix(config)


def _memory_query_norm(config: Architecture) -> Fill:
    return Fill(mean=query_gain(config.memory))


def _memory_keys(config: Architecture) -> Fill:
    return Fill(std=1 / math.sqrt(config.memory.kdim))


def _memory_keys_norm(config: Architecture) -> Fill:
    return Fill(mean=1 / math.sqrt(config.memory.kdim))


def _memory_core(config: Architecture) -> Fill:
    return core_fill(config.memory)


def _memory_value_proj(config: Architecture) -> Fill:
    memory = config.memory
    if memory.init == "pkm":
        return _residual(config)
    return Fill(std=1 / math.sqrt(memory.expansion * memory.value_dim))


def _table(config: Architecture) -> Fill:
    memory = config.memory
    if memory.init == "pkm":
        return Fill(std=1 / math.sqrt(memory.value_dim))
    selected = 2 * memory.top_m * memory.num_heads * config.model.num_layers
    std = math.sqrt(memory.expansion / selected)
    if memory.init == "corrected":
        std /= math.sqrt(score_moments(memory).core_square)
    return Fill(std=std)


INITIALISERS: dict[str, Callable[[Architecture], Fill]] = {
    # name               pkm                paper              corrected
    "embedding": _embedding,  # embedding_std
    "matrix": _matrix,  # init_std
    "residual": _residual,  # init_std / sqrt(2 L)
    "norm": _ones,  # 1
    "memory_conv": _memory_conv,  # the identity; more taps by memory.query_tokens
    "memory_query": _memory_query,  # init_std; without norms query_gain / sqrt(D) but for pkm
    "memory_query_norm": _memory_query_norm,  # pkm 1, paper 1 / sqrt(E[Y]), corrected: measured Y
    "memory_keys": _memory_keys,  # 1 / sqrt(d)
    "memory_keys_norm": _memory_keys_norm,  # 1 / sqrt(d)
    "memory_core": _memory_core,  # 1 / (r sqrt(h)); corrected: shifted to a sum of norm 1
    "memory_value_proj": _memory_value_proj,  # pkm init_std / sqrt(2 L), else 1 / sqrt(E V)
    "table": _table,  # pkm 1 / sqrt(V), paper sqrt(E / (2 m H L)), corrected: / rms core score
}


def core_fill(memory: MemoryConfig) -> Fill:
    """Entries of one core, such that the summed core has expected squared norm 1."""
    std = 1 / (memory.tucker_rank * math.sqrt(memory.num_cores))
    return Fill(std=std, unit_norm=memory.init == "corrected")


@functools.lru_cache
def gaussian_top_mean(num_candidates: int, top_m: int) -> float:
    """E[Y] of Appendix A: mean of the top-m of N standard Gaussians, by sampling.

    The top-m of N uniforms are drawn through their exponential spacings, so that N = 10^8 costs
    no more than m.

    Args:
        num_candidates: N.
        top_m: m.

    Returns:
        The mean over 1024 draws (about 0.1% accurate).
    """
    generator = torch.Generator().manual_seed(0)
    spacings = torch.empty(_SAMPLES, top_m, dtype=torch.float64, device="cpu")
    tails = spacings.exponential_(generator=generator).cumsum(1)
    # The other N + 1 - m spacings enter by their mean: m << N (Appendix A).
    tails = tails / (tails[:, -1:] + num_candidates + 1 - top_m)
    return float(-torch.special.ndtri(tails).mean())


@dataclass(frozen=True)
class ScoreMoments:
    """What retrieval really selects when all row and column scores are N(0, 1)."""

    top_mean: float  # E[Y]: mean total score of the selected slots
    core_square: float  # mean square of one core's score once the scores are scaled to mean 1


@functools.lru_cache
def score_moments(memory: MemoryConfig) -> ScoreMoments:
    """Sample the two-stage search itself, cores included.

    Args:
        memory: The layer; recipe and retrieval settings matter.

    Returns:
        Its moments, from 8 tokens of 128 heads (about 2% accurate).
    """
    generator = torch.Generator().manual_seed(0)
    tokens, heads, rank = 8, 128, memory.tucker_rank
    cores = []
    for _ in range(heads):  # head by head: n is thousands
        shape = (2, tokens, 1, memory.num_keys, rank)
        scores_2THnr = torch.randn(shape, generator=generator)
        form = _random_form(memory, generator)
        ranked_2THn = (scores_2THnr * form.directions_2Hr[:, None, :, None, :]).sum(-1)
        candidates = top_candidates(ranked_2THn, memory.top_m, memory.candidates)
        picked = scores_2THnr.gather(-2, candidates[..., None].expand(*candidates.shape, rank))
        cores.append(best_pairs(form.core_hHrr, picked, memory.top_m)[1])
    scores = torch.stack(cores)
    top_mean = float(scores.sum(-1).mean())
    scaled = scores / top_mean
    if memory.softmax:
        scaled = scaled.softmax(dim=-2)
    return ScoreMoments(top_mean=top_mean, core_square=float(scaled.square().mean()))


def _random_form(memory: MemoryConfig, generator: torch.Generator) -> ScoreForm:
    """The score form of one freshly initialised head."""
    if memory.retrieval == "product-key":
        return ScoreForm(None, torch.ones(2, 1, 1))
    core = torch.empty(memory.num_cores, 1, memory.tucker_rank, memory.tucker_rank)
    _draw(core, core_fill(memory), generator)
    total = core.sum(0)
    directions = leading_singular_vectors(total, torch.zeros(2, 1, memory.tucker_rank))
    return ScoreForm(core, directions)


def query_gain(memory: MemoryConfig) -> float:
    """Scale of the normalised queries: makes the mean selected score 1 (Appendix A).

    ``paper`` takes the candidate scores for N(0, 1) over all E*N slots; ``corrected`` samples the
    real search. A Tucker score is quadratic in the scale, a product-key score linear.
    """
    if memory.init == "pkm":
        return 1.0
    if memory.init == "paper":
        return 1 / math.sqrt(gaussian_top_mean(memory.num_slots, memory.top_m))
    power = 0.5 if memory.retrieval == "tdqkr" else 1.0
    return score_moments(memory).top_mean ** -power


def _seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _draw(out: Tensor, fill: Fill, generator: torch.Generator) -> None:
    """Fill in place; drawn in fp32 on the CPU, so equal on every device."""
    draw = torch.empty(out.shape, dtype=torch.float32)
    if fill.std:
        draw.normal_(fill.mean, fill.std, generator=generator)
    else:
        draw.fill_(fill.mean)
    if fill.unit_norm:  # shift every core alike: rescaling would blow up cores that cancel
        total = draw.sum(0)
        draw += (total / total.norm(dim=(-2, -1), keepdim=True) - total) / len(draw)
    if fill.taps:
        draw = torch.where(draw < 0, -1.0, 1.0)
        draw[-1] = 1
        draw[: -fill.taps] = 0
    with torch.no_grad():
        out.copy_(draw)


def init_parameter(name: str, param: nn.Parameter, config: Architecture, seed: int) -> None:
    """Fill one parameter in place.

    Args:
        name: Its qualified name in the model; seeds its numbers (tables: their index does).
        param: Tagged by ``model.roles.tag``; whole, not partitioned.
        config: The model's configuration.
        seed: ``train.seed``.

    Raises:
        ValueError: The parameter carries no known ``init`` or ``role`` tag.
    """
    line = getattr(param, "init", getattr(param, "role", None))
    if line not in INITIALISERS:
        raise ValueError(f"parameter {name} has no line in INITIALISERS (its tag: {line!r})")
    if line == "table":
        fill_rows(param, config, seed, param.table_index, 0)  # type: ignore[attr-defined]
        return
    fill = INITIALISERS[line](config)
    if line == "memory_conv":  # with signs: a query of (a, b) is not that of (b, a)
        fill = replace(fill, taps=param.query_tokens)  # type: ignore[attr-defined]
    _draw(param, fill, torch.Generator().manual_seed(_seed(seed, name)))


def init_module(module: nn.Module, config: Architecture, seed: int) -> None:
    """Fill every parameter of a module that lies whole on this process."""
    for name, param in module.named_parameters():
        init_parameter(name, param, config, seed)


def fill_rows(
    out_RV: Tensor, config: Architecture, seed: int, table_index: int, first_row: int
) -> None:
    """Fill rows ``first_row ...`` of a value table in place, the same for any split into shards.

    Blocks of ``TABLE_BLOCK_ROWS`` rows have a generator each; at most one block is held at a time.

    Args:
        out_RV: A run of whole rows, any dtype and device.
        config: The model's configuration.
        seed: ``train.seed``.
        table_index: 0-based memory layer.
        first_row: Global index of ``out_RV[0]``.
    """
    fill = INITIALISERS["table"](config)
    end_row = first_row + out_RV.shape[0]
    block = torch.empty(TABLE_BLOCK_ROWS, out_RV.shape[1])
    for number in range(first_row // TABLE_BLOCK_ROWS, -(-end_row // TABLE_BLOCK_ROWS)):
        begin = number * TABLE_BLOCK_ROWS
        _draw(block, fill, torch.Generator().manual_seed(_seed(seed, "table", table_index, number)))
        low, high = max(begin, first_row), min(begin + TABLE_BLOCK_ROWS, end_row)
        with torch.no_grad():
            out_RV[low - first_row : high - first_row].copy_(block[low - begin : high - begin])


def fill_block(
    out_RC: Tensor,
    config: Architecture,
    seed: int,
    table_index: int,
    first_row: int,
    first_column: int,
) -> None:
    """Fill a block of rows and columns of a value table, equal to the same cut of the whole table.

    Rows past the table's end are padding and get numbers too; nothing looks them up.

    Args:
        out_RC: R rows of C columns, any dtype and device.
        config: The model's configuration.
        seed: ``train.seed``.
        table_index: 0-based memory layer.
        first_row: Global row of ``out_RC[0]``.
        first_column: Column of the table at ``out_RC[:, 0]``.
    """
    num_rows, num_columns = out_RC.shape
    if num_columns == config.memory.value_dim:
        fill_rows(out_RC, config, seed, table_index, first_row)
        return
    rows_BV = torch.empty(TABLE_BLOCK_ROWS, config.memory.value_dim)
    end_column = first_column + num_columns
    for begin in range(0, num_rows, TABLE_BLOCK_ROWS):
        part_BC = out_RC[begin : begin + TABLE_BLOCK_ROWS]
        fill_rows(rows_BV[: len(part_BC)], config, seed, table_index, first_row + begin)
        with torch.no_grad():
            part_BC.copy_(rows_BV[: len(part_BC), first_column:end_column])
