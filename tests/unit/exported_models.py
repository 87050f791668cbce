"""Small models of every kind as run directories and as exported ones, made without training."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ultramem_ds.config.load import load_config
from ultramem_ds.data.tokenizers import HuggingFaceTokenizer
from ultramem_ds.exchange.importing import Source, write_run
from ultramem_ds.infer.generate import generate
from ultramem_ds.infer.sampling import Sampling
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.blocks import Block

ENTRIES, ROWS = 300, 320  # of the tokenizer, of the embedding
_SMALL = (
    "model.hidden_size=32 model.inner_size=64 model.num_heads=2 model.seq_len=64 "
    f"model.vocab_size={ROWS} model.init_std=0.17"
).split()
_MEMORY = ["memory.knum=12", "memory.top_m=4", "memory.kdim=8", "memory.value_dim=32"]
_ULTRAMEM = [*_MEMORY, "memory.value_dim=16", "memory.placement=1:2/3:4"]
# Two layers at one block, states of one cache layer; every option away from its default.
_OTHER = [
    "memory.placement=2:2/2:4",
    "memory.shuffle=stored",
    "memory.candidates=two-sided",
    "memory.query_conv=3",
    "memory.query=per-head-shared-sides",
    "memory.qk_norm=rmsnorm",
    "memory.num_cores=1",
    "model.norm=rmsnorm",
]
OVERRIDES = {
    "dense": [],
    "pkm": _MEMORY,
    "moe": ["moe.num_experts=5", "model.inner_size=48"],
    "ultramem": _ULTRAMEM,
    "ultramem-other": [*_ULTRAMEM, *_OTHER],
}
KINDS = tuple(OVERRIDES)


class ModelWeights:
    """A model's own parameters, for ``write_run``."""

    def __init__(self, model: LanguageModel) -> None:
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())

    def read(self, name: str, block: Block, out_RC: Tensor) -> None:
        values = self._parameters[name].detach().reshape(-1, block.num_columns)
        out_RC.copy_(values[block.first_row : block.first_row + block.num_rows])

    def buffers(self) -> dict[str, Tensor]:
        return self._buffers


@functools.cache
def small_tokenizer() -> HuggingFaceTokenizer:
    """Byte-level BPE with ``ENTRIES`` entries; the end of text is id 0."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = Path(__file__).read_text()
    backend.train_from_iterator(text.splitlines(), trainer)
    return HuggingFaceTokenizer(backend.to_str().encode())


def random_model(kind: str, overrides: tuple[str, ...] = ()) -> LanguageModel:
    """A model whose every part does something: convolutions that look back, directions computed."""
    preset = f"{kind.split('-')[0]}-debug"
    config = load_config(preset, [*_SMALL, *OVERRIDES[kind], *overrides])
    model = LanguageModel(config)
    init_module(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".conv." in name:
                param.normal_(0.0, 0.5, generator=generator)
        model.eval().logits(torch.arange(4)[None])
    return model


def write_model(model: LanguageModel, run_dir: Path, world_size: int = 1) -> Path:
    """``model`` as a run directory."""
    source = Source(model.config, ModelWeights(model), small_tokenizer())
    write_run(source, run_dir, world_size)
    return run_dir


def prompts_of(*lengths: int) -> list[list[int]]:
    """Token ids without the end of text."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, ENTRIES, (n,), generator=generator).tolist() for n in lengths]


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """A batch padded on the left, as transformers takes it."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def greedy(model: LanguageModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Our own continuations."""
    sampling = Sampling(max_new_tokens=count, temperature=0.0)
    return generate(model, prompts, sampling, eos_id=0, vocab_size=ENTRIES)
