"""Run by test_kernels_finding.py with TRITON_INTERPRET=1 (or on a GPU, where that is not set).

The oracle is float64 torch, one (token, head) at a time, and tries all pairs of candidates.
"""

import contextlib
import dataclasses
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ultramem_ds.config.load import load_config
from ultramem_ds.infer.cache import DecodeCache
from ultramem_ds.infer.find import FusedLocate
from ultramem_ds.infer.generate import last_logits
from ultramem_ds.infer.prepare import prepare_for_decoding
from ultramem_ds.kernels import registry, tiles, triton_finding, tuning
from ultramem_ds.kernels import triton as launches
from ultramem_ds.kernels.cpu import NativeKernel
from ultramem_ds.kernels.finding import RowFinder
from ultramem_ds.kernels.reference import ReferenceKernel
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.expansion import round_tables
from ultramem_ds.model.memory.query import LAYOUTS, query_groups

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = {
    "ultramem": dict(T=3, D=40, d=24, n=37, m=5, H=2, r=2, h=2),
    "one token": dict(T=1, D=70, d=70, n=130, m=16, H=2, r=2, h=2, norm="rmsnorm"),
    "seven tokens": dict(T=7, D=17, d=9, n=20, m=4, H=1, r=1, h=2, conv=2),
    "64 tokens": dict(T=64, D=16, d=8, n=18, m=1, H=1, r=1, h=1, conv=0, norm="none"),
    "m 35": dict(T=1, D=16, d=16, n=300, m=35, H=1, r=2, h=1),
    "m 42": dict(T=1, D=16, d=16, n=42, m=42, H=1, r=3, h=2, shuffle="none"),
    "pkm": dict(
        T=1, D=33, d=20, n=67, m=16, H=6, r=1, h=1, layout="per-head", norm="none", conv=0,
        softmax=True, cores=False,
    ),
    "shared sides": dict(
        T=2, D=16, d=16, n=16, m=3, H=2, r=2, h=1, layout="per-head-shared-sides",
        shuffle="stored",
    ),
}  # fmt: skip


