"""``count``: predicted parameters and FLOPs of presets, beside what the paper prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from ultramem_ds.config.presets import PRESETS, preset
from ultramem_ds.model.accounting import count


@dataclass(frozen=True)
class Printed:
    """The paper's numbers: billions of parameters, billions of FLOPs per token."""

    params_b: float
    flops_g: float


def _ablation(dense_m: float, sparse_g: float, flops_m: float) -> Printed:
    return Printed(dense_m / 1e3 + sparse_g, flops_m / 1e3)


# Tables 1, 2 and 6. PKM-1.6B-x12: Table 1 (Table 6 prints 21.44 and 3.52 for the same model).
PAPER: dict[str, Printed] = {
    "dense-151m": Printed(0.15, 0.30),
    "dense-680m": Printed(0.68, 1.36),
    "dense-1.6b": Printed(1.61, 3.21),
    "dense-6.5b": Printed(6.44, 12.88),
    "moe-151m-2in32": Printed(2.04, 0.35),
    "moe-680m-2in33": Printed(8.95, 1.50),
    "moe-1.6b-2in34": Printed(21.36, 3.52),
    "ultramem-151m-x10": Printed(1.71, 0.35),
    "ultramem-151m-x12": Printed(2.03, 0.35),
    "ultramem-680m-x12": Printed(8.93, 1.49),
    "ultramem-1.6b-x12": Printed(21.41, 3.50),
    "pkm-151m-x12": Printed(2.04, 0.35),
    "pkm-680m-x12": Printed(8.95, 1.50),
    "pkm-1.6b-x12": Printed(21.13, 3.48),
    "ablation-00-pkm": _ablation(173.01, 1.534, 346.06),
    "ablation-01-rm-softmax": _ablation(173.01, 1.534, 346.06),
    "ablation-02-half-vdim-proj": _ablation(178.47, 1.529, 356.98),
    "ablation-03-share-query": _ablation(173.46, 1.529, 346.96),
    "ablation-04-split-skip": _ablation(161.64, 1.536, 323.32),
    "ablation-05-qk-norm": _ablation(161.64, 1.536, 323.54),
    "ablation-06-ive": _ablation(172.37, 1.536, 344.98),
    "ablation-07-tdqkr": _ablation(172.37, 1.536, 344.98),
    "ablation-08-mcs": _ablation(172.37, 1.536, 344.98),
    "ablation-09-improved-init": _ablation(172.37, 1.536, 344.98),
    "ablation-10-value-lr-decay": _ablation(172.37, 1.536, 344.98),
    "ablation-11-query-conv": _ablation(172.38, 1.536, 345.02),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "count", help="parameters and FLOPs per token of presets, beside the paper's"
    )
    parser.add_argument("--preset", help="one preset; all by default")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    parser.set_defaults(run=run)


def counts(name: str) -> dict[str, Any]:
    """One preset's plain numbers, without embedding and head."""
    size = count(preset(name))
    return {
        "preset": name,
        "params": size.params,
        "dense_params": size.dense_params,
        "sparse_params": size.sparse_params,
        "norm_params": size.norm_params,
        "flops_per_token": size.flops_per_token,
    }


def run(args: argparse.Namespace) -> int:
    """Print the counts."""
    rows = [counts(name) for name in ([args.preset] if args.preset else PRESETS)]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'preset':28}{'params':>12}{'paper':>9}{'dense':>12}{'sparse':>12}", end="")
    print(f"{'FLOPs/token':>14}{'paper':>9}")
    for row in rows:
        printed = PAPER.get(row["preset"])
        params = f"{printed.params_b:.2f} B" if printed else ""
        flops = f"{printed.flops_g:.2f} G" if printed else ""
        print(
            f"{row['preset']:28}{row['params'] / 1e9:10.4f} B{params:>9}"
            f"{row['dense_params'] / 1e6:10.2f} M{row['sparse_params'] / 1e9:10.4f} B"
            f"{row['flops_per_token'] / 1e9:12.4f} G{flops:>9}"
        )
    return 0
