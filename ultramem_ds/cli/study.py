"""``study``: runs of a study file, resumed by themselves, and their table and figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "study",
        help="runs of a study one after the other, and their table with standard errors",
        description="Run every row, seed and token budget of STUDY that is not finished, then "
        "write a table with standard errors and paired differences, figures and a small JSON. "
        "Interrupt and repeat the command at will. STUDY is a file or a shipped study's name.",
        epilog="Example: ultramem-ds study table-2-cpu --data runs/corpus/data",
    )
    parser.add_argument("study", metavar="STUDY", nargs="?", help="file or name")
    parser.add_argument("--list", action="store_true", help="name the shipped studies and stop")
    parser.add_argument("--data", type=Path, metavar="DIR", help="directory written by `prepare`")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/studies/STUDY")
    parser.add_argument("--nproc", type=int, default=1, metavar="P", help="ranks of one run")
    parser.add_argument(
        "--report-only", action="store_true", help="run nothing; write about what is finished"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    parser.add_argument(
        "--keep-checkpoints", action="store_true", help="do not delete those of finished runs"
    )
    parser.add_argument(
        "--submit",
        metavar="OPTIONS",
        help="hand every unfinished run to SLURM's sbatch with these OPTIONS and stop, for example "
        "--submit='--nodes=1 --gpus-per-node=1 --time=4:00:00'",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="of every run, as for train"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run or submit what is missing, and report."""
    from ultramem_ds.data.manifest import load_manifest
    from ultramem_ds.study.expand import lines, trials
    from ultramem_ds.study.report import write_study
    from ultramem_ds.study.run import Settings, is_finished, run_trials, submit_trials
    from ultramem_ds.study.spec import load_study, shipped

    if arguments.list:
        for each in shipped():
            print(f"{each:16} {load_study(each)[1].title}")
        return 0
    if arguments.study is None:
        raise ValueError("name a study: a file, or one of " + ", ".join(shipped()))
    if arguments.nproc < 1:
        raise ValueError(f"--nproc {arguments.nproc} must be at least 1")
    name, study = load_study(arguments.study)
    table, runs = lines(study), trials(study, arguments.overrides)
    output: Path = arguments.output or Path("runs/studies") / name
    if arguments.dry_run:
        for trial in runs:
            state = (
                "finished" if is_finished(trial, output) else f"{trial.tokens / 1e6:.2f} M tokens"
            )
            print(f"{trial.run_dir.name:60} {state}")
        return 0
    if arguments.data is None:
        raise ValueError("--data DIR is needed: a directory written by `prepare`")
    manifest = load_manifest(arguments.data)
    settings = Settings(
        data=arguments.data,
        output=output,
        num_ranks=arguments.nproc,
        keep_checkpoints=arguments.keep_checkpoints,
    )
    output.mkdir(parents=True, exist_ok=True)
    if arguments.submit is not None:
        said = submit_trials(runs, settings, arguments.submit, Path("launch/slurm.sh"))
        print("\n".join(said) or "all runs are finished")
        return 0
    failed = [] if arguments.report_only else run_trials(runs, settings)
    tokens = sum(subset.tokens for subset in manifest.of_split("train").values())
    for path in write_study(name, study, table, runs, output, tokens):
        print(path)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0
