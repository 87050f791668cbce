"""``plan``: memory per rank, bytes per step of each partition scheme, and the scheme chosen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ultramem_ds.config.load import load_config
from ultramem_ds.planning.crossover import plot_crossover
from ultramem_ds.planning.planner import Plan, make_plan


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "plan", help="memory per rank and bytes per step of a preset on a number of ranks"
    )
    parser.add_argument("--preset", required=True, help="name of a preset; `count` lists them")
    parser.add_argument("--world-size", type=int, required=True, metavar="P", help="ranks")
    parser.add_argument(
        "--micro-batch",
        type=int,
        metavar="B",
        help="sequences per rank and forward; train.micro_batch_size by default, 1 if that is auto",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE.png",
        help="also draw where number-wise and dimension-wise send alike (the paper's Figure 9)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for train")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    if args.world_size < 1:
        raise ValueError(f"--world-size {args.world_size} must be at least 1")
    overrides = list(args.overrides)
    if args.micro_batch is not None:
        overrides.append(f"train.micro_batch_size={args.micro_batch}")
    config = load_config(args.preset, overrides)
    plan = make_plan(config, args.world_size)
    if args.figure is not None:
        if not config.has_memory:
            raise ValueError(f"--figure: preset {args.preset} has no memory layer")
        plot_crossover(config.memory, args.figure)
    print(json.dumps(plan.to_json(), indent=2) if args.json else describe(plan))
    return 0


def describe(plan: Plan) -> str:
    """The plan as text."""
    lines = [
        f"{plan.preset} on {plan.world_size} ranks: ZeRO-{plan.zero_stage}, micro-batch "
        f"{plan.micro_batch_size}, {plan.accumulation_steps} forwards per optimizer step",
        "",
        f"{'memory per rank':24}{'GB':>9}",
    ]
    lines += [f"  {name:22}{size / 1e9:9.3f}" for name, size in plan.memory.parts().items()]
    if plan.padding_experts:
        lines.append(f"{plan.padding_experts} of a group's expert slots are padding, held as zeros")
    if not plan.schemes:
        return "\n".join(lines)
    lines += [
        "",
        f"tables over {plan.shard_group_size} ranks; per rank and micro-batch, all memory layers:",
        f"{'scheme':18}{'MB sent':>10}{'lookup ms':>11}{'kept MB':>9}   parts (MB)",
    ]
    for scheme in plan.schemes:
        chosen = " <- chosen" if scheme.scheme == plan.partition else ""
        if scheme.obstacle:
            lines.append(f"{scheme.scheme:18}not possible: {scheme.obstacle}")
            continue
        parts = ", ".join(
            f"{name} {size / 1e6:.1f}" for name, size in scheme.bytes_by_category.items()
        )
        lines.append(
            f"{scheme.scheme:18}{scheme.bytes_per_step / 1e6:10.1f}{scheme.predicted_step_ms:11.1f}"
            f"{scheme.lookup_activation_bytes / 1e6:9.1f}   {parts}{chosen}"
        )
    lines.append(f"chosen by {plan.rates}")
    lines.append(f"{'stock ZeRO-3':18}{plan.stock_zero3_bytes_per_step / 1e6:10.1f}")
    if plan.replica_bytes_per_optimizer_step:
        lines.append(
            "between copies of the tables, per optimizer step: "
            f"{plan.replica_bytes_per_optimizer_step / 1e6:.1f} MB"
        )
    return "\n".join(lines)
