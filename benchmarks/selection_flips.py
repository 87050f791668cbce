"""Series of one and of several ranks: do near-ties of the selection part them, or an error?

    python benchmarks/selection_flips.py --data DIR [--ranks 4] [--steps 10] [--bits 12] [overrides]

Runs, all with the same seed, batch and micro-batch: one rank; P ranks; P ranks on which the slots
of one rank are imposed; and one and P ranks that round scores to ``bits`` bits before ranking
(0: without these).
Prints, per step, how far the loss of P ranks is from that of one, as it is, with imposed slots, and
rounded; how many selections are not those of one rank; and how near to a tie the widest of those
was. ``--loss-steps`` also trains on one rank with and without rounding and compares the loss.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ultramem_ds.config.deepspeed import BatchPlan, load_deepspeed_json
from ultramem_ds.config.load import load_config
from ultramem_ds.data.loader import BatchLoader
from ultramem_ds.data.mixture import Mixture
from ultramem_ds.telemetry.phases import Phases
from ultramem_ds.telemetry.report import markdown_table
from ultramem_ds.testing.distributed import run_ranks
from ultramem_ds.testing.selections import SelectionLog, Slots, round_before_ranking
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.runtime import Ranks

LAST = 10  # steps that a training loss is averaged over


def run_body(
    rank: int, world_size: int, args: argparse.Namespace, steps: int, bits: int, imposed: Any
) -> Any:
    """Losses, selected slots of the rank's samples, and per step the flips and the widest tie."""
    deepspeed.init_distributed("gloo", verbose=False)
    config = load_config(args.preset, args.overrides)
    micro = config.train.global_batch_size // args.ranks
    batches = BatchPlan(config.train.global_batch_size, micro, args.ranks // world_size)
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    json = load_deepspeed_json(None, config.model.kind)
    engine = TrainEngine(config, ranks, json, batches, Phases())
    if bits:
        for layer in engine.model.memory_layers:
            round_before_ranking(layer.retrieval, bits)
    tensors = imposed and {key: torch.from_numpy(slots) for key, slots in imposed.items()}
    log = SelectionLog(engine.model, tensors)
    mixture = Mixture(args.data, "train", seq_len=config.model.seq_len, weights={}, seed=0)
    loader = BatchLoader(
        mixture,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        num_workers=0,
    )
    micro_batches = log.batches(iter(loader))
    losses, flips = [], []
    for step in range(steps):
        losses.append(engine.train_step(micro_batches, step).loss)
        flips.append((log.flips.searches, list(log.flips.ties)))
    return losses, log.slots if bits == 0 else {}, flips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    parser.add_argument("--preset", default="ultramem-debug")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bits", type=int, default=12, help="0 = no runs that round")
    parser.add_argument("--loss-steps", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="section.key=value, of all runs")
    args = parser.parse_args()

    def run(ranks: int, bits: int = 0, imposed: Slots | None = None, steps: int = 0) -> list[Any]:
        steps = steps or args.steps
        # As arrays: a tensor would travel as a file descriptor, of which a process start takes 256.
        arrays = imposed and {key: slots.numpy() for key, slots in imposed.items()}
        return run_ranks(run_body, ranks, args, steps, bits, arrays, timeout_s=7200)

    one, slots, _ = run(1)[0]
    free = run(args.ranks)[0][0]
    replays = run(args.ranks, imposed=slots)
    rounded = [run(ranks, args.bits)[0][0] for ranks in (1, args.ranks)] if args.bits else []
    rows, seen = [], 0
    for step in range(args.steps):
        ties = [tie for _, _, flips in replays for tie in flips[step][1]]
        searches = sum(flips[step][0] for _, _, flips in replays)
        apart = [(free, one), (replays[0][0], one)] + ([tuple(rounded)] if rounded else [])
        row = [str(step + 1), *(f"{abs(a[step] / b[step] - 1):.1e}" for a, b in apart)]
        rows.append([*row, f"{len(ties) - seen}", f"{max(ties, default=0):.1e}"])
        seen = len(ties)
    header = ["step", f"{args.ranks} ranks from one", "slots imposed"]
    header += [f"{args.bits} bits"] if rounded else []
    header += ["flips", "widest tie so far"]
    print(markdown_table(header, rows))
    print(f"{seen} of {searches} selections flipped in {args.steps} steps")
    if args.loss_steps:
        for bits in (0, args.bits):
            losses = run(1, bits, steps=args.loss_steps)[0][0]
            print(f"{bits or 'all'} bits: mean loss of the last {LAST} {mean(losses[-LAST:]):.4f}")


if __name__ == "__main__":
    main()
