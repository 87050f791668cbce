"""Advice of ``bench``, ``study``, ``doctor``, ``plan`` and the programs around them, followed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from tests.dist.launching import ROOT
from tests.unit.advice import Advice, Claim, Told, ask, follow, says
from tests.unit.bad_inputs import Scene
from ultramem_ds.bench.comm import CommBenchConfig
from ultramem_ds.bench.decode import check_steps
from ultramem_ds.bench.lookup import LookupBenchConfig
from ultramem_ds.bench.step import StepBenchConfig
from ultramem_ds.config.load import load_config
from ultramem_ds.doctor import checkout, gpu, inputs, machine, software
from ultramem_ds.harness.extra import require_lm_eval
from ultramem_ds.kernels.registry import resolve
from ultramem_ds.planning.rates import planned_rates


def refused(claim: Claim, act: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ValueError) as refusal:
        act()
    return claim.values(refusal.value)


def _names(text: str) -> list[str]:
    return re.findall(r"[\w.-]+", text)


SIZE = says("--size {}: use one of {}")
KV = says("--kv {}: use some of {}")
DTYPE = says("dtype={}: use one of {}")
SHAPE = says("--shape {}: use one of {}")
VARIANTS = says("--variants {}: use some of {}")
IDS = says("ids={}: use uniform or zipf")
STEPS = says("--steps {}: use some of {}")


def test_names_that_benchmarks_take() -> None:
    """Every name that is listed is taken."""
    for name in _names(refused(SIZE, lambda: check_steps("huge", [1], []))[1]):
        check_steps(name, [1], [])
    size = _names(refused(SIZE, lambda: check_steps("huge", [1], []))[1])[0]
    for name in _names(refused(KV, lambda: check_steps(size, [1], ["half"]))[1]):
        check_steps(size, [1], [name])
    for name in _names(refused(DTYPE, lambda: LookupBenchConfig(dtype="int8"))[1]):
        assert LookupBenchConfig(dtype=name)
    for name in _names(refused(SHAPE, lambda: StepBenchConfig(shape="huge"))[1]):
        assert StepBenchConfig(shape=name)
    for name in _names(refused(VARIANTS, lambda: StepBenchConfig(variants=("x",)))[1]):
        assert StepBenchConfig(variants=(name,))
    refused(IDS, lambda: CommBenchConfig(ids="normal"))
    assert CommBenchConfig(ids="uniform") and CommBenchConfig(ids="zipf")
    for name in _names(refused(STEPS, lambda: gpu.chosen_steps(["fly"]))[1]):
        assert gpu.chosen_steps([name])


RATES = says("memory.rates_file={} cannot be used ({}); write it with `ultramem-ds bench comm "
             "--json > FILE`")  # fmt: skip
ASSUMED = says("assumed: gloo on CPUs; `bench comm` measures")


@pytest.mark.slow
def test_rates_are_measured(tmp_path: Path) -> None:
    """By the command that the message names, on as few tokens as there can be."""
    file = tmp_path / "rates.json"
    memory = load_config("ultramem-debug", [f"memory.rates_file={file}"]).memory
    with pytest.raises(ValueError) as refusal:
        planned_rates(memory)
    RATES.values(refusal.value)
    command = re.findall(r"`ultramem-ds (.*) > FILE`", str(refusal.value))[0].split()
    small = ["--preset", "ultramem-debug", "--tokens", "8", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "ultramem_ds", *command, *small], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file.write_text(done.stdout)
    assert str(file) in str(planned_rates(memory))
    ASSUMED.values(planned_rates(load_config("ultramem-debug").memory))


def _configured(scene: Scene) -> list[str]:
    """A study whose first run directory holds another run."""
    from ultramem_ds.study.expand import trials
    from ultramem_ds.study.spec import load_study

    trial = trials(load_study("tuned-demo")[1], [])[0]
    values = {**json.loads((scene.trained / "config.json").read_text())}
    values.pop("history", None)
    scene.file(f"studies/{trial.run_dir}/config.json", values)
    return ["study", "tuned-demo", "--dry-run", "--output", str(scene.root / "studies")]


def _delete(told: Told) -> list[str]:
    shutil.rmtree(told.values[0])
    return told.argv


def _listed(told: Told) -> list[str]:
    listed = ask(["study", "--list"])
    assert listed.code == 0 and told.values[1] in listed.text
    argv = [told.values[1] if word == told.values[0] else word for word in told.argv]
    return [*argv, "--dry-run"]


def _a_row(told: Told) -> list[str]:
    row = told.values[1].split(", ")[0]
    at = told.argv.index("--rows")
    return [*told.argv[: at + 1], row, "--dry-run"]


def _data(told: Told) -> list[str]:
    output = str(told.scene.root / "studies")
    return [*told.argv, "--data", str(told.scene.prepared), "--report-only", "--output", output]


OTHER_STUDY = says(
    "{} is a run with another {} than the study's; delete it or use another --output"
)
CASES = [
    Advice(_configured, OTHER_STUDY, _delete, "another run in a study"),
    Advice(_configured, OTHER_STUDY,
           lambda told: told.option("--output", told.scene.root / "elsewhere"),
           "another run in a study"),
    Advice("study misspelt",
           says("{} is no file and no shipped study: did you mean {}? `study --list` names them "
                "all"), _listed),
    Advice(lambda scene: ["study"], says("name a study: a file, or one of "),
           lambda told: [*told.argv, told.line.rpartition("one of ")[2].split(", ")[0],
                         "--dry-run"], "no study"),
    Advice("row that a study does not have", says("--rows {} fits no row of {}"), _a_row),
    Advice("study without data", says("--data DIR is needed: a directory written by `prepare`"),
           _data),
    Advice(lambda scene: ["doctor", "--steps", "fly"],
           says("--rehearse, --report and --steps belong to doctor --gpu"),
           lambda told: ["count"] if "use some of" in ask([*told.argv, "--gpu", "--rehearse"]).line
           else [], "steps of another check"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_following_helps(case: Advice, prepared: Path, trained: Path, tmp_path: Path) -> None:
    said = follow(case, Scene(tmp_path, prepared, trained))
    assert said.code == 0, said.text


PRESET = says("{} overrides a preset: name it with --preset")
REHEARSE = says("doctor --gpu: torch sees no CUDA device; --rehearse runs it on the CPU")


def test_options_of_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    PRESET.values(ask(["doctor", "optim.lr=1"]).line)
    monkeypatch.setattr("ultramem_ds.doctor.inputs.check_inputs", lambda wanted: iter(()))
    for area in ("check_python", "check_packages", "check_kernels", "check_deepspeed_ops"):
        monkeypatch.setattr(software, area, lambda *args: iter(()))
    said = ask(["doctor", "optim.lr=1", "--preset", "dense-debug"])
    assert said.code in (0, 1) and "error: " not in said.text  # 1: this machine has a problem
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "STEPS", {})
        REHEARSE.values(ask(["doctor", "--gpu"]).line)
        assert ask(["doctor", "--gpu", "--rehearse"]).code == 0


SBATCH = says("--submit needs SLURM's sbatch, which is not on this machine's PATH")
SCRIPT = says("{} is not there: submit from the repository's root")


def test_submitting(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["study", "tuned-demo", "--data", str(prepared), "--submit=--nodes=1"]
    command += ["--output", str(tmp_path / "out")]
    monkeypatch.chdir(tmp_path)
    SBATCH.values(ask(command).line)
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho Submitted\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    SCRIPT.values(ask(command).line)
    monkeypatch.chdir(ROOT)
    said = ask(command)
    assert said.code == 0 and "Submitted" in said.text, said.text


LOCK = says("rm {}", "doctor/software.py", whole=True)
SEGMENTS = says("rm {}", "doctor/machine.py")


def _do(fix: str) -> None:
    subprocess.run(["bash", "-c", fix], check=True)


def test_what_dead_processes_left(tmp_path: Path) -> None:
    """Doctor's ``rm`` removes what it found, and nothing of those that live."""
    lock = tmp_path / "it's old" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    (found,) = software.stale_locks(tmp_path)
    LOCK.values(found.fix)
    _do(found.fix)
    assert not list(software.stale_locks(tmp_path))
    alive, dead = (tmp_path / f"deepspeed_allreduce_buffer_{n}_29500" for n in "01")
    for path in (alive, dead):
        path.write_bytes(bytes(4096))
    import mmap

    with open(alive, "r+b") as file, mmap.mmap(file.fileno(), 0):
        (found,) = [f for f in machine.check_shared_memory(tmp_path) if "dead runs" in f.what]
        SEGMENTS.values(found.fix)
        _do(found.fix)
        assert not [f for f in machine.check_shared_memory(tmp_path) if "dead runs" in f.what]
    assert alive.exists() and not dead.exists()


