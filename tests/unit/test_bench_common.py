"""The benchmarks' shared parts: alternation, summaries, header, output."""

import argparse
import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from ultramem_ds.bench.common import Timing, header, print_document, time_alternating
from ultramem_ds.bench.lookup import LookupBench, LookupBenchConfig
from ultramem_ds.cli import bench


def test_rounds_alternate_over_the_variants_and_rotate_the_first():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = time_alternating(variants, rounds=4, sample_s=0.0)
    # The warm-up makes two calls per variant (one repeat per sample, as sample_s is 0).
    assert "".join(calls[6:]) == "abc" + "bca" + "cab" + "abc"
    assert all(timing.rounds == 4 for timing in timings.values())
    with pytest.raises(ValueError, match="rounds=1"):
        time_alternating(variants, rounds=1)


def test_timing_is_median_and_quartiles():
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (timing.low_ms, timing.median_ms, timing.high_ms) == (2.0, 3.0, 5.0)
    assert timing.as_row() == {"time_ms": 3.0, "low_ms": 2.0, "high_ms": 5.0, "rounds": 5}


def test_header_names_hardware_versions_config_and_commit():
    document = header({"tokens": 4})
    assert document["hardware"]["cpu"] and document["hardware"]["cpu_cores"] >= 1
    assert document["versions"]["torch"]
    assert document["config"] == {"tokens": 4}
    assert "commit" in document


def test_table_has_a_line_per_row_and_the_header_below(capsys):
    rows = [{"variant": "ours", "time_ms": 0.123456}, {"variant": "theirs", "time_ms": 12.0}]
    print_document(
        {"rows": rows, **header({})}, as_json=False, columns=("variant", "time_ms", "fair")
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["ours", "0.1235", "-"]
    assert lines[3].startswith("hardware: ")


def test_bench_lookup_prints_one_json_document(capsys):
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    arguments = "bench lookup --tokens 1,3 --rows 64 --value-dim 8 --entries 4 --rounds 2 --json"
    assert bench.run(parser.parse_args(arguments.split())) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"rows", "hardware", "versions", "config", "commit"}
    assert document["config"]["num_rows"] == 64
    keys = {(row["variant"], row["tokens"], row["direction"]) for row in document["rows"]}
    assert len(keys) == len(document["rows"])
    for tokens in (1, 3):
        for direction, variant in (
            ("forward", "lookup_reduce"),
            ("forward", "embedding_bag"),
            ("forward", "eager-gather"),
            ("backward", "lookup_reduce"),
            ("backward", "sparse-coalesce"),
            ("backward", "dense-gradient"),
        ):
            assert (variant, tokens, direction) in keys
    assert all(row["time_ms"] > 0 for row in document["rows"])


@pytest.mark.parametrize("cores", [1, 2])
def test_variants_of_the_lookup_bench_compute_the_same_thing(cores):
    config = LookupBenchConfig(num_rows=16, value_dim=8, entries=6, num_cores=cores, expansion=1)
    lookup_bench = LookupBench(config)
    problem = lookup_bench.problem(tokens=3)
    problem.grad_TEV.fill_(1.0)
    # Callables of both directions cycle over their problems, here one.
    forward = {name: run() for name, run in lookup_bench.forward_variants([problem]).items()}
    for name, pooled in forward.items():
        torch.testing.assert_close(pooled.reshape(3, 8), forward["lookup_reduce"][:, 0], msg=name)

    variants = lookup_bench.backward_variants([problem])
    (grad_scores_TKh,) = variants["lookup_reduce"]()
    grad_RV = lookup_bench.grad_RV.clone()
    dense_grad, dense_grad_weights = variants["dense-gradient"]()
    sparse_grad, sparse_grad_weights = variants["sparse-coalesce"]()
    torch.testing.assert_close(dense_grad.view(16, 8), grad_RV)
    torch.testing.assert_close(sparse_grad.to_dense().view(16, 8), grad_RV)
    # embedding_bag's weights lie in (token, core, entry) order when there is one projector.
    expected = grad_scores_TKh.transpose(1, 2).flatten()
    torch.testing.assert_close(dense_grad_weights, expected)
    torch.testing.assert_close(sparse_grad_weights, expected)


def test_bad_bench_settings_are_named():
    with pytest.raises(ValueError, match="dtype=fp8"):
        LookupBenchConfig(dtype="fp8")
    with pytest.raises(ValueError, match="tokens"):
        LookupBenchConfig(tokens=(0,))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a switch of glibc")
def test_kept_memory_faults_no_pages():
    """In a process of its own: the switch cannot be taken back."""
    script = """
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault
from ultramem_ds.bench.common import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(1 << 23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
default = [faults() for _ in range(3)][-1]
assert keep_freed_memory()
kept = max([faults() for _ in range(40)][-5:])  # every place in the kept pad was used by now
print(default, kept)
"""
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    default, kept = map(int, done.stdout.split())
    assert default > 1000 > 10 * kept  # 32 MiB are 8192 pages
