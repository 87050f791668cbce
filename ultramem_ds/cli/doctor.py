"""``doctor``: is everything here that training needs, and what to do if not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "doctor",
        help="check environment, disk, ranks, data and configuration; say what to fix",
        description="Check Python, packages, compiler and kernels, GPU, limits, shared memory and "
        "disk; under a launcher also whether all ranks answer and how fast; with --preset, --data "
        "and --run-dir also the run itself. Exit code 1 if something must be fixed. The native "
        "kernel is built if it is not yet; 64 MB are written beside the run directory and removed.",
        epilog="Examples: ultramem-ds doctor | NPROC=8 launch/one_node.sh doctor --preset "
        "ultramem-151m-x12 --data /data/prepared --run-dir runs/u151",
    )
    parser.add_argument("--preset", help="check this preset's configuration and memory")
    parser.add_argument("--data", type=Path, metavar="DIR", help="check this prepared data")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="check its disk and checkpoints; default: here"
    )
    parser.add_argument("--deepspeed", type=Path, metavar="FILE", help="as for train")
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="check the GPU instead: kernels, training, decoding, rates, each against the CPU",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="with --gpu: what has a CPU equivalent, on the CPU"
    )
    parser.add_argument(
        "--steps", metavar="A,B", help="with --gpu: only these; their names stand in its output"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="with --gpu: gpu-check.md and .json go here"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for train")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check everything on rank 0, the ranks' connection on all."""
    if arguments.gpu:
        return _check_gpu(arguments)
    if arguments.rehearse or arguments.report or arguments.steps:
        raise ValueError("--rehearse, --report and --steps belong to doctor --gpu")
    from ultramem_ds.doctor import machine, software
    from ultramem_ds.doctor.finding import describe, must_fix, to_json
    from ultramem_ds.doctor.inputs import Wanted, check_inputs
    from ultramem_ds.doctor.ranks import check_ranks, joined
    from ultramem_ds.utils import environment

    if arguments.overrides and not arguments.preset:
        raise ValueError(f"{arguments.overrides[0]!r} overrides a preset: name it with --preset")
    wanted = Wanted(
        preset=arguments.preset,
        overrides=tuple(arguments.overrides),
        data=arguments.data,
        run_dir=arguments.run_dir,
        deepspeed=arguments.deepspeed,
        world_size=environment.adopt().size,
    )
    with joined() as ranks:
        of_ranks = list(check_ranks(ranks))
    if not ranks.is_main:
        return 0
    findings = [
        *software.check_python(),
        *software.check_packages(),
        *software.check_kernels(),
        *software.check_deepspeed_ops(),
        *software.check_gpu(),
        *machine.check_limits(),
        *machine.check_shared_memory(),
        *machine.check_names(),
        *machine.check_disk(arguments.run_dir or Path(), wanted.disk_bytes()),
        *of_ranks,
        *check_inputs(wanted),
    ]
    print(json.dumps(to_json(findings), indent=2) if arguments.json else describe(findings))
    return int(must_fix(findings))


def _check_gpu(arguments: argparse.Namespace) -> int:
    """Run the GPU's steps, a line each; 1 if one failed."""
    from ultramem_ds.doctor.gpu import STEPS, chosen_steps, run_steps, write_report

    steps = chosen_steps(arguments.steps.split(",")) if arguments.steps else STEPS
    outcomes = []
    for outcome in run_steps(arguments.rehearse, steps):
        outcomes.append(outcome)
        if not arguments.json:
            print(outcome.line(), flush=True)
    if arguments.json:
        print(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
    if arguments.report:
        write_report(outcomes, arguments.report)
    return int(any(outcome.status == "FAIL" for outcome in outcomes))
