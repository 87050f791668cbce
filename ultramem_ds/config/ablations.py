"""The paper's ablations as presets: Table 2 row by row, Table 3, and Table 8's independent rows."""

from __future__ import annotations

from ultramem_ds.config.shapes import SIZE_151M, SPANS_151M, Overrides, merge, pkm

# Table 2, row by row: (preset, what the row changes with respect to the row before). The first row
# is PKM-151M-x10; the kind is "ultramem" throughout, so that a row differs in one group of keys.
ABLATION_ROWS: tuple[tuple[str, Overrides], ...] = (
    (
        "ablation-00-pkm",
        merge(
            SIZE_151M,
            pkm("6:6", top_m=16, num_heads=6, kdim=816, knum=1224, width=1024),
            {"model": {"kind": "ultramem"}},
            # Section 5.4: LR 1.2e-4, 500 B tokens.
            {"optim": {"lr": 1.2e-4}, "train": {"max_steps": 119_209}},
        ),
    ),
    ("ablation-01-rm-softmax", {"memory": {"softmax": False}}),
    (
        "ablation-02-half-vdim-proj",
        {"memory": {"value_dim": 512, "value_proj": True, "knum": 1728, "top_m": 32}},
    ),
    ("ablation-03-share-query", {"memory": {"query": "per-head-shared-sides"}}),
    (
        "ablation-04-split-skip",
        {
            "memory": {
                "placement": SPANS_151M,
                "knum": 1000,
                "num_heads": 2,
                "kdim": 500,
                "top_m": 16,
            }
        },
    ),
    ("ablation-05-qk-norm", {"memory": {"qk_norm": "layernorm"}}),
    ("ablation-06-ive", {"memory": {"expansion": 4, "shuffle": "bijection"}}),
    ("ablation-07-tdqkr", {"memory": {"retrieval": "tdqkr", "tucker_rank": 2, "kdim": 250}}),
    ("ablation-08-mcs", {"memory": {"num_cores": 2}}),
    ("ablation-09-improved-init", {"memory": {"init": "paper"}}),
    ("ablation-10-value-lr-decay", {"optim": {"value_lr_schedule": "decay"}}),
    ("ablation-11-query-conv", {"memory": {"query_conv": 4}}),
)

# Table 3: rows of Table 2 with another E, r or h: (preset, row that it varies, what it changes).
# Kdim shrinks with r as in row 07, so that queries and keys cost the same.
TABLE_3_ROWS: tuple[tuple[str, str, Overrides], ...] = (
    ("ablation-06-ive-e9", "ablation-06-ive", {"memory": {"expansion": 9}}),
    ("ablation-06-ive-e16", "ablation-06-ive", {"memory": {"expansion": 16}}),
    ("ablation-07-tdqkr-r3", "ablation-07-tdqkr", {"memory": {"tucker_rank": 3, "kdim": 166}}),
    ("ablation-07-tdqkr-r4", "ablation-07-tdqkr", {"memory": {"tucker_rank": 4, "kdim": 125}}),
    ("ablation-08-mcs-h4", "ablation-08-mcs", {"memory": {"num_cores": 4}}),
    ("ablation-08-mcs-h8", "ablation-08-mcs", {"memory": {"num_cores": 8}}),
)

# Table 8: (preset, what it changes in the first row of Table 2, and nothing else). The paper does
# not print these rows' sizes: what a change needs besides is as in Table 2's row of that change.
_TDQKR: Overrides = {"memory": {"retrieval": "tdqkr", "tucker_rank": 2, "kdim": 408}}
TABLE_8_ROWS: tuple[tuple[str, Overrides], ...] = (
    ("alone-rm-softmax", {"memory": {"softmax": False}}),
    (
        "alone-half-vdim-proj",
        {"memory": {"value_dim": 512, "value_proj": True, "knum": 1728, "top_m": 32}},
    ),
    ("alone-share-query", {"memory": {"query": "per-head-shared-sides"}}),
    # Three layers of a third of the rows and heads; without the skip they end where they begin.
    (
        "alone-split-big-mem",
        {"memory": {"placement": "4:4/7:7/10:10", "knum": 707, "num_heads": 2}},
    ),
    ("alone-qk-norm", {"memory": {"qk_norm": "layernorm"}}),
    # Expansion needs the projectors.
    ("alone-ive", {"memory": {"expansion": 4, "shuffle": "bijection", "value_proj": True}}),
    ("alone-tdqkr", _TDQKR),
    # Several scores per value cannot be normalised by one softmax, which goes.
    ("alone-tdqkr-mcs", merge(_TDQKR, {"memory": {"num_cores": 2, "softmax": False}})),
    ("alone-value-lr-decay", {"optim": {"value_lr_schedule": "decay"}}),
    ("alone-query-conv", {"memory": {"query_conv": 4}}),
)


def ablations() -> dict[str, Overrides]:
    """Every preset of the three tables; Table 2's accumulate from row to row."""
    presets: dict[str, Overrides] = {}
    current: Overrides = {}
    for name, change in ABLATION_ROWS:
        current = merge(current, change)
        presets[name] = current
    for name, row, change in TABLE_3_ROWS:
        presets[name] = merge(presets[row], change)
    for name, change in TABLE_8_ROWS:
        presets[name] = merge(presets[ABLATION_ROWS[0][0]], change)
    return presets