def make_finder(
    T, D, d, n, m, H, r, h, layout="shared", norm="layernorm", conv=4, softmax=False, cores=True,
    shuffle="bijection", dtype=torch.float32,
):  # fmt: skip
    """A finder with its inputs and the convolution's state."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    sizes = {"s": 2, "h": H, "r": r}
    num_queries = torch.Size(sizes[letter] for letter in LAYOUTS[layout]).numel()
    keys, directions = random(2, H, n, r, d), random(2, H, r)
    search = keys * directions[:, :, None, :, None]
    if "r" not in LAYOUTS[layout]:
        search = search.sum(3, keepdim=True)
    permutation = torch.randperm(n * n, generator=generator).to(DEVICE)
    finder = RowFinder(
        conv_kD=random(conv, D) if conv else None,
        proj_OD=random(num_queries * d, D),
        norm=norm,
        norm_d=None if norm == "none" else 1 + random(d) / 4,
        eps=1e-5,
        groups_2Hr=query_groups(LAYOUTS[layout], H, r, torch.device(DEVICE)),
        keys_2Hnrd=keys,
        search_2Hnsd=search.contiguous(),
        core_hHrr=random(h, H, r, r, dtype=torch.float32) if cores else None,
        top_m=m,
        softmax=softmax,
        rounds=round_tables(n, 3).to(DEVICE) if shuffle == "bijection" else None,
        permutation=permutation if shuffle == "stored" else None,
        num_rows=max(1, n * n // 4),
    )
    return finder, random(T, D), random(T, conv - 1, D) if conv else None


def pair_scores(finder, row_ir, col_jr, head):
    """Of all pairs, per core ``(h, i, j)``."""
    if finder.core_hHrr is None:
        return (row_ir + col_jr.T)[None]
    return torch.einsum("ia,cab,jb->cij", row_ir, finder.core_hHrr[:, head].double(), col_jr)


def exact(finder, x_TD, state_TCD):
    """Row and column scores of all keys ``(T, H, 2, n, r)`` and candidate scores without r."""
    x_TD = x_TD.double()
    if finder.conv_kD is not None:
        window = torch.cat([state_TCD, x_TD[:, None]], dim=1).double()
        x_TD = (window * finder.conv_kD.double()).sum(1)
    d = finder.keys_2Hnrd.shape[4]
    queries = (x_TD @ finder.proj_OD.double().T).unflatten(1, (-1, d))
    if finder.norm == "layernorm":
        queries = F.layer_norm(queries, (d,), finder.norm_d.double(), None, finder.eps)
    if finder.norm == "rmsnorm":
        queries = F.rms_norm(queries, (d,), finder.norm_d.double(), finder.eps)
    met = queries[:, finder.groups_2Hr]  # (T, 2, H, r, d)
    scores = torch.einsum("tshrd,shnrd->thsnr", met, finder.keys_2Hnrd.double())
    directions = finder.search_2Hnsd.shape[3]
    ranked = torch.einsum("tshrd,shnrd->thsn", met[:, :, :, :directions],
                          finder.search_2Hnsd.double())  # fmt: skip
    return scores, ranked


def oracle(finder, x_TD, state_TCD):
    """Slots ``(T, H, m)`` and scores ``(T, H, m, h)``."""
    all_scores, all_ranked = exact(finder, x_TD, state_TCD)
    n, m = finder.keys_2Hnrd.shape[2], finder.top_m
    slots, scores = [], []
    for per_head, ranked in zip(all_scores, all_ranked):
        for head, (sides, candidates) in enumerate(zip(per_head, ranked)):
            row, col = (c.argsort(descending=True, stable=True)[:m] for c in candidates)
            per_core = pair_scores(finder, sides[0][row], sides[1][col], head)
            best = per_core.sum(0).flatten().argsort(descending=True, stable=True)[:m]
            slots.append(row[best // m] * n + col[best % m])
            scores.append(per_core.flatten(1)[:, best].T)
    scores = torch.stack(scores).unflatten(0, all_ranked.shape[:2])
    if finder.softmax:
        scores = scores.softmax(-2)
    return torch.stack(slots).unflatten(0, all_ranked.shape[:2]), scores


def find(finder, x_TD, state_TCD=None, begins_T=None):
    """By Triton, into fresh state."""
    state_TCD = None if state_TCD is None else state_TCD.clone()
    kernel = registry.resolve("triton", torch.device(DEVICE))
    return kernel.find_rows(finder, x_TD, state_TCD, begins_T), state_TCD


@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name):
    finder, x_TD, state_TCD = make_finder(**SHAPES[name])
    found, moved = find(finder, x_TD, state_TCD)
    slots_THm, scores_THmh = oracle(finder, x_TD, state_TCD)
    assert torch.equal(found.slots_TK, slots_THm.flatten(1))
    # Sums of up to d products of fp32 numbers, scores of up to a few hundred.
    torch.testing.assert_close(
        found.scores_TKh.double(), scores_THmh.flatten(1, 2), rtol=1e-5, atol=1e-4
    )
    permuted = slots_THm.flatten(1)
    if finder.permutation is not None:
        permuted = finder.permutation[permuted]
    elif finder.rounds is not None:
        n = finder.keys_2Hnrd.shape[2]
        left, right = permuted // n, permuted % n
        for table in finder.rounds:
            left, right = right, (left + table[right]) % n
        permuted = left * n + right
    assert torch.equal(found.permuted_TK, permuted)
    assert torch.equal(found.rows_TK, permuted % finder.num_rows)
    assert torch.equal(found.projectors_TK, permuted // finder.num_rows)
    if state_TCD is not None:
        assert torch.equal(moved, torch.cat([state_TCD[:, 1:], x_TD[:, None]], 1))


@pytest.mark.parametrize("name", ["ultramem", "one token", "pkm"])
def test_bf16_finds_the_best_but_for_rounding(name):
    finder, x_TD, state_TCD = make_finder(**SHAPES[name] | {"H": 2, "dtype": torch.bfloat16})
    finder = dataclasses.replace(finder, softmax=False)
    found, _ = find(finder, x_TD, state_TCD)
    sides, _ = exact(finder, x_TD, state_TCD)
    _, wanted_THmh = oracle(finder, x_TD, state_TCD)
    # Inputs, queries and normalised queries are each rounded to 2^-9: of the largest score, in all.
    tolerance = 4 * 2**-9 * sides.abs().amax() * 2
    for t, per_head in enumerate(sides):
        for head, (row_nr, col_nr) in enumerate(per_head):
            slots_m = found.slots_TK[t].view(-1, finder.top_m)[head]
            scores_mh = found.scores_TKh[t].unflatten(0, (-1, finder.top_m))[head].double()
            assert slots_m.unique().numel() == finder.top_m
            of_slots = pair_scores(finder, row_nr, col_nr, head).flatten(1)[:, slots_m].T
            scale = max(1.0, float(wanted_THmh.abs().max()) ** 0.5)
            assert (of_slots - scores_mh).abs().max() < tolerance * scale
            # Another candidate may have come in, whose score is as good.
            ranked = scores_mh.sum(-1).sort().values - wanted_THmh[t, head].sum(-1).sort().values
            assert ranked.abs().max() < 2 * tolerance * scale


def test_equal_scores_take_the_smallest_number_first():
    finder, x_TD, _ = make_finder(**SHAPES["pkm"] | {"H": 1, "n": 70, "m": 4})
    finder = dataclasses.replace(
        finder,
        keys_2Hnrd=torch.ones_like(finder.keys_2Hnrd),
        search_2Hnsd=torch.ones_like(finder.search_2Hnsd),
    )
    found, _ = find(finder, x_TD)
    assert found.slots_TK.tolist() == [[0, 1, 2, 3]]  # of n = 70: row 0, columns 0 to 3


def test_the_first_token_of_a_document_sees_no_past():
    finder, x_TD, state_TCD = make_finder(**SHAPES["ultramem"])
    begins_T = torch.tensor([False, True, False], device=DEVICE)
    found, moved = find(finder, x_TD, state_TCD, begins_T)
    forgotten = state_TCD * ~begins_T[:, None, None]
    assert torch.equal(found.slots_TK, oracle(finder, x_TD, forgotten)[0].flatten(1))
    assert torch.equal(moved[:, :-1], state_TCD[:, 1:])  # kept, as the plain kernel keeps it
    reference = registry.resolve("reference", torch.device(DEVICE))
    plain = reference.find_rows(finder, x_TD, state_TCD, begins_T)
    assert torch.equal(plain.slots_TK, found.slots_TK) and torch.equal(state_TCD, moved)


MODELS = {
    "ultramem": ("ultramem-debug", ["memory.placement=1:2", "memory.num_heads=1"]),
    "pkm": ("pkm-debug", ["memory.placement=1:1", "memory.num_heads=2"]),
}
SMALL = [
    *("model.hidden_size=32", "model.inner_size=64", "model.num_layers=2", "model.vocab_size=64"),
    *("model.dropout=0.0", "memory.knum=12", "memory.kdim=16", "memory.top_m=4"),
]


def build(name, kernel):
    preset, overrides = MODELS[name]
    width = "memory.value_dim=32"
    config = load_config(preset, [*SMALL, width, *overrides, f"memory.kernel={kernel}"])
    model = LanguageModel(config).eval()
    init_module(model, config, seed=0)
    return model.to(DEVICE)


@pytest.fixture(autouse=True)
def torch_does_the_rest(monkeypatch):
    """Decoding on a CPU would pack products; a GPU does not."""
    monkeypatch.setattr(NativeKernel, "packs", ReferenceKernel.packs)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_gives_the_logits_of_the_layers_own_way(name):
    fused = prepare_for_decoding(build(name, "triton"))
    plain = build(name, "reference")
    assert all(isinstance(memory.locate, FusedLocate) for memory in fused.memory_layers)
    tokens = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 7, 8, 9]], device=DEVICE)  # one padded twice
    caches = [DecodeCache(model, [0, 2]) for model in (fused, plain)]
    for columns in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:]):
        got, want = (last_logits(m, columns, c) for m, c in zip((fused, plain), caches))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for weight in ("proj.weight", "norm.weight"):  # a weight that changes is noticed
        for model in (fused, plain):
            query = model.memory_layers[0].retrieval.query
            with contextlib.suppress(AttributeError):  # PKM has no norm
                query.get_parameter(weight).mul_(-1.5)
    for model in (fused, plain):
        model.memory_layers[0].retrieval.keys.weight.mul_(-0.5)
        for core in model.memory_layers[0].retrieval.form.parameters():
            core.add_(0.25)
    got, want = (last_logits(m, tokens[:, 4:], c) for m, c in zip((fused, plain), caches))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Launches(TorchDispatchMode):
    """Counts what torch gives to the device: views and allocations give it nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = func.overloadpacket.__name__
        if not is_view and name not in ("empty", "new_empty", "_unsafe_view", "promote_types"):
            self.names.append(name)
        return out


