"""The released UltraMem layer's arrays, as one of our layers (released names on the outside).

Released layouts: ``keys`` (H, 2, n, kdim, r); ``tucker_core.i`` (H, r, r) per core;
``tucker_core_u``, ``tucker_core_v`` (1, H, 1, r); ``shuffle_index`` (E*N); ``values_for_look_up``
(N, V); ``query_proj.weight`` (2*kdim, D); ``values_proj.weight`` (D, E*V); ``query_norm.weight``,
``keys_norm.weight`` (kdim).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultramem_ds.config.schema import MemoryConfig, ModelConfig
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.lookup import ValueTable
from ultramem_ds.model.memory.scores import TuckerCore

# B sequences, S sequence length, D hidden, H heads, r Tucker rank, h cores, n keys per side,
# d kdim, E expansion, N physical rows, V value width.

NORMS = {"default": "layernorm", "rms": "rmsnorm"}

# Released name -> our name, for the arrays whose layout is the same.
SAME_LAYOUT = {
    "query_proj.weight": "retrieval.query.proj.weight",
    "query_norm.weight": "retrieval.query.norm.weight",
    "keys_norm.weight": "retrieval.keys.norm.weight",
    "values_for_look_up": "values.weight",
    "values_proj.weight": "value_proj.weight",
    "shuffle_index": "shuffle.index",
}
KEYS = "retrieval.keys.weight"  # (2, H, n, r, d) here
CORE = "retrieval.form.core"  # (h, H, r, r) here
DIRECTIONS = "retrieval.form.directions"  # (2, H, r) here
KEYS_PERMUTATION = (1, 0, 2, 4, 3)  # its own inverse


class ReferenceLayer(nn.Module):
    """A ``MemoryLayer`` that runs start and finish at once."""

    def __init__(self, memory: MemoryLayer) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map hidden states (B, S, D) to the layer's output (B, S, D)."""
        return self.memory.finish(self.memory.start(x_BSD))


def reference_layer(
    arrays: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    norm: str,
    eps: float,
    *,
    kernel: str = "reference",
) -> ReferenceLayer:
    """Build our layer from a released layer's arrays.

    Args:
        arrays: The released arrays by their names, without prefix. The selection uses
            ``tucker_core_u`` and ``tucker_core_v`` as they are; where both are missing or zero they
            are computed from the cores.
        config: ``hidden_size knum kdim vdim knn head tucker_rank tucker_multihead
            value_expand_time``.
        norm: ``default`` (LayerNorm with weight, no bias) or ``rms``.
        eps: The norms' epsilon.
        kernel: ``lookup_reduce`` implementation.

    Returns:
        A float64 module on the CPU without dropout, needing no process group.

    Raises:
        ValueError: An unknown norm, or arrays that are missing, unknown or of the wrong shape.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: expected one of {', '.join(NORMS)}")
    model = ModelConfig(hidden_size=config["hidden_size"], num_heads=1, norm_eps=eps, dropout=0.0)
    memory = MemoryConfig(
        placement="1:1",
        knum=config["knum"],
        kdim=config["kdim"],
        value_dim=config["vdim"],
        top_m=config["knn"],
        num_heads=config["head"],
        tucker_rank=config["tucker_rank"],
        num_cores=config["tucker_multihead"],
        expansion=config["value_expand_time"],
        query="shared",
        query_conv=0,
        qk_norm=NORMS[norm],  # type: ignore[arg-type]
        shuffle="stored",
        kernel=kernel,
    )
    table = ValueTable(memory.num_rows, memory.value_dim, table_index=0)
    layer = MemoryLayer(model, memory, table).double()
    state = _to_our_names(arrays, memory.num_cores)
    expected = layer.state_dict()
    directions = state.setdefault(DIRECTIONS, expected[DIRECTIONS])
    for name in sorted(expected.keys() | state.keys()):
        ours = tuple(expected[name].shape) if name in expected else "no such array"
        given = tuple(state[name].shape) if name in state else "missing"
        if ours != given:
            raise ValueError(f"arrays do not fit the configuration: {name} {given}, need {ours}")
    layer.load_state_dict(state)
    form = layer.retrieval.form
    if isinstance(form, TuckerCore) and directions.any():
        form.keep_directions()
    return ReferenceLayer(layer)


def _to_our_names(arrays: Mapping[str, np.ndarray], num_cores: int) -> dict[str, Tensor]:
    """Released arrays -> a state dict of ``MemoryLayer``; unknown names are kept as they are."""
    left = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    state = {ours: left.pop(name) for name, ours in SAME_LAYOUT.items() if name in left}
    core_names = [f"tucker_core.{i}" for i in range(num_cores)]
    if all(name in left for name in core_names):
        state[CORE] = torch.stack([left.pop(name) for name in core_names])
    if "keys" in left:
        state[KEYS] = left.pop("keys").permute(KEYS_PERMUTATION).contiguous()
    if "tucker_core_u" in left and "tucker_core_v" in left:
        pair = (left.pop("tucker_core_u"), left.pop("tucker_core_v"))
        state[DIRECTIONS] = torch.stack([vectors[0, :, 0] for vectors in pair])
    return {**left, **state}


def reference_gradients(layer: ReferenceLayer) -> dict[str, Tensor]:
    """Gradients after a backward, dense, under the released names and layouts.

    Args:
        layer: From ``reference_layer``.

    Returns:
        One tensor per trainable array.

    Raises:
        ValueError: No backward has run.
    """
    params = dict(layer.memory.named_parameters())
    grads = {name: param.grad for name, param in params.items() if param.grad is not None}
    missing = sorted(params.keys() - grads.keys())
    if missing:
        raise ValueError(f"no gradient for {', '.join(missing)}: run backward() first")
    released = {name: grads[ours] for name, ours in SAME_LAYOUT.items() if ours in grads}
    released["keys"] = grads[KEYS].permute(KEYS_PERMUTATION).contiguous()
    released |= {f"tucker_core.{i}": grad for i, grad in enumerate(grads[CORE])}
    return released
