"""lookup_reduce and bag_reduce of every CPU implementation against nested Python loops."""

import pytest
import torch

from ultramem_ds.kernels import bag_reduce, lookup_reduce, registry
from ultramem_ds.kernels.dots import row_dots

KERNELS = ["reference", "embedding-bag", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# fp32 and fp64: another order of summation over at most 24 terms of size about 1. bf16: one
# rounding of the result (half a unit in the 8th bit, 2^-9) on top of fp32 sums.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float64: 1e-12}

# T tokens, K entries, E projectors, V width, h cores, R rows; one core and V not a power of two.
SHAPES = [
    dict(T=5, K=8, E=4, V=24, h=2, R=17),
    dict(T=3, K=24, E=1, V=7, h=1, R=4),
    dict(T=1, K=4, E=3, V=40, h=8, R=1000),
    dict(T=0, K=4, E=2, V=8, h=2, R=10),
]


def make_problem(T, K, E, V, h, R, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    values_RV = torch.randn(R, V, generator=generator, dtype=wide).to(dtype)
    rows_TK = torch.randint(0, R, (T, K), generator=generator)
    projectors_TK = torch.randint(0, E, (T, K), generator=generator)
    scores_TKh = torch.randn(T, K, h, generator=generator, dtype=wide)
    grad_TEV = torch.randn(T, E, V, generator=generator, dtype=wide).to(dtype)
    return values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV


def loops(values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV):
    """The definition, entry by entry in fp64: pooled, gradient of the table, of the scores."""
    V, h = values_RV.shape[1], scores_TKh.shape[-1]
    values, scores, grad = values_RV.double(), scores_TKh.double(), grad_TEV.double()
    pooled, grad_values = torch.zeros_like(grad), torch.zeros_like(values)
    grad_scores = torch.zeros_like(scores)
    for t in range(rows_TK.shape[0]):
        for k in range(rows_TK.shape[1]):
            row, p = rows_TK[t, k], projectors_TK[t, k]
            for i in range(h):
                chunk = slice(i * V // h, (i + 1) * V // h)
                pooled[t, p, chunk] += scores[t, k, i] * values[row, chunk]
                grad_values[row, chunk] += scores[t, k, i] * grad[t, p, chunk]
                grad_scores[t, k, i] = values[row, chunk] @ grad[t, p, chunk]
    return pooled, grad_values, grad_scores


def to_bags(rows_TK, projectors_TK, scores_TKh, num_projectors):
    """The same entries as CSR bags, written as loops; order_M are positions in (T, K)."""
    K = rows_TK.shape[1]
    order, offsets = [], [0]
    for t in range(rows_TK.shape[0]):
        for p in range(num_projectors):
            order += [t * K + k for k in range(K) if projectors_TK[t, k] == p]
            offsets.append(len(order))
    order_M = torch.tensor(order, dtype=torch.int64)
    return (
        rows_TK.flatten()[order_M],
        torch.tensor(offsets),
        scores_TKh.flatten(0, 1)[order_M],
        (order_M),
    )


def assert_close(actual, expected, dtype):
    scale = 1.0 if expected.numel() == 0 else max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lookup_reduce_forward_and_both_gradients(kernel, dtype, shape):
    values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV = make_problem(**shape, dtype=dtype)
    expected = loops(values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV)
    values_RV.requires_grad_()
    scores_TKh.requires_grad_()
    pooled_TEV = lookup_reduce(
        values_RV, rows_TK, projectors_TK, scores_TKh, shape["E"], kernel=kernel
    )
    assert pooled_TEV.dtype == dtype
    pooled_TEV.backward(grad_TEV)
    assert values_RV.grad.dtype == dtype
    assert_close(pooled_TEV.detach(), expected[0], dtype)
    assert_close(values_RV.grad, expected[1], dtype)
    # The gradient of the scores is never rounded to the table's dtype.
    accumulated = torch.promote_types(dtype, torch.float32)
    assert scores_TKh.grad.dtype == accumulated
    assert_close(scores_TKh.grad, expected[2], accumulated)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bag_reduce_forward_and_both_gradients(kernel, dtype, shape):
    values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV = make_problem(**shape, dtype=dtype)
    pooled, grad_values, grad_scores = loops(
        values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV
    )
    rows_M, offsets_B1, scores_Mh, order_M = to_bags(rows_TK, projectors_TK, scores_TKh, shape["E"])
    assert shape["T"] == 0 or (offsets_B1.diff() == 0).any() or shape["E"] < 3
    values_RV.requires_grad_()
    scores_Mh.requires_grad_()
    pooled_BV = bag_reduce(values_RV, rows_M.int(), offsets_B1.int(), scores_Mh, kernel=kernel)
    pooled_BV.backward(grad_TEV.flatten(0, 1))
    assert_close(pooled_BV.detach(), pooled.flatten(0, 1), dtype)
    assert_close(values_RV.grad, grad_values, dtype)
    accumulated = torch.promote_types(dtype, torch.float32)
    assert_close(scores_Mh.grad, grad_scores.flatten(0, 1)[order_M], accumulated)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_buffer_is_added_to_and_autograd_sees_no_table_gradient(kernel, dtype):
    shape = SHAPES[0]
    values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV = make_problem(**shape, dtype=dtype)
    _, grad_values, _ = loops(values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV)
    accumulated = torch.promote_types(dtype, torch.float32)
    buffer_RV = torch.full((shape["R"], shape["V"]), 3.0, dtype=accumulated)
    values_RV.requires_grad_()
    scores_TKh.requires_grad_()
    for _ in range(2):
        pooled_TEV = lookup_reduce(
            values_RV,
            rows_TK,
            projectors_TK,
            scores_TKh,
            shape["E"],
            grad_values_RV=buffer_RV,
            kernel=kernel,
        )
        pooled_TEV.backward(grad_TEV)
    assert values_RV.grad is None
    assert_close(buffer_RV, 3.0 + 2 * grad_values, accumulated)


@pytest.mark.parametrize("kernel", KERNELS)
def test_buffer_is_filled_even_if_the_scores_need_no_gradient(kernel):
    values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV = make_problem(**SHAPES[0])
    _, grad_values, _ = loops(values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV)
    buffer_RV = torch.zeros_like(values_RV)
    rows_M, offsets_B1, scores_Mh, _ = to_bags(rows_TK, projectors_TK, scores_TKh, 4)
    bag_reduce(
        values_RV, rows_M, offsets_B1, scores_Mh, grad_values_RV=buffer_RV, kernel=kernel
    ).backward(grad_TEV.flatten(0, 1))
    assert_close(buffer_RV, grad_values, torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_cores", [1, 3])
def test_gradcheck(kernel, num_cores):
    values_RV, rows_TK, projectors_TK, scores_TKh, _ = make_problem(
        T=2, K=5, E=2, V=6, h=num_cores, R=4, dtype=torch.float64
    )
    rows_M, offsets_B1, scores_Mh, _ = to_bags(rows_TK, projectors_TK, scores_TKh, 2)
    values_RV.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, s: lookup_reduce(v, rows_TK, projectors_TK, s, 2, kernel=kernel),
        (values_RV, scores_TKh.requires_grad_()),
    )
    assert torch.autograd.gradcheck(
        lambda v, s: bag_reduce(v, rows_M, offsets_B1, s, kernel=kernel),
        (values_RV, scores_Mh.requires_grad_()),
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 40])
def test_row_dots_are_the_products_and_differentiable(kernel, dtype, width):
    generator = torch.Generator().manual_seed(width)
    wide = torch.promote_types(dtype, torch.float32)
    queries_TGd = torch.randn(5, 3, width, generator=generator, dtype=wide).to(dtype)
    keys_Rd = torch.randn(11, width, generator=generator, dtype=wide).to(dtype)
    rows_TK = torch.randint(0, 11, (5, 9), generator=generator)
    # What retrieval hands over: the groups of one token, expanded over tokens.
    groups_TK = torch.randint(0, 3, (1, 9), generator=generator).expand(5, 9)
    weight_TK = torch.randn(5, 9, generator=generator, dtype=wide)
    kernel = registry.resolve(kernel, keys_Rd.device)

    def products(queries_TGd, keys_Rd):
        return row_dots(kernel, queries_TGd, keys_Rd, rows_TK, groups_TK)

    def oracle(queries_TGd, keys_Rd):
        asked_TKd = queries_TGd[torch.arange(5)[:, None], groups_TK]
        return (asked_TKd * keys_Rd[rows_TK]).sum(-1)

    found = []
    for function, leaves in (
        (products, (queries_TGd, keys_Rd)),
        (oracle, (queries_TGd.double(), keys_Rd.double())),
    ):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        dots_TK = function(*leaves)
        (dots_TK * weight_TK.to(dots_TK.dtype)).sum().backward()
        found.append((dots_TK.detach(), *(leaf.grad for leaf in leaves)))
    assert found[0][0].dtype == wide
    assert_close(found[0][0], found[1][0], wide)
    for got, exact in zip(found[0][1:], found[1][1:]):
        assert_close(got, exact, dtype)


def test_native_calls_take_dense_memory_only():
    """A view that expands one element has not the elements that C++ would read."""
    kernel = registry.resolve("cpu", torch.device("cpu"))
    values_RV, ids_M = torch.randn(4, 8), torch.zeros(6, dtype=torch.int64)
    weights_M1 = torch.ones(1, 1).expand(6, 1)
    with pytest.raises(AssertionError):
        kernel.backward(values_RV, values_RV, ids_M, ids_M, weights_M1, torch.zeros(4, 8))


@pytest.mark.parametrize("kernel", ["embedding-bag", "cpu"])
def test_backward_allocates_nothing_of_the_tables_size(kernel):
    num_rows, width = 200_000, 64  # 51 MB in fp32; the lookup touches 64 rows, 16 KB
    values_RV, buffer_RV = torch.zeros(num_rows, width), torch.zeros(num_rows, width)
    _, rows_TK, projectors_TK, scores_TKh, grad_TEV = make_problem(
        T=8, K=8, E=2, V=width, h=2, R=num_rows // 1000
    )
    scores_TKh.requires_grad_()
    pooled_TEV = lookup_reduce(
        values_RV,
        rows_TK * 1000,
        projectors_TK,
        scores_TKh,
        2,
        grad_values_RV=buffer_RV,
        kernel=kernel,
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        pooled_TEV.backward(grad_TEV)
    allocated = max(abs(event.self_cpu_memory_usage) for event in profile.key_averages())
    assert buffer_RV.any()
    assert allocated < values_RV.nbytes / 100


@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_is_bitwise_reproducible(kernel):
    values_RV, rows_TK, projectors_TK, scores_TKh, grad_TEV = make_problem(
        T=64, K=16, E=4, V=32, h=2, R=40
    )
    runs = []
    for _ in range(2):
        buffer_RV = torch.zeros_like(values_RV)
        scores = scores_TKh.clone().requires_grad_()
        lookup_reduce(
            values_RV, rows_TK, projectors_TK, scores, 4, grad_values_RV=buffer_RV, kernel=kernel
        ).backward(grad_TEV)
        runs.append((buffer_RV, scores.grad))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad_row", [17, -1])
def test_row_out_of_range_is_an_error(kernel, bad_row):
    values_RV, rows_TK, projectors_TK, scores_TKh, _ = make_problem(**SHAPES[0])
    rows_TK[2, 3] = bad_row
    with pytest.raises((IndexError, RuntimeError), match=r"range|bound"):
        lookup_reduce(values_RV, rows_TK, projectors_TK, scores_TKh, 4, kernel=kernel)


def test_bad_arguments_are_named():
    values_RV, rows_TK, projectors_TK, scores_TKh, _ = make_problem(**SHAPES[0])
    with pytest.raises(ValueError, match="must both be"):
        lookup_reduce(values_RV, rows_TK, projectors_TK[:, 1:], scores_TKh, 4)
    with pytest.raises(ValueError, match=r"\(T, K, h\)"):
        lookup_reduce(values_RV, rows_TK, projectors_TK, scores_TKh[..., 0], 4)
    with pytest.raises(ValueError, match="5 cores must divide the value width 24"):
        lookup_reduce(values_RV, rows_TK, projectors_TK, scores_TKh.new_zeros(5, 8, 5), 4)
    with pytest.raises(ValueError, match="int64 or int32"):
        lookup_reduce(values_RV, rows_TK.float(), projectors_TK, scores_TKh, 4)
    with pytest.raises(ValueError, match="fp32, bf16"):
        lookup_reduce(values_RV.half(), rows_TK, projectors_TK, scores_TKh, 4)
    with pytest.raises(ValueError, match="gradient buffer"):
        lookup_reduce(
            values_RV.bfloat16(),
            rows_TK,
            projectors_TK,
            scores_TKh,
            4,
            grad_values_RV=torch.zeros_like(values_RV, dtype=torch.bfloat16),
        )
    with pytest.raises(ValueError, match="not contiguous"):
        lookup_reduce(values_RV.t().contiguous().t(), rows_TK, projectors_TK, scores_TKh, 4)
    with pytest.raises(ValueError, match="no such kernel"):
        lookup_reduce(values_RV, rows_TK, projectors_TK, scores_TKh, 4, kernel="cuda")


def test_environment_forces_a_kernel_and_describe_says_so(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.delenv(registry.ENVIRONMENT_KEY, raising=False)
    assert registry.resolve("reference", device).name == "reference"
    assert "forced" not in registry.describe("reference")
    monkeypatch.setenv(registry.ENVIRONMENT_KEY, "embedding-bag")
    assert registry.resolve("reference", device).name == "embedding-bag"
    assert "kernel embedding-bag (forced by ULTRAMEM_KERNEL)" in registry.describe("auto")
    monkeypatch.setenv(registry.ENVIRONMENT_KEY, "typo")
    with pytest.raises(ValueError, match="no such kernel: typo"):
        registry.resolve("auto", device)
