"""Prefill and decode give the logits of the full forward, for every kind and both precisions."""

import pytest
import torch

from ultramem_ds.config.presets import preset
from ultramem_ds.infer.cache import DecodeCache
from ultramem_ds.infer.generate import EagerStepper, generate, pad_left
from ultramem_ds.infer.graphs import FixedStep, GraphStepper
from ultramem_ds.infer.prepare import prepare_for_decoding
from ultramem_ds.infer.sampling import Sampling
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel

KINDS = ("dense", "pkm", "moe", "ultramem")
# fp32 sums of at most 512 products in another order, through 4 blocks: some 1e-6 of logits up to
# about 10.
FP32 = {"rtol": 1e-5, "atol": 1e-4}
# Of positions, bf16. With a CPU's own bf16 products (AVX512-BF16) 0.78 of moe's, else 0.9.
WITHOUT_FLIPS = {"dense": 0.85, "pkm": 0.85, "moe": 0.7, "ultramem": 0.3}
GREEDY = Sampling(max_new_tokens=5, temperature=0)


def build(kind, dtype=torch.float32, device="cpu"):
    config = preset(f"{kind}-debug")
    model = LanguageModel(config)
    init_module(model, config, seed=3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "mlp" not in name and param.ndim == 2 and param.shape[0] < 4096:
                param.mul_(3)  # attention that discriminates: at initialisation it averages
    return model.to(device, dtype).eval()


def tokens(*shape):
    return torch.randint(1, 4096, shape, generator=torch.Generator().manual_seed(5))


def decoded(model, tokens_BS, chunks, block_size=8):
    cache = DecodeCache(model, [0] * tokens_BS.shape[0], block_size)
    pieces = tokens_BS.split(chunks, dim=1)
    return torch.cat([model.logits(piece, state=cache) for piece in pieces], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decode_is_the_full_forward_fp32(kind):
    model = build(kind)
    tokens_BS = tokens(3, 21)
    full = model.logits(tokens_BS)
    model = prepare_for_decoding(model)
    torch.testing.assert_close(model.logits(tokens_BS), full, **FP32)
    for chunks in ([21], [7] + [1] * 14, [1] * 21, [5, 9, 7]):
        torch.testing.assert_close(decoded(model, tokens_BS, chunks), full, **FP32)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decode_is_as_accurate_as_the_full_forward_bf16(kind):
    # Rounding to bf16 flips near-ties of what is selected (experts, rows), and a flip is no small
    # error. The exact answer is therefore the same weights in fp32: decoding must be no further
    # from it than the full bf16 forward is. The factor covers the chance of single flips (on a CPU
    # the two errors are within 4% of each other).
    model = build(kind, torch.bfloat16)
    tokens_BS = tokens(4, 24)
    full = model.logits(tokens_BS).float()
    exact = build(kind, torch.bfloat16).float().logits(tokens_BS)
    steps = decoded(prepare_for_decoding(model), tokens_BS, [7] + [1] * 17).float()
    scale = exact.square().mean().sqrt()
    full_error = (full - exact).square().mean().sqrt() / scale
    assert (steps - exact).square().mean().sqrt() / scale < 1.15 * full_error
    # Positions that no flip has reached have only rounding, 8 bits through 4 blocks: 0.9 of all
    # and more, of UltraMem's, which selects 16 rows of 147,456 slots twice, 0.42.
    error_BS = (steps - full).abs().amax(-1) / scale
    assert (error_BS < 0.1).float().mean() > WITHOUT_FLIPS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    model = prepare_for_decoding(build(kind))
    prompts = [[5], [7, 8, 9, 10, 11, 12, 13], [9, 4], [3, 1, 4, 1, 5]]
    limits = {"eos_id": 0, "vocab_size": 4096}
    together = generate(model, prompts, GREEDY, **limits)
    alone = [generate(model, [prompt], GREEDY, **limits)[0] for prompt in prompts]
    assert together == alone
    with torch.no_grad():
        for fill in (0, 77):  # what the padding holds is never seen
            tokens_BS, padding = pad_left(prompts, fill=fill)
            cache = DecodeCache(model, padding)
            last = model.logits(tokens_BS, state=cache)[:, -1]
            for row, prompt in zip(last, prompts):
                expected = model.logits(torch.tensor([prompt]))[0, -1]
                torch.testing.assert_close(row, expected, **FP32)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fixed_buffers_give_the_eager_logits(kind):
    # The body of a CUDA graph, run without one: same position, masks and convolution states.
    model = prepare_for_decoding(build(kind))
    tokens_BS, padding = pad_left([[5], [7, 8, 9], [1, 2, 3, 4, 5]], fill=0)
    caches = [DecodeCache(model, padding, block_size=16) for _ in range(2)]
    for cache in caches:
        model.logits(tokens_BS, state=cache)
    eager, fixed = EagerStepper(model, caches[0]), FixedStep(model, _entered(caches[1]))
    for step in range(6):
        next_B1 = tokens(3, 6)[:, step : step + 1]
        fixed.tokens_B1.copy_(next_B1)
        torch.testing.assert_close(fixed.run(), eager.step(next_B1), **FP32)


def _entered(cache):
    cache.enter(0)
    return cache


def test_fixed_buffers_say_when_they_are_full():
    model = prepare_for_decoding(build("dense"))
    cache = DecodeCache(model, [0], block_size=4)
    with torch.no_grad():
        model.logits(tokens(1, 4), state=cache)
    with pytest.raises(ValueError, match="full at 4 positions"):
        FixedStep(model, cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_graphs_give_the_eager_logits(kind):
    model = prepare_for_decoding(build(kind, torch.bfloat16, "cuda"))
    tokens_BS, padding = pad_left([[5], [7, 8, 9], [1, 2, 3, 4, 5]], fill=0)
    caches = [DecodeCache(model, padding, block_size=8) for _ in range(2)]
    for cache in caches:
        model.logits(tokens_BS.cuda(), state=cache)
    steppers = EagerStepper(model, caches[0]), GraphStepper(model, caches[1])
    close = []
    for step in range(12):  # crosses a growth of the buffers
        if step == 6:
            for stepper in steppers:
                stepper.select([0, 2])
        next_B1 = tokens(3, 12)[: 3 if step < 6 else 2, step : step + 1].cuda()
        expected, got = (stepper.step(next_B1).float() for stepper in steppers)
        close += ((got - expected).abs().amax(-1) < 0.1 * expected.abs().max()).tolist()
    # Attention over a masked buffer rounds in another order; flips as in the bf16 test.
    assert sum(close) > WITHOUT_FLIPS[kind] * len(close)
