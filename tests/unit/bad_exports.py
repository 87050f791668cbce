"""Mistakes around exported models, for :mod:`tests.unit.test_bad_input`."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.unit.bad_inputs import Case, Scene
from ultramem_ds.exchange.directory import export_hf

AREA = "Exported models"


@functools.cache
def _exported(trained: Path) -> Path:
    """The run of all cases, exported in several shards once."""
    return export_hf(trained, trained.parent / "exported", "fp32", 100_000).directory


def _import(what: str, damage: Callable[[Path], object], *names: str) -> Case:
    """Damage to a copy of an exported directory that is then imported."""

    def command(scene: Scene) -> list[str]:
        source = scene.root / "exported"
        shutil.copytree(_exported(scene.trained), source)
        damage(source)
        return _words(scene, source)

    return Case(AREA, what, command, names)


def _words(scene: Scene, source: Path, *rest: str) -> list[str]:
    scene.untouched.append(scene.root / "imported")
    return ["import", "--input", str(source), "--output", str(scene.root / "imported"), *rest]


def _export(scene: Scene, *rest: str) -> list[str]:
    scene.untouched.append(scene.root / "new-export")
    checkpoint, output = str(scene.trained), str(scene.root / "new-export")
    return ["export", "--checkpoint", checkpoint, "--output", output, *rest]


def _edit(**changes: object) -> Callable[[Path], object]:
    def damage(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _first_shard(source: Path) -> Path:
    return min(source.glob("model-*.safetensors"))


def _cut(source: Path) -> None:
    path = _first_shard(source)
    path.write_bytes(path.read_bytes()[:-1000])


def _other_tokenizer(source: Path) -> None:
    path = source / "tokenizer.json"
    values = json.loads(path.read_text())
    token = {"id": 9999, "content": "<extra>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"].append({**token, **flags})
    values["model"]["vocab"]["<extra>"] = 9999
    path.write_text(json.dumps(values))


def _export_over(scene: Scene) -> list[str]:
    command = _export(scene)
    scene.untouched.clear()
    scene.file("new-export/precious", "x")
    return command


def _export_of_nothing(scene: Scene) -> list[str]:
    command = _export(scene)
    return [*command[:2], str(scene.root / "no-run"), *command[3:]]


EXPORTS = [
    _import("import of a directory that is no export", lambda source: shutil.rmtree(source),
            "no such directory"),
    _import("no configuration in it", lambda source: (source / "config.json").unlink(),
            "config.json", "no exported model"),
    _import("a shard missing", lambda source: _first_shard(source).unlink(),
            "model-00001", "missing"),
    _import("a shard cut short", _cut, "model-00001", "cut short"),
    _import("index of shards missing",
            lambda source: (source / "model.safetensors.index.json").unlink(),
            "model.safetensors.index.json"),
    _import("configuration of a newer format", _edit(format_version=2),
            "format_version 2", "newer", "update"),
    _import("another family's configuration", _edit(model_type="llama"), "'llama'"),
    _import("shapes that do not fit the configuration", _edit(memory_knum=11),
            "config.json says"),
    _import("tokenizer of another model", _other_tokenizer, "tokenizer", "another model's"),
    Case(AREA, "no ranks to import for",
         lambda scene: _words(scene, _exported(scene.trained), "--world-size", "0"),
         ("--world-size 0",)),
    Case(AREA, "shard size not a size",
         lambda scene: _export(scene, "--max-shard-size", "many"), ("--max-shard-size", "5GB")),
    Case(AREA, "bf16 for DeepSpeed's tools",
         lambda scene: _export(scene, "--format", "deepspeed", "--dtype", "bf16"),
         ("--format deepspeed", "fp32")),
    Case(AREA, "export over something", _export_over, ("exists already",)),
    Case(AREA, "export of no run", _export_of_nothing, ("no-run",)),
]  # fmt: skip
