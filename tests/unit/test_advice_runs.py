"""Advice about checkpoints, going on, and what a run needs, followed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import RUN_OVERRIDES
from tests.dist.launching import ROOT, run_verb
from tests.unit.advice import Advice, Follow, Told, ask, follow, no_training, says, with_words
from tests.unit.bad_inputs import FITS, Scene
from ultramem_ds.checkpoint.directory import find_checkpoint, read_trainer_state
from ultramem_ds.config.load import from_dict, load_config, valid_keys
from ultramem_ds.config.schema import Config
from ultramem_ds.train.going_on import changes_since, check_changes
from ultramem_ds.train.init_from import check_origin, open_origin
from ultramem_ds.train.keys import Freedom, freedom_of
from ultramem_ds.watch.guards import BadStep, TooManyBadStepsError
from ultramem_ds.watch.runlock import only_job


def _elsewhere(option: str = "--run-dir") -> Follow:
    """Another directory."""
    return lambda told: told.option(option, told.scene.root / "elsewhere")


def _anew(told: Told) -> list[str]:
    """Another run directory, and the weights of the run that the message names."""
    told.argv += ["--init-from", told.values[-1]]
    return _elsewhere()(told)


def _delete(told: Told) -> list[str]:
    shutil.rmtree(told.values[-1])
    return told.argv


def _without_option(told: Told) -> list[str]:
    at = told.argv.index("--init-from")
    return [*told.argv[:at], *told.argv[at + 2 :]]


def _all_damaged(scene: Scene) -> list[str]:
    (scene.checkpoint() / "trainer.json").write_text("{")
    return scene.resume()


def _delete_line(told: Told) -> list[str]:
    path, number = Path(told.values[0]), int(told.values[1])
    lines = path.read_text().splitlines(keepends=True)
    del lines[number - 1]
    path.write_text("".join(lines))
    return told.argv


def _one_bad_record(scene: Scene) -> list[str]:
    run = scene.run()
    path = run / "metrics.jsonl"
    path.write_text("[1]\n" + path.read_text())
    return ["report", str(run), "--output", str(scene.root / "report")]


def _one_bad_line(scene: Scene) -> list[str]:
    command = _one_bad_record(scene)
    path = scene.root / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace("[1]", "{"))
    return command


def _linked(scene: Scene) -> list[str]:
    checkpoint = scene.checkpoint()
    (file,) = checkpoint.glob("*optim_states.pt")
    file.rename(scene.root / file.name)
    file.symlink_to(scene.root / file.name)
    return scene.evaluate(checkpoint)


def _copy_back(told: Told) -> list[str]:
    path = Path(told.values[0])
    target = path.resolve()
    path.unlink()
    shutil.copy(target, path)
    return told.argv


WITH = says("{} was trained with {}={}, not {}{}; resume with the old value")
EXTEND = says("{}, add --extend to go on with the new, or use another --run-dir")
ANEW = says("{}, or start anew from its weights: another --run-dir and --init-from {}")
OTHER_RUN = says("{} or use another --run-dir")
STARTED = says("did not start from {} {}: leave the option out to resume, or use another --run-dir")
SKIPS = says("the next one is {}. Skip from there, or go back: write the name of an earlier "
             "checkpoint into the run's checkpoints/latest")  # fmt: skip

CASES = [
    Advice("another learning rate on resume", WITH, with_words("{1}={2}")),
    Advice("another learning rate on resume", EXTEND, with_words("--extend")),
    Advice("another learning rate on resume", EXTEND, _elsewhere()),
    Advice("more steps on resume", EXTEND, with_words("--extend")),
    Advice("another batch size on resume", WITH, with_words("{1}={2}")),
    Advice("another batch size on resume", ANEW, _anew),
    Advice("another model on resume", WITH, with_words("{1}={2}")),
    Advice("another model on resume", OTHER_RUN, _elsewhere()),
    Advice("no more steps than were taken, with --extend",
           says("{} has taken {} steps: train.max_steps={} leaves nothing to do; set a larger one"),
           with_words("train.max_steps=3")),
    Advice("a start with a larger vocabulary",
           says("weights neither grow nor shrink: set {}={}"), with_words("{0}={1}")),
    Advice("a start with a larger table", says("neither grow nor shrink: set {}={}"),
           with_words("{0}={1}")),
    Advice("a run that did not start there", STARTED, _without_option),
    Advice("a run that did not start there", STARTED, _elsewhere()),
    Advice("jumping over samples that were trained on", SKIPS,
           lambda told: told.option("--skip-samples", f"{told.values[0]}:12")),
    Advice("run directory is a file", says("--run-dir {} is a file; name a directory"),
           _elsewhere()),
    Advice("report directory is a file",
           says("--output {} is a file; name a directory", "telemetry/report.py"),
           _elsewhere("--output")),
    Advice(_all_damaged, says("no checkpoint of {} can be used: {}; delete {} to start over"),
           _delete, "every checkpoint damaged"),
    Advice(_one_bad_line, says("{}:{} is not valid JSON: delete that line"), _delete_line,
           "a line of metrics damaged"),
    Advice(_one_bad_record, says("{}:{} is not a record with a step: delete that line"),
           _delete_line, "a line of metrics without a step"),
    Advice(_linked, says("{} is refused: it is a symbolic link, and checkpoints hold none; copy "
                         "the file itself here if you trust it"), _copy_back,
           "a link in a checkpoint"),
    Advice("number of ranks for a real run",
           says("--world-size is for --dry-run; to train on several ranks use a launcher "
                "(NPROC=P launch/one_node.sh train ...)"), with_words("--dry-run")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_following_helps(case: Advice, prepared: Path, trained: Path, tmp_path: Path) -> None:
    said = follow(case, Scene(tmp_path, prepared, trained))
    assert said.code == 0, said.text


@pytest.fixture(scope="module")
def two(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    result = run_verb(
        "train", "--preset", "ultramem-debug", "--data", str(prepared), "--run-dir", str(run_dir),
        *RUN_OVERRIDES, "train.stop_at_step=2", "train.save_every=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return run_dir


ANOTHER = says("{}; the run has another one: --checkpoint {}")
POINTER = says("{} names {}, which is not a complete checkpoint; write the name of another one "
               "into it ({})")  # fmt: skip


def test_another_checkpoint_is_named(two: Path, prepared: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, prepared, two)
    newest, older = sorted(scene.run().glob("checkpoints/step-*"), reverse=True)
    (newest / "trainer.json").write_text("{")
    advised = ANOTHER.values(ask(scene.evaluate(scene.root / "run")).line)[1]
    assert Path(advised) == older
    said = ask(scene.evaluate(Path(advised)))
    assert said.code == 0, said.text


def test_an_only_checkpoint_has_no_other(trained: Path, prepared: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, prepared, trained)
    checkpoint = scene.checkpoint()
    (checkpoint / "trainer.json").write_text("{")
    line = ask(scene.evaluate(checkpoint)).line
    assert "trainer.json" in line and "--checkpoint" not in line


def test_the_pointer_can_be_written(two: Path, prepared: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, prepared, two)
    pointer = scene.run() / "checkpoints" / "latest"
    pointer.write_text("step-00000009")
    named = POINTER.values(ask(scene.evaluate(scene.root / "run")).line)
    assert named[0] == str(pointer) and named[1] == "step-00000009"
    for name in named[2].split(", "):
        pointer.write_text(name)
        said = ask(scene.evaluate(scene.root / "run"))
        assert said.code == 0, said.text


def test_going_back_takes_up_samples_again(two: Path, prepared: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, prepared, two)
    run = scene.run()
    with no_training():
        command = [*scene.resume(), "--skip-samples", "4:8"]
        SKIPS.values(ask(command).line)
        (run / "checkpoints" / "latest").write_text("step-00000001")
        said = ask(command)
    assert said.code == 0, said.text


def _values_of(key: str) -> list[str]:
    return ["0", "1", "2", "3", "8", "96", "0.5", "true", "false", "none", "layernorm", "rmsnorm",
            "bf16", "shared", "per-head", "stored", "product-key", "corrected", "1:2", "two-sided",
            "per-head-shared-sides", "dense", "owner-pooled", "row-sparse", "fp32"]  # fmt: skip


@pytest.mark.parametrize("key", valid_keys())
def test_old_values_can_be_set_again(key: str, trained: Path, prepared: Path) -> None:
    """Of every key that may not change: "set KEY=OLD", and resuming with what stood there."""
    checkpoint = find_checkpoint(trained)
    state = read_trainer_state(checkpoint)
    old, origin = from_dict(state.config), open_origin(trained)

    def refused(config: Config) -> str:
        try:
            changes = changes_since(checkpoint, state, config, state.data_fingerprint)
            check_changes(checkpoint, state, changes, extend=False)
        except ValueError as error:
            return str(error)
        return ""

    words = [*RUN_OVERRIDES, "train.stop_at_step=2"]
    assert load_config("ultramem-debug", words) == old
    for value in _values_of(key):
        try:
            config = load_config("ultramem-debug", [*words, f"{key}={value}"])
        except ValueError:
            continue
        message = refused(config)
        if not message:
            continue
        _, named, before, *_ = WITH.values(message)
        assert named == key
        again = load_config("ultramem-debug", [*words, f"{key}={value}", f"{key}={before}"])
        assert refused(again) == "", message
        if freedom_of(key) == Freedom.MODEL and key not in ("model.kind", "memory.placement"):
            from ultramem_ds.data.same_tokenizer import data_tokenizer

            with pytest.raises(ValueError) as refusal:
                check_origin(origin, config, prepared, data_tokenizer(prepared))
            named, before = says_set.values(refusal.value)
            assert named == key
            again = load_config("ultramem-debug", [*words, f"{key}={value}", f"{named}={before}"])
            check_origin(origin, again, prepared, data_tokenizer(prepared))


says_set = says("weights neither grow nor shrink: set {}={}")
SUCH = says("start from weights of such a model")


def test_weights_of_such_a_model(trained: Path, prepared: Path) -> None:
    from ultramem_ds.data.same_tokenizer import data_tokenizer

    origin, tokenizer = open_origin(trained), data_tokenizer(prepared)
    config = load_config("ultramem-debug", [*RUN_OVERRIDES, "memory.placement=1:2"])
    with pytest.raises(ValueError) as refusal:
        check_origin(origin, config, prepared, tokenizer)
    SUCH.values(refusal.value)
    check_origin(replace(origin, config=config), config, prepared, tokenizer)


OTHER_DATA = says("{} was trained on other data{} (fingerprint {}, here {}); use the same --data")


def test_other_data(prepared: Path, trained: Path, tmp_path: Path) -> None:
    """Use the same, or --extend, or another run directory."""
    scene = Scene(tmp_path, prepared, trained)
    scene.run()
    other = scene.data()
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["subsets"] = [s for s in manifest["subsets"] if s["subset"] != "odd"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with no_training():
        command = scene.resume(data=other)
        told = Told(scene, command, (), ask(command).line)
        OTHER_DATA.values(told.line)
        for again in (
            told.option("--data", prepared),
            [*command, "--extend"],
            told.option("--run-dir", tmp_path / "elsewhere"),
        ):
            said = ask(again)
            assert said.code == 0, said.text


FORGOTTEN = says("has a configuration that this program does not know: {}; use the version that "
                 "trained it or another --run-dir")  # fmt: skip


def test_a_configuration_of_tomorrow(trained: Path, prepared: Path, tmp_path: Path) -> None:
    state = read_trainer_state(find_checkpoint(trained))
    config = {**state.config, "train": {**state.config["train"], "of_tomorrow": 1}}
    strange = replace(state, config=config)
    with pytest.raises(ValueError) as refusal:
        changes_since(trained, strange, from_dict(state.config), state.data_fingerprint)
    FORGOTTEN.values(refusal.value)
    with no_training():
        scene = Scene(tmp_path, prepared, trained)
        assert ask(scene.train(*RUN_OVERRIDES, preset="ultramem-debug")).code == 0


BAD_STEPS = says(
    "Look at the data with `inspect-data`, jump over it with --skip-samples A:B, or, with "
    "--extend, lower optim.lr or let train.rollback=true go back and around it"
)


def test_bad_steps(trained: Path, prepared: Path, tmp_path: Path) -> None:
    step = BadStep(step=3, reason="loss not finite", loss=1.0, grad_norm=1.0,
                   samples=((8, 12),), suspects={})  # fmt: skip
    message = str(TooManyBadStepsError([step]))
    BAD_STEPS.values(message)
    begin, end = re.findall(r"samples (\d+):(\d+)", message)[0]
    scene = Scene(tmp_path, prepared, trained)
    scene.run()
    assert ask(["inspect-data", str(prepared)]).code == 0
    with no_training():
        for words in (
            ["--skip-samples", f"{begin}:{end}"],
            ["--extend", "optim.lr=1e-4"],
            ["--extend", "train.rollback=true"],
        ):
            said = ask([*scene.resume(), *words])
            assert said.code == 0, said.text


LOCKED = says("{} is in use by {}; stop that job first, or use another --run-dir")


def test_a_run_directory_in_use(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = (
        "import sys, pathlib; from ultramem_ds.watch.runlock import only_job\n"
        "with only_job(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError) as refusal, only_job(run, wait_s=0.0):
            pass
        owner = LOCKED.values(refusal.value)[1]
        assert owner.startswith(f"pid {holder.pid} ")
        with only_job(tmp_path / "another", wait_s=0.0):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with only_job(run, wait_s=5.0):
        pass


USAGE = namedtuple("USAGE", "total used free")
ROOM = says("{} has {} GB free, {} checkpoints need {} GB: free some, ")
FEWER = says("set train.keep_last={}, ")
ELSEWHERE = says("or use another --run-dir", "train/dry_run.py")
NEEDS = says("a rank needs {} GB, this machine has {} GB free: ")
WAYS = says("use {}", "train/dry_run.py")
TOGETHER = says("{} and --deepspeed {}", "train/fitting.py")


def _words_of(way: str) -> list[str]:
    """A way to fit as words of a command."""
    words = []
    for part in re.split(r" with | and ", way):
        ranks = re.fullmatch(r"(\d+) ranks", part)
        words += ["--world-size", ranks[1]] if ranks else part.split()
    return words


def _kind(way: str) -> str:
    return "together" if " with " in way else re.findall(r"ranks|train|deepspeed", way)[0]


@pytest.mark.parametrize(
    ("preset", "share", "kinds"),
    [
        ("ultramem-151m-x12", 0.9, {"ranks", "train", "deepspeed"}),
        ("moe-151m-2in32", 0.9, {"ranks", "train"}),  # experts are not offloaded
        ("dense-151m", 0.2, {"together"}),
    ],
)
def test_what_makes_a_run_fit(
    preset: str, share: float, kinds: set[str], prepared: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each way of a dry run, tried: its problem is gone."""
    from ultramem_ds.train import dry_run

    scene = Scene(tmp_path, prepared, prepared)
    command = scene.train(
        "train.micro_batch_size=8", "model.seq_len=1024", "--dry-run", preset=preset
    )
    monkeypatch.setattr(dry_run, "_matmul_flops_per_s", lambda *args: 1e12)
    monkeypatch.setattr("shutil.disk_usage", lambda path: USAGE(0, 0, 10**15))
    monkeypatch.setattr(dry_run, "_available_bytes", lambda: 10**15)
    needed = float(re.findall(r"memory/rank +([\d.]+) GB", ask(command).text)[0])
    monkeypatch.setattr(dry_run, "_available_bytes", lambda: int(needed * share * 1e9))
    problem = ask(command).text.splitlines()[-1]
    NEEDS.values(problem)
    ways = WAYS.values(problem.split("free: ")[1])[0].split(" or ")
    assert set(map(_kind, ways)) == kinds, problem
    for way in ways:
        assert _kind(way) != "together" or TOGETHER.values(way)
        said = ask([*command, *_words_of(way)])
        assert said.code == 0 and "problem" not in said.text, f"{way}: {said.text}"


