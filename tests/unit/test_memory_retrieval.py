"""Retrieval against an exhaustive oracle that scores all n*n slots from the raw parameters."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.unit.memory_helpers import MODEL, inputs, make_layer
from ultramem_ds.kernels import resolve
from ultramem_ds.kernels.pairs import top_candidates

# The query of (side, head, rank) as a slice of the projection's output, by layout.
LAYOUTS = ["shared", "per-head", "per-head-shared-sides"]
PKM = dict(retrieval="product-key", tucker_rank=1, num_cores=1)


def oracle_scores(retrieval, x_BSD, layout):
    """Scores of all slots per core, (T, H, h, n, n), by loops over heads and ranks."""
    keys = retrieval.keys.weight.detach()
    _, heads, n, rank, d = keys.shape

    def normalise(vectors, norm):
        if isinstance(norm, torch.nn.LayerNorm):
            return F.layer_norm(vectors, (d,), norm.weight.detach(), eps=norm.eps)
        if isinstance(norm, torch.nn.RMSNorm):
            mean_square = vectors.square().mean(-1, keepdim=True)
            return vectors / (mean_square + norm.eps).sqrt() * norm.weight.detach()
        return vectors

    x = retrieval.query.conv(x_BSD, None, None)[0].flatten(0, 1)
    flat = (x @ retrieval.query.proj.weight.T).detach()

    def query(side, head, r):
        index = {
            "shared": side,
            "per-head": head * 2 + side,
            "per-head-shared-sides": head * rank + r,
        }[layout]
        return normalise(flat[:, index * d : (index + 1) * d], retrieval.query.norm)

    sides = torch.zeros(2, flat.shape[0], heads, n, rank, dtype=flat.dtype)
    for side, head, r in itertools.product(range(2), range(heads), range(rank)):
        key = normalise(keys[side, head, :, r], retrieval.keys.norm)
        sides[side, :, head, :, r] = query(side, head, r) @ key.T
    row, col = sides
    if not hasattr(retrieval.form, "core"):
        return (row + col.transpose(-1, -2)).unsqueeze(2)
    core = retrieval.form.core.detach()
    return torch.einsum("thia,chab,thjb->thcij", row, core, col)


def check_selected_scores(retrieval, x, layout):
    """The selection's scores are the oracle's at the selected slots, in descending total."""
    selection = retrieval(x)
    exact = oracle_scores(retrieval, x, layout).flatten(-2)  # T H h n*n
    tokens, heads, cores, _ = exact.shape
    slots = selection.slots_TK.view(tokens, heads, 1, -1).expand(-1, -1, cores, -1)
    scores = selection.scores_TKh.detach().view(tokens, heads, -1, cores)
    expected = exact.gather(-1, slots).transpose(-1, -2)
    # Two orders of summing about a hundred float64 products.
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-12)
    totals = scores.sum(-1)
    assert (totals.diff(dim=-1) <= 1e-12).all()
    distinct = selection.slots_TK.view(tokens, heads, -1).sort(-1).values.diff(dim=-1) > 0
    assert distinct.all()
    return totals, exact.sum(2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("qk_norm", ["none", "layernorm", "rmsnorm"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(num_heads=1, tucker_rank=1, num_cores=1, expansion=1, value_dim=12),
        dict(num_heads=2, tucker_rank=2, num_cores=2, expansion=4),
        dict(num_heads=3, tucker_rank=3, num_cores=4, expansion=9),
        dict(num_heads=2, tucker_rank=4, num_cores=6, expansion=16, query_conv=0),
    ],
)
def test_scores_of_the_selection(layout, qk_norm, shape):
    layer = make_layer(query=layout, qk_norm=qk_norm, **shape)
    check_selected_scores(layer.retrieval, inputs(), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top_m", [1, 4, 12])
def test_product_keys_are_exact(layout, top_m):
    """The two-stage search finds the exhaustive top-m; top_m = 12 is m = n."""
    for seed in range(5):
        layer = make_layer(seed, query=layout, top_m=top_m, **PKM)
        totals, exact = check_selected_scores(layer.retrieval, inputs(seed=seed), layout)
        best = exact.flatten(2).topk(top_m).values
        torch.testing.assert_close(totals, best, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("top_m", [3, 12])
def test_product_keys_with_ties(top_m):
    """Small integers: exact arithmetic, many equal scores."""
    layer = make_layer(qk_norm="none", query_conv=0, top_m=top_m, **PKM)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in layer.retrieval.parameters():
            param.copy_(torch.randint(-1, 2, param.shape, generator=generator))
    x = torch.randint(-1, 2, (2, 6, MODEL.hidden_size), generator=generator).double()
    totals, exact = check_selected_scores(layer.retrieval, x, "shared")
    torch.testing.assert_close(totals, exact.flatten(2).topk(top_m).values, rtol=0, atol=0)
    slots = layer.retrieval(x).slots_TK
    assert torch.equal(slots, layer.retrieval(x).slots_TK)
    # The same tie is broken the same way whatever else is in the batch.
    alone = torch.cat([layer.retrieval(x[:, i : i + 1]).slots_TK for i in range(6)])
    assert torch.equal(slots.view(2, 6, -1).transpose(0, 1).reshape(12, -1), alone)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tucker_is_exact_when_every_key_is_a_candidate(rank):
    layer = make_layer(tucker_rank=rank, top_m=12)
    totals, exact = check_selected_scores(layer.retrieval, inputs(), "shared")
    torch.testing.assert_close(totals, exact.flatten(2).topk(12).values, rtol=1e-10, atol=1e-12)


def test_rank_one_needs_both_ends():
    """With r = 1 a pair of very negative factors scores high: full two-sided search finds all of
    them, one-sided search misses some."""
    settings = dict(tucker_rank=1, num_cores=1, knum=16)
    x = inputs(4, 8)
    full = make_layer(candidates="two-sided-full", **settings).retrieval
    totals, exact = check_selected_scores(full, x, "shared")
    best = exact.flatten(2).topk(4).values
    torch.testing.assert_close(totals, best, rtol=1e-10, atol=1e-12)
    one = make_layer(candidates="one-sided", **settings).retrieval
    totals, exact = check_selected_scores(one, x, "shared")
    assert (totals < exact.flatten(2).topk(4).values - 1e-6).any()


def test_candidate_modes():
    scores = torch.tensor([[5.0, -7.0, 1.0, 3.0, -2.0, 0.0]])
    assert top_candidates(scores, 2, "one-sided").tolist() == [[0, 3]]
    assert top_candidates(scores, 2, "two-sided").tolist() == [[0, 1]]
    assert top_candidates(scores, 2, "two-sided-full").tolist() == [[0, 3, 1, 4]]
    # m from each end would overlap: every key once.
    assert sorted(top_candidates(scores, 4, "two-sided-full")[0].tolist()) == list(range(6))


@pytest.mark.parametrize("candidates", ["one-sided", "two-sided", "two-sided-full"])
def test_recall_is_the_share_of_the_exhaustive_top(candidates):
    layer = make_layer(candidates=candidates, knum=10, tucker_rank=3)
    x = inputs(2, 6)
    selection = layer.retrieval(x, recall_tokens=12)
    exact = oracle_scores(layer.retrieval, x, "shared").sum(2).flatten(2)  # T H n*n
    best = exact.topk(4).indices
    slots = selection.slots_TK.view(best.shape)
    found = torch.stack(
        [torch.isin(a, b).double().mean() for a, b in zip(best.flatten(0, 1), slots.flatten(0, 1))]
    )
    torch.testing.assert_close(selection.diagnosis.recall.double(), found.mean(), rtol=1e-6, atol=0)
    core = layer.retrieval.form.core.detach().sum(0)
    expected = torch.linalg.svdvals(core).mean(0)
    torch.testing.assert_close(selection.diagnosis.singular_values_r, expected)


def test_two_sided_candidates_find_more():
    """At random initialisation about one half of the true top-m is seen from one side."""
    x = inputs(1, 64, dtype=torch.float32)
    recall = {}
    for candidates in ("one-sided", "two-sided", "two-sided-full"):
        layer = make_layer(
            dtype=torch.float32, candidates=candidates, knum=100, kdim=32, top_m=16, num_heads=8
        )
        recall[candidates] = float(layer.retrieval(x, recall_tokens=64).diagnosis.recall)
    assert 0.3 < recall["one-sided"] < 0.7
    assert recall["two-sided"] > 0.8
    assert recall["two-sided-full"] > 0.95


def test_softmax_normalises_each_head():
    plain, soft = (make_layer(softmax=flag, **PKM).retrieval(inputs()) for flag in (False, True))
    assert torch.equal(plain.slots_TK, soft.slots_TK)
    expected = plain.scores_TKh.view(10, 2, 4).softmax(-1).flatten(1)[..., None]
    torch.testing.assert_close(soft.scores_TKh, expected)


def test_bf16_selects_in_fp32():
    selection = make_layer(dtype=torch.bfloat16).retrieval(inputs(dtype=torch.bfloat16))
    assert selection.scores_TKh.dtype == torch.float32
    assert selection.aux_loss.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(
    resolve("auto", torch.device("cpu")).name != "cpu", reason="inductor needs a compiler"
)
@pytest.mark.parametrize("form", [dict(num_heads=2, tucker_rank=2, num_cores=2), PKM])
def test_compiled_pair_scoring_is_the_same(form):
    """Slots to the bit, scores and gradients to rounding; in float64 nothing is native."""
    eager = make_layer(knum=20, top_m=5, **form).retrieval
    compiled = make_layer(knum=20, top_m=5, compile=True, **form).retrieval
    compiled.load_state_dict(eager.state_dict())
    x = inputs(2, 30)
    weight = torch.randn(eager(x).scores_TKh.shape, dtype=x.dtype)
    found = []
    torch._dynamo.utils.counters.clear()
    for retrieval in (eager, compiled):
        selection = retrieval(x)
        (selection.scores_TKh * weight).sum().backward()
        grads = {name: param.grad for name, param in retrieval.named_parameters()}
        found.append((selection.slots_TK, selection.scores_TKh, grads))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1:], found[0][1:], rtol=1e-10, atol=1e-12)
