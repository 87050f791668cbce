"""What users get wrong: the cases behind docs/bad-input.md, each a real command that is run.

A case prepares its damage in a :class:`Scene` and says which command meets it. Its ``names`` are
what the message must contain: the file, key or value, and what to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tests.conftest import RUN_OVERRIDES, VOCAB_SIZE

FITS = (f"model.vocab_size={VOCAB_SIZE}", "train.micro_batch_size=2")


@dataclass
class Scene:
    """A fresh directory per case, with copies of good data and of a good run on demand.

    Attributes:
        root: everything lies here; messages are shown relative to it.
        prepared: good data, not to be changed.
        trained: a good run of ``ultramem-debug``, not to be changed.
        environment: set while the command runs.
        untouched: must not exist afterwards.
    """

    root: Path
    prepared: Path
    trained: Path
    environment: dict[str, str] = field(default_factory=dict)
    untouched: list[Path] = field(default_factory=list)

    def data(self) -> Path:
        """A copy of the data."""
        return Path(shutil.copytree(self.prepared, self.root / "data"))

    def run(self) -> Path:
        """A copy of the run."""
        return Path(shutil.copytree(self.trained, self.root / "run"))

    def checkpoint(self) -> Path:
        """The one checkpoint of a copy of the run."""
        (found,) = self.run().glob("checkpoints/step-*")
        return found

    def file(self, name: str, content: str | bytes | dict[str, Any] | list[Any]) -> Path:
        """A file of any content; plain values become JSON."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def train(self, *rest: str, preset: str = "dense-debug", data: Path | None = None) -> list[str]:
        """A ``train`` command into a directory that must not come to be."""
        run_dir = self.root / "new-run"
        self.untouched.append(run_dir)
        data = data or self.prepared
        return ["train", "--preset", preset, "--data", str(data), "--run-dir", str(run_dir), *rest]

    def resume(self, *rest: str, data: Path | None = None) -> list[str]:
        """The command that made the run, again, in the copy made before."""
        data = data or self.prepared
        run_dir = str(self.root / "run")
        base = ["train", "--preset", "ultramem-debug", "--data", str(data), "--run-dir", run_dir]
        return [*base, *RUN_OVERRIDES, "train.stop_at_step=0", *rest]

    def evaluate(self, checkpoint: Path, data: Path | None = None) -> list[str]:
        """An ``evaluate`` command."""
        return ["evaluate", "--checkpoint", str(checkpoint), "--data", str(data or self.prepared)]

    def generate(self, checkpoint: Path | None = None, *rest: str) -> list[str]:
        """A ``generate`` command."""
        return ["generate", "--checkpoint", str(checkpoint or self.trained), "--prompt", "a", *rest]

    def prepare(self, source: Path, *rest: str) -> list[str]:
        """A ``prepare`` command into a directory that must not come to be."""
        self.untouched.append(self.root / "new-data" / "manifest.json")
        command = ["prepare", "--input", str(source), "--output", str(self.root / "new-data")]
        return [*command, "--tokenizer", str(self.prepared / "tokenizer.json"), *rest]


