"""DeepSpeed's own tools on the default layout, ours on every other, and the safetensors export."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from tests.dist.elastic_series import KINDS, Leg, run_legs
from ultramem_ds.checkpoint import directory as checkpoints
from ultramem_ds.checkpoint.export import export_safetensors
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.state import KINDS as KINDS_OF_STATE
from ultramem_ds.exchange.directory import export_hf
from ultramem_ds.exchange.importing import import_model
from ultramem_ds.infer.load import load_model
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.zero.default_layout import write_default_layout

COLUMNS = ("memory.partition=dimension-wise", "memory.shard_group_size=2")
ROWS = ("memory.partition=number-wise",)


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Leg]:
    """Two steps on 2 ranks of each kind, UltraMem's tables by rows and by columns."""
    root = tmp_path_factory.mktemp("runs")
    made = {kind: Leg(kind=kind, begin=0, end=2, run_dir=root / kind) for kind in KINDS}
    for kind in ("pkm", "ultramem"):
        made[kind] = replace(made[kind], overrides=ROWS)
    made["columns"] = replace(made["ultramem"], run_dir=root / "columns", overrides=COLUMNS)
    run_ranks(run_legs, 2, list(made.values()))
    return made


def deepspeed_weights(run_dir: Path) -> dict[str, Tensor]:
    """What DeepSpeed's ``zero_to_fp32`` makes of a run's latest checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    directory = checkpoints.checkpoints_dir(run_dir)
    with contextlib.redirect_stdout(sys.stderr):
        weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(directory))
    return weights


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal to the last bit, apart from rows that pad tables."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            theirs[name].reshape(-1)[: value.numel()], value.reshape(-1), rtol=0, atol=0, msg=name
        )


@pytest.mark.dist
@pytest.mark.parametrize("name", ["dense", "pkm", "ultramem"])
def test_zero_to_fp32_reads_the_default_layout(legs: dict[str, Leg], name: str) -> None:
    """As written by training with the default partition."""
    run_dir = legs[name].run_dir
    assert_same_weights(load_model(run_dir).state_dict(), deepspeed_weights(run_dir))


@pytest.mark.dist
@pytest.mark.parametrize(("name", "world_size"), [("columns", 2), ("columns", 3), ("dense", 2)])
def test_converter_writes_the_default_layout(
    legs: dict[str, Leg], name: str, world_size: int, tmp_path: Path
) -> None:
    """After which ``zero_to_fp32`` reads what it could not before."""
    run_dir = legs[name].run_dir
    write_default_layout(run_dir, tmp_path, world_size)
    expected = load_model(run_dir).state_dict()
    assert_same_weights(expected, deepspeed_weights(tmp_path))
    assert_same_weights(expected, load_model(tmp_path).state_dict())


@pytest.mark.dist
def test_training_resumes_from_a_converted_checkpoint(legs: dict[str, Leg], tmp_path: Path) -> None:
    """Moments included, through DeepSpeed's own load: layouts agree."""
    write_default_layout(legs["columns"].run_dir, tmp_path, 2)
    converted = replace(legs["columns"], begin=2, end=4, overrides=ROWS, run_dir=tmp_path)
    direct = replace(converted, run_dir=legs["columns"].run_dir, overrides=COLUMNS, save=False)
    ours, theirs = run_ranks(run_legs, 2, [converted, direct])[0]
    # Two steps apart in the order of fp32 sums only.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["dense", "pkm", "moe", "columns"])
def test_safetensors_export_is_the_whole_model(
    legs: dict[str, Leg], name: str, tmp_path: Path
) -> None:
    """Read back by the format's own library, against what DeepSpeed reads where it can."""
    safetensors = pytest.importorskip("safetensors.torch")
    run_dir = legs[name].run_dir
    expected = load_model(run_dir).state_dict()
    if name in ("dense", "pkm"):  # other layouts: see the converter's test above
        assert_same_weights(expected, deepspeed_weights(run_dir))
    export_safetensors(run_dir, tmp_path / "model.safetensors")
    read = safetensors.load_file(tmp_path / "model.safetensors")
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(read[key], value), key
    export_safetensors(run_dir, tmp_path / "half.safetensors", "bf16")
    half = safetensors.load_file(tmp_path / "half.safetensors")
    assert all(torch.equal(half[k], v.bfloat16()) for k, v in expected.items())


@pytest.mark.dist
def test_universal_conversion_reads_the_default_layout(
    legs: dict[str, Leg], tmp_path: Path
) -> None:
    """DeepSpeed's ``ds_to_universal`` writes each parameter whole, moments included."""
    checkpoint = checkpoints.latest_checkpoint(legs["ultramem"].run_dir)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder"]
    command += [str(checkpoint), "--output_folder", str(tmp_path / "universal")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    reader = CheckpointReader(checkpoint)
    for name, record in reader.parameters.items():
        for kind in KINDS_OF_STATE:
            stored = torch.load(
                tmp_path / "universal" / "zero" / name / f"{kind}.pt", weights_only=False
            )
            whole = stored["param"] if isinstance(stored, dict) else stored
            expected_RC = torch.empty(record.block.num_rows, record.block.num_columns)
            reader.read(name, kind, record.block, expected_RC)
            assert kind == "fp32" or expected_RC.any(), (name, kind)
            numel = expected_RC.numel()  # tables are stored with the rows that pad them
            assert torch.equal(whole.reshape(-1)[:numel], expected_RC.reshape(-1)), (name, kind)


@pytest.mark.dist
def test_exported_directory_is_the_trained_model(legs: dict[str, Leg], tmp_path: Path) -> None:
    """Of every kind and layout, there and back, bit-equal; training starts from what came back."""
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "<unk>": 1}, unk_token="<unk>"))
    resumed = []
    for name, leg in legs.items():
        tokenizer.save(str(leg.run_dir / "tokenizer.json"))
        export_hf(leg.run_dir, tmp_path / name, "fp32", 20_000)
        import_model(tmp_path / name, tmp_path / f"{name}-run", 2)
        expected, back = (
            load_model(path).state_dict() for path in (leg.run_dir, tmp_path / f"{name}-run")
        )
        for key, value in expected.items():
            if not key.endswith("directions"):  # the run's are of the step before
                assert torch.equal(back[key], value), (name, key)
        if name in ("moe", "columns"):
            resumed.append(replace(leg, run_dir=tmp_path / f"{name}-run", begin=1, save=False))
    series = run_ranks(run_legs, 2, [replace(leg, end=2) for leg in resumed])[0]
    assert all(0 < loss < 10 for (loss, _), in series)
