"""Three classes of keys when a run goes on: as data, and each refusal's advice followed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.dist.launching import ROOT
from ultramem_ds.checkpoint.directory import TrainerState
from ultramem_ds.config.load import load_config, load_run_config, to_dict, valid_keys
from ultramem_ds.train.going_on import (
    changes_since,
    check_changes,
    entry_of,
    notes_on,
    read_history,
    write_config,
)
from ultramem_ds.train.keys import DATA, TABLE, Change, Freedom, freedom_of
from ultramem_ds.watch.guards import TooManyBadStepsError

CHECKPOINT = Path("run/checkpoints/step-00000010")


def state(*overrides: str, preset: str = "ultramem-debug", data: str = "d" * 64) -> TrainerState:
    return TrainerState(
        step=10,
        consumed_samples=160,
        data_fingerprint=data,
        world_size=2,
        partition="number-wise",
        zero_stage=3,
        config=to_dict(load_config(preset, overrides)),
    )


def go_on(*overrides: str, extend: bool = False, preset: str = "ultramem-debug") -> list[Change]:
    """Changes of a run that goes on under ``overrides``; raises where it may not."""
    old = state(preset=preset)
    config = load_config(preset, overrides)
    changes = changes_since(CHECKPOINT, old, config, "d" * 64)
    check_changes(CHECKPOINT, old, changes, extend)
    return changes


def test_the_table_names_keys_that_exist_and_none_twice() -> None:
    named = [key for keys in TABLE.values() for key in keys]
    assert len(named) == len(set(named))
    assert set(named) - {DATA, "preset"} <= set(valid_keys())
    decisive = ("model.hidden_size", "memory.knum", "moe.num_experts", "model.kind")
    assert {freedom_of(key) for key in decisive} == {Freedom.MODEL}


# Issue: log, eval, save, keep, workers, prefetch, watchdog, background, guard thresholds.
FREE = [
    "train.log_every=1",
    "train.eval_every=3",
    "train.eval_sequences=4",
    "train.save_every=7",
    "train.keep_last=1",
    "train.keep_every=5",
    "train.stop_at_step=12",
    "train.watchdog_s=1200",
    "train.background_save=true",
    "train.desync_every=1",
    "train.max_bad_steps=3",
    "train.grad_spike_sigma=4",
    "train.micro_batch_size=1",
    "train.activation_checkpointing=true",
    "data.num_workers=0",
    "data.prefetch=2",
    "memory.partition=dimension-wise",
    "memory.kernel=reference",
    "memory.stats_every=9",
    "memory.dedup=true",
    "memory.async_lookup=true",
]
EXTEND = [
    "optim.lr=0.001",
    "optim.weight_decay=0",
    "optim.beta2=0.99",
    "optim.clip_grad=0.5",
    "train.max_steps=5000",
    "train.rollback=true",
    "train.seed=7",
    "model.dropout=0.3",
    "data.weights.a=1",
    "data.document_mask=true",
    "train.grad_spike=skip",
]
START = ["train.global_batch_size=32", "train.precision=bf16", "model.seq_len=64"]
MODEL = ["model.hidden_size=64", "memory.knum=20", "model.vocab_size=1024", "memory.top_m=4"]


@pytest.mark.parametrize("override", FREE)
def test_free_keys_are_noted(override: str) -> None:
    (change,) = go_on(override)
    notes = notes_on([change], state(), load_config("ultramem-debug", [override]))
    assert len(notes) == 1 and notes[0].startswith("changed from step 10 on: ")
    assert override.split("=")[0] in notes[0]


@pytest.mark.parametrize("override", EXTEND)
def test_extension_is_refused_until_its_advice_is_followed(override: str) -> None:
    key = re.sub(r"(data\.weights).*", r"\1", override).split("=")[0]
    with pytest.raises(ValueError, match=f"{key}=.*add --extend to go on with the new"):
        go_on(override)
    changes = go_on(override, extend=True)
    assert [change.key for change in changes] == [key]
    notes = notes_on(changes, state(), load_config("ultramem-debug", [override]))
    assert key in notes[0] and "learning rates of step 11" in notes[1]


@pytest.mark.parametrize("override", START)
def test_what_needs_a_new_run_says_so(override: str) -> None:
    with pytest.raises(ValueError, match="another --run-dir and --init-from run$"):
        go_on(override, extend=True)


@pytest.mark.parametrize("override", MODEL)
@pytest.mark.parametrize("extend", [False, True])
def test_another_model_is_refused(override: str, extend: bool) -> None:
    with pytest.raises(ValueError, match=override.split("=")[0]) as refusal:
        go_on(override, extend=extend)
    assert "--extend" not in str(refusal.value) and "--init-from" not in str(refusal.value)


def test_messages_that_advise_a_change_say_how() -> None:
    """Keys that a stopped run is told to change may be changed as the message says."""
    message = str(TooManyBadStepsError([]))
    named = [key for keys in TABLE.values() for key in keys if re.search(rf"\b{key}\b", message)]
    assert {"optim.lr", "train.rollback"} <= set(named)
    assert all(freedom_of(key) <= Freedom.EXTEND for key in named) and "--extend" in message
    go_on("optim.lr=1e-4", "train.rollback=true", extend=True)
    # What a dry run proposes for want of memory or disk needs no option.
    assert {freedom_of(k) for k in ("train.keep_last", "train.micro_batch_size")} == {
        Freedom.RESUME
    }


def test_the_worst_change_is_named_first_and_the_others_with_it() -> None:
    with pytest.raises(ValueError, match=r"memory\.knum=.*and optim\.lr\)"):
        go_on("optim.lr=0.1", "memory.knum=20", "train.log_every=1")


def test_keys_of_other_kinds_mean_nothing() -> None:
    assert go_on("memory.knum=20", "moe.num_experts=4", preset="dense-debug") == []


def test_other_data() -> None:
    old, config = state(), load_config("ultramem-debug")
    changes = changes_since(CHECKPOINT, old, config, "e" * 64)
    with pytest.raises(ValueError, match=r"other data \(fingerprint dddddd.*--extend"):
        check_changes(CHECKPOINT, old, changes, extend=False)
    check_changes(CHECKPOINT, old, changes, extend=True)
    notes = notes_on(changes, old, config)
    assert "data dddddddddddd -> eeeeeeeeeeee" in notes[0] and "sample 160" in notes[-1]
    imported = replace(old, data_fingerprint="")  # has seen no data yet
    assert changes_since(CHECKPOINT, imported, config, "e" * 64) == []


def test_more_steps_than_were_taken() -> None:
    with pytest.raises(ValueError, match="has taken 10 steps: train.max_steps=10 leaves nothing"):
        go_on("train.max_steps=10", extend=True)


def test_the_history_follows_the_run(tmp_path: Path) -> None:
    """Entries beyond the checkpoint that a run goes back to are given up, as its metrics are."""
    config = load_config("ultramem-debug")
    write_config(tmp_path, config, 0)
    assert "history" not in json.loads((tmp_path / "config.json").read_text())
    born: dict[str, Any] = {"step": 0, "init_from": "/a/run", "init_step": 5}
    write_config(tmp_path, config, 0, born)
    for step, lr in ((10, 0.1), (20, 0.2), (10, 0.3), (30, 0.4)):
        write_config(tmp_path, config, step, entry_of(step, [Change("optim.lr", 0.0, lr)]))
    found = [(e["step"], e.get("changed", {}).get("optim.lr")) for e in read_history(tmp_path)]
    assert found == [(0, None), (10, [0.0, 0.3]), (30, [0.0, 0.4])]
    write_config(tmp_path, config, 40)
    assert len(read_history(tmp_path)) == 3
    assert load_run_config(tmp_path / "config.json") == config


def test_the_document_shows_the_table() -> None:
    """docs/training.md names every key where the table has it."""
    rows = [
        line
        for line in (ROOT / "docs" / "training.md").read_text().splitlines()
        if line.startswith("| ") and "`train." in line
    ]
    shown = [re.findall(r"`([\w.]+)`", row.split("|")[2]) for row in rows]
    assert shown == [[key for key in keys if key != DATA] for keys in TABLE.values()]
