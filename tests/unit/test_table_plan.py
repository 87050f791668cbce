"""Rank arithmetic of sharded tables against index lists written out by hand."""

import pytest
import torch

from ultramem_ds.sharding.table_plan import (
    TableSpec,
    bag_starts,
    column_pieces,
    id_dtype,
    mark_bag_starts,
    padded_rows,
    route_bags,
    route_distinct,
    route_entries,
    rows_per_rank,
    shard_layout,
)

ROWS_TK = torch.tensor([[5, 1], [1, 6]])


def test_rows_are_padded_to_whole_blocks():
    assert [rows_per_rank(10, p) for p in (1, 2, 3, 4, 16)] == [10, 5, 4, 3, 1]
    assert [padded_rows(10, p) for p in (1, 2, 3, 4, 16)] == [10, 10, 12, 12, 16]


def test_row_layouts_cover_the_table_once():
    spec = TableSpec(num_rows=10, value_dim=6)
    for scheme in ("number-wise", "owner-pooled"):
        blocks = [shard_layout(spec, scheme, 4, rank) for rank in range(4)]
        assert [block.first_row for block in blocks] == [0, 3, 6, 9]
        assert {block.shape for block in blocks} == {(3, 6)}


def test_column_layouts_cover_the_table_once():
    spec = TableSpec(num_rows=10, value_dim=6)
    blocks = [shard_layout(spec, "dimension-wise", 3, rank) for rank in range(3)]
    assert [block.first_column for block in blocks] == [0, 2, 4]
    assert {block.shape for block in blocks} == {(10, 2)}


def test_bad_layouts_name_the_key():
    spec = TableSpec(num_rows=10, value_dim=6)
    with pytest.raises(ValueError, match=r"memory\.value_dim=6 divisible by the 4 ranks"):
        shard_layout(spec, "dimension-wise", 4, 0)
    with pytest.raises(ValueError, match=r"memory\.partition='rows' is none of"):
        shard_layout(spec, "rows", 4, 0)
    with pytest.raises(ValueError, match="num_cores=4"):
        TableSpec(num_rows=10, value_dim=6, num_cores=4)


def test_every_entry_travels():
    route = route_entries(ROWS_TK, 4, 2)
    assert route.send_M.tolist() == [1, 1, 1, 2]
    assert route.counts_P.tolist() == [2, 2]
    assert route.position_TK.tolist() == [[2, 0], [1, 3]]


def sent_of(route):
    """The part of ``send_M`` that is sent."""
    return route.send_M[: int(route.counts_P.sum())]


def test_distinct_rows_travel_once():
    route = route_distinct(ROWS_TK, 4, 2)
    assert sent_of(route).tolist() == [1, 1, 2]
    assert route.counts_P.tolist() == [1, 2]
    assert route.position_TK.tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize("route", [route_entries, route_distinct])
@pytest.mark.parametrize("world_size", [1, 3, 300])
def test_routes_lead_back_to_the_rows(route, world_size):
    rows_TK = torch.randint(0, 1000, (17, 5), generator=torch.Generator().manual_seed(0))
    block = rows_per_rank(1000, world_size)
    plan = route(rows_TK, block, world_size)
    first_row_M = torch.repeat_interleave(torch.arange(world_size) * block, plan.counts_P)
    assert torch.equal((sent_of(plan) + first_row_M)[plan.position_TK], rows_TK)
    assert sent_of(plan).min() >= 0 and sent_of(plan).max() < block


@pytest.mark.parametrize("route", [route_entries, route_distinct])
def test_routes_without_tokens_and_with_skew(route):
    empty = route(torch.zeros(0, 5, dtype=torch.long), 4, 3)
    assert empty.counts_P.tolist() == [0, 0, 0] and empty.position_TK.shape == (0, 5)
    skewed = route(torch.full((2, 2), 9), 4, 3)
    sent = 4 if route is route_entries else 1
    assert skewed.counts_P.tolist() == [0, 0, sent] and sent_of(skewed).tolist() == [1] * sent


@pytest.mark.parametrize("route", [route_entries, route_distinct])
def test_rows_outside_the_table_do_not_break_the_plan(route):
    assert route(torch.tensor([[-7, 99, 5]]), 4, 2).counts_P.sum() == 3


@pytest.mark.parametrize(
    ("value_dim", "num_cores", "world_size", "expected"),
    [
        (12, 3, 2, [[0, 0, 1], [1, 2, 2]]),  # a boundary cuts a rank's columns
        (8, 1, 4, [[0], [0], [0], [0]]),  # one core over all ranks
        (8, 4, 2, [[0, 1], [2, 3]]),  # whole cores on each rank
        (8, 2, 4, [[0], [0], [1], [1]]),  # a core over several ranks
    ],
)
def test_column_pieces_have_one_core_each(value_dim, num_cores, world_size, expected):
    spec = TableSpec(num_rows=4, value_dim=value_dim, num_cores=num_cores)
    layouts = [shard_layout(spec, "dimension-wise", world_size, p) for p in range(world_size)]
    assert [column_pieces(spec, layout) for layout in layouts] == expected


def test_ids_are_as_narrow_as_the_table_allows():
    assert id_dtype(2**31) is torch.int32
    assert id_dtype(2**31 + 1) is torch.int64


def test_entries_are_sorted_into_bags():
    rows_TK = torch.tensor([[5, 1, 7], [1, 6, 2]])
    projectors_TK = torch.tensor([[0, 0, 0], [1, 0, 1]])
    route = route_bags(rows_TK, projectors_TK, 2, 4, 2)
    assert route.order_M.tolist() == [1, 3, 5, 0, 2, 4]
    assert route.send_M.tolist() == [1, 1, 2, 1, 3, 2]
    assert route.slot_M.tolist() == [0, 3, 3, 0, 0, 2]
    assert route.starts_M.tolist() == [True, True, False, True, False, True]
    assert route.counts_P.tolist() == [3, 3]
    assert route.bag_counts_P.tolist() == [2, 2]


def test_bags_without_tokens():
    empty = torch.zeros(0, 3, dtype=torch.long)
    route = route_bags(empty, empty, 2, 4, 2)
    assert route.counts_P.tolist() == route.bag_counts_P.tolist() == [0, 0]
    rows_M, offsets_B1 = bag_starts(mark_bag_starts(route.send_M, route.starts_M), 0)
    assert rows_M.tolist() == [] and offsets_B1.tolist() == [0]


def test_bag_marks_cost_nothing_and_come_back():
    rows_M = torch.tensor([0, 3, 3, 2**31 - 1])
    starts_M = torch.tensor([True, False, True, True])
    wire_M = mark_bag_starts(rows_M, starts_M).to(torch.int32)
    assert wire_M.tolist() == [-1, 3, -4, -(2**31)]
    found_M, offsets_B1 = bag_starts(wire_M, 3)
    assert torch.equal(found_M, rows_M)
    assert offsets_B1.tolist() == [0, 2, 3, 4]
