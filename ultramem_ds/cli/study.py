"""``study``: runs of a study file, resumed by themselves, and their table and figures."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
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
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="instead of the study's")
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="N", help="budgets instead of the study's"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="PATTERN",
        help="run only rows whose name fits, for example 'moe*'; the table shows all there are",
    )
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
    for option in ("nproc", "jobs"):
        if getattr(arguments, option) < 1:
            raise ValueError(f"--{option} {getattr(arguments, option)} must be at least 1")
    name, study = load_study(arguments.study)
    study = replace(
        study,
        seeds=tuple(arguments.seeds or study.seeds),
        tokens=tuple(arguments.tokens or study.tokens),
    )
    table, runs = lines(study), trials(study, arguments.overrides)
    chosen = [trial for trial in runs if _fits(trial.line.name, arguments.rows)]
    if not chosen:
        names = ", ".join(line.name for line in table)
        raise ValueError(f"--rows {' '.join(arguments.rows)} fits no row of {names}")
    output: Path = arguments.output or Path("runs/studies") / name
    if arguments.dry_run:
        for trial in chosen:
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
        jobs=arguments.jobs,
        keep_checkpoints=arguments.keep_checkpoints,
    )
    output.mkdir(parents=True, exist_ok=True)
    if arguments.submit is not None:
        said = submit_trials(chosen, settings, arguments.submit, Path("launch/slurm.sh"))
        print("\n".join(said) or "all runs are finished")
        return 0
    failed = [] if arguments.report_only else run_trials(chosen, settings)
    tokens = sum(subset.tokens for subset in manifest.of_split("train").values())
    for path in write_study(name, study, table, runs, output, tokens):
        print(path)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _fits(name: str, patterns: list[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
