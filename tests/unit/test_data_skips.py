"""Jumped-over samples: the order that remains, against a plain list with them taken out."""

import random

import pytest

from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.skips import NO_SKIPS, SkipRanges, parse_range

END = 60


def remaining(skips: SkipRanges) -> list[int]:
    return [s for s in range(END) if not any(a <= s < b for a, b in skips.ranges)]


def test_order_and_ranges_equal_the_plain_list() -> None:
    rng = random.Random(0)
    for _ in range(200):
        cuts = [sorted(rng.sample(range(END // 2), 2)) for _ in range(rng.randrange(4))]
        skips = SkipRanges.of(cuts)
        order = remaining(skips)
        assert [skips.sample_at(p) for p in range(len(order))] == order
        first, last = sorted(rng.choices(range(len(order)), k=2))
        pieces = skips.samples(first, last)
        assert [s for a, b in pieces for s in range(a, b)] == order[first:last]
        assert all(a < b for a, b in pieces)


def test_ranges_are_joined() -> None:
    assert SkipRanges.of([(8, 9), (2, 4), (4, 6), (3, 5)]).ranges == ((2, 6), (8, 9))
    assert NO_SKIPS.samples(3, 7) == ((3, 7),) and NO_SKIPS.samples(3, 3) == ()


def test_extending_a_run() -> None:
    recorded = SkipRanges.of([(8, 16)])
    assert recorded.extended([(8, 16)], consumed=24) == recorded  # the same command again
    assert recorded.extended([(32, 40)], consumed=24).ranges == ((8, 16), (32, 40))
    with pytest.raises(ValueError, match="already trained on samples 16:20; the next one is 32"):
        recorded.extended([(12, 20)], consumed=24)
    with pytest.raises(ValueError, match="already trained on samples 31:32"):
        recorded.extended([(31, 40)], consumed=24)


@pytest.mark.parametrize("text", ["", "5", "5:5", "9:3", "-1:4", "a:b", "1:2:3"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(ValueError, match="--skip-samples"):
        parse_range(text)


def test_loader_keeps_the_order_at_any_number_of_ranks(prepared) -> None:
    from ultramem_ds.data.mixture import Mixture

    mixture = Mixture(prepared, "train", seq_len=32, weights={}, seed=0)
    skips = SkipRanges.of([(3, 5), (9, 17)])
    for ranks in (1, 2, 4):
        seen = []
        for rank in range(ranks):
            loader = BatchLoader(
                mixture,
                global_batch_size=8,
                micro_batch_size=2,
                rank=rank,
                world_size=ranks,
                start_step=1,
                num_workers=0,
                skips=skips,
            )
            batches = iter(loader)
            for _ in range(2 * loader.micro_batches_per_step):
                batch = next(batches)
                seen += batch.sample_ids
                assert (batch.tokens[0].numpy() == mixture.sample(batch.sample_ids[0])).all()
            loader.close()
        assert sorted(seen) == remaining(skips)[8:24]
