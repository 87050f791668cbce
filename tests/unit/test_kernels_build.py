"""Building the native extension: cache, locks, and what happens where it cannot be built."""

import pytest
import torch

from ultramem_ds.kernels import __main__ as command
from ultramem_ds.kernels import build, native, registry

CPU = torch.device("cpu")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache directory of its own, and a registry that has not looked yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(registry.ENVIRONMENT_KEY, raising=False)
    forget()
    yield tmp_path
    forget()


def forget():
    registry._pick.cache_clear()
    registry._choice.cache_clear()


def test_a_left_over_lock_does_not_stop_a_build_and_a_second_call_finds_it(
    empty_cache, monkeypatch
):
    path = build.library_path()
    assert path.parent == empty_cache / "ultramem_ds"
    path.parent.mkdir()
    path.with_suffix(".lock").touch()
    assert build.build() == path
    built_at = path.stat().st_mtime_ns
    assert [item.suffix for item in path.parent.iterdir() if item.is_dir()] == []
    monkeypatch.setenv("CXX", "no-such-compiler")  # a library built earlier needs none
    assert build.build() == path
    assert path.stat().st_mtime_ns == built_at
    assert native.load_library(path).ultramem_pool.restype is not None


def test_without_a_compiler_the_cpu_kernel_is_embedding_bag_and_says_why(
    empty_cache, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(empty_cache))
    assert registry.resolve("cpu", CPU).name == "embedding-bag"
    assert "no C++ compiler (g++, c++, clang++) on PATH" in registry.describe("cpu")
    assert command.main() == 1
    assert "no C++ compiler" in capsys.readouterr().err


def test_a_failed_compilation_is_reported_with_the_compilers_words(empty_cache, monkeypatch):
    compiler = empty_cache / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho 'line 1: no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="no such instruction"):
        build.build()
    assert not build.library_path().exists()


def test_an_unusable_cache_directory_names_the_variable_to_set(empty_cache, monkeypatch):
    blocked = empty_cache / "file"
    blocked.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(blocked))
    with pytest.raises(build.BuildError, match="set TORCH_EXTENSIONS_DIR"):
        build.build()


def test_the_name_follows_source_flags_torch_and_cpu(monkeypatch):
    names = {build.library_path().name}
    monkeypatch.setattr(torch, "__version__", "0.0")
    names.add(build.library_path().name)
    monkeypatch.setattr(build, "_cpu_identity", lambda: "another CPU")
    names.add(build.library_path().name)
    monkeypatch.setattr(build, "_COMPILE_FLAGS", ("-O0",))
    names.add(build.library_path().name)
    assert len(names) == 4


def test_the_kernel_for_another_device_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="runs on cpu, the table is on meta"):
        registry.resolve("cpu", torch.device("meta"))
    assert registry.resolve("auto", torch.device("meta")).name == "reference"