def rendezvous(ranks: int) -> dict[str, str]:
    """What a launcher says to the first of so many ranks."""
    return {
        "RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


Command: TypeAlias = Callable[[Scene], list[str]]


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        area: heading of its table.
        what: the mistake in words.
        command: prepares it and gives the command line.
        names: what the message must contain.
    """

    area: str
    what: str
    command: Command
    names: tuple[str, ...]


def _train(what: str, override: str, *names: str, preset: str = "ultramem-debug") -> Case:
    """A wrong override of a training run."""
    return Case(
        "Configuration",
        what,
        lambda scene: scene.train(*FITS, override, preset=preset),
        names,
    )


def _deepspeed(what: str, content: Any, *names: str, preset: str = "dense-debug") -> Case:
    """A wrong DeepSpeed JSON."""

    def command(scene: Scene) -> list[str]:
        path = scene.file("ds.json", content)
        return scene.train(*FITS, "--deepspeed", str(path), preset=preset)

    return Case("DeepSpeed JSON", what, command, names)


def _launched(what: str, ranks: int, override: str, *names: str, preset: str) -> Case:
    """Settings that do not fit the number of ranks."""

    def command(scene: Scene) -> list[str]:
        scene.environment |= rendezvous(ranks)
        return scene.train(FITS[0], override, preset=preset)

    return Case("Configuration", what, command, names)


CONFIGURATION = [
    Case(
        "Configuration",
        "preset misspelt",
        lambda scene: scene.train(preset="dense-debgu"),
        ("dense-debgu", "did you mean 'dense-debug'"),
    ),
    _train("key misspelt", "train.maxsteps=3", "train.maxsteps", "train.max_steps"),
    _train("unknown section", "trian.max_steps=3", "trian.max_steps", "train.max_steps"),
    _train("override without a value", "train.max_steps", "section.key=value"),
    _train("text for a number", "train.max_steps=many", "train.max_steps='many'", "integer"),
    _train("fraction for a whole number", "train.max_steps=1.5", "train.max_steps=1.5", "integer"),
    _train("a step count of zero", "train.max_steps=0", "train.max_steps", "at least 1"),
    _train("not one of the choices", "memory.partition=rowwise", "'rowwise'", "'number-wise'"),
    _train("dropout of 150%", "model.dropout=1.5", "model.dropout", "[0, 1)"),
    _train("negative learning rate", "optim.lr=-1", "optim.lr", "positive"),
    _train("infinite learning rate", "optim.lr=Infinity", "optim.lr", "finite"),
    _train("more bad steps than are remembered", "train.max_bad_steps=200", "200", "at most 128"),
    _train("width not divisible by heads", "model.num_heads=3", "model.num_heads=3", "divisible"),
    _train("expansion not a square", "memory.expansion=3", "memory.expansion=3", "1, 4, 9"),
    _train("placement not a:b", "memory.placement=1-2", "memory.placement='1-2'", "a:b"),
    _train("placement beyond the blocks", "memory.placement=1:9", "block 9", "num_layers=4"),
    _train("more slots than keys", "memory.top_m=4000", "memory.top_m=4000", "keys per side"),
    _train("queries of more tokens than taps", "memory.query_tokens=5", "is not between 1 and"),
    _train("queries of three layers for two", "memory.query_tokens=1/2/2", "2 memory layers"),
    _train("columns not divisible by cores", "memory.num_cores=3", "memory.num_cores=3"),
    _train("product keys with a Tucker rank", "memory.retrieval=product-key", "memory.tucker_rank"),
    _train("unknown kernel", "memory.kernel=fast", "memory.kernel", "fast", "reference"),
    _train("micro-batch does not divide", "train.micro_batch_size=5", "micro_batch_size=5"),
    Case(
        "Configuration",
        "rollback without a limit",
        lambda scene: scene.train(*FITS, "train.rollback=true", "train.max_bad_steps=0"),
        ("train.rollback=true", "train.max_bad_steps"),
    ),
    _train("unknown subset in the weights", "data.weights.arxiv=1", "data.weights.arxiv", "even"),
    _train("negative subset weight", "data.weights.even=-1", "data.weights.even", "negative"),
    _train("all subset weights zero", 'data.weights={"even": 0}', "data.weights"),
    _train("sequences longer than a subset", "model.seq_len=100000000", "model.seq_len"),
    _launched("batch not divisible by ranks", 3, "train.micro_batch_size=auto",
              "train.global_batch_size=16", "3 ranks", preset="dense-debug"),
    _launched("expert groups not dividing the ranks", 4, "moe.expert_parallel_size=3",
              "moe.expert_parallel_size=3", "4 ranks", preset="moe-debug"),
    _launched("sub-groups not dividing the ranks", 4, "memory.shard_group_size=3",
              "memory.shard_group_size=3", "4 data-parallel ranks", preset="ultramem-debug"),
    Case(
        "Configuration",
        "columns not divisible by ranks",
        lambda scene: (
            scene.environment.update(rendezvous(3)),
            scene.train(FITS[0], "train.global_batch_size=18", "memory.partition=dimension-wise",
                        preset="ultramem-debug"),
        )[1],
        ("dimension-wise", "3 ranks"),
    ),
]  # fmt: skip

DEEPSPEED = [
    Case(
        "DeepSpeed JSON",
        "DeepSpeed file missing",
        lambda scene: scene.train(*FITS, "--deepspeed", str(scene.root / "none.json")),
        ("none.json", "no such file"),
    ),
    _deepspeed("not JSON", "{", "ds.json", "not valid JSON"),
    _deepspeed("not an object", [1], "ds.json", "JSON object"),
    _deepspeed("ZeRO-3 for MoE", {"zero_optimization": {"stage": 3}}, "stage 3",
               "moe_zero2.json", preset="moe-debug"),
    _deepspeed("ZeRO-1 for UltraMem", {"zero_optimization": {"stage": 1}}, "stage 1",
               "ultramem_zero3.json", preset="ultramem-debug"),
    _deepspeed("no ZeRO at all", {}, "ZeRO stage 0", "dense_zero1.json"),
    _deepspeed("a stage in words", {"zero_optimization": {"stage": "three"}}, "stage", "three"),
    _deepspeed("zero_optimization not an object", {"zero_optimization": 1}, "zero_optimization"),
    _deepspeed("key that DeepSpeed refuses", {"zero_optimization": {"stage": 1},
               "sparse_gradients": True}, "sparse_gradients"),
    _deepspeed("key that DeepSpeed does not know", {"zero_optimization": {"stage": 1, "stag": 1}},
               "stag"),
    _deepspeed("an optimizer of its own", {"zero_optimization": {"stage": 1},
               "optimizer": {"type": "Adam"}}, "'optimizer'", "optim.*"),
    _deepspeed("another batch size", {"zero_optimization": {"stage": 1}, "train_batch_size": 7},
               "train_batch_size=7", "train.global_batch_size"),
    _deepspeed("another limit of the gradient norm", {"zero_optimization": {"stage": 1},
               "gradient_clipping": 0.5}, "gradient_clipping=0.5", "optim.clip_grad=1.0"),
    _deepspeed("another precision", {"zero_optimization": {"stage": 1},
               "bf16": {"enabled": True}}, "bf16.enabled=true", "train.precision=fp32"),
    _deepspeed("gradients accumulated in bf16", {"zero_optimization": {"stage": 1},
               "data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype", "fp32"),
]  # fmt: skip
