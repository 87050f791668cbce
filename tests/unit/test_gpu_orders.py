"""What a GPU could add in any order, or wait for, and does not: as far as a CPU can tell."""

import itertools

import pytest
import torch

from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.kernels.pairs import best_pairs, pick_in_order
from ultramem_ds.model.moe import sum_choices
from ultramem_ds.sharding.row_sum import RowSum


def test_picks_in_order_are_those_of_gather():
    # A candidate in several pairs: its gradients add up (small integers: exact in any order).
    scores = torch.randn(2, 3, 2, 5, 4, dtype=torch.float64)
    picks = torch.randint(0, 5, (2, 3, 2, 7))
    grad = torch.randint(-9, 9, (2, 3, 2, 7, 4)).double()
    found = []
    for pick in (
        pick_in_order,
        lambda s, p: s.gather(-2, p[..., None].expand(*p.shape, s.shape[-1])),
    ):
        leaf = scores.clone().requires_grad_()
        picked = pick(leaf, picks)
        picked.backward(grad)
        found.append((picked.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_pairs_that_need_gradients_are_picked_in_order_off_the_cpu():
    core = torch.empty(2, 2, 3, 3, device="meta")
    for training in (True, False):
        scores = torch.empty(2, 4, 2, 6, 3, device="meta", requires_grad=training)
        picks, pair_scores = best_pairs(core, scores, 5)
        assert picks.shape == (2, 4, 2, 5) and pair_scores.shape == (4, 2, 5, 2)
        names = set()
        nodes = [pair_scores.grad_fn] if training else []
        while nodes:
            node = nodes.pop()
            names.add(type(node).__name__)
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        assert "GatherBackward0" not in names
        assert ("IndexBackward0" in names) == training


def test_choices_are_summed_in_one_order_whatever_order_they_come_in():
    # Three addends of unlike size: another order is another last digit.
    answers = torch.randn(4 * 3, 8) * 10.0 ** torch.arange(12)[:, None].remainder(3)
    sums = []
    for seed in range(4):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        sums.append(sum_choices(answers[order], order, 3))
    assert all(torch.equal(sums[0], other) for other in sums[1:])
    torch.testing.assert_close(sums[0], answers.view(4, 3, 8).sum(1))
    assert sum_choices(answers[:0], torch.arange(0), 3).shape == (0, 8)


def test_a_micro_batch_goes_to_a_gpu_through_pinned_memory(monkeypatch):
    calls = []

    def pin(self):
        calls.append("pin")
        return self

    def move(self, device, non_blocking=False):
        calls.append((torch.device(device).type, non_blocking))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", move)
    batch = MicroBatch(torch.zeros(2, 5, dtype=torch.int64), (0, 1), torch.zeros(2, 4))
    batch.to("cuda:0")
    assert calls == ["pin", ("cuda", True)] * 2
    calls.clear()
    batch.to("cpu")
    assert "pin" not in calls


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_row_sum_names_a_slot_once_per_addition(order, monkeypatch):
    """So that ``index_add_``, which a GPU does in any order, has one order here."""
    additions = []
    index_add_ = torch.Tensor.index_add_

    def watched(self, dim, index, source):
        additions.append(index)
        return index_add_(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_add_", watched)
    sums = RowSum(20, 4, torch.device("cpu"))
    parts = [torch.tensor([0, 3, 7]), torch.tensor([3, 4]), torch.tensor([0, 4, 19])]
    for index in order:
        sums.add(parts[index], torch.ones(len(parts[index]), 4))
    rows, total = sums.take()
    assert rows.tolist() == [0, 3, 4, 7, 19] and total[:, 0].tolist() == [2, 2, 2, 1, 1]
    assert additions and all(len(index.unique()) == len(index) for index in additions)