NO_FILES = says("ulimit -n {} in {}")


def test_more_open_files() -> None:
    """With the limit that ``ulimit`` is told to set, doctor has nothing to say about it."""

    def fixes() -> list[str]:
        return [f.fix for f in machine.check_limits() if "open files" in f.what]

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        limit, where = NO_FILES.values(fixes()[0])
        if where == "limits.conf":
            pytest.skip("this user may not raise the limit so far")
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), hard))
        assert not fixes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


PACKAGE = says("make install, or {} -m pip install '{}'")
PINNED = says("make install installs {}; otherwise run `make test` on yours once")
EVAL = says("tasks need lm-evaluation-harness, which is not installed: pip install "
            "'ultramem_ds[eval]' (in a checkout: pip install -e '.[eval]')")  # fmt: skip
PYTEST = says("pytest is not installed: pip install -e '.[test]' in the checkout")
CHECKOUT = says("the package is installed without its tests: run in a checkout")
TENSORBOARD = says("TensorBoard: make tensorboard LOGDIR={}")
DEEPSPEED = says("this release knows DeepSpeed {}.x: pip install 'deepspeed=={}.*'")


def make(*words: str) -> str:
    """What ``make`` would do."""
    done = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_what_to_install_can_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed here, but asked of the same files that pip and make read."""
    (tmp_path / "setup.cfg").write_text("[options]\ninstall_requires =\n    no-such-package>=1\n\n")
    (tmp_path / "constraints.txt").write_text("torch==1.0\n")
    found = list(software.check_packages(tmp_path))
    assert Path(PACKAGE.values(found[0].fix)[0]).exists()
    assert Requirement(PACKAGE.values(found[0].fix)[1])
    assert PINNED.values(found[1].fix) == ("1.0",)
    assert "constraints.txt" in make("-B", "install") and "pytest" in make("test")
    assert "tensorboard.main --logdir runs/demo" in make("tensorboard", "LOGDIR=runs/demo")
    TENSORBOARD.values((ROOT / "ultramem_ds/demo/__main__.py").read_text().replace("{ROOT}", "{}"))
    extras = set(metadata.metadata("ultramem_ds").get_all("Provides-Extra") or ())
    for claim, act in ((EVAL, require_lm_eval), (PYTEST, checkout.marked_files)):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            with pytest.raises((ValueError, checkout.NoCheckoutError)) as refusal:
                act()
        claim.values(refusal.value)
        named = set(re.findall(r"\[(\w+)\]", str(refusal.value)))
        assert named and named <= extras
    with monkeypatch.context() as patch:
        patch.setattr(checkout.ultramem_ds, "__file__", str(tmp_path / "ultramem_ds" / "x.py"))
        with pytest.raises(checkout.NoCheckoutError) as refusal:
            checkout.marked_files()
        CHECKOUT.values(refusal.value)
    assert checkout.marked_files()


def test_the_deepspeed_that_is_known() -> None:
    from ultramem_ds.zero import pinned

    text = (ROOT / "ultramem_ds" / "zero" / "pinned.py").read_text()
    DEEPSPEED.values(text.replace("{KNOWN}", "{}").replace('"\n            f"', ""))
    wanted = Requirement(f"deepspeed=={pinned.KNOWN}.*")
    assert wanted.specifier.contains(metadata.version("deepspeed"))
    (ours,) = [r for r in software.requirements(ROOT) if r.name == "deepspeed"]
    assert ours.specifier.contains(metadata.version("deepspeed"))


NO_OPS = says("install g++ and ninja, or do not use the offload JSON files of ds_configs/")
NO_AIO = says(
    "apt-get install libaio-dev, or do not use ds_configs/ultramem_zero3_nvme_offload.json"
)


def test_offload_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other files ask for no op that is missing."""
    from ultramem_ds.config.deepspeed import load_deepspeed_json, offload_device
    from ultramem_ds.zero import offload

    monkeypatch.setattr(offload, "buildable_ops", lambda: {"cpu_adam": False, "async_io": False})
    monkeypatch.setattr(software, "stale_locks", lambda directory: iter(()))
    cpu, nvme = software.check_deepspeed_ops()
    NO_OPS.values(cpu.fix), NO_AIO.values(nvme.fix)
    for file in sorted((ROOT / "ds_configs").glob("*.json")):
        device = offload_device(load_deepspeed_json(file, "ultramem"))
        assert (device == "none") == ("offload" not in file.name)
        assert (device == "nvme") == (file.name in nvme.fix)


