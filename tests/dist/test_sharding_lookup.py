"""Sharded lookups on real ranks against a loop over the whole table in fp64.

One spawn per world size runs every case; the failing case is in the message.
"""

import functools
import itertools

import pytest
import torch

from ultramem_ds.config.schema import MemoryConfig
from ultramem_ds.sharding.groups import make_groups
from ultramem_ds.sharding.lookup import build_lookup
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.sharding.table_plan import TableSpec, shard_layout
from ultramem_ds.testing.distributed import run_ranks

pytestmark = pytest.mark.dist

# 37 rows do not divide; 24 columns in 3 cores are cut inside a core by 2 and by 4 ranks.
SPEC = TableSpec(num_rows=37, value_dim=24, num_projectors=4, num_cores=3)
TOKENS, ROWS_PER_TOKEN, STEPS = 6, 5, 2

CASES = ("uniform", "skewed", "one-row", "no-tokens-on-one-rank")
SCHEMES = ("number-wise", "owner-pooled", "dimension-wise")


def whole_table():
    return torch.randn(SPEC.num_rows, SPEC.value_dim, generator=torch.Generator().manual_seed(1))


def rank_inputs(case, rank, world_size, step):
    """Rows, projectors, scores and output gradient of one rank, equal wherever computed."""
    gen = torch.Generator().manual_seed(100 * rank + step)
    num_tokens = TOKENS + rank
    if case == "no-tokens-on-one-rank" and rank == world_size - 1:
        num_tokens = 0
    shape = (num_tokens, ROWS_PER_TOKEN)
    rows = torch.randint(0, SPEC.num_rows, shape, generator=gen)
    if case == "skewed":
        rows = torch.randint(0, 3, shape, generator=gen)  # rank 0's first rows, many duplicates
    if case == "one-row":
        rows = torch.full(shape, SPEC.num_rows - 1)  # nobody wants the other ranks' rows
    projectors = torch.randint(0, SPEC.num_projectors, shape, generator=gen)
    scores = torch.randn(*shape, SPEC.num_cores, generator=gen)
    grad = torch.randn(num_tokens, SPEC.num_projectors, SPEC.value_dim, generator=gen)
    return rows, projectors, scores, grad


