"""An exported directory computed in fp64 from its files alone, as docs/export.md has them.

Shares no code with the program: safetensors, ``config.json``, and the papers' formulas written out.
Rotary embedding is a rotation of complex numbers, experts are a loop over tokens, the memory scores
its candidates' whole grid.

Letters: S tokens, D hidden, A heads, H memory heads, r Tucker rank, h cores, n keys a side, d key
width, c candidates, m selected slots, E projectors, V value width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class ExportOracle:
    """Logits of an exported directory."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.weights: dict[str, Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            for name, value in load_file(file).items():
                self.weights[name] = value.double() if value.is_floating_point() else value

    def logits(self, ids: list[int]) -> Tensor:
        """``(S, vocab_size)`` of one sequence."""
        config = self.config
        spans = config.get("memory_spans", [])
        x_SD = self.weights["model.embedding.weight"][ids]
        pending = {}
        for i in range(config["num_hidden_layers"]):
            block = f"model.blocks.{i}."
            x_SD = x_SD + self.attended(
                block + "attention.", self.normed(block + "attention_norm", x_SD)
            )
            inner_SD = self.normed(block + "mlp_norm", x_SD)
            x_SD = x_SD + self.mlp(block + "mlp.", inner_SD)
            for j, (begin, end) in enumerate(spans):
                if begin == i + 1:
                    pending[j] = self.memory(f"model.memories.{j}.", inner_SD)
                if end == i + 1:
                    x_SD = x_SD + pending[j]
        return self.linear("lm_head", self.normed("model.final_norm", x_SD))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def normed(self, name: str, x: Tensor, kind: str = "") -> Tensor:
        kind = kind or self.config["norm_type"]
        if kind == "none":
            return x
        if kind == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        root = (x.square().mean(-1, keepdim=True) + self.config["norm_eps"]).sqrt()
        return x / root * self.weights[f"{name}.weight"]

    def attended(self, name: str, x_SD: Tensor) -> Tensor:
        S, K = len(x_SD), self.config["head_dim"]
        theta = self.config["rope_parameters"]["rope_theta"]
        angles_Sk = torch.outer(torch.arange(S), theta ** (-2 * torch.arange(K // 2).double() / K))
        turn_Sk = torch.polar(torch.ones_like(angles_Sk), angles_Sk)

        def turned(heads_SAK: Tensor) -> Tensor:
            z_SAk = torch.complex(*heads_SAK.split(K // 2, dim=-1)) * turn_Sk[:, None]
            return torch.cat([z_SAk.real, z_SAk.imag], dim=-1)

        q, k, v = (part.view(S, -1, K) for part in self.linear(name + "qkv_proj", x_SD).chunk(3, 1))
        scores_ASS = torch.einsum("qak,sak->aqs", turned(q), turned(k)) / math.sqrt(K)
        future_SS = torch.ones(S, S, dtype=torch.bool).triu(1)
        weights_ASS = scores_ASS.masked_fill(future_SS, -math.inf).softmax(-1)
        out_SAK = torch.einsum("aqs,sak->qak", weights_ASS, v)
        return self.linear(name + "out_proj", out_SAK.flatten(1))

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        inner = self.linear(name + "up_proj", x)
        return self.linear(name + "down_proj", inner * (1 + torch.erf(inner / math.sqrt(2))) / 2)

    def mlp(self, name: str, x_SD: Tensor) -> Tensor:
        if self.config["kind"] != "moe":
            return self.feed_forward(name, x_SD)
        count = self.config["num_experts_per_tok"]
        out = []
        for x_D, gates_X in zip(x_SD, self.linear(name + "gate", x_SD).softmax(-1)):
            chosen = sorted(range(len(gates_X)), key=lambda x: -float(gates_X[x]))[:count]
            share = sum(gates_X[x] for x in chosen) if count > 1 else 1.0
            out.append(
                sum(
                    gates_X[x] / share * self.feed_forward(f"{name}experts.{x}.", x_D)
                    for x in chosen
                )
            )
        return torch.stack(out)

    def memory(self, name: str, x_SD: Tensor) -> Tensor:
        config, weights = self.config, self.weights
        taps = config["memory_query_conv"]
        if taps:
            kernel_kD = weights[name + "retrieval.query.conv.weight"]
            before_SD = torch.cat([x_SD.new_zeros(taps - 1, x_SD.shape[1]), x_SD])
            x_SD = sum(kernel_kD[t] * before_SD[t : t + len(x_SD)] for t in range(taps))
        keys_2Hnrd = self.normed(
            name + "retrieval.keys.norm",
            weights[name + "retrieval.keys.weight"],
            config["memory_qk_norm"],
        )
        _, H, n, r, d = keys_2Hnrd.shape
        queries_SGd = self.normed(
            name + "retrieval.query.norm",
            self.linear(name + "retrieval.query.proj", x_SD).view(len(x_SD), -1, d),
            config["memory_qk_norm"],
        )
        number = {
            "shared": lambda side, head, rank: side,
            "per-head": lambda side, head, rank: 2 * head + side,
            "per-head-shared-sides": lambda side, head, rank: r * head + rank,
        }[config["memory_query"]]
        core_hHrr = directions_2Hr = None
        if config["memory_retrieval"] == "tdqkr":
            core_hHrr = weights[name + "retrieval.form.core"]
            directions_2Hr = weights[name + "retrieval.form.directions"]
        table_NV = self.table(name)
        N, V = table_NV.shape
        h = config["memory_num_cores"]
        out = []
        for queries_Gd in queries_SGd:
            pooled_EV = x_SD.new_zeros(config["memory_expansion"], V)
            for head in range(H):
                row_nr, col_nr = (
                    torch.stack(
                        [
                            keys_2Hnrd[side, head, :, rank] @ queries_Gd[number(side, head, rank)]
                            for rank in range(r)
                        ],
                        dim=1,
                    )
                    for side in range(2)
                )
                if core_hHrr is None or directions_2Hr is None:
                    picks = [self.candidates(scores_nr[:, 0]) for scores_nr in (row_nr, col_nr)]
                    grid_hnn = (row_nr + col_nr.T)[None]
                else:
                    picks = [
                        self.candidates(scores_nr @ directions_2Hr[side, head])
                        for side, scores_nr in enumerate((row_nr, col_nr))
                    ]
                    grid_hnn = torch.stack(
                        [row_nr @ core_hHrr[k, head] @ col_nr.T for k in range(h)]
                    )
                pairs = [(a, b) for a in picks[0] for b in picks[1]]
                pairs.sort(key=lambda pair: -float(grid_hnn[:, pair[0], pair[1]].sum()))
                pairs = pairs[: config["memory_top_m"]]
                scores_mh = torch.stack([grid_hnn[:, a, b] for a, b in pairs])
                if config["memory_softmax"]:
                    scores_mh = scores_mh.softmax(0)
                for (a, b), scores_h in zip(pairs, scores_mh):
                    slot = self.shuffled(name, a, b, n)
                    row_hv = table_NV[slot % N].view(h, -1)
                    pooled_EV[slot // N] += (scores_h[:, None] * row_hv).flatten()
            out.append(pooled_EV.flatten())
        pooled_SEV = torch.stack(out)
        return (
            self.linear(name + "value_proj", pooled_SEV)
            if config["memory_value_proj"]
            else pooled_SEV
        )

    def candidates(self, scores_n: Tensor) -> list[int]:
        m, mode = self.config["memory_top_m"], self.config["memory_candidates"]
        best = scores_n.argsort(descending=True).tolist()
        if mode == "one-sided":
            return best[:m]
        per_end = m // 2 if mode == "two-sided" else m
        return best if 2 * per_end >= len(best) else best[:per_end] + best[-per_end:]

    def shuffled(self, name: str, left: int, right: int, n: int) -> int:
        mode = self.config["memory_shuffle"]
        if mode == "bijection":
            for round_n in self.weights[name + "shuffle.rounds"]:
                left, right = right, (left + int(round_n[right])) % n
        slot = left * n + right
        return int(self.weights[name + "shuffle.index"][slot]) if mode == "stored" else slot

    def table(self, name: str) -> Tensor:
        """The value table; its parts one below the other."""
        parts = self.config["memory_table_parts"]
        if parts == 1:
            return self.weights[name + "values.weight"]
        return torch.cat([self.weights[f"{name}values.part_{p}.weight"] for p in range(parts)])
