"""Train with the memory's learned addresses replaced by hashes of the last tokens.

    python benchmarks/hashed_addresses.py [--orders 2,3] -- --preset ultramem-debug --data DIR
        --run-dir DIR [what else `train` takes]

Everything else is `ultramem-ds train`: tables, lookups, value projections, optimizer. Head i reads
top-m slots that are a hash of the last ``orders[i]`` tokens, each with score 1 (its cores' equal
shares); queries and keys get no gradient. What such a run gains over a learned one is what the
addresses lose: the values are the same. One rank.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ultramem_ds.cli.main import main as command
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.retrieval import Retrieval
from ultramem_ds.model.memory.scores import ScoreForm

_MIX = (2246822519, 668265263)  # odd multipliers
_SPACE = 2**61 - 1


def hashed_slots(tokens_BS: Tensor, order: int, count: int, salt: int, space: int) -> Tensor:
    """``count`` slots below ``space`` of the last ``order`` tokens, int64 (B * S, count)."""
    key_BS = torch.zeros_like(tokens_BS)
    for back in range(order):
        earlier_BS = torch.roll(tokens_BS, back, 1)
        earlier_BS[:, :back] = 0
        key_BS = (key_BS * 1_000_003 + earlier_BS + 17) % (2**31 - 1)
    number = torch.arange(count) * 7919 + salt
    mixed = (key_BS.flatten()[:, None] + number) * _MIX[0] % _SPACE
    mixed = (mixed ^ (mixed >> 17)) * _MIX[1] % _SPACE
    return (mixed ^ (mixed >> 13)) % space


def replace_addresses(orders: list[int]) -> None:
    """From now on every retrieval hashes the tokens of the forward it is part of."""
    seen: dict[str, Tensor] = {}
    hidden, build = LanguageModel.hidden, Retrieval.__init__
    layers = 0

    def watched(self: LanguageModel, tokens_BS: Tensor, *rest: Any, **named: Any) -> Any:
        seen["tokens"] = tokens_BS
        return hidden(self, tokens_BS, *rest, **named)

    def built(self: Retrieval, *args: Any) -> None:
        nonlocal layers
        build(self, *args)
        layer, layers = layers, layers + 1

        def select(form: ScoreForm, queries: Tensor, keys_2Hnrd: Tensor, _: Tensor) -> Any:
            heads, space = keys_2Hnrd.shape[1], self.num_keys**2
            slots_THm = torch.stack(
                [
                    hashed_slots(
                        seen["tokens"],
                        orders[head % len(orders)],
                        self.top_m,
                        head * 104_729 + layer * 1_299_709,
                        space,
                    )
                    for head in range(heads)
                ],
                dim=1,
            )
            cores = 1 if form.core_hHrr is None else len(form.core_hHrr)
            # Nothing that is trained may be left out of the graph.
            unused = [queries.mean(), keys_2Hnrd.mean()]
            unused += [] if form.core_hHrr is None else [form.core_hHrr.mean()]
            scores = torch.full((*slots_THm.shape, cores), cores**-0.5)
            return slots_THm, scores + 0 * torch.stack(unused).sum()

        self.select = select

    LanguageModel.hidden = watched  # type: ignore[method-assign]
    Retrieval.__init__ = built  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", default="2,3", help="tokens hashed, head by head")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="-- and the arguments of `train`")
    args = parser.parse_args()
    replace_addresses([int(order) for order in args.orders.split(",")])
    return command(["train", *(word for word in args.train if word != "--")])


if __name__ == "__main__":
    sys.exit(main())
