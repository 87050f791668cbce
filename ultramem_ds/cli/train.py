"""``train``: one training run, resumed by itself where its directory has a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ultramem_ds.utils.console import LibraryOutput


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "train",
        help="train a preset; resumes by itself",
        description="Train PRESET on prepared data. Run it again to resume: the run directory's "
        "latest checkpoint is used. A finished run says so and exits 0.",
        epilog="Example: deepspeed --num_gpus 2 --no_local_rank --module ultramem_ds train "
        "--preset ultramem-debug --data runs/demo/data --run-dir runs/mine train.max_steps=50",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", required=True, help="name of a preset; `count` lists them")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="directory written by `prepare`"
    )
    parser.add_argument(
        "--run-dir", type=Path, required=True, metavar="DIR", help="where the run lives"
    )
    parser.add_argument(
        "--deepspeed",
        type=Path,
        metavar="FILE",
        help="DeepSpeed JSON; without it the preset's own of ds_configs/",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="go on from the latest checkpoint under changed settings: train.max_steps, optim.*, "
        "train.rollback, other data and more (docs/training.md); noted in config.json",
    )
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="PATH",
        help="start a new run from the weights of a run: fresh optimizer and schedule",
    )
    parser.add_argument(
        "--skip-samples",
        action="append",
        default=[],
        metavar="A:B",
        help="jump over global samples A to B - 1, which the run has not reached; repeatable, and "
        "recorded in the checkpoints",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print memory, steps, checkpoint size and a time estimate, and "
        "stop: nothing is trained or written",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        default=argparse.SUPPRESS,
        metavar="P",
        help="with --dry-run: as if on P ranks; otherwise the launcher decides",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="show what DeepSpeed and PyTorch print, instead of writing it to RUN/logs/",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="override a configuration key, for example train.max_steps=100",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the run, then train."""
    from ultramem_ds.utils.console import libraries_apart

    with libraries_apart(arguments.verbose) as libraries:
        return _run(arguments, libraries)


def _run(arguments: argparse.Namespace, libraries: LibraryOutput | None) -> int:
    from ultramem_ds.config.load import load_config
    from ultramem_ds.data.skips import parse_range
    from ultramem_ds.harness.extra import require_lm_eval
    from ultramem_ds.train.dry_run import describe, dry_run
    from ultramem_ds.train.loop import train
    from ultramem_ds.train.run import prepare_run
    from ultramem_ds.utils import environment

    if libraries is not None:
        libraries.speak()
    world = environment.adopt()
    world_size = world.size
    if "world_size" in arguments:
        if not arguments.dry_run:
            raise ValueError(
                "--world-size is for --dry-run; to train on several ranks use a launcher "
                "(NPROC=P launch/one_node.sh train ...)"
            )
        if arguments.world_size < 1:
            raise ValueError(f"--world-size {arguments.world_size} must be at least 1")
        world_size = arguments.world_size
    config = load_config(arguments.preset, arguments.overrides)
    checked = prepare_run(
        config,
        arguments.data,
        arguments.run_dir,
        arguments.deepspeed,
        world_size,
        [parse_range(text) for text in arguments.skip_samples],
        extend=arguments.extend,
        init_from=arguments.init_from,
    )
    if arguments.dry_run:
        if world.rank == 0:
            print(describe(dry_run(checked)))
        return 0
    make_judge = None
    if config.train.tasks:
        require_lm_eval()
        from ultramem_ds.harness.in_loop import LoopJudge

        make_judge = LoopJudge
    train(checked, libraries, make_judge)
    return 0
