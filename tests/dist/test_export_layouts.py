"""Exports of what trains sharded, offloaded or in bf16 against the live model that was saved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor

pytest.importorskip("transformers", reason="the extra hf is not installed")
from transformers import AutoModelForCausalLM

import ultramem_ds.hf  # noqa: F401 - registers the model family
from tests.dist.elastic_series import Leg, build_engine, micro_batches
from tests.dist.test_elastic_nvme import libaio, nvme_file
from tests.unit.export_oracle import ExportOracle
from ultramem_ds.config.deepspeed import CONFIG_DIR
from ultramem_ds.exchange.directory import export_hf
from ultramem_ds.infer.branch import Branch
from ultramem_ds.model.lm import Scored
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.zero.deepspeed_import import deepspeed

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SHARD_BYTES = 20_000  # a table of 729 rows of 16 takes 46,656
EXPERT = re.compile(r"\.mlp\.moe\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")
GATE = ".mlp.moe.deepspeed_moe.gate.wg."
# Where the leg's config says nothing else: ZeRO-3 without offload; dense ZeRO-1, experts ZeRO-2.
OVERRIDES = {
    "dense": (),
    "moe": (),
    "pkm": ("memory.partition=number-wise",),
    "number-wise": ("memory.partition=number-wise",),
    "owner-pooled": ("memory.partition=owner-pooled",),
    "dimension-wise": ("memory.partition=dimension-wise",),
    "copies": ("memory.partition=number-wise", "memory.shard_group_size=1"),
    "row-sparse": ("memory.table_optimizer=row-sparse", "memory.partition=owner-pooled"),
    "cpu-offload": ("memory.partition=number-wise",),
    "nvme-offload": ("memory.partition=number-wise", "memory.knum=201"),
    "bf16": ("train.precision=bf16", "memory.partition=dimension-wise"),
    "bf16-cpu-offload": ("train.precision=bf16", "memory.partition=owner-pooled"),
}


class Live(NamedTuple):
    """What one rank saw of a model that it trained: its logits, and the weights that it held."""

    logits: Tensor
    weights: dict[str, list[tuple[tuple[int, int], Tensor]]]  # name -> (row, column), block


def tokens_of(leg: Leg) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(leg.config.model.vocab_size, (2, 16), generator=generator)


def weights_of(engine: Any, rank: int) -> Iterator[tuple[str, tuple[int, int], Tensor]]:
    """The training process' own tensors, under the one-process model's names."""
    tables = (
        {}
        if engine.tables is None
        else dict(zip(map(id, engine.tables.params), engine.tables.shards))
    )
    for name, param in engine.model.named_parameters():
        if id(param) in tables:
            shard = tables[id(param)]
            block = shard.layout.block(shard.spec)
            held = shard.values()[: block.num_rows]
            yield name, (block.first_row, block.first_column), held.detach().cpu().clone()
            continue
        with deepspeed.zero.GatheredParameters([param] if hasattr(param, "ds_id") else []):
            value = param.detach().cpu().clone()
        expert = EXPERT.search(name)
        if expert:  # two of the four on each rank
            name = EXPERT.sub(f".mlp.experts.{2 * rank + int(expert[1])}.", name)
        yield name.replace(GATE, ".mlp.gate."), (0, 0), value


def train_and_look(rank: int, world_size: int, legs: list[Leg]) -> list[Live]:
    """Body for ``run_ranks``: two steps of each leg, saved; then the live model's own answers."""
    found = []
    for leg in legs:
        engine = build_engine(leg, rank, world_size)
        batches = micro_batches(leg.config, engine.ranks, 0)
        for step in range(leg.end):
            engine.train_step(batches, step)
        engine.save(leg.run_dir, leg.end, "test data", wait=True)
        engine.engine.eval()
        tokens_BS = tokens_of(leg)
        with torch.no_grad():
            branch = Branch(engine.model, [tokens_BS.shape[1]] * len(tokens_BS))
            scored = Scored(branch, torch.arange(tokens_BS.numel()))
            logits_MW = engine.model(tokens_BS, scored=scored)
        weights: dict[str, list[tuple[tuple[int, int], Tensor]]] = {}
        for name, place, value in weights_of(engine, rank):
            weights.setdefault(name, []).append((place, value))
        found.append(Live(logits_MW.float().view(*tokens_BS.shape, -1), weights))
        engine.engine.destroy()
    return found


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Leg]:
    root = tmp_path_factory.mktemp("layouts")
    cpu_offload = CONFIG_DIR / "ultramem_zero3_cpu_offload.json"
    made = {}
    for name, overrides in OVERRIDES.items():
        kind = name if name in ("dense", "moe", "pkm") else "ultramem"
        leg = Leg(kind=kind, begin=0, end=2, run_dir=root / name, overrides=overrides)
        if name.endswith("cpu-offload"):
            leg = replace(leg, deepspeed_file=cpu_offload)
        if name == "nvme-offload":
            if not libaio():
                continue
            leg = replace(leg, deepspeed_file=nvme_file(root))
        made[name] = leg
    return made


