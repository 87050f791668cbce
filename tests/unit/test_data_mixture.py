"""The global sample order: every sequence once per epoch, weights kept, random access, resuming."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpus import write_megatron
from ultramem_ds.data import mixture as mixture_module
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.manifest import Manifest, SubsetInfo, TokenizerInfo
from ultramem_ds.data.micro_batch import Boundaries
from ultramem_ds.data.mixture import Mixture, num_sequences, quotas_of
from ultramem_ds.data.permutation import Permutation
from ultramem_ds.data.subsets import REDPAJAMA_WEIGHTS
from ultramem_ds.data.validation import ValidationSet, validation_subsets

VOCAB_SIZE = 60_000


def make_data(directory: Path, subsets: dict[str, list[int]], split: str = "train") -> Path:
    """A prepared directory: subset name -> document lengths; ids are the tokens' positions."""
    root = directory / "validation" if split == "validation" else directory
    root.mkdir(parents=True, exist_ok=True)
    infos = []
    for number, (name, lengths) in enumerate(sorted(subsets.items())):
        ends = np.cumsum(lengths)
        ids = [
            (np.arange(end - length, end) + 10_000 * number) % VOCAB_SIZE
            for end, length in zip(ends, lengths)
        ]
        write_megatron(root / name, ids, code=8, dtype="<u2")
        info = SubsetInfo(
            subset=name,
            split=split,
            documents=len(lengths),
            tokens=sum(lengths),
            text_bytes=4 * sum(lengths),
            dtype="uint16",
            sha256=f"{name}{lengths}",
            tokenizer_hash="t",
            eos_id=0,
            source_files=(),
            fingerprint="",
        )
        infos.append(info)
    Manifest(
        version=1,
        fingerprint="",
        tokenizer=TokenizerInfo(file="tokenizer.json", hash="t", vocab_size=VOCAB_SIZE, eos_id=0),
        validation_share=0.0,
        subsets=tuple(infos),
        records=0,
        bad_records={},
        duplicates={},
    ).save(directory)
    return directory


def make_mixture(directory, subsets, *, seq_len=8, weights=None, seed=0):
    data = make_data(directory, subsets)
    return Mixture(data, "train", seq_len=seq_len, weights=weights or {}, seed=seed)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_permutations_are_bijections(size, seed):
    order = Permutation(size, seed)
    assert sorted(map(order, range(size))) == list(range(size))


def test_permutations_look_random_and_never_change():
    order = Permutation(10_000, "x")
    images = np.array([order(k) for k in range(10_000)])
    # Of n random pairs of successors about half rise; five standard deviations of sqrt(n / 12).
    assert abs((np.diff(images) > 0).sum() - 5_000) < 5 * (10_000 / 12) ** 0.5
    assert abs(np.corrcoef(np.arange(10_000), images)[0, 1]) < 0.05
    assert [Permutation(10**12, 7)(k) for k in range(2)] == PERMUTATION_GOLDEN


# Resuming a run with a newer version must find the same order: these numbers must not change.
PERMUTATION_GOLDEN = [417322016659, 530824087766]
ORDER_GOLDEN = [(1, 95, 0), (1, 53, 0), (0, 27, 0), (1, 67, 468), (1, 8, 6696428)]


@given(
    weights=st.dictionaries(st.text("abcdef", min_size=1), st.floats(1e-6, 1e6), min_size=1),
    block=st.sampled_from([16, 1000, 1 << 16]),
)
@settings(max_examples=200, deadline=None)
def test_quotas(weights, block):
    if len(weights) > block:
        return
    quotas = quotas_of(weights, block)
    assert sum(quotas.values()) == block
    raised = {name for name, quota in quotas.items() if quota == 1}
    rest = {name: weight for name, weight in weights.items() if name not in raised}
    for name, weight in rest.items():
        # Largest remainders are off by less than one sample, after at most one for each tiny one.
        share = weight / sum(weights.values())
        assert -1 - len(raised) < quotas[name] - block * share < 1
    for name in raised:
        assert block * weights[name] / sum(weights.values()) < 2 + len(raised)