def test_what_makes_room(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, prepared, prepared)
    command = scene.train(*FITS, "train.keep_last=5", "--dry-run")
    size = float(re.findall(r"checkpoint +([\d.]+) GB", ask(command).text)[0]) * 1e9
    free = int(3.5 * size)
    monkeypatch.setattr("shutil.disk_usage", lambda path: USAGE(10 * free, 9 * free, free))
    problem = ask(command).text.splitlines()[-1]
    ROOM.values(problem), ELSEWHERE.values(problem)
    said = ask([*command, f"train.keep_last={FEWER.values(problem)[0]}"])
    assert said.code == 0 and "problem" not in said.text
    assert FEWER.values(problem)[0] == "2"  # and not fewer than need be


LARGER_SHARE = says("{} has no validation subset of at least {} tokens; prepare with a larger "
                    "--validation-share")  # fmt: skip


def test_a_larger_share_to_validate_on(trained: Path, prepared: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, prepared, trained)
    text = scene.file("a.jsonl", "".join(
        json.dumps({"text": f"{word} " * 60}) + "\n" for word in range(60)
    ))  # fmt: skip
    command = [*scene.prepare(text), "--workers", "1"]
    data = Path(command[command.index("--output") + 1])
    assert ask([*command, "--validation-share", "0"]).code == 0
    LARGER_SHARE.values(ask(scene.evaluate(trained, data)).line)
    again = [*command, "--validation-share", "0.5"]
    assert "choose another --output, or --overwrite" in ask(again).line
    assert ask([*again, "--overwrite"]).code == 0
    said = ask(scene.evaluate(trained, data))
    assert said.code == 0, said.text
