"""Sampling, stopping, streaming text, and the expert layer of decoding."""

import pytest
import torch

from ultramem_ds.config.schema import MemoryConfig, ModelConfig, MoEConfig
from ultramem_ds.infer.cache import KVCache
from ultramem_ds.infer.experts import GroupedExperts
from ultramem_ds.infer.generate import generate, stream
from ultramem_ds.infer.sampling import Sampling, choose, distribution
from ultramem_ds.infer.search import PackedSearch
from ultramem_ds.infer.text import Detokenizer
from ultramem_ds.infer.weights import GroupedWeights, PackedLinear
from ultramem_ds.kernels import resolve
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.lookup import ValueTable
from ultramem_ds.model.memory.query import LAYOUTS
from ultramem_ds.model.moe import MixtureOfExperts

LOGITS = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))


class Counter(torch.nn.Module):
    """Stands for a model: after token t comes t + 1, with certainty."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(1, 1)
        self.blocks, self.memories = [object()], []
        self.batch_sizes = []

    def head(self, tokens_B):
        return torch.nn.functional.one_hot(tokens_B + 1, 16).float() * 100

    def forward(self, tokens_BS, scored):
        self.batch_sizes.append(tokens_BS.shape[0])
        return self.head(tokens_BS.flatten()[scored.picks_M])


def test_cuts_keep_the_right_tokens():
    def kept(**settings):
        probs, ids = distribution(LOGITS, Sampling(**settings))
        return {int(i): round(float(p), 4) for p, i in zip(probs[0], ids[0]) if p > 0}

    assert kept() == {1: 0.5, 3: 0.25, 2: 0.15, 0: 0.1}
    assert kept(top_k=2) == {1: 0.5, 3: 0.25}
    assert kept(top_p=0.5) == {1: 0.5}
    assert kept(top_p=0.51) == {1: 0.5, 3: 0.25}
    assert kept(top_p=1e-9, top_k=3) == {1: 0.5}
    cold = kept(temperature=0.5)  # squares, normalised
    assert cold == pytest.approx({1: 0.7246, 3: 0.1812, 2: 0.0652, 0: 0.029}, abs=1e-4)


def test_choices_follow_the_distribution():
    generator = torch.Generator().manual_seed(1)
    picks = choose(LOGITS.expand(4000, 4), Sampling(top_k=2), [generator] * 4000)
    shares = torch.bincount(picks, minlength=4) / 4000
    # Standard deviation of a share: sqrt(2/9 / 4000) < 0.008; four of them.
    torch.testing.assert_close(shares, torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.03, rtol=0)


def test_greedy_ignores_the_seed():
    assert choose(LOGITS, Sampling(temperature=0), []).tolist() == [1]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"seed": -1}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=f"--{next(iter(bad)).replace('_', '-')}"):
        Sampling(**bad)


def test_each_sequence_stops_for_itself():
    model = Counter()
    new = list(
        stream(model, [[2], [7, 8], [5]], Sampling(max_new_tokens=4), eos_id=9, vocab_size=16)
    )
    assert new[:2] == [(0, 3), (2, 6)]  # sequence 1 ended at once, unseen
    assert [token for sequence, token in new if sequence == 0] == [3, 4, 5, 6]
    assert [token for sequence, token in new if sequence == 2] == [6, 7, 8]
    assert model.batch_sizes == [3, 2, 2, 2]  # ended sequences cost nothing more


def test_padded_vocabulary_is_never_chosen():
    assert generate(Counter(), [[6]], Sampling(max_new_tokens=1), eos_id=0, vocab_size=7) != [[7]]


def test_empty_prompts_are_refused():
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            generate(Counter(), prompts, Sampling(), eos_id=0, vocab_size=16)


def test_sampled_sequences_do_not_depend_on_their_neighbours():
    class Flat(Counter):
        def head(self, tokens_B):
            return torch.zeros(*tokens_B.shape, 16)

    limits = {"eos_id": 99, "vocab_size": 16}
    runs = [
        generate(Flat(), prompts, Sampling(max_new_tokens=20, seed=4), **limits)
        for prompts in ([[1], [1], [1]], [[1], [1]])
    ]
    assert runs[0][:2] == runs[1]
    assert runs[0][0] != runs[0][1]
    other = generate(Flat(), [[1]], Sampling(max_new_tokens=20, seed=5), **limits)
    assert other[0] != runs[0][0]


def test_kv_cache_grows_by_blocks():
    cache, pieces = KVCache(block_size=4), []
    for length, capacity in ((3, 4), (1, 4), (2, 8), (7, 16)):
        piece = torch.randn(2, 3, length, 5)
        pieces.append(piece)
        keys, values = cache.update(piece, -piece)
        assert cache.capacity == capacity
        torch.testing.assert_close(keys, torch.cat(pieces, dim=2), rtol=0, atol=0)
        torch.testing.assert_close(values, -keys, rtol=0, atol=0)


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def is_byte(self, token):
        return False


def test_text_comes_in_pieces_that_join():
    text = "naïve — 世界 🌍 end" * 9
    ids = list(text.encode())
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) == text and detokenizer.rest() == ""
    assert "\ufffd" not in "".join(pieces)
    assert detokenizer.push(0xF0) == "" and detokenizer.rest() == "\ufffd"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
@torch.no_grad()
def test_grouped_experts_are_the_mixture_and_read_only_the_chosen(
    dtype, top_k, kernel, monkeypatch
):
    monkeypatch.setenv("ULTRAMEM_KERNEL", kernel)
    config = ModelConfig(kind="moe", hidden_size=32, inner_size=64, num_heads=2)
    torch.manual_seed(0)
    mixture = MixtureOfExperts(config, MoEConfig(num_experts=8, top_k=top_k)).to(dtype)
    x_BSD = torch.randn(2, 3, 32, dtype=dtype)
    expected = mixture(x_BSD)
    used = expected.expert_counts > 0
    assert not used.all()
    for expert, chosen in zip(mixture.experts, used):
        if not chosen:
            expert.up_proj.weight.fill_(float("nan"))
            expert.down_proj.weight.fill_(float("nan"))
    got = GroupedExperts(mixture, GroupedWeights.pack)(x_BSD)
    assert torch.equal(got.expert_counts, expected.expert_counts)
    # Same products, perhaps another order of sums over 64: a few units in the last place.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.y_BSD, expected.y_BSD, rtol=tolerance, atol=tolerance)


KERNEL = resolve("auto", torch.device("cpu"))
needs_native = pytest.mark.skipif(
    KERNEL.name != "cpu", reason="no compiler: packed products are torch's here"
)


@needs_native
@pytest.mark.parametrize("outputs, inputs", [(32, 7), (33, 1), (1000, 520), (64, 1024), (5, 2500)])
@pytest.mark.parametrize("rows", [1, 2, 13, 14, 15, 37])
def test_packed_product_is_the_product(outputs, inputs, rows):
    generator = torch.Generator().manual_seed(rows)
    weight_NK = torch.randn(outputs, inputs, generator=generator)
    x_MK = torch.randn(rows, inputs, generator=generator)
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = weight_NK.clone()
    got = PackedLinear(GroupedWeights.pack([linear]))(x_MK[None])[0]
    exact = (x_MK.double() @ weight_NK.double().T).float()
    # Sums of up to 2500 products of unit size: sqrt(2500) * 2^-24 * a few.
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-4)


@needs_native
def test_packed_groups_use_their_own_weights_and_skip_idle_ones():
    generator = torch.Generator().manual_seed(0)
    weights_XNK = torch.randn(5, 40, 24, generator=generator)
    packed = torch.empty(5, *KERNEL.packed_shape(40, 24, dtype=torch.float32))
    for slot, weight in zip(packed, weights_XNK):
        KERNEL.pack_into(slot, weight)
    packed[2] = float("nan")
    counts = [3, 1, 0, 20, 0]
    x_MK = torch.randn(24, 24, generator=generator)
    got = KERNEL.grouped_linear(x_MK, packed, torch.tensor(counts).cumsum(0), 40)
    expected = [x @ w.T for x, w in zip(x_MK.split(counts), weights_XNK)]
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_packed_search_is_the_einsum(layout):
    generator = torch.Generator().manual_seed(0)
    sizes = {"s": 2, "h": 3, "r": 4}
    rank = 4 if "r" in layout else 1
    queries = torch.randn(6, *(sizes[letter] for letter in layout), 10, generator=generator)
    product = PackedSearch(layout)
    for _ in range(2):  # new keys are noticed
        search = torch.randn(2, 3, 17, rank, 10, generator=generator)
        expected = torch.einsum(f"t{layout}d,shnrd->sthn", queries, search)
        got = product(queries, search)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("retrieval", ["tdqkr", "product-key"])
@torch.no_grad()
def test_packed_selection_is_the_two_stage_selection(layout, retrieval):
    tucker = retrieval == "tdqkr"
    sizes = {"tucker_rank": 3, "num_cores": 2} if tucker else {"tucker_rank": 1, "num_cores": 1}
    memory = MemoryConfig(
        knum=20, kdim=21, top_m=7, num_heads=3, query=layout, retrieval=retrieval, **sizes
    )
    model = ModelConfig(kind="ultramem", hidden_size=32, num_heads=2)
    torch.manual_seed(0)
    layer = MemoryLayer(model, memory, ValueTable(memory.num_rows, memory.value_dim, table_index=0))
    for param in layer.parameters():
        param.normal_()
    x_BSD = torch.randn(5, 3, 32)
    expected = layer.retrieval(x_BSD)
    layer.retrieval.product = PackedSearch(LAYOUTS[layout])
    got = layer.retrieval(x_BSD)
    assert torch.equal(got.slots_TK, expected.slots_TK)
    # Scores multiply two sums of 21 products near 20 each: a few units of 2^-24 * 10^3.
    torch.testing.assert_close(got.scores_TKh, expected.scores_TKh, rtol=1e-4, atol=1e-3)


@needs_native
@pytest.mark.parametrize("width", [32, 80])
@pytest.mark.parametrize("heads, cached_heads", [(8, 8), (8, 2), (8, 1), (6, 1), (9, 3)])
@pytest.mark.parametrize("positions", [1, 15, 16, 100])
def test_attention_to_a_cache_is_torchs(width, heads, cached_heads, positions):
    generator = torch.Generator().manual_seed(positions)
    q_BA1K = 3 * (32 / width) ** 0.25 * torch.randn(2, heads, 1, width, generator=generator)
    keys, values = torch.randn(2, 2, cached_heads, 128, width, generator=generator)[
        :, :, :, :positions
    ]
    with torch.no_grad():
        got = KERNEL.attend(q_BA1K, keys, values, None, 0.0)
        plain = resolve("reference", q_BA1K.device).attend(q_BA1K, keys, values, None, 0.0)
    repeated = [x.repeat_interleave(heads // cached_heads, dim=1) for x in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(q_BA1K, *repeated)
    # Exponentials good to 2e-7 of scores up to about 50, sums of up to 100 values near 1.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