class Counted:
    """A Triton program that notes its launches."""

    def __init__(self, program, names):
        self.program, self.names = program, names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.names.append(self.program.__name__)
            with _disable_current_modes():  # the interpreter's own operations
                self.program[grid](*args, **kwargs)

        return launch


EXPECTED = {
    "ultramem": [
        *("convolve_project_program", "search_program", "select_program"),
        *("pool_rectangular_program", "mm"),
    ],
    "pkm": ["mm", "search_program", "select_program", "pool_rectangular_program"],
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_decode_step_of_a_memory_layer_is_five_launches_at_most(name):
    model = prepare_for_decoding(build(name, "triton"))
    layer, width = model.memory_layers[0], model.config.model.hidden_size
    reach = max(0, model.config.memory.query_conv - 1)
    state = torch.randn(2, reach, width, device=DEVICE) if reach else None
    x_BSD = torch.randn(2, 1, width, device=DEVICE)
    layer.finish(layer.start(x_BSD, None, state))  # derives what follows from the weights
    mode = Launches()
    with contextlib.ExitStack() as patches:
        for module, program in [
            *((triton_finding, program) for program in EXPECTED["ultramem"][:3]),
            (launches, "pool_rectangular_program"),
        ]:
            counted = Counted(getattr(module, program), mode.names)
            patches.enter_context(mock.patch.object(module, program, counted))
        patches.enter_context(mode)
        pending = layer.start(x_BSD, None, state)
        layer.finish(pending)
    assert pending.conv_state is state  # moved on in place: nothing is left to copy
    assert mode.names == EXPECTED[name] and len(mode.names) <= 5


def test_tuning_takes_the_fastest_of_what_it_tries():
    layer = tuning.Layer(
        hidden_size=16, num_keys=16, kdim=16, value_dim=16, top_m=1, num_heads=1, rank=2,
        expansion=4, tokens=1, num_rows=8,
    )  # fmt: skip
    tried = []

    def measure(call):  # the wider, the faster, and more warps are of no use
        asked = tiles._forced
        tried.append(dict(asked))
        call()
        (settings,) = asked.values()
        return 100.0 / sum(settings.values()) + 10.0 * settings["num_warps"]

    choices = {
        name: {size: sizes[:2] for size, sizes in some.items() if size != "num_stages"}
        for name, some in tuning.CHOICES.items()
    }
    device = torch.device(DEVICE)
    rows = tuning.tune(iter([tuning.find_rows_call(layer, device)]), "sm_90", choices, measure)
    assert len(tried) == 24 and not tiles._forced
    by_program = {row.program: row for row in rows}
    assert by_program["search_program"] == tiles.Row(
        "search_program", "sm_90", "T1 d16 m2", {"TILE_N": 64, "TILE_D": 64, "num_warps": 2}
    )
    assert set(by_program) == set(EXPECTED["ultramem"][:3])
    table = tuning.joined(tiles.read(), rows)
    assert table[: len(rows)] == rows and tuning.joined(table, rows) == table
    for call in tuning.lookup_calls(layer, device):  # the other programs can be launched too
        with tiles.noting() as asked:
            call()
        assert asked and set(asked) <= set(tuning.CHOICES)
