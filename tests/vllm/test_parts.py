"""The plugin's own arithmetic, and what it refuses, without an engine."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
from vllm.engine.arg_utils import EngineArgs

from ultramem_ds.vllm.memory import RowShardedTable
from ultramem_ds.vllm.query_conv import past_slots
from ultramem_ds.vllm.weights import load_tensors


def test_past_slots_of_two_requests():
    slots_Tk, exists_Tk = past_slots(
        torch.tensor([0, 2, 3]), torch.tensor([6, 1]), torch.tensor([[7, 2], [5, 0]]), 4, 2
    )
    # Positions 2, 3 and 3, 4 of the first request; nothing before the second one's first token.
    assert slots_Tk[:2].tolist() == [[30, 31], [31, 8]]
    assert exists_Tk.tolist() == [[True, True], [True, True], [False, False]]


@pytest.mark.parametrize("num_parts", [1, 3])
def test_rows_over_four_ranks(num_parts: int):
    whole_NV = torch.arange(10.0)[:, None].expand(10, 2)
    held = []
    for rank in range(4):
        table = RowShardedTable(10, 2, 0, rank, 4)
        first = 0
        for part_RV in whole_NV.chunk(num_parts):
            table.take(part_RV, first)
            first += len(part_RV)
        held.append(table.weight[:, 0].tolist())
    assert held == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 0]]
    with pytest.raises(ValueError, match="rows 8 to 12 of 2 columns are none of a table of 10"):
        table.take(torch.zeros(4, 2), 8)


def test_a_tensor_too_few_and_one_too_many():
    taken: dict[str, torch.Tensor] = {}
    takers = {"a": lambda tensor: taken.update(a=tensor), "b": lambda tensor: None}
    with pytest.raises(ValueError, match="the export lacks b"):
        load_tensors(takers, [("a", torch.ones(1))])
    with pytest.raises(ValueError, match="the export holds c, which config.json has no place for"):
        load_tensors(takers, [("c", torch.ones(1))])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism is not supported: a memory layer"),
        ({"enable_expert_parallel": True}, "expert parallelism is not supported: experts are"),
        ({"quantization": "fp8"}, "quantization fp8 is not supported: keys and tables"),
        ({"tensor_parallel_size": 3}, "intermediate_size=64 cannot be split over"),
    ],
)
def test_refusals(export, arguments: dict, sentence: str):
    directory = str(export("ultramem").directory)
    with pytest.raises(ValueError, match=sentence):
        EngineArgs(model=directory, dtype="float32", **arguments).create_engine_config()


def test_a_newer_format(export, tmp_path):
    directory = shutil.copytree(export("dense").directory, tmp_path / "newer")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99 is newer than 1"):
        EngineArgs(model=str(directory), dtype="float32").create_engine_config()
