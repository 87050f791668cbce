"""The rest of :mod:`tests.unit.bad_inputs`: data, checkpoints, environment, command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import RUN_OVERRIDES, VOCAB_SIZE
from tests.unit.bad_inputs import FITS, Case, Scene, rendezvous


def _data(what: str, damage: Callable[[Path], object], *names: str) -> Case:
    """Damage to a copy of the prepared data that ``train`` is given."""

    def command(scene: Scene) -> list[str]:
        data = scene.data()
        damage(data)
        return scene.train(*FITS, data=data)

    return Case("Prepared data", what, command, names)


def _cut(path: Path, keep: float = 0.5) -> None:
    """Leave the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def _flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _nothing(data: Path) -> None:
    for path in sorted(data.rglob("*"), reverse=True):
        if path.is_file():
            path.unlink()
        else:
            path.rmdir()


DATA = [
    Case(
        "Prepared data",
        "data directory missing",
        lambda scene: scene.train(*FITS, data=scene.root / "nowhere"),
        ("nowhere", "prepare"),
    ),
    _data("data directory empty", _nothing, "manifest.json", "prepare"),
    _data("manifest torn", lambda d: _cut(d / "manifest.json"), "manifest.json", "JSON"),
    _data("manifest of a newer version", lambda d: _edit(d / "manifest.json", version=99),
          "manifest.json", "99"),
    _data("manifest of something else", lambda d: (d / "manifest.json").write_text("[]"),
          "manifest.json"),
    _data("manifest without its subsets", lambda d: _edit(d / "manifest.json", subsets=[1]),
          "manifest.json"),
    _data("tokens truncated", lambda d: _cut(d / "even.bin"), "even.bin", "prepare"),
    _data("index missing", lambda d: (d / "even.idx").unlink(), "even", "prepare"),
    _data("index overwritten", lambda d: (d / "even.idx").write_bytes(b"nonsense" * 9),
          "even.idx"),
    _data("index truncated", lambda d: _cut(d / "even.idx"), "even.idx"),
    _data("tokenizer missing", lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    _data("tokenizer torn", lambda d: _cut(d / "tokenizer.json"), "tokenizer.json"),
    Case(
        "Prepared data",
        "more tokenizer entries than rows of the embedding",
        lambda scene: scene.train("model.vocab_size=256"),
        ("512", "model.vocab_size=256", "set model.vocab_size=512"),
    ),
]  # fmt: skip


def _source(what: str, name: str, content: str | bytes, *names: str) -> Case:
    """A file that ``prepare`` is to read."""
    return Case(
        "Text for `prepare`",
        what,
        lambda scene: scene.prepare(scene.file(name, content), "--workers", "1"),
        names,
    )


SOURCES = [
    Case(
        "Text for `prepare`",
        "input missing",
        lambda scene: scene.prepare(scene.root / "nowhere"),
        ("nowhere",),
    ),
    _source("no file of a known kind", "texts/notes.docx", "text", "texts"),
    _source("no record with text", "texts/a.jsonl", '{"title": "x"}\n' * 3, "text"),
    Case(
        "Text for `prepare`",
        "tokenizer file missing",
        lambda scene: [
            *scene.prepare(scene.file("a.jsonl", '{"text": "x"}\n'))[:-1],
            str(scene.root / "none.json"),
        ],
        ("none.json",),
    ),
    Case(
        "Text for `prepare`",
        "part 5 of 2",
        lambda scene: scene.prepare(scene.file("a.jsonl", '{"text": "x"}\n'), "--shard", "5/2"),
        ("5/2",),
    ),
    Case(
        "Text for `prepare`",
        "no workers",
        lambda scene: scene.prepare(scene.file("a.jsonl", '{"text": "x"}\n'), "--workers", "0"),
        ("workers",),
    ),
    Case(
        "Text for `prepare`",
        "a validation share of 2",
        lambda scene: scene.prepare(
            scene.file("a.jsonl", '{"text": "x"}\n'), "--validation-share", "2"
        ),
        ("validation",),
    ),
]


def _checkpoint(what: str, damage: Callable[[Path], object], *names: str) -> Case:
    """Damage to the one checkpoint that ``evaluate`` is given."""

    def command(scene: Scene) -> list[str]:
        checkpoint = scene.checkpoint()
        damage(checkpoint)
        return scene.evaluate(checkpoint)

    return Case("Checkpoints and runs", what, command, names)


def _resumed(what: str, override: str, *names: str) -> Case:
    """Resuming a good run with something changed."""

    def command(scene: Scene) -> list[str]:
        scene.run()
        return scene.resume(override)

    return Case("Checkpoints and runs", what, command, names)


def _started(
    what: str, origin: Callable[[Scene], Path], overrides: tuple[str, ...], *names: str
) -> Case:
    """A new run from the weights of another; OTHER takes other data, RESUMED an old run."""

    def command(scene: Scene) -> list[str]:
        data, words = scene.prepared, [*RUN_OVERRIDES]
        if overrides == ("OTHER",):
            data = _other_tokenizer(scene)
        elif overrides == ("RESUMED",):
            scene.run()
            return [*scene.resume(), "--init-from", str(origin(scene))]
        else:
            words += overrides
        head = scene.train(preset="ultramem-debug", data=data)
        return [*head, "--init-from", str(origin(scene)), *words]

    return Case("Checkpoints and runs", what, command, names)


def _other_tokenizer(scene: Scene) -> Path:
    """Data whose tokenizer has the same size and gives two tokens each other's ids."""
    data = scene.data()
    vocabulary = json.loads((data / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    first, second = list(tokens)[-2:]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    text = json.dumps(vocabulary)
    (data / "tokenizer.json").write_text(text)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"]["hash"] = hashlib.sha256(text.encode()).hexdigest()
    (data / "manifest.json").write_text(json.dumps(manifest))
    return data


def _weights(checkpoint: Path) -> Path:
    """The file with the fp32 weights."""
    (found,) = checkpoint.glob("*optim_states.pt")
    return found


def _report(what: str, damage: Callable[[Path], object], *names: str) -> Case:
    def command(scene: Scene) -> list[str]:
        run = scene.run()
        damage(run)
        return ["report", str(run), "--output", str(scene.root / "report")]

    return Case("Checkpoints and runs", what, command, names)


def _foreign_tokenizer(scene: Scene) -> list[str]:
    scene.run()
    data = scene.data()
    vocabulary = json.loads((data / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    tokens.update({f"extra-{i}": len(tokens) + i for i in range(100)})
    (data / "tokenizer.json").write_text(json.dumps(vocabulary))
    return scene.evaluate(scene.root / "run", data)


CHECKPOINTS = [
    Case(
        "Checkpoints and runs",
        "checkpoint missing",
        lambda scene: scene.evaluate(scene.root / "nowhere"),
        ("nowhere", "no such directory"),
    ),
    Case(
        "Checkpoints and runs",
        "a directory that is no run",
        lambda scene: scene.generate(scene.root),
        ("neither a checkpoint nor a run",),
    ),
    _checkpoint("trainer state torn", lambda c: _cut(c / "trainer.json"), "trainer.json"),
    _checkpoint("trainer state of something else",
                lambda c: (c / "trainer.json").write_text('{"a": 1}'), "trainer.json"),
    _checkpoint("checkpoint file truncated", lambda c: _cut(_weights(c)), "optim_states.pt"),
    _checkpoint("one bit flipped", lambda c: _flip(_weights(c)), "optim_states.pt"),
    _checkpoint("checkpoint file missing", lambda c: _weights(c).unlink(), "optim_states.pt"),
    _checkpoint("layout torn", lambda c: _cut(c / "layout.json"), "layout.json"),
    _checkpoint("layout missing", lambda c: (c / "layout.json").unlink(), "layout.json"),
    _resumed("another learning rate on resume", "optim.lr=1.0", "optim.lr=", "not 1.0",
             "--extend", "--run-dir"),
    _resumed("another batch size on resume", "train.global_batch_size=8",
             "train.global_batch_size=4", "--init-from"),
    _resumed("more steps on resume", "train.max_steps=9", "train.max_steps=4", "--extend"),
    Case("Checkpoints and runs", "no more steps than were taken, with --extend",
         lambda scene: (scene.run(), [*scene.resume("train.max_steps=2"), "--extend"])[1],
         ("train.max_steps=2", "set a larger one")),
    _started("a start from nowhere", lambda scene: scene.root / "nowhere", (), "--init-from",
             "no such directory"),
    _started("a start from a directory that is no run", lambda scene: scene.root, (),
             "--init-from", "neither a checkpoint nor a run"),
    _started("a start from another kind of model", lambda scene: scene.trained,
             ("model.kind=dense",), "model.kind", "'ultramem'"),
    _started("a start with a larger vocabulary", lambda scene: scene.trained,
             (f"model.vocab_size={2 * VOCAB_SIZE}",), "model.vocab_size",
             f"set model.vocab_size={VOCAB_SIZE}"),
    _started("a start with a larger table", lambda scene: scene.trained, ("memory.knum=20",),
             "memory.knum", "set memory.knum=10"),
    _started("a start with the data of another tokenizer", lambda scene: scene.trained,
             ("OTHER",), "another tokenizer", "tokenizer.json"),
    _started("a run that did not start there", lambda scene: scene.trained, ("RESUMED",),
             "did not start from"),
    _resumed("another model on resume", "memory.knum=20", "memory.knum=10", "not 20"),
    _resumed("a key that is gone, on resume", "train.log_evry=5", "train.log_every"),
    Case(
        "Checkpoints and runs",
        "jumping over samples that were trained on",
        lambda scene: (scene.run(), [*scene.resume(), "--skip-samples", "0:4"])[1],
        ("0:4",),
    ),
    Case("Checkpoints and runs", "evaluation data of another tokenizer", _foreign_tokenizer,
         ("tokenizer",)),
    _report("report of a directory without a run", lambda r: (r / "config.json").unlink(),
            "config.json", "run directory"),
    _report("configuration of a run torn", lambda r: _cut(r / "config.json"), "config.json",
            "JSON"),
    _report("metrics damaged in the middle",
            lambda r: (r / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n'),
            "metrics.jsonl:2"),
    _report("metrics without steps", lambda r: (r / "metrics.jsonl").write_text("[1]\n[2]\n"),
            "metrics.jsonl:1"),
    _report("summary torn", lambda r: _cut(r / "summary.json"), "summary.json", "JSON"),
]  # fmt: skip


def _environment(what: str, name: str, value: str, *names: str) -> Case:
    def command(scene: Scene) -> list[str]:
        scene.environment[name] = value
        return scene.train(*FITS)

    return Case("Environment", what, command, names)


def _run_dir_is_a_file(scene: Scene) -> list[str]:
    path = scene.file("taken", "x")
    command = scene.train(*FITS)
    return [*command[: command.index("--run-dir") + 1], str(path), *FITS]


def _unwritable_report(scene: Scene) -> list[str]:
    return ["report", str(scene.run()), "--output", str(scene.file("taken", "x"))]


def _started_by(what: str, environment: dict[str, str], *names: str) -> Case:
    """A start that looks like one of several."""

    def command(scene: Scene) -> list[str]:
        scene.environment |= environment
        return scene.train(*FITS)

    return Case("Environment", what, command, names)


ENVIRONMENT = [
    _started_by("ranks without a meeting point", {"RANK": "0", "WORLD_SIZE": "2"},
                "without LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    _started_by("a number of ranks and no rank", {"WORLD_SIZE": "2"}, "without RANK"),
    _started_by("a SLURM job without srun",
                {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
                 "SLURM_LOCALID": "0"}, "srun"),
    _started_by("mpirun over several machines",
                {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4",
                 "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
                "-x MASTER_ADDR"),
    _started_by("a port that is none", {**rendezvous(2), "MASTER_PORT": "http"},
                "MASTER_PORT='http'"),
    _environment("number of ranks not a number", "WORLD_SIZE", "two", "WORLD_SIZE='two'"),
    _environment("no ranks at all", "WORLD_SIZE", "0", "WORLD_SIZE='0'"),
    _environment("rank not a number", "RANK", "first", "RANK='first'"),
    _environment("peak rate not a number", "ULTRAMEM_PEAK_TFLOPS", "fast",
                 "ULTRAMEM_PEAK_TFLOPS='fast'"),
    Case("Environment", "run directory is a file", _run_dir_is_a_file, ("taken",)),
    Case("Environment", "report directory is a file", _unwritable_report, ("taken",)),
]  # fmt: skip


def _words(what: str, *words: str, names: tuple[str, ...]) -> Case:
    return Case("Command line", what, lambda scene: list(words), names)


def _sampling(what: str, *words: str) -> Case:
    return Case("Command line", what, lambda scene: scene.generate(None, *words), words)


COMMAND_LINE = [
    _words("no verb", names=("VERB",)),
    _words("verb misspelt", "trian", names=("trian", "train")),
    _words("option missing", "train", "--preset", "dense-debug", names=("--data", "--run-dir")),
    _words("unknown option", "count", "--jsn", names=("--jsn",)),
    _words("no ranks to plan for", "plan", "--preset", "dense-debug", "--world-size", "0",
           names=("--world-size 0", "at least 1")),
    _words("figure of a plan that is no PNG", "plan", "--preset", "pkm-debug", "--world-size", "2",
           "--figure", "a.pdf", names=("--figure a.pdf", ".png")),
    _words("study misspelt", "study", "tuned-dem", names=("tuned-dem", "did you mean")),
    _words("study without data", "study", "tuned-demo", names=("--data", "prepare")),
    _words("row that a study does not have", "study", "tuned-demo", "--rows", "mo", "p?",
           names=("--rows mo p?", "moe-plain")),
    _words("number of ranks in words", "plan", "--preset", "dense-debug", "--world-size", "two",
           names=("--world-size", "'two'")),
    _words("preset to count misspelt", "count", "--preset", "dens-151m",
           names=("dens-151m", "did you mean")),
    _words("override for doctor without a preset", "doctor", "optim.lr=1",
           names=("optim.lr=1", "--preset")),
    Case("Command line", "number of ranks for a real run",
         lambda scene: scene.train(*FITS, "--world-size", "2"), ("--dry-run", "launch")),
    Case("Command line", "samples to jump over not A:B",
         lambda scene: scene.train(*FITS, "--skip-samples", "many"), ("many", "A:B")),
    Case("Command line", "samples to jump over backwards",
         lambda scene: scene.train(*FITS, "--skip-samples", "9:3"), ("9:3",)),
    _sampling("nucleus of 200%", "--top-p", "2"),
    _sampling("temperature below zero", "--temperature", "-1"),
    _sampling("temperature not a number", "--temperature", "nan"),
    _sampling("no new tokens", "--max-new-tokens", "-1"),
    Case("Command line", "empty evaluation batch",
         lambda scene: [*scene.evaluate(scene.trained), "--batch-size", "0"], ("--batch-size",)),
    _words("benchmark of no rows", "bench", "comm", "--tokens", "0", names=("tokens=0",)),
]  # fmt: skip

REST = [*DATA, *SOURCES, *CHECKPOINTS, *ENVIRONMENT, *COMMAND_LINE]
