"""Cost formulas against the figures worked out by hand for the 1.6B layer (DESIGN, App. D)."""

import math

import pytest

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.planning.costs import distinct_rows, lookup_cost, stock_zero3_bytes

LAYER_1_6B = MemoryConfig(
    knum=1792, kdim=448, value_dim=1024, top_m=42, num_heads=2, wire_dtype="bf16"
)


@pytest.mark.parametrize(
    ("scheme", "megabytes"),
    [
        # 2048 tokens per rank, K 84, V 1024, forward, MB per rank at P = 2, 8, 64.
        ("number-wise", (176, 309, 348)),
        ("dimension-wise", (9.8, 24, 103)),
        ("owner-pooled", (17, 110, 300)),
    ],
)
def test_forward_bytes_of_the_largest_layer(scheme, megabytes):
    for ranks, expected in zip((2, 8, 64), megabytes):
        cost = lookup_cost(LAYER_1_6B, scheme, tokens=2048, ranks=ranks, value_bytes=2)
        # The hand figures have two or three digits; owner-pooled's are "about".
        tolerance = 0.05 if scheme == "owner-pooled" else 0.02
        assert sum(cost.forward.values()) / 1e6 == pytest.approx(expected, rel=tolerance)


def test_stock_zero3_moves_17_gigabytes():
    assert stock_zero3_bytes(LAYER_1_6B, 8, 2) / 1e9 == pytest.approx(17.3, rel=0.01)


@pytest.mark.parametrize(
    ("knum", "top_m", "value_dim", "kdim", "crossing"),
    [(1100, 16, 512, 256, 112), (1632, 35, 768, 384, 182), (1792, 42, 1024, 448, 244)],
)
def test_dimension_wise_has_fewer_bytes_than_row_shipping_up_to(
    knum, top_m, value_dim, kdim, crossing
):
    layer = MemoryConfig(knum=knum, top_m=top_m, value_dim=value_dim, wire_dtype="bf16")

    def difference(ranks):
        rows, columns = (
            sum(lookup_cost(layer, s, tokens=2048, ranks=ranks, value_bytes=2).forward.values())
            for s in ("number-wise", "dimension-wise")
        )
        return columns - rows

    # "About": the crossing lies within two ranks of the figure.
    assert difference(crossing - 2) < 0 < difference(crossing + 2)


def test_short_fragments_cost_a_cache_line():
    layer = MemoryConfig(value_dim=64)
    touched = [
        lookup_cost(layer, "dimension-wise", tokens=10, ranks=ranks, value_bytes=4).touched_bytes
        for ranks in (1, 4, 16)
    ]
    entries = 10 * layer.rows_per_token
    assert touched == [entries * 256, entries * 256, 16 * entries * 64]


def test_distinct_rows_of_uniform_draws():
    assert distinct_rows(1, 10) == pytest.approx(1)
    assert distinct_rows(2, 10) == pytest.approx(1.9)
    assert distinct_rows(10**6, 10) == pytest.approx(10)
    assert math.isclose(distinct_rows(65536, 1_210_000), 63_793, rel_tol=1e-4)


def test_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="rows-first"):
        lookup_cost(LAYER_1_6B, "rows-first", tokens=1, ranks=2, value_bytes=2)