@given(
    sizes=st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=8), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
    seq_len=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_sequence_exactly_once_per_epoch(tmp_path_factory, sizes, weights, seq_len, seed):
    subsets = {f"s{number}": lengths for number, lengths in enumerate(sizes)}
    subsets = {name: [*lengths, 10] for name, lengths in subsets.items()}
    mixture = make_mixture(
        tmp_path_factory.mktemp("data"),
        subsets,
        seq_len=seq_len,
        weights=dict(zip(subsets, weights)),
        seed=seed,
    )
    drawn: dict[str, list[tuple[int, int]]] = {name: [] for name in subsets}
    for index in range(600):
        location = mixture.locate(index)
        drawn[mixture.subsets[location.subset]].append((location.epoch, location.sequence))
    for name, lengths in subsets.items():
        count = num_sequences(sum(lengths), seq_len)
        assert mixture.num_sequences[name] == count == (sum(lengths) - 1) // seq_len
        for begin in range(0, len(drawn[name]), count):
            epoch = drawn[name][begin : begin + count]
            assert {number for number, _ in epoch} <= {begin // count}
            assert len({sequence for _, sequence in epoch}) == len(epoch), "no replacement"
            if len(epoch) == count:
                assert {sequence for _, sequence in epoch} == set(range(count))


def test_samples_are_the_tokens_of_the_stream(tmp_path):
    lengths = [5, 9, 1, 30, 2, 20]
    mixture = make_mixture(tmp_path, {"a": lengths})
    for index in range(20):
        sequence = mixture.locate(index).sequence
        sample = mixture.sample(index)
        assert sample.dtype == np.int64
        assert sample.tolist() == list(range(sequence * 8, sequence * 8 + 9))


@pytest.mark.parametrize("end", [1, 7, 100, 1000, 5_000, 65_536, 65_537, 200_000])
def test_proportions_of_every_prefix(tmp_path, end):
    weights = REDPAJAMA_WEIGHTS
    mixture = make_mixture(tmp_path, {name: [50, 60] for name in weights})
    shares = mixture.proportions(0, end)
    total = sum(weights.values())
    for name, weight in weights.items():
        # A prefix is off by a few samples (one per subset at most on either side), and the quotas
        # by half of 1/65,536.
        assert abs(shares[name] - weight / total) < 7 / end + 1e-5
    if end <= 5_000:
        counted = Counter(mixture.subset_of(index) for index in range(end))
        assert shares == {name: counted[name] / end for name in mixture.subsets}
        begin = end // 3
        counted = Counter(mixture.subset_of(index) for index in range(begin, end))
        part = mixture.proportions(begin, end)
        assert part == {name: counted[name] / (end - begin) for name in mixture.subsets}


def test_order_across_blocks_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture_module, "BLOCK", 10)
    mixture = make_mixture(tmp_path, {"a": [100], "b": [200]}, weights={"a": 0.3, "b": 0.7})
    drawn = [mixture.locate(index) for index in range(100)]
    for subset, name in enumerate(mixture.subsets):
        count = mixture.num_sequences[name]
        mine = [place for place in drawn if place.subset == subset]
        assert len(mine) == [30, 70][subset]
        assert [place.epoch for place in mine] == [k // count for k in range(len(mine))]


def test_the_order_never_changes(tmp_path):
    mixture = make_mixture(tmp_path, {"a": [1000], "b": [900]}, weights={"a": 1, "b": 3}, seed=5)
    places = [mixture.locate(index) for index in (0, 1, 2, 70_000, 10**9)]
    assert [(place.subset, place.sequence, place.epoch) for place in places] == ORDER_GOLDEN


def test_default_weights(tmp_path):
    def weights_of(directory, subsets):
        return make_mixture(directory, subsets).weights

    known = weights_of(tmp_path / "1", {"c4": [50], "arxiv": [500]})
    assert known["c4"] == pytest.approx(0.148 / (0.148 + 0.024), abs=1e-5)
    other = weights_of(tmp_path / "2", {"c4": [50], "mine": [150]})
    assert other["c4"] == pytest.approx(0.25, abs=1e-5)


def test_short_and_unknown_subsets(tmp_path, caplog):
    mixture = make_mixture(tmp_path, {"a": [8], "b": [9]})
    assert mixture.subsets == ("b",), "9 tokens are one sequence of 8 + 1"
    assert "subset a has 8 tokens" in caplog.text
    data = tmp_path
    for weights, message in [
        ({"a": 1.0}, "data.weights.a=1.0: subset a has 8 tokens"),
        ({"none": 1.0}, "no such subset, only a, b"),
        ({"b": -1.0}, "must not be negative"),
        ({"b": 0.0}, "every subset has data.weights 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mixture(data, "train", seq_len=8, weights=weights, seed=0)
    with pytest.raises(ValueError, match=r"sequence of 16 \+ 1 tokens"):
        Mixture(data, "train", seq_len=16, weights={}, seed=0)


def test_fingerprints(tmp_path):
    def fingerprint(name, subsets, **options):
        return make_mixture(tmp_path / name, subsets, **options).fingerprint

    base = fingerprint("a", {"a": [50], "b": [60]})
    assert fingerprint("b", {"a": [50], "b": [60]}) == base
    others = [
        fingerprint("c", {"a": [50], "b": [61]}),
        fingerprint("d", {"a": [50], "c": [60]}),
        fingerprint("e", {"a": [50], "b": [60]}, seq_len=9),
        fingerprint("f", {"a": [50], "b": [60]}, seed=1),
        fingerprint("g", {"a": [50], "b": [60]}, weights={"a": 1.0, "b": 2.0}),
    ]
    assert len({base, *others}) == 6


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    make_data(tmp_path, {"a": [50]})
    value = json.loads((tmp_path / "manifest.json").read_text())
    value["tokenizer"]["vocab_size"] = 20
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    mixture = Mixture(tmp_path, "train", seq_len=8, weights={}, seed=0)
    with pytest.raises(ValueError, match="subset a has ids outside"):
        for index in range(6):
            mixture.sample(index)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (data / "manifest.json").unlink(), "no manifest.json"),
        (lambda data: (data / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda data: (data / "manifest.json").write_text("{}"), "not a manifest"),
        (lambda data: (data / "manifest.json").write_text('{"version": 9}'), "version 9"),
        (lambda data: (data / "a.bin").unlink(), "missing or torn"),
    ],
)
def test_damaged_directories_are_refused(tmp_path, damage, message):
    make_data(tmp_path, {"a": [50]})
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Mixture(tmp_path, "train", seq_len=8, weights={}, seed=0)
    with pytest.raises(ValueError, match="does not exist"):
        Mixture(tmp_path / "none", "train", seq_len=8, weights={}, seed=0)


def micro_batches(mixture, steps, *, start=0, **options):
    """{(step, number in the step): sample ids} over all ranks, and every rank's count per step."""
    size, micro, ranks = options["size"], options["micro"], options["ranks"]
    found = {}
    for rank in range(ranks):
        loader = BatchLoader(
            mixture,
            global_batch_size=size,
            micro_batch_size=micro,
            rank=rank,
            world_size=ranks,
            start_step=start,
            num_workers=options.get("workers", 0),
            prefetch=2,
        )
        batches = iter(loader)
        for step in range(start, start + steps):
            for turn in range(loader.micro_batches_per_step):
                batch = next(batches)
                found[step, turn * ranks + rank] = batch.sample_ids
                expected = [mixture.sample(index).tolist() for index in batch.sample_ids]
                assert batch.tokens.tolist() == expected
        loader.close()
        assert next(batches, None) is None, "a closed loader ends"
    return found


@given(
    micro=st.integers(1, 3),
    turns=st.integers(1, 2),
    ranks=st.sampled_from([1, 2, 3, 4]),
    other=st.sampled_from([1, 2, 3, 4]),
    cut=st.integers(0, 4),
)
@settings(max_examples=25, deadline=None)
def test_any_world_size_and_resume_point_give_the_same_micro_batches(
    tmp_path_factory, micro, turns, ranks, other, cut
):
    mixture = make_mixture(tmp_path_factory.mktemp("data"), {"a": [90], "b": [70, 3]})
    size = micro * turns * 12  # a multiple of every number of ranks
    whole = micro_batches(mixture, 4, size=size, micro=micro, ranks=1)
    samples = [index for key in sorted(whole) for index in whole[key]]
    assert samples == list(range(4 * size))
    first = micro_batches(mixture, cut, size=size, micro=micro, ranks=ranks)
    rest = micro_batches(mixture, 4 - cut, start=cut, size=size, micro=micro, ranks=other)
    assert first | rest == whole


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_order(tmp_path, workers):
    mixture = make_mixture(tmp_path, {"a": [90], "b": [70, 3]})
    options = {"size": 12, "micro": 2, "ranks": 2}
    assert micro_batches(mixture, 5, workers=workers, **options) == micro_batches(
        mixture, 5, **options
    )


def test_errors_in_workers_arrive(tmp_path):
    mixture = make_mixture(tmp_path, {"a": [90]})
    mixture.vocab_size = 1
    loader = BatchLoader(
        mixture, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1, num_workers=1
    )
    with pytest.raises(ValueError, match="outside the tokenizer"):
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(tmp_path, workers):
    """Or a resumed run, which starts a loader where another did not, would drop other units."""
    loader = BatchLoader(
        make_mixture(tmp_path, {"a": [90]}),
        global_batch_size=1,
        micro_batch_size=1,
        rank=0,
        world_size=1,
        num_workers=workers,
    )
    before = torch.get_rng_state()
    next(iter(loader))
    loader.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_requests_to_stop_are_not_for_workers(tmp_path):
    """They reach every process of a job; a rank that lost its worker could not save."""
    mixture = make_mixture(tmp_path, {"a": [900]})
    loader = BatchLoader(
        mixture, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1, prefetch=1
    )
    before = psutil.Process().children()
    batches = iter(loader)
    next(batches)
    (worker,) = set(psutil.Process().children()) - set(before)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        worker.send_signal(number)
    for _ in range(10):
        next(batches)
    loader.close()
    del batches
    assert not psutil.wait_procs([worker], timeout=10)[1]


LEAVE_OPEN = """
import sys
from pathlib import Path
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.mixture import Mixture
mixture = Mixture(Path(sys.argv[1]), "train", seq_len=8, weights={}, seed=0)
loader = BatchLoader(mixture, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1)
batches = iter(loader)
next(batches)
raise ValueError("open")
"""


def test_a_process_ends_with_its_loader_open(tmp_path):
    """Python asks what is left of its children by SIGTERM and waits for them."""
    make_data(tmp_path, {"a": [900]})
    command = [sys.executable, "-c", LEAVE_OPEN, str(tmp_path)]
    errors = tmp_path / "errors"  # a pipe would stay open as long as the worker
    with open(errors, "w") as file:
        done = subprocess.run(command, stderr=file, timeout=60)
    assert done.returncode == 1
    assert errors.read_text().rstrip().endswith("ValueError: open")


def test_global_batch_must_divide(tmp_path):
    mixture = make_mixture(tmp_path, {"a": [90]})
    with pytest.raises(ValueError, match="global_batch_size=12 must be a multiple"):
        BatchLoader(mixture, global_batch_size=12, micro_batch_size=2, rank=0, world_size=4)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=4, max_size=30),
    seq_len=st.integers(1, 12),
    mask=st.booleans(),
    reset=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_document_boundaries(tmp_path_factory, lengths, seq_len, mask, reset):
    lengths = [*lengths, 13]
    mixture = make_mixture(tmp_path_factory.mktemp("data"), {"a": lengths}, seq_len=seq_len)
    loader = BatchLoader(
        mixture,
        global_batch_size=2,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        num_workers=0,
        boundaries=Boundaries(document_mask=mask, reset_positions=reset),
    )
    batch = next(iter(loader))
    owner = np.repeat(np.arange(len(lengths)), lengths)  # document of every token of the stream
    starts = []
    for index in batch.sample_ids:
        begin = mixture.locate(index).sequence * seq_len
        mine = owner[begin : begin + seq_len].tolist()
        starts.append([mine.index(document) for document in mine])
    assert (batch.doc_ids is not None) == mask and (batch.positions is not None) == reset
    if batch.doc_ids is not None:
        assert batch.doc_ids.tolist() == starts
    if batch.positions is not None:
        expected = [[k - start for k, start in enumerate(row)] for row in starts]
        assert batch.positions.tolist() == expected


def test_validation_sets(tmp_path):
    make_data(tmp_path, {"a": [5, 20, 8], "short": [3]}, split="validation")
    assert validation_subsets(tmp_path) == ["a", "short"]
    held_out = ValidationSet(tmp_path, "a", 8)
    assert len(held_out) == 4  # 33 tokens: 4 x 8 and one more target
    assert [ids.tolist() for ids in held_out] == [
        list(range(begin, begin + 9)) for begin in (0, 8, 16, 24)
    ]
    assert held_out.bytes_per_token == 4.0
    with pytest.raises(IndexError):
        held_out[4]
    short = ValidationSet(tmp_path, "short", 8)
    assert len(short) == 0 and list(short) == []
    with pytest.raises(ValueError, match="no validation split of 'b', only of a, short"):
        ValidationSet(tmp_path, "b", 8)
