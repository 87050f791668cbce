"""Advice about configuration keys and DeepSpeed JSON files, followed."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tests.unit.advice import Advice, Follow, Said, Told, ask, follow, says, with_words
from tests.unit.bad_inputs import FITS, Command, Scene, rendezvous
from ultramem_ds.config.load import load_config, valid_keys
from ultramem_ds.config.schema import Config, OptimConfig
from ultramem_ds.optim.row_adam import CatchUpRowAdam

SETTING = re.compile(r"\b[a-z]+\.[a-z_0-9]+=[^\s;,]+")


def _train(*overrides: str, preset: str = "ultramem-debug") -> Command:
    return lambda scene: scene.train(*FITS, *overrides, preset=preset)


def _settings(told: Told) -> list[str]:
    """Everything ``section.key=value`` after the word that asks for it."""
    asked = re.split(r"\b(?:needs|set|stay)\b", told.line)[-1]
    return [*told.argv, *SETTING.findall(asked)]


def _preset(told: Told) -> list[str]:
    listed = ask(["count"])
    assert listed.code == 0 and told.values[1] in listed.text
    return told.option("--preset", told.values[1])


def _key(told: Told) -> list[str]:
    return [word.replace(*told.values) for word in told.argv]


def _one_of(number: int) -> Follow:
    """The n-th of a list in the last gap."""

    def way(told: Told) -> list[str]:
        choices = json.loads(told.values[-1])
        key = re.findall(r"[a-z]+\.[a-z_]+(?==)", told.line)[0]
        return [*told.argv, f"{key}={choices[number]}"]

    return way


KEY = says("unknown key {}; the nearest valid key is {}")
NEEDS_EQUAL = says(
    "memory.value_proj=false needs memory.value_dim={} to equal model.hidden_size={}"
)
ALL_ZERO = says("every subset has data.weights 0; give one of them a weight")
TOO_SHORT = says(
    "no subset with a positive weight has a sequence of {} + 1 tokens; prepare more text or choose "
    "a smaller model.seq_len"
)
COLUMNS = says(
    "dimension-wise needs memory.value_dim={} divisible by the {} ranks that share a table; choose "
    "another memory.partition or memory.shard_group_size"
)
EXPERTS = says("moe.expert_parallel_size={} does not divide the {} ranks; use one of {}")
TWO_COLUMNS = says("memory.candidates=two-sided needs an even memory.top_m")

CASES = [
    Advice("preset misspelt", says("unknown preset {}: did you mean {}? See `count`."), _preset),
    Advice("preset to count misspelt", says("unknown preset {}: did you mean {}?"),
           lambda told: told.option("--preset", told.values[1])),
    Advice("key misspelt", KEY, _key),
    Advice("unknown section", KEY, _key),
    Advice("product keys with a Tucker rank",
           says("memory.retrieval=product-key needs memory.tucker_rank=1 and memory.num_cores=1"),
           _settings),
    Advice(_train("memory.softmax=true"), says("memory.softmax=true needs memory.num_cores=1"),
           _settings, "softmax over several cores"),
    Advice(_train("memory.value_proj=false", "memory.value_dim=128"),
           says("memory.value_proj=false needs memory.expansion=1"), _settings, "no projection"),
    Advice(_train("memory.value_proj=false", "memory.expansion=1"), NEEDS_EQUAL,
           with_words("memory.value_dim={1}"), "no projection, narrow values"),
    Advice(_train("memory.candidates=two-sided", "memory.top_m=3"), TWO_COLUMNS,
           with_words("memory.top_m=4"), "an odd number of candidates"),
    Advice(_train("memory.placement=2:1"), says("memory.placement: {} needs 1 <= a <= b"),
           with_words("memory.placement=1:2"), "a memory layer that goes back"),
    Advice("unknown kernel",
           says("no such kernel: {} (from memory.kernel or {}); use auto (or, where they run, one "
                "of {})"), with_words("memory.kernel=auto")),
    Advice("micro-batch does not divide",
           says("train.micro_batch_size={} does not divide train.global_batch_size={} / {} ranks "
                "= {}; the nearest that does is {}"), with_words("train.micro_batch_size={4}")),
    Advice("rollback without a limit", says("train.rollback=true needs train.max_bad_steps above"),
           with_words("train.max_bad_steps=1")),
    Advice("all subset weights zero", ALL_ZERO, with_words("data.weights.even=1")),
    Advice("sequences longer than a subset", TOO_SHORT, with_words("model.seq_len=64")),
    Advice("batch not divisible by ranks",
           says("train.global_batch_size={} cannot be divided over {} ranks; the nearest that can "
                "is {}"), with_words("train.global_batch_size={2}")),
    Advice(lambda scene: (scene.environment.update(rendezvous(3)), scene.train(*FITS))[1],
           says("the nearest that can is {}"), with_words("train.global_batch_size={0}"),
           "batch not divisible by ranks, with micro-batches of two"),
    *(Advice("expert groups not dividing the ranks", EXPERTS, _one_of(n)) for n in range(3)),
    Advice("columns not divisible by ranks", COLUMNS, with_words("memory.partition=number-wise")),
    Advice("columns not divisible by ranks", COLUMNS, with_words("memory.shard_group_size=1")),
    Advice("more tokenizer entries than rows of the embedding",
           says("the tokenizer of {} has {} entries but model.vocab_size={}; set "
                "model.vocab_size={}"), with_words("model.vocab_size={3}")),
    Advice("unknown subset in the weights", says("the data has no such subset, only {}"),
           lambda told: [word.replace("arxiv", told.values[0].split(", ")[0])
                         for word in told.argv]),
]  # fmt: skip


def _deepspeed(content: dict[str, Any], preset: str = "dense-debug") -> Command:
    def command(scene: Scene) -> list[str]:
        path = scene.file("ds.json", content)
        return scene.train(*FITS, "--deepspeed", str(path), preset=preset)

    return command


def _other_file(number: int = 0) -> Follow:
    """The n-th file of ds_configs/ that the message names."""
    return lambda told: told.option(
        "--deepspeed", re.findall(r"ds_configs/\w+\.json", told.line)[number]
    )


def _remove(*then: str) -> Follow:
    """Remove the key that the message's first gap names from the JSON, and set the run's."""

    def way(told: Told) -> list[str]:
        path = Path(told.argv[told.argv.index("--deepspeed") + 1])
        values = json.loads(path.read_text())
        *sections, key = told.values[0].split(".")
        inner = values
        for section in sections:
            inner = inner[section]
        found = inner.pop(key)
        path.write_text(json.dumps(values))
        return [*told.argv, *(word.format(found) for word in then)]

    return way


MOE = says("DeepSpeed-MoE needs stage 1 or 2; use ds_configs/moe_zero2.json or "
           "ds_configs/moe_zero1.json")  # fmt: skip
CONTRADICTION = says("the DeepSpeed JSON sets {}={} but the run has {}; remove the key{}")

CASES += [
    Advice("ZeRO-3 for MoE", MOE, _other_file(0)),
    Advice("ZeRO-3 for MoE", MOE, _other_file(1)),
    Advice("ZeRO-1 for UltraMem",
           says("its value tables are ZeRO-3 partitioned parameters; use "
                "ds_configs/ultramem_zero3.json"), _other_file()),
    Advice("no ZeRO at all",
           says("ZeRO stage {} is not supported; use ds_configs/dense_zero1.json"), _other_file()),
    Advice("an optimizer of its own",
           says("the DeepSpeed JSON sets {}; ultramem_ds builds it from optim.* and "
                "train.precision: remove the key"), _remove()),
    Advice("another batch size",
           says("the DeepSpeed JSON sets {}={} but the run has {}; remove the key and use "
                "train.global_batch_size / train.micro_batch_size"),
           _remove("train.global_batch_size={}", "train.micro_batch_size=1")),
    Advice("another limit of the gradient norm", CONTRADICTION, _remove("optim.clip_grad={}")),
    Advice("another precision", CONTRADICTION, _remove("train.precision=bf16")),
    Advice("gradients accumulated in bf16", CONTRADICTION, _remove()),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_following_helps(case: Advice, prepared: Path, trained: Path, tmp_path: Path) -> None:
    said: Said = follow(case, Scene(tmp_path, prepared, trained))
    assert said.code == 0, said.text


def test_more_text_is_the_other_way(prepared: Path, tmp_path: Path) -> None:
    """ "prepare more text": sequences of the length that was refused, of twice the text."""
    from ultramem_ds.data.mixture import Mixture

    def mixture(data: Path) -> Mixture:
        return Mixture(data, "train", seq_len=3000, weights={}, seed=0)

    tokenizer = str(prepared / "tokenizer.json")
    for name, repeats in (("few", 40), ("more", 4000)):
        text = tmp_path / f"{name}.jsonl"
        text.write_text(json.dumps({"text": "a word " * repeats}) + "\n")
        command = ["prepare", "--input", str(text), "--output", str(tmp_path / name)]
        done = ask([*command, "--tokenizer", tokenizer, "--workers", "1", "--validation-share=0"])
        assert done.code == 0, done.text
    with pytest.raises(ValueError) as refusal:
        mixture(tmp_path / "few")
    TOO_SHORT.values(refusal.value)
    assert len(mixture(tmp_path / "more").subsets) == 1


BETAS = says("memory.table_optimizer=row-sparse-catch-up needs 0 < optim.beta1 < "
             "sqrt(optim.beta2), not {} and {}; use row-sparse")  # fmt: skip


def test_betas_of_the_catching_up_optimizer() -> None:
    import torch

    from ultramem_ds.optim.row_adam import LazyRowAdam

    table_RV = torch.zeros(4, 8)
    with pytest.raises(ValueError) as refusal:
        CatchUpRowAdam(lambda: table_RV, OptimConfig(beta1=0.99, beta2=0.95), "auto")
    BETAS.values(refusal.value)
    CatchUpRowAdam(lambda: table_RV, OptimConfig(beta1=0.97, beta2=0.95), "auto")
    LazyRowAdam(lambda: table_RV, OptimConfig(beta1=0.99, beta2=0.95), "auto")
    config = load_config("ultramem-debug", ["memory.table_optimizer=row-sparse"])
    assert config.memory.table_optimizer == "row-sparse"


# What a message about a value demands, and a value that has it.
DEMANDS = [
    (r"must be at least (\d+)", r"\1"),
    (r"must be at most (\d+)", r"\1"),
    (r"must be (\d+) or (\d+)", r"\2"),
    (r"must be a perfect square \(1, (\d+)", r"\1"),
    (r"must be \[?in [\[(](\d+), ", r"\1.5"),
    (r"must be 0 \(\w+\) or ", "0"),
    (r"must be 0 or positive", "0"),
    (r"must be auto or positive", "auto"),
    (r"must not be negative", "0"),
    (r"must be positive", "1"),
    (r"Input should be ('[^']+')", r"\1"),
    (r"Input should be (?:a valid|a finite) (?:integer|number)", "1"),
    (r"Input should be a valid boolean", "true"),
    (r"Input should be a valid string", "text"),
]
WRONG = ("-1", "0", "7", "1.5", "1000000", "Infinity", "no such", "[1]")


def _demanded(message: str) -> str | None:
    for pattern, value in DEMANDS:
        found = re.search(pattern, message)
        if found is not None:
            return found.expand(value).strip("'")
    return None


@pytest.mark.parametrize("key", valid_keys())
def test_values_that_a_message_demands_are_taken(key: str) -> None:
    """Of every key: values that are refused by themselves, and what the refusal asks for."""
    preset = {"memory": "ultramem-debug", "moe": "moe-debug"}.get(key.split(".")[0], "dense-debug")
    for wrong in WRONG:
        try:
            load_config(preset, [f"{key}={wrong}"])
        except ValueError as error:
            message = str(error)
            value = _demanded(message) if f"{key}=" in message else None
        else:
            continue
        if value is None:
            continue
        try:
            load_config(preset, [f"{key}={value}"])
        except ValueError as error:
            # Beyond that message: what it says now is about how keys fit together.
            assert str(error) != message and f"{key}={value}:" not in str(error), message


def test_demands_are_read_from_most_messages() -> None:
    """The test above does not pass for want of messages that it can read."""
    assert _demanded("model.num_layers=0 must be at least 1") == "1"
    refused = read = 0
    for key in valid_keys():
        for wrong in WRONG:
            try:
                load_config("ultramem-debug", [f"{key}={wrong}"])
            except ValueError as error:
                refused += f"{key}=" in str(error)
                read += f"{key}=" in str(error) and _demanded(str(error)) is not None
    assert refused > 200 and read > 0.9 * refused


def test_sections_are_those_of_the_schema() -> None:
    """A preset of the right kind is tried for every section that has demands of its own."""
    sections = {key.split(".")[0] for key in valid_keys()}
    hints = get_type_hints(Config)
    assert sections == {f.name for f in dataclasses.fields(Config) if f.name != "preset"}
    assert not get_args(hints["model"])
