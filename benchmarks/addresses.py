"""What a memory layer's addresses depend on, and how long they stay: of a run's checkpoints.

    python benchmarks/addresses.py --data DIR [--sequences N] CHECKPOINT [CHECKPOINT ...]

Looks up the same validation tokens in every checkpoint. Per memory layer: the share of slots (of a
head's top-m) that two positions have in common when they hold different tokens, the same token
after another one, the same pair of tokens, the same three; and the share of a position's slots that
the checkpoint before had too. A layer whose slots are the same for a token after any other is a
table of tokens; one that keeps few of them trains values that are not read again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.natural_rows import whole_batches
from ultramem_ds.infer.load import load_model
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.telemetry.report import markdown_table

PAIRS = 50_000  # positions compared, of each kind at most
NEAR = 32  # the same token is compared with up to so many later occurrences away


def slots_of(model: LanguageModel, tokens_BS: Tensor) -> list[Tensor]:
    """Selected slots (T, H, m) of every memory layer."""
    found: list[Tensor] = []
    hooks = [
        layer.retrieval.register_forward_hook(
            lambda retrieval, _, selection: found.append(
                selection.slots_TK.view(len(selection.slots_TK), -1, retrieval.top_m)
            )
        )
        for layer in model.memory_layers
    ]
    with torch.no_grad():
        model.hidden(tokens_BS)
    for hook in hooks:
        hook.remove()
    return found


def shared(first_PHm: Tensor, second_PHm: Tensor) -> Tensor:
    """Share of slots that both have, (P,)."""
    equal = first_PHm[..., :, None] == second_PHm[..., None, :]
    return equal.any(-1).float().mean((-1, -2))


def pairs(tokens_BS: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What two positions have in common, and such positions."""
    generator = torch.Generator().manual_seed(0)
    tokens = tokens_BS.flatten()
    before = [torch.roll(tokens_BS, steps, 1).flatten() for steps in (1, 2)]
    count = len(tokens)
    order = torch.argsort(tokens, stable=True)
    ahead = torch.arange(count) + torch.randint(1, NEAR, (count,), generator=generator)
    a, b = order[torch.arange(count)], order[ahead.clamp(max=count - 1)]
    token = (tokens[a] == tokens[b]) & (a != b)
    pair = token & (before[0][a] == before[0][b])
    three = pair & (before[1][a] == before[1][b])
    others = torch.randint(count, (2, PAIRS), generator=generator)
    apart = tokens[others[0]] != tokens[others[1]]
    yield "other tokens", others[0][apart], others[1][apart]
    for name, kind in (
        ("the same token", token & ~pair),
        ("the same pair", pair & ~three),
        ("the same three", three),
    ):
        yield name, a[kind][:PAIRS], b[kind][:PAIRS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared data of the runs")
    parser.add_argument("--sequences", type=int, default=128, help="of validation")
    parser.add_argument("checkpoints", nargs="+", type=Path, help="in order of their steps")
    args = parser.parse_args()
    rows = []
    last: list[Tensor] | None = None
    for path in args.checkpoints:
        model = load_model(path).eval()
        seq_len = model.config.model.seq_len
        batch = next(whole_batches(args.data, "validation", seq_len, args.sequences))
        tokens_BS = batch.tokens[:, :seq_len]
        now = slots_of(model, tokens_BS)
        for index, slots in enumerate(now):
            row = [path.name, str(index)]
            row += [f"{shared(slots[a], slots[b]).mean():.3f}" for _, a, b in pairs(tokens_BS)]
            row.append(f"{shared(slots, last[index]).mean():.3f}" if last else "")
            rows.append(row)
        last = now
    names = [name for name, _, _ in pairs(tokens_BS)]
    print(markdown_table(["checkpoint", "layer", *names, "kept since the one before"], rows))


if __name__ == "__main__":
    main()