def slow_lookup(values, rows, projectors, scores):
    """The definition, entry by entry."""
    zero = values.new_zeros(SPEC.value_dim)
    out = [[zero] * SPEC.num_projectors for _ in range(len(rows))]
    for t, k in itertools.product(range(rows.shape[0]), range(rows.shape[1])):
        weights = scores[t, k].repeat_interleave(SPEC.value_dim // SPEC.num_cores)
        out[t][projectors[t, k]] = out[t][projectors[t, k]] + values[rows[t, k]] * weights
    flat = [vector for token in out for vector in token]
    shape = (len(rows), SPEC.num_projectors, SPEC.value_dim)
    return torch.stack(flat).view(shape) if flat else values.new_zeros(shape)


@functools.cache
def expected(case, world_size):
    """Of each (step, rank): pooled and scores' gradient; the table's gradient over all of them."""
    values = whole_table().double().requires_grad_()
    total, results = values.sum() * 0, {}
    for step, rank in itertools.product(range(STEPS), range(world_size)):
        rows, projectors, scores, grad = rank_inputs(case, rank, world_size, step)
        scores = scores.double().requires_grad_()
        pooled = slow_lookup(values, rows, projectors, scores)
        total = total + (pooled * grad.double()).sum() + scores.sum() * 0
        results[step, rank] = (pooled.detach(), scores)
    total.backward()
    return {key: (pooled, s.grad) for key, (pooled, s) in results.items()}, values.grad


def make_shard(groups, scheme, dtype=torch.float32):
    layout = shard_layout(SPEC, scheme, groups.shard.world_size, groups.shard.rank)
    stored = block_of(whole_table(), layout).to(dtype).view(-1)
    return TableShard(SPEC, layout, lambda: stored, groups.replicas)


def block_of(table, layout):
    """A shard cut out of a whole table, which is padded with zero rows."""
    rows, columns = layout.num_rows, layout.num_columns
    padded = table.new_zeros(max(SPEC.num_rows, layout.first_row + rows), SPEC.value_dim)
    padded[: SPEC.num_rows] = table
    return padded[layout.first_row :, layout.first_column :][:rows, :columns].contiguous()


def run_case(groups, case, scheme, memory, rank, world_size, dtype=torch.float32):
    """Pooled and scores' gradient of each step, and the shard's reduced gradient."""
    shard = make_shard(groups, scheme, dtype)
    lookup = build_lookup(shard, scheme, groups, memory)
    results = []
    for step in range(STEPS):
        rows, projectors, scores, grad = rank_inputs(case, rank, world_size, step)
        scores.requires_grad_()
        pooled = lookup.start(rows, projectors, scores).wait()
        pooled.backward(grad.to(pooled.dtype))
        results += [pooled.detach(), scores.grad]
    return [*results, shard.reduced_gradient()], shard.layout


def check_case(found, layout, case, rank, world_size, rtol, atol):
    results, grad_values = expected(case, world_size)
    want = [x for step in range(STEPS) for x in results[step, rank]]
    want.append(block_of(grad_values, layout))
    for name, x, y in zip(("pooled 0", "scores 0", "pooled 1", "scores 1", "table"), found, want):
        assert x.shape == y.shape, name
        scale = max(1.0, y.abs().max().item() if y.numel() else 1.0)
        torch.testing.assert_close(
            x.double(), y, rtol=rtol, atol=atol * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def parity_body(rank, world_size):
    sizes = [size for size in (1, 2, 4) if world_size % size == 0]
    for size in sizes:
        sync = make_groups(size)
        worker = make_groups(size, asynchronous=True)
        for case, scheme, dedup in itertools.product(CASES, SCHEMES, (False, True)):
            if dedup and scheme != "number-wise":
                continue
            memory = MemoryConfig(value_dim=24, num_cores=3, dedup=dedup)
            where = f"case {case}, {scheme}, dedup={dedup}, {size} of {world_size} ranks"
            try:
                found, layout = run_case(sync, case, scheme, memory, rank, world_size)
                # fp32 sums of up to 130 products in another order than the fp64 loop's: a few
                # hundred roundings of 6e-8 relative to the largest sum.
                check_case(found, layout, case, rank, world_size, rtol=1e-5, atol=1e-5)
                again, _ = run_case(worker, case, scheme, memory, rank, world_size)
                assert all(torch.equal(x, y) for x, y in zip(found, again)), "async differs"
            except Exception as error:
                raise AssertionError(where) from error
    return True


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_schemes_agree_with_the_whole_table(world_size):
    assert run_ranks(parity_body, world_size) == [True] * world_size


def half_body(rank, world_size):
    groups = make_groups()
    for scheme, dtype in itertools.product(SCHEMES, (torch.float32, torch.bfloat16)):
        memory = MemoryConfig(value_dim=24, num_cores=3, wire_dtype="bf16")
        found, layout = run_case(groups, "uniform", scheme, memory, rank, world_size, dtype)
        assert found[0].dtype == dtype and found[-1].dtype == torch.float32
        # Rows or sums, scores and their gradients are each rounded once or twice to 8 bits
        # (4e-3 relative), then summed in fp32.
        check_case(found, layout, "uniform", rank, world_size, rtol=0, atol=2e-2)
    return True


def test_half_precision_on_the_wire():
    assert run_ranks(half_body, 2) == [True, True]


def pipeline(groups, memory, rank, world_size, scheme):
    """Two tables in flight at once, work on the main thread between start and wait."""
    shards = [make_shard(groups, scheme) for _ in range(2)]
    lookups = [build_lookup(shard, scheme, groups, memory) for shard in shards]
    weight = torch.eye(SPEC.value_dim).mul_(0.5).requires_grad_()
    losses = []
    for step in range(3):
        rows, projectors, scores, grad = rank_inputs("uniform", rank, world_size, step)
        scores.requires_grad_()
        first = lookups[0].start(rows, projectors, scores)
        x = grad @ weight
        second = lookups[1].start(rows.flip(0), projectors, scores * 2)
        x = (x @ weight).relu() + first.wait()
        x = (x @ weight) * second.wait()
        x.square().sum().backward()
        losses += [x.detach(), scores.grad]
    with torch.no_grad():
        losses.append(lookups[0].start(rows, projectors, scores).wait())
    return [*losses, weight.grad, *(shard.reduced_gradient() for shard in shards)]


def pipeline_body(rank, world_size):
    for scheme in SCHEMES:
        memory = MemoryConfig(value_dim=24, num_cores=3)
        sync = pipeline(make_groups(), memory, rank, world_size, scheme)
        worker = pipeline(make_groups(asynchronous=True), memory, rank, world_size, scheme)
        assert all(torch.equal(x, y) for x, y in zip(sync, worker, strict=True)), scheme
    return True


def test_lookups_in_flight_together_give_the_same_bits():
    assert run_ranks(pipeline_body, 2) == [True, True]


def frozen_body(rank, world_size):
    """Scores without a gradient: the table's must gather all the same, on every rank."""
    groups = make_groups()
    for scheme in SCHEMES:
        shards = [make_shard(groups, scheme) for _ in range(2)]
        for shard, trained in zip(shards, (True, False)):
            lookup = build_lookup(shard, scheme, groups, MemoryConfig(value_dim=24, num_cores=3))
            rows, projectors, scores, grad = rank_inputs("uniform", rank, world_size, 0)
            pooled = lookup.start(rows, projectors, scores.requires_grad_(trained)).wait()
            pooled.backward(grad)
        assert shards[0].grad_RV.any() and torch.equal(shards[0].grad_RV, shards[1].grad_RV)
        shards[0].zero_gradient()
        assert not shards[0].grad_RV.any()
    return True


def test_tables_learn_although_scores_are_frozen():
    assert run_ranks(frozen_body, 2) == [True, True]


def bad_rows_body(rank, world_size):
    messages = []
    for asynchronous, scheme in itertools.product((False, True), SCHEMES):
        groups = make_groups(asynchronous=asynchronous)
        lookup = build_lookup(make_shard(groups, scheme), scheme, groups, MemoryConfig())
        rows = torch.full((2, 3), SPEC.num_rows if rank == 1 else 0)
        try:
            lookup.start(rows, torch.zeros_like(rows), torch.ones(2, 3, 3)).wait()
        except RuntimeError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("world_size", [2])
def test_rows_outside_the_table_stop_every_rank(world_size):
    message = "value table: row ids outside 0..36 were looked up (rank 1: 6 ids)"
    assert run_ranks(bad_rows_body, world_size) == [[message] * 6] * world_size


def bad_size_body(rank, world_size):
    with pytest.raises(ValueError, match=r"memory\.shard_group_size=2 must divide the 3"):
        make_groups(2)


def test_sub_groups_must_divide_the_ranks():
    run_ranks(bad_size_body, 3)