OFF_BY = says("rm {} and run doctor again; if it stays, train with memory.kernel=reference")


def test_a_native_kernel_that_is_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "lookup.so"
    built = []

    def build() -> Path:
        if not library.exists():
            library.touch()
            built.append(library)
        return library

    library.touch()
    monkeypatch.setattr(software.native, "build", build)
    monkeypatch.setattr(software, "_try_lookup", lambda: 0.0 if built else 1.0)
    (found,) = software.check_kernels()
    OFF_BY.values(found.fix)
    _do(found.fix.partition(" and ")[0])
    (found,) = software.check_kernels()
    assert found.status == "ok"
    config = load_config("ultramem-debug", ["memory.kernel=reference"])
    assert resolve(config.memory.kernel, torch.device("cpu"))


CHANGE = says("change what the message names")
ROOM = says("free some, or use another --run-dir")
ELSEWHERE = says("use another --run-dir", whole=True)


def test_inputs_and_places_of_doctor(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = inputs.Wanted(preset="dense-debug", overrides=("optim.lrr=1",))
    (found,) = inputs.check_inputs(wrong)
    CHANGE.values(found.fix)
    key = re.findall(r"nearest valid key is '([\w.]+)'", found.what)[0]
    right = inputs.Wanted(preset="dense-debug", overrides=(f"{key}=1",))
    assert all(f.status == "ok" for f in inputs.check_inputs(right))
    found = next(iter(machine.check_disk(tmp_path, needed_bytes=1 << 60)))
    ROOM.values(found.fix)
    assert next(iter(machine.check_disk(tmp_path, needed_bytes=1))).status == "ok"

    def broken(scratch: Path, size: int) -> float:
        if scratch.is_relative_to(tmp_path / "bad"):
            raise OSError("read-only")
        return 1e9

    monkeypatch.setattr(machine, "_durable_write", broken)
    (tmp_path / "bad").mkdir()
    found = list(machine.check_disk(tmp_path / "bad"))[-1]
    ELSEWHERE.values(found.fix)
    assert list(machine.check_disk(tmp_path))[-1].status == "ok"


COMPILER = says("install g++ (apt-get install g++), or set CXX")
CXX20 = says("install a C++20 compiler (g++ 11 or newer) or set CXX and TORCH_EXTENSIONS_DIR")


def test_a_compiler_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultramem_ds.kernels import build

    def compile_(compiler: str, path: Path) -> None:
        if Path(compiler).name != "mine":
            raise build.BuildError("an old compiler")
        path.touch()

    mine = tmp_path / "bin" / "mine"
    mine.parent.mkdir()
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setattr(build, "_compile", compile_)
    monkeypatch.setattr(software, "_try_lookup", lambda: 0.0)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "one"))
    monkeypatch.delenv("CXX", raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "nothing"))
        (found,) = software.check_kernels()
        COMPILER.values(found.fix)
        patch.setenv("CXX", str(mine))
        (found,) = software.check_kernels()
        assert found.status == "ok"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "two"))
    shutil.copy(mine, mine.with_name("g++"))
    monkeypatch.setenv("PATH", str(mine.parent), prepend=os.pathsep)
    (found,) = software.check_kernels()
    CXX20.values(found.fix)
    monkeypatch.setenv("CXX", str(mine))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "three"))
    (found,) = software.check_kernels()
    assert found.status == "ok" and build.library_path().is_relative_to(tmp_path / "three")


