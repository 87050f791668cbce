"""The model card of an exported directory, filled in from the run."""

from __future__ import annotations

from pathlib import Path

from ultramem_ds import __version__
from ultramem_ds.checkpoint.directory import TrainerState
from ultramem_ds.config.schema import Config
from ultramem_ds.model.accounting import count
from ultramem_ds.telemetry.metrics import VALIDATION, read_lines


def model_card(
    run_dir: Path, state: TrainerState, config: Config, dtype: str, tokenizer_vocab_size: int
) -> str:
    """Markdown with the facts that a reader of the weights asks for; nothing is guessed.

    Args:
        run_dir: holds the validation record.
        state: of the exported checkpoint.
        config: of the run.
        dtype: of the exported weights.
        tokenizer_vocab_size: entries of the tokenizer.
    """
    model, train, counted = config.model, config.train, count(config)
    tokens = state.step * train.global_batch_size * model.seq_len
    facts = {
        "kind": model.kind,
        "preset": config.preset,
        "parameters": f"{counted.params:,} without embedding and head",
        "of them sparse (tables or experts)": f"{counted.sparse_params:,}",
        "FLOPs per token (forward)": f"{counted.flops_per_token:,}",
        "vocabulary": f"{tokenizer_vocab_size:,} entries, padded to {model.vocab_size:,} rows",
        "tokens per training sequence": f"{model.seq_len:,}",
        "optimizer steps": f"{state.step:,} of {train.max_steps:,}",
        "training tokens": f"{tokens:,} ({train.global_batch_size} sequences per step)",
        "training precision": train.precision,
        "ranks that wrote the checkpoint": f"{state.world_size} (ZeRO-{state.zero_stage})",
        "data fingerprint": f"`{state.data_fingerprint}`",
        "dtype of these weights": dtype,
        "exported by": f"ultramem_ds {__version__}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    name = run_dir.resolve().name
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [ultramem]
---

# {name}

A decoder-only language model pre-trained with ultramem_ds (UltraMem, arXiv 2411.12364). It has
seen no instruction tuning and no safety training.

| fact | value |
|---|---|
{rows}
{_validation(run_dir, state.step)}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(DIR)
```

Without `trust_remote_code`: `import ultramem_ds.hf` first. `memory_device="cpu"` keeps value tables
in main memory. `ultramem_run.json` holds the whole training configuration.
"""


def _validation(run_dir: Path, step: int) -> str:
    """The last validation up to ``step``, as a table; nothing where there was none."""
    records = [line for line in read_lines(run_dir / VALIDATION) if line["step"] <= step]
    if not records:
        return ""
    last = records[-1]
    losses = [f"| {name} | {loss:.4f} |" for name, loss in last.items() if name != "step"]
    header = [f"| validation at step {last['step']} | loss, nats per token |", "|---|---|"]
    return "\n" + "\n".join(header + losses) + "\n\n"
