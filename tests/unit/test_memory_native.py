"""The native calls of a memory layer against the torch operations they replace, in float64."""

import copy

import pytest
import torch

from tests.unit.memory_helpers import inputs, make_layer, run
from ultramem_ds.kernels import cpu_autograd, resolve
from ultramem_ds.model.memory.expansion import BijectionShuffle
from ultramem_ds.model.memory.query import CausalConv

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    resolve("auto", CPU).name != "cpu", reason="no compiler: all of it is torch's here"
)

TUCKER = dict(num_heads=2, tucker_rank=2, num_cores=2)
PKM = dict(retrieval="product-key", tucker_rank=1, num_cores=1, num_heads=3)


def selected(retrieval, x, weight):
    """Slots and scores, and gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    retrieval.zero_grad()
    selection = retrieval(x)
    (selection.scores_TKh * weight.to(x.dtype)).sum().backward()
    grads = {name: param.grad for name, param in retrieval.named_parameters()}
    return selection.slots_TK, selection.scores_TKh, {"x": x.grad} | grads


@pytest.mark.parametrize("layout", ["shared", "per-head", "per-head-shared-sides"])
@pytest.mark.parametrize("shape", [TUCKER, PKM, dict(TUCKER, tucker_rank=3, num_cores=3)])
@pytest.mark.parametrize("kdim", [7, 40])
def test_selection_and_its_gradients(layout, shape, kdim):
    """fp32 is native, float64 is torch: the same selection where no scores nearly tie."""
    wide = make_layer(query=layout, knum=40, kdim=kdim, top_m=5, **shape).retrieval
    narrow = copy.deepcopy(wide).float()
    x = inputs(3, 30)
    expected = wide(x)
    weight = torch.randn(expected.scores_TKh.shape, generator=torch.Generator().manual_seed(1))
    slots, scores, grads = selected(wide, x, weight)
    native_slots, native_scores, native_grads = selected(narrow, x.float(), weight)
    # A near-tie may fall either way in fp32: such tokens are left out, and must be few.
    same_T = (slots == native_slots).all(1)
    assert same_T.float().mean() > 0.9
    torch.testing.assert_close(native_scores[same_T].double(), scores[same_T], rtol=1e-4, atol=1e-4)
    assert narrow(x.float()).scores_TKh.dtype == torch.float32
    if not same_T.all():
        weight = weight * same_T[:, None, None]
        grads, native_grads = selected(wide, x, weight)[2], selected(narrow, x.float(), weight)[2]
    for name, grad in grads.items():
        # fp32 sums of up to 90 * 5 products of order one.
        largest = grad.abs().max()
        error = (native_grads[name].double() - grad).abs().max()
        assert largest > 0 and error <= 1e-4 * largest, name


@pytest.mark.parametrize("top_m", [1, 5, 16, 17, 31, 32, 33, 50])
@pytest.mark.parametrize("num_keys", [50, 64, 135])
def test_of_equal_scores_the_smallest_number_comes_first(top_m, num_keys):
    """Whole numbers, most of them equal to others, some minus infinity, against stable sorts."""
    draw = torch.Generator().manual_seed(100 * top_m + num_keys)
    keys_2Hn = torch.randint(-4, 30, (2, 2, num_keys), generator=draw).float()
    keys_2Hn[0, 1, ::3] = -torch.inf
    factors_T1 = torch.tensor([[1.0], [2.0], [5.0]])
    scores_2THn = torch.stack([factors_T1 * keys_2Hn[side, :, None] for side in (0, 1)])
    scores_2THn = scores_2THn.transpose(1, 2).contiguous()
    slots_THm, found_THmh = resolve("cpu", CPU).select(
        lambda tokens: scores_2THn[:, tokens],
        factors_T1[:, None],
        torch.zeros(2, 2, 1, dtype=torch.int64),
        keys_2Hn[..., None, None],
        None,
        top_m,
    )
    rows_THm, cols_THm = scores_2THn.sort(dim=-1, descending=True, stable=True).indices[..., :top_m]
    sums_THmm = (
        scores_2THn[0].gather(-1, rows_THm)[..., None]
        + scores_2THn[1].gather(-1, cols_THm)[..., None, :]
    )
    best = sums_THmm.flatten(2).sort(dim=-1, descending=True, stable=True)
    pairs_THm = best.indices[..., :top_m]
    row_of_pair = rows_THm.gather(-1, pairs_THm // top_m)
    col_of_pair = cols_THm.gather(-1, pairs_THm % top_m)
    assert torch.equal(slots_THm, row_of_pair * num_keys + col_of_pair)
    assert torch.equal(found_THmh[..., 0], best.values[..., :top_m])


def test_runs_of_tokens_make_no_difference(monkeypatch):
    """Searching 7 tokens at a time, the last run shorter, gives what one search gives."""
    retrieval = make_layer(dtype=torch.float32, knum=40, top_m=5, **TUCKER).retrieval
    x = inputs(2, 20, dtype=torch.float32)
    weight = torch.randn(retrieval(x).scores_TKh.shape)
    whole = selected(retrieval, x, weight)
    monkeypatch.setattr(cpu_autograd, "TOKENS_PER_SEARCH", 7)
    parts = selected(retrieval, x, weight)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])
    for name, grad in whole[2].items():
        torch.testing.assert_close(grad, parts[2][name], rtol=1e-5, atol=1e-6)


def test_gradients_do_not_depend_on_threads(restored_threads):
    retrieval = make_layer(dtype=torch.float32, knum=40, **TUCKER).retrieval
    x = inputs(4, 50, dtype=torch.float32)
    weight = torch.randn(retrieval(x).scores_TKh.shape)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        slots, _, grads = selected(retrieval, x, weight)
        results.append((slots, grads["keys.norm.weight"], grads["form.core"]))
    assert torch.equal(results[0][0], results[1][0])
    for one, two in zip(results[0][1:], results[1][1:]):
        # torch's products differ in fp32: sums of 200 tokens' terms, which partly cancel.
        assert (one - two).abs().max() <= 1e-4 * two.abs().max()


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_conv(taps):
    conv = CausalConv(24, taps)
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(taps))
    return conv


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("seq_len", [1, 2, 13])
@pytest.mark.parametrize("documents", [False, True])
def test_convolution_and_its_gradients(taps, seq_len, documents):
    conv = make_conv(taps)
    oracle = copy.deepcopy(conv).double()
    x = inputs(3, seq_len, dtype=torch.float32)[..., :1].repeat(1, 1, 24)
    x = (x * torch.linspace(-1, 2, 24)).contiguous()
    starts = (torch.arange(3 * seq_len).view(3, seq_len) % 5 == 2) if documents else None
    results = []
    for module, data in ((conv, x), (oracle, x.double())):
        data = data.clone().requires_grad_()
        out, state = module(data, starts, None)
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        results.append([out, state, data.grad, module.weight.grad])
    for native, exact in zip(*results):
        torch.testing.assert_close(native.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seq_len", [1, 2, 9])
@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_convolution_continues_from_a_state(seq_len, documents):
    conv = make_conv(4)
    oracle = copy.deepcopy(conv).double()
    x, before = torch.randn(2, seq_len, 24), torch.randn(2, 3, 24)
    starts = None
    if documents:
        starts = torch.zeros(2, seq_len, dtype=torch.bool)
        starts[1, seq_len // 2] = True
    out, state = conv(x, starts, before)
    exact, exact_state = oracle(x.double(), starts, before.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.double(), exact_state)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_shuffle_and_split_are_the_formulas(name):
    n, num_rows = 37, 350
    kernel = resolve(name, CPU)
    shuffle = BijectionShuffle(n, seed=3, kernel=name)
    slots = torch.arange(n * n).view(n, n)
    permuted = shuffle(slots)
    left, right = slots // n, slots % n
    for table in shuffle.tables(slots.device):
        left, right = right, (left + table[right]) % n
    assert torch.equal(permuted, left * n + right)
    assert torch.equal(permuted.flatten().sort().values, slots.flatten())
    rows, projectors = kernel.split(permuted.t(), num_rows)
    assert torch.equal(rows, permuted.t() % num_rows)
    assert torch.equal(projectors, permuted.t() // num_rows)


def test_a_named_kernel_is_what_a_layer_runs():
    """Every operator of the layer follows ``memory.kernel``: a stand-in sees the calls."""
    reference = resolve("reference", CPU)
    seen = set()

    class Counting:
        def __getattr__(self, name):
            seen.add(name)
            return getattr(reference, name)

    layer = make_layer(dtype=torch.float32, kernel="reference", **TUCKER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultramem_ds.kernels.registry.resolve", lambda *_: Counting())
        for module in ("query", "retrieval", "expansion", "layer"):
            patch.setattr(f"ultramem_ds.model.memory.{module}.resolve", lambda *_: Counting())
        x = inputs(dtype=torch.float32).requires_grad_()
        run(layer, x).sum().backward()
    assert seen >= {"causal_conv", "select", "shuffle", "split", "lookup", "backward"}
