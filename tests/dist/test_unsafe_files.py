"""Crafted files: no code runs, no file outside is read, and the message names the culprit."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.elastic_series import Leg, build_engine, run_legs
from tests.dist.test_elastic_integrity import latest, rerecord
from ultramem_ds.checkpoint.export import export_safetensors
from ultramem_ds.checkpoint.record import LAYOUT, _own_digest, rank_file
from ultramem_ds.checkpoint.safe import DamagedCheckpointError
from ultramem_ds.infer.load import load_model
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.checkpoint import directory as checkpoints

pytestmark = pytest.mark.dist


class Bomb:
    """Unpickled by a careless reader, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def leg(tmp_path_factory: pytest.TempPathFactory) -> Leg:
    """A run of one step on 2 ranks, with files of our own beside DeepSpeed's."""
    overrides = ("memory.table_optimizer=row-sparse",)
    run_dir = tmp_path_factory.mktemp("good")
    good = Leg(kind="ultramem", begin=0, end=1, run_dir=run_dir, overrides=overrides)
    run_ranks(run_legs, 2, [good])
    return good


PICKLES = {
    "zero_pp_rank_1_mp_rank_00_optim_states.pt": 1,
    "zero_pp_rank_0_mp_rank_00_model_states.pt": 0,
    "tables_rank_00001.pt": 1,
    "rng_rank_00000.pt": 0,
}


def errors_of(rank: int, world_size: int, leg: Leg, run_dirs: list[Path]) -> list[str]:
    """What resuming from each crafted run raises on this rank, by our loader or DeepSpeed's own."""
    engine = build_engine(leg, rank, world_size)
    found = []
    for run_dir in run_dirs:
        with pytest.raises(DamagedCheckpointError) as error:
            engine.load(latest(run_dir))
        found.append(str(error.value))
    path = latest(run_dirs[0])
    if rank == 1:  # reads its crafted file before anything collective
        with pytest.raises(DamagedCheckpointError):
            engine.engine.checkpoint_engine.load(str(path / list(PICKLES)[0]))
    engine.engine.destroy()
    return found


def test_crafted_pickles_are_refused(leg: Leg, tmp_path: Path) -> None:
    """Each kind of file, as torch.save or pickle writes it, the record fitting it or not."""
    mark = tmp_path / "mark"
    run_dirs, names = [], []
    for name, rank in PICKLES.items():
        for form in ("torch", "pickle", "unrecorded"):
            run_dir = tmp_path / f"{name}-{form}"
            shutil.copytree(leg.run_dir, run_dir)
            file = latest(run_dir) / name
            if form == "pickle":
                file.write_bytes(pickle.dumps(Bomb(mark)))
            else:
                torch.save({"module": {}, "optimizer_state_dict": Bomb(mark)}, file)
            if form != "unrecorded":
                rerecord(latest(run_dir), rank, [name])
            run_dirs.append(run_dir)
            names.append((name, form))
    for errors in run_ranks(errors_of, 2, leg, run_dirs):
        for error, (name, form) in zip(errors, names, strict=True):
            assert name in error
            expected = "system, which is no part of a checkpoint" if form == "torch" else name
            assert expected in error, (form, error)
    for run_dir, (name, _) in zip(run_dirs, names):
        if not name.startswith("rng"):  # which inference does not read
            with pytest.raises(ValueError, match=name):
                load_model(run_dir)
            if "model_states" not in name or "pickle" in run_dir.name:
                continue
            with pytest.raises(ValueError, match=name):
                export_safetensors(run_dir, tmp_path / "out")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb works


def rename_store(checkpoint: Path, name: str) -> None:
    """Let rank 1's record lead to another file."""
    path = checkpoint / rank_file(1)
    text = path.read_text().replace("zero_pp_rank_1_mp_rank_00_optim_states.pt", name)
    path.write_text(text)
    layout = json.loads((checkpoint / LAYOUT).read_text())
    layout["files"][name] = layout["files"].pop("zero_pp_rank_1_mp_rank_00_optim_states.pt")
    reseal(checkpoint, layout)
    rerecord_file(checkpoint, rank_file(1))


def rerecord_file(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    layout = json.loads((checkpoint / LAYOUT).read_text())
    layout["files"][name] |= {
        "num_bytes": len(content),
        "digest": hashlib.sha256(content).hexdigest(),
    }
    reseal(checkpoint, layout)


def reseal(checkpoint: Path, layout: dict[str, Any]) -> None:
    layout.pop("digest")
    (checkpoint / LAYOUT).write_text(json.dumps({**layout, "digest": _own_digest(layout)}))


def make_link(checkpoint: Path) -> None:
    file = checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.move(file, checkpoint.parent / "elsewhere.pt")
    file.symlink_to(checkpoint.parent / "elsewhere.pt")


ESCAPES: dict[str, tuple[Callable[[Path], None], str]] = {
    "climbs": (lambda c: rename_store(c, "../elsewhere.pt"), "'../elsewhere.pt', which is not in"),
    "absolute": (lambda c: rename_store(c, "/etc/passwd"), "'/etc/passwd', which is not inside"),
    "link": (make_link, "is a symbolic link"),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_records_lead_nowhere_else(name: str, leg: Leg, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(leg.run_dir, run_dir)
    craft, message = ESCAPES[name]
    craft(latest(run_dir))
    with pytest.raises(ValueError, match=message):
        load_model(run_dir)


def test_the_pointer_leads_nowhere_else(leg: Leg, tmp_path: Path) -> None:
    """``latest`` names a directory beside it, which is one and not a link to one."""
    good = latest(leg.run_dir)
    directory = checkpoints.checkpoints_dir(tmp_path / "run")
    directory.mkdir(parents=True)
    relative = os.path.relpath(good, directory)
    (directory / good.name).symlink_to(good)
    for text in (str(good), relative, good.name, "", "step-00000001/../step-00000001", "\0"):
        (directory / "latest").write_text(text)
        assert checkpoints.resume_candidates(tmp_path / "run") == []
        with pytest.raises(ValueError, match="is not a complete checkpoint"):
            checkpoints.find_checkpoint(tmp_path / "run")
