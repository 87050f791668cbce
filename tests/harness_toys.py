"""Small models, a tokenizer of bytes and toy tasks for the tests of the harness."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import torch

from ultramem_ds.config.load import load_config
from ultramem_ds.data.tokenizers import Tokenizer, load_tokenizer
from ultramem_ds.infer.peers import ALONE, Peers
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel

SMALL = [
    "model.hidden_size=32",
    "model.inner_size=64",
    "model.seq_len=96",
    "model.vocab_size=384",
    "model.num_heads=2",
]
SMALL_MEMORY = ["memory.knum=12", "memory.top_m=4", "memory.kdim=8"]
KINDS = ("dense", "pkm", "moe", "ultramem")


def small_config(kind: str, *overrides: str):
    """A model of a kind that takes milliseconds."""
    memory = SMALL_MEMORY + (["memory.value_dim=32"] if kind == "pkm" else [])
    chosen = memory if kind in ("pkm", "ultramem") else []
    return load_config(f"{kind}-debug", [*SMALL, *chosen, *overrides])


def small_model(kind: str, *overrides: str) -> LanguageModel:
    """The same weights each time, attention that discriminates."""
    config = small_config(kind, *overrides)
    model = LanguageModel(config)
    init_module(model, config, seed=3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "mlp" not in name and param.ndim == 2 and param.shape[0] < 384:
                param.mul_(3)
    return model.eval()


@functools.cache
def byte_tokenizer(directory: Path) -> Tokenizer:
    """GPT-2's byte alphabet without merges: 256 bytes, and the end of text as id 0."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


def harness_lm(model: LanguageModel, tokenizer: Tokenizer, peers: Peers = ALONE, **settings: int):
    """The harness' model over a service with a small budget, so that there are many batches."""
    from ultramem_ds.harness.lm import HarnessLM
    from ultramem_ds.harness.service import Service

    service = Service(model, tokenizer, max_tokens=settings.pop("max_tokens", 400), peers=peers)
    return HarnessLM(service, max_length=settings.pop("max_length", 96), **settings)


def random_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Contexts and continuations: letters after shared shots, endings, plain pairs, no context."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefg hij") for _ in range(draw.randint(low, high))) + "."

    shots = text(40, 40)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        question = text(3, 30)
        pairs += [(shots + question, f" {letter}") for letter in "ABCD"]
        pairs += [(question, " " + text(2, 12)) for _ in range(3)]
        pairs += [(text(5, 120), text(1, 9)), ("", text(3, 9)), (question + " ", text(2, 4))]
    return pairs[:count]


def toy_records(count: int, seed: int = 0) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Records of every kind of multiple-choice task, whose answers are drawn by lot.

    Returns:
        Records by task, in the schema of its data set; and for BoolQ and ARC's cloze format the
        answer to each prompt, for a corpus that gives them away.
    """
    draw = random.Random(seed)
    words = ["red", "sun", "map", "oak", "ice", "fog", "pen", "cup"]
    records: dict[str, list[dict]] = {}
    answers: dict[str, str] = {}

    def add(task: str, **record: object) -> None:
        records.setdefault(task, []).append(record)

    for i in range(count):
        label, four = draw.randint(0, 1), draw.randint(0, 3)
        chosen = draw.sample(words, 4)
        add("boolq", passage=f"p{i}", question=f"q{i}", label=label)
        answers[f"p{i}\nQuestion: q{i}?\nAnswer:"] = f" {('no', 'yes')[label]}"
        choices = {"text": chosen, "label": list("ABCD")}
        add("arc_challenge", question=f"w{i}", choices=choices, answerKey="ABCD"[four])
        answers[f"Question: w{i}\nAnswer:"] = f" {chosen[four]}"
        add("mmlu_anatomy", question=f"m{i}", subject="anatomy", choices=chosen, answer=four)
        scene = {"activity_label": "a", "ctx_a": f"h{i}", "ctx_b": "he"}
        add("hellaswag", ind=i, **scene, endings=chosen, label=str(four))
        options = {"option1": chosen[0], "option2": chosen[1]}
        add("winogrande", sentence=f"s{i} _ went", **options, answer=str(label + 1))
        wrong = {f"Incorrect Answer {n}": chosen[n] for n in (1, 2, 3)}
        add("gpqa_main_zeroshot", **{"Question": f"g{i}", "Correct Answer": chosen[0]}, **wrong)
        add("agieval_sat_en", query=f"e{i} A:", choices=[f"({w})" for w in chosen], gold=[four])
    return records, answers


# The split that a task is evaluated on.
_SPLITS = {"gpqa_main_zeroshot": "train", "mmlu_anatomy": "test", "agieval_sat_en": "test"}


def write_toy_tasks(root: Path, count: int = 32) -> dict[str, str]:
    """``DIR/TASK`` for every task of :func:`toy_records`; returns its answers."""
    records, answers = toy_records(count)
    for task, found in records.items():
        (root / task).mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in found)
        (root / task / f"{_SPLITS.get(task, 'validation')}.jsonl").write_text(lines)
    dev = json.dumps(records["mmlu_anatomy"][0]) + "\n"
    (root / "mmlu_anatomy" / "dev.jsonl").write_text(dev)
    return answers