@pytest.fixture(scope="module")
def live(legs: dict[str, Leg]) -> dict[str, list[Live]]:
    """By leg, what both ranks saw."""
    ranks = run_ranks(train_and_look, 2, list(legs.values()), timeout_s=500)
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(legs)}


def exported_weights(directory: Path) -> dict[str, Tensor]:
    """Read by safetensors' own library; a table's parts put together by their numbers."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for file in directory.glob("*.safetensors"):
        for name, value in load_file(file).items():
            part = re.fullmatch(r"(.*\.values)\.part_(\d+)\.weight", name)
            if part:
                parts.setdefault(f"{part[1]}.weight", {})[int(part[2])] = value
            else:
                found[name] = value
    for name, tensors in parts.items():
        assert len(tensors) > 1
        found[name] = torch.cat([tensors[p] for p in range(len(tensors))])
    return found


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_export_is_what_was_trained(
    legs: dict[str, Leg], live: dict[str, list[Live]], name: str, tmp_path: Path
) -> None:
    """Every weight bit by bit, the logits to rounding; tables in parts."""
    if name not in legs:
        pytest.skip("libaio and its headers (libaio-dev) are not installed")
    leg = legs[name]
    vocabulary = {"<|endoftext|>": 0, "<unk>": 1}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(
        str(leg.run_dir / "tokenizer.json")
    )
    precision = leg.config.train.precision
    export_hf(leg.run_dir, tmp_path / "export", precision, SHARD_BYTES)
    exported = exported_weights(tmp_path / "export")
    seen: set[str] = set()
    for rank in live[name]:
        for own_name, blocks in rank.weights.items():
            theirs = "lm_head.weight" if own_name == "head.weight" else f"model.{own_name}"
            seen.add(theirs)
            for (row, column), block in blocks:
                whole = exported[theirs]
                if (row, column) != (0, 0) or block.shape != whole.shape:
                    whole = whole[row : row + block.shape[0], column : column + block.shape[1]]
                assert torch.equal(whole, block.to(whole.dtype)), own_name
                if precision == "bf16" and ".mlp.gate." not in own_name:
                    assert block.dtype == torch.bfloat16, own_name
    derived = {n for n in exported if n.endswith("directions") or ".shuffle." in n}
    assert seen == exported.keys() - derived

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto").eval()
    tokens_BS = tokens_of(leg)
    with torch.no_grad():
        found = model(tokens_BS).logits.float()
    expected = live[name][0].logits
    if precision == "bf16":
        # 8 bits of mantissa through two blocks: in near ties some tokens select other slots.
        similarity = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
        assert similarity.median() > 0.9999 and similarity.min() > 0.9
        return
    # fp32 sums in another order, within 1e-5 of the largest logit; the files in fp64 likewise.
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    oracle = ExportOracle(tmp_path / "export")
    for ids, logits in zip(tokens_BS.tolist(), expected):
        assert float((oracle.logits(ids) - logits).abs().max()) <= 1e-5 * scale