UNREADABLE = says("{} cannot be read: {}; delete it to fetch it anew")


def test_a_package_that_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultramem_ds.corpus import archives, fetch
    from ultramem_ds.corpus.packages import PACKAGES

    package = next(p for p in PACKAGES if p.registry == "pypi")
    good = tmp_path / "good.whl"
    with zipfile.ZipFile(good, "w") as archive:
        archive.writestr("a.py", "x = 1\n")
    command = ["cp", str(good), f"{package.names[0]}-1.0.whl"]
    monkeypatch.setattr(fetch, "_command", lambda registry, name: command)

    def read() -> list[tuple[str, bytes]]:
        found = fetch.Fetcher(tmp_path / "packages").fetch(package)
        assert isinstance(found, tuple), found
        return list(archives.files(found[1], lambda path: True))

    assert read() == [("a.py", b"x = 1\n")]
    (file,) = (tmp_path / "packages").glob("*/*.whl")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError) as refusal:
        read()
    Path(UNREADABLE.values(refusal.value)[0]).unlink()
    assert read()


DEBUG = says("preset {} has no debug scale: shape=debug is for 151M memories")


def test_the_shape_of_a_study() -> None:
    from ultramem_ds.config.presets import PRESETS
    from ultramem_ds.study.shape import debug_scale

    refused(DEBUG, lambda: debug_scale("dense-151m"))
    wanted = [name for name in PRESETS if re.match(r"(ultramem|pkm)-151m", name)]
    assert wanted and all(load_config(name, debug_scale(name)) for name in wanted)
