"""Presets against the paper's tables, and predictions against built models."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch

from ultramem_ds.cli.count import PAPER
from ultramem_ds.cli.main import main
from ultramem_ds.config.ablations import ABLATION_ROWS, TABLE_3_ROWS, TABLE_8_ROWS
from ultramem_ds.config.presets import PRESETS, preset
from ultramem_ds.model.accounting import count
from ultramem_ds.model.lm import LanguageModel

# Table 6 with Table 1 for PKM-1.6B-x12: parameters (B), FLOPs (G).
TABLE_6 = {
    "dense-151m": (0.15, 0.30),
    "dense-680m": (0.68, 1.36),
    "dense-1.6b": (1.61, 3.21),
    "dense-6.5b": (6.44, 12.88),
    "moe-151m-2in32": (2.04, 0.35),
    "moe-680m-2in33": (8.95, 1.50),
    "moe-1.6b-2in34": (21.36, 3.52),
    "pkm-151m-x12": (2.04, 0.35),
    "pkm-680m-x12": (8.95, 1.50),
    "pkm-1.6b-x12": (21.13, 3.48),
    "ultramem-151m-x10": (1.71, 0.35),
    "ultramem-151m-x12": (2.03, 0.35),
    "ultramem-680m-x12": (8.93, 1.49),
    "ultramem-1.6b-x12": (21.41, 3.50),
}
# Table 2: dense parameters (M), sparse parameters (G), FLOPs (M), row by row.
TABLE_2 = [
    (173.01, 1.534, 346.06),
    (173.01, 1.534, 346.06),
    (178.47, 1.529, 356.98),
    (173.46, 1.529, 346.96),
    (161.64, 1.536, 323.32),
    (161.64, 1.536, 323.54),
    (172.37, 1.536, 344.98),
    (172.37, 1.536, 344.98),
    (172.37, 1.536, 344.98),
    (172.37, 1.536, 344.98),
    (172.37, 1.536, 344.98),
    (172.38, 1.536, 345.02),
]
# What each row of Table 2 may change with respect to the row before.
GROUPS = {
    "ablation-01-rm-softmax": {"memory.softmax"},
    "ablation-02-half-vdim-proj": {
        "memory.value_dim",
        "memory.value_proj",
        "memory.knum",
        "memory.top_m",
    },
    "ablation-03-share-query": {"memory.query"},
    "ablation-04-split-skip": {
        "memory.placement",
        "memory.knum",
        "memory.num_heads",
        "memory.kdim",
        "memory.top_m",
    },
    "ablation-05-qk-norm": {"memory.qk_norm"},
    "ablation-06-ive": {"memory.expansion", "memory.shuffle"},
    "ablation-07-tdqkr": {"memory.retrieval", "memory.tucker_rank", "memory.kdim"},
    "ablation-08-mcs": {"memory.num_cores"},
    "ablation-09-improved-init": {"memory.init"},
    "ablation-10-value-lr-decay": {"optim.value_lr_schedule"},
    "ablation-11-query-conv": {"memory.query_conv"},
}


def flat(config):
    sections = dataclasses.asdict(config)
    sections.pop("preset")
    return {f"{name}.{key}": v for name, part in sections.items() for key, v in part.items()}


@pytest.mark.parametrize("name", TABLE_6)
def test_table_6(name):
    params_b, flops_g = TABLE_6[name]
    size = count(preset(name))
    pkm = name.startswith("pkm")
    rounding = 0.005  # of a number printed with two decimals
    assert abs(size.params / 1e9 - params_b) <= max((0.01 if pkm else 0.005) * params_b, rounding)
    assert abs(size.flops_per_token / 1e9 - flops_g) <= (0.06 if pkm else 0.025) * flops_g
    assert (PAPER[name].params_b, PAPER[name].flops_g) == (params_b, flops_g)


def test_table_2():
    names = [name for name, _ in ABLATION_ROWS]
    assert len(names) == len(TABLE_2)
    for name, (dense_m, sparse_g, flops_m) in zip(names, TABLE_2):
        size = count(preset(name))
        assert abs(size.dense_params / 1e6 - dense_m) <= 0.02, name
        assert abs(size.sparse_params / 1e9 - sparse_g) <= 0.001 * sparse_g, name
        assert abs(size.flops_per_token / 1e6 - flops_m) <= 0.025 * flops_m, name


def test_each_ablation_row_changes_one_group():
    names = [name for name, _ in ABLATION_ROWS]
    for before, after in pairwise(names):
        first, second = flat(preset(before)), flat(preset(after))
        changed = {key for key in first if first[key] != second[key]}
        assert changed == GROUPS[after]


# Table 3: FLOPs (M) of rows that are not in Table 2.
TABLE_3 = {
    "ablation-06-ive-e9": 323.54 * 1.149,
    "ablation-06-ive-e16": 323.54 * 1.264,
    "ablation-07-tdqkr-r3": 344.98,
    "ablation-07-tdqkr-r4": 344.98,
    "ablation-08-mcs-h4": 344.98,
    "ablation-08-mcs-h8": 344.98,
}
# Table 8: what each row changes in the first row of Table 2.
ALONE = {
    "alone-rm-softmax": {"memory.softmax"},
    "alone-half-vdim-proj": GROUPS["ablation-02-half-vdim-proj"],
    "alone-share-query": {"memory.query"},
    "alone-split-big-mem": {"memory.placement", "memory.knum", "memory.num_heads"},
    "alone-qk-norm": {"memory.qk_norm"},
    "alone-ive": {"memory.expansion", "memory.shuffle", "memory.value_proj"},
    "alone-tdqkr": {"memory.retrieval", "memory.tucker_rank", "memory.kdim"},
    "alone-tdqkr-mcs": {
        "memory.retrieval",
        "memory.tucker_rank",
        "memory.kdim",
        "memory.num_cores",
        "memory.softmax",
    },
    "alone-value-lr-decay": {"optim.value_lr_schedule"},
    "alone-query-conv": {"memory.query_conv"},
}


def changed_keys(a, b):
    first, second = flat(preset(a)), flat(preset(b))
    return {key for key in first if first[key] != second[key]}


def test_table_3():
    assert {name for name, _, _ in TABLE_3_ROWS} == TABLE_3.keys()
    for name, row, _ in TABLE_3_ROWS:
        assert count(preset(name)).flops_per_token / 1e6 == pytest.approx(TABLE_3[name], rel=0.01)
        assert count(preset(name)).sparse_params == count(preset(row)).sparse_params
        varied = {"ive": "expansion", "tdqkr": "tucker_rank", "mcs": "num_cores"}
        key = "memory." + varied[row.split("-")[-1]]
        assert changed_keys(row, name) - {"memory.kdim"} == {key}


def test_table_8():
    assert {name for name, _ in TABLE_8_ROWS} == ALONE.keys()
    first = ABLATION_ROWS[0][0]
    for name in ALONE:
        assert changed_keys(first, name) == ALONE[name]
        sparse, plain = (count(preset(n)).sparse_params for n in (name, first))
        assert sparse == pytest.approx(plain, rel=0.005)


def test_tuned_presets_have_the_size_of_their_plain_ones():
    names = [name for name in PRESETS if name.endswith("-tuned")]
    assert {name.split("-")[0] for name in names} == {"dense", "pkm", "moe", "ultramem"}
    for name in names:
        plain = name.removesuffix("-tuned")
        assert count(preset(name)) == count(preset(plain))
        assert changed_keys(name, plain)


def test_table_4():
    for size, lr in (("151m", 6e-4), ("680m", 2.5e-4), ("1.6b", 2e-4), ("6.5b", 1.2e-4)):
        config = preset(f"dense-{size}")
        optim, train = config.optim, config.train
        assert (optim.lr, optim.lr_end_ratio, optim.warmup_ratio) == (lr, 0.1, 0.01)
        assert (optim.weight_decay, optim.beta1, optim.beta2) == (0.1, 0.9, 0.95)
        assert (train.global_batch_size, train.max_steps) == (2048, 238_418)
        assert (config.model.seq_len, config.model.dropout) == (2048, 0.1)
    for name, _ in ABLATION_ROWS:
        config = preset(name)
        assert config.optim.lr == 1.2e-4  # section 5.4
        tokens = config.train.max_steps * config.train.global_batch_size * config.model.seq_len
        assert tokens == pytest.approx(500e9, rel=1e-4)


def test_table_5():
    for name in PRESETS:
        if name.startswith("ultramem") and "debug" not in name:
            memory = preset(name).memory
            assert (memory.tucker_rank, memory.num_cores, memory.expansion) == (2, 2, 4)
            assert (memory.aux_loss_weight, memory.aux_loss_margin) == (0.001, 0.15)


def test_debug_presets_are_comparable_and_divide_by_four_ranks():
    sizes = {kind: count(preset(f"{kind}-debug")) for kind in ("dense", "pkm", "moe", "ultramem")}
    for kind in ("pkm", "moe"):
        for field in ("params", "flops_per_token"):
            ours, other = getattr(sizes["ultramem"], field), getattr(sizes[kind], field)
            assert other == pytest.approx(ours, rel=0.05), (kind, field)
    assert sizes["ultramem"].params > 5 * sizes["dense"].params
    for kind in ("pkm", "ultramem"):
        memory = preset(f"{kind}-debug").memory
        assert memory.value_dim % (4 * memory.num_cores) == 0
        assert memory.num_rows % 4 == 0
    assert preset("moe-debug").moe.num_experts % 4 == 0
    assert preset("dense-debug").train.global_batch_size % 4 == 0


@pytest.mark.parametrize("name", PRESETS)
def test_meta_model_agrees_with_the_prediction(name):
    config = preset(name)
    with torch.device("meta"):
        model = LanguageModel(config)
    outside = {id(model.embedding.weight), id(model.head.weight)}
    sizes = {"dense": 0, "sparse": 0, "norm": 0}
    experts = {id(p) for n, p in model.named_parameters() if ".experts." in n}
    for param in model.parameters():
        if id(param) in outside:
            continue
        sparse = param.role == "table" or id(param) in experts
        sizes["norm" if param.role == "norm" else "sparse" if sparse else "dense"] += param.numel()
    size = count(config)
    assert sizes == {
        "dense": size.dense_params,
        "sparse": size.sparse_params,
        "norm": size.norm_params,
    }


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'ultramem-151m-x12'"):
        preset("ultramem-151m-12")


def test_count_command(capsys):
    assert main(["count", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["preset"] for row in rows] == list(PRESETS)
    for row in rows:
        assert row["params"] == row["dense_params"] + row["sparse_params"]
        assert isinstance(row["flops_per_token"], int)
    assert main(["count", "--preset", "dense-151m"]) == 0
    assert "150.99 M" in capsys.readouterr().out
    assert main(["count", "--preset", "nonsense"]) == 2
