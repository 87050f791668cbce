"""Validation: every predicted token once, documents as in training, one meaning of ``all``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.test_data_mixture import make_data
from ultramem_ds.config.load import load_config
from ultramem_ds.config.schema import Config
from ultramem_ds.data.micro_batch import MicroBatch
from ultramem_ds.train.evaluate import Reader, SubsetLoss, evaluate

SEQ_LEN = 8
# Tokens per document: 5 sequences with one partial behind them; 2; none.
LENGTHS = {"a": [3, 9, 1, 20, 8, 4], "b": [5, 12], "short": [4]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path, LENGTHS, split="validation")  # ids count up from 10,000 x number


def config(mask: bool, reset: bool) -> Config:
    words = {"data.document_mask": mask, "data.reset_positions": reset, "model.seq_len": SEQ_LEN}
    return load_config(
        "dense-debug", [f"{key}={str(value).lower()}" for key, value in words.items()]
    )


def loss_of_token(target: int, depth: int, position: int) -> float:
    """Depends on everything that a model may see: its document's length so far, its position."""
    return target + 0.1 * depth + 0.01 * position


def stand_in(batch: MicroBatch) -> Tensor:
    """A model whose loss of a token is :func:`loss_of_token`."""
    index_S = torch.arange(SEQ_LEN)
    starts = batch.doc_ids if batch.doc_ids is not None else torch.zeros(SEQ_LEN)
    positions = batch.positions if batch.positions is not None else index_S
    return (batch.tokens[:, 1:] + 0.1 * (index_S - starts) + 0.01 * positions).double().mean()


def expected(stream: list[int], lengths: list[int], mask: bool, reset: bool, limit: int) -> float:
    """Token by token over the stream, from the documents' lengths alone."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    losses = []
    for first in range(0, min(limit, (len(stream) - 1) // SEQ_LEN) * SEQ_LEN, SEQ_LEN):
        for i in range(SEQ_LEN):
            same = [j for j in range(i + 1) if owner[first + j] == owner[first + i]]
            inside = len(same) - 1
            losses.append(
                loss_of_token(stream[first + i + 1], inside if mask else i, inside if reset else i)
            )
    return math.fsum(losses) / len(losses)


def evaluate_on(
    data: Path, settings: Config, world_size: int, batch: int, limit: int
) -> list[dict[str, SubsetLoss]]:
    """Results on each of ``world_size`` ranks, one after the other: first their sums, then all."""
    shares: list[list[Tensor]] = []
    for rank in range(world_size):
        mine: list[Tensor] = []

        def keep(tensor: Tensor, mine: list[Tensor] = mine) -> Tensor:
            mine.append(tensor.clone())
            return tensor

        _run(data, settings, Reader(rank, world_size, "cpu", keep), batch, limit)
        shares.append(mine)
    sums = [sum(parts) for parts in zip(*shares, strict=True)]
    results = []
    for rank in range(world_size):
        totals = iter(sums)
        reader = Reader(rank, world_size, "cpu", lambda _, totals=totals: next(totals))
        results.append(_run(data, settings, reader, batch, limit))
    return results


def _run(
    data: Path, settings: Config, reader: Reader, batch: int, limit: int
) -> dict[str, SubsetLoss]:
    return evaluate(
        stand_in, data, settings, micro_batch_size=batch, max_sequences=limit, reader=reader
    )


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize(("world_size", "batch"), [(1, 1), (1, 4), (2, 2), (3, 2), (4, 8)])
@pytest.mark.parametrize(("mask", "reset"), [(False, False), (True, False), (True, True)])
def test_losses_are_those_of_a_loop_over_tokens(
    data: Path, mask: bool, reset: bool, world_size: int, batch: int, limit: int
) -> None:
    """At uneven shares too: 5 and 2 sequences on up to 4 ranks."""
    found = evaluate_on(data, config(mask, reset), world_size, batch, limit)
    assert all(result == found[0] for result in found)
    streams = {
        name: [10_000 * number + i for i in range(sum(LENGTHS[name]))]
        for number, name in enumerate(sorted(LENGTHS))
    }
    sequences = {"a": 5, "b": 2}
    assert set(found[0]) == {"a", "b", "all"}
    want = {
        name: expected(streams[name], LENGTHS[name], mask, reset, limit or 99) for name in sequences
    }
    for name, loss in want.items():
        taken = min(limit or 99, sequences[name])
        assert found[0][name].loss == pytest.approx(loss, rel=1e-6)  # positions are float32
        assert found[0][name].tokens == taken * SEQ_LEN
    # Weighted by what there is, not by what was looked at.
    total = sum(want[name] * sequences[name] for name in want) / sum(sequences.values())
    assert found[0]["all"].loss == pytest.approx(total, rel=1e-6)


def test_bits_per_byte_of_all_are_those_of_the_text(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["subsets"][1]["text_bytes"] *= 3  # 12 bytes per token of b, 4 of a
    (data / "manifest.json").write_text(json.dumps(manifest))
    result = evaluate(stand_in, data, config(False, False), micro_batch_size=2, max_sequences=2)
    bytes_per_token = (5 * 4 + 2 * 12) / 7
    bits = result["all"].loss / math.log(2)
    assert result["all"].bits_per_byte == pytest.approx(bits / bytes_per_token)
    assert result["all"].tokens == 4 * SEQ_LEN  # those that were looked at
