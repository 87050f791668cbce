"""What compiled blocks save of a training step, in CPU time of one thread.

``python -m benchmarks.compiled_blocks``. CPU time, unlike the clock of ``bench step``, means
something on a machine that others use too. Steps of the two models alternate.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from ultramem_ds.config.load import load_config
from ultramem_ds.model.compiling import compile_blocks
from ultramem_ds.model.init import init_module
from ultramem_ds.model.lm import LanguageModel


class Trained:
    """A model with its optimizer."""

    def __init__(self, preset: str, layers: int) -> None:
        overrides = ["model.dropout=0", "model.vocab_size=4096", f"model.num_layers={layers}"]
        self.model = LanguageModel(load_config(preset, overrides)).train()
        init_module(self.model, self.model.config, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def step_s(self, tokens_BS1: torch.Tensor) -> float:
        """CPU seconds of one step."""
        begin = time.process_time()
        terms = self.model(tokens_BS1)
        (terms["loss"] + terms["aux_loss"] + terms["balance_loss"]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.model.mark_stale()
        return time.process_time() - begin


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="dense-debug,ultramem-debug")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens_BS1 = torch.randint(4096, (arguments.sequences, arguments.seq_len + 1))
    for preset in arguments.presets.split(","):
        plain, compiled = (Trained(preset, arguments.layers) for _ in range(2))
        compile_blocks(compiled.model)
        pairs = [
            (plain.step_s(tokens_BS1), compiled.step_s(tokens_BS1))
            for _ in range(3 + arguments.rounds)
        ][3:]
        of_plain, of_compiled = (median(times) for times in zip(*pairs))
        ratio = median(a / b for a, b in pairs)
        print(
            f"{preset}: {1e3 * of_plain:.0f} ms as it is, {1e3 * of_compiled:.0f} compiled: "
            f"{ratio:.2f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()
