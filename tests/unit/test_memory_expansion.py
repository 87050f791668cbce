"""Shuffles are permutations, and slots split into rows and projectors."""

import pytest
import torch

from tests.unit.memory_helpers import MEMORY, inputs, make_layer, run
from ultramem_ds.kernels import resolve
from ultramem_ds.model.memory.expansion import BijectionShuffle, build_shuffle

SPLIT = resolve("auto", torch.device("cpu")).split


@pytest.mark.parametrize("num_keys", [1, 2, 3, 24, 101])
def test_bijection_is_a_permutation(num_keys):
    num_slots = num_keys * num_keys
    permuted = BijectionShuffle(num_keys, seed=7)(torch.arange(num_slots))
    assert torch.equal(permuted.sort().values, torch.arange(num_slots))


def test_bijection_beyond_32_bits():
    """n = 100,000: 10^10 slots. Distinct slots stay distinct and in range."""
    num_keys = 100_000
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(num_keys**2, (200_000,), generator=generator).unique()
    permuted = BijectionShuffle(num_keys, seed=7)(slots)
    assert permuted.min() >= 0 and permuted.max() < num_keys**2
    assert permuted.unique().numel() == slots.numel()


def test_bijection_breaks_up_rows_and_columns():
    """One row of the grid spreads evenly over physical rows and projectors."""
    num_keys, expansion = 400, 4
    num_rows = num_keys**2 // expansion
    shuffle = BijectionShuffle(num_keys, seed=3)
    for line in (torch.arange(num_keys), torch.arange(num_keys) * num_keys):
        rows, projectors = SPLIT(shuffle(line), num_rows)
        # Expected 100 per projector, standard deviation below 9.
        assert (projectors.bincount(minlength=4) - 100).abs().max() < 45
        assert (rows * 8 // num_rows).bincount(minlength=8).min() > 20
        assert rows.unique().numel() > 390


def test_shuffles_differ_by_table_only():
    slots = torch.arange(MEMORY.num_slots)
    for kind in ("bijection", "stored"):
        memory = make_layer(shuffle=kind).shuffle
        assert torch.equal(memory(slots), make_layer(seed=5, shuffle=kind).shuffle(slots))
        assert torch.equal(memory(slots).sort().values, slots)
    first, second = (build_shuffle(MEMORY, index)(slots) for index in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(make_layer(shuffle="none").shuffle(slots), slots)


def test_only_the_stored_shuffle_is_saved():
    assert "shuffle.index" in make_layer(shuffle="stored").state_dict()
    for kind in ("bijection", "none"):
        assert not [name for name in make_layer(shuffle=kind).state_dict() if "shuffle" in name]


@pytest.mark.parametrize("expansion", [1, 4, 9, 16])
def test_expansion_is_a_table_of_projected_rows(expansion):
    """The layer equals one lookup in the E*N x D table that eq. 13 describes."""
    layer, x = make_layer(expansion=expansion), inputs()
    memory_rows, width = layer.values.weight.shape
    projectors = layer.value_proj.weight.T.view(expansion, width, -1)
    pending = layer.start(x)
    scores = pending.selection.scores_TKh.repeat_interleave(width // 2, dim=-1)  # h = 2 chunks
    permuted = layer.shuffle(pending.selection.slots_TK)
    picked = layer.values.weight[permuted % memory_rows] * scores  # T K V
    expected = torch.einsum("tkv,tkvd->td", picked, projectors[permuted // memory_rows])
    # float64 sums of K * V = 96 products in another order.
    torch.testing.assert_close(run(layer, x).flatten(0, 1), expected, rtol=1e-10, atol=1e-12)
