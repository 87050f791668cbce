"""Small layers for the memory tests."""

from dataclasses import replace

import torch

from ultramem_ds.config.schema import Config, MemoryConfig, ModelConfig
from ultramem_ds.model.init import init_module
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.lookup import ValueTable

MODEL = ModelConfig(
    kind="ultramem", hidden_size=24, inner_size=48, num_layers=2, num_heads=2, dropout=0.0
)
MEMORY = MemoryConfig(placement="1:2", knum=6, kdim=8, value_dim=12, top_m=4, query_conv=3)


def make_config(**memory) -> Config:
    return Config(preset="test", model=MODEL, memory=replace(MEMORY, **memory))


def make_layer(seed=0, dtype=torch.float64, **memory) -> MemoryLayer:
    config = make_config(**memory)
    table = ValueTable(config.memory.num_rows, config.memory.value_dim, table_index=0)
    layer = MemoryLayer(config.model, config.memory, table)
    init_module(layer, config, seed)
    return layer.to(dtype)


def run(layer: MemoryLayer, x_BSD: torch.Tensor, **kwargs) -> torch.Tensor:
    return layer.finish(layer.start(x_BSD, **kwargs))


def inputs(batch=2, seq_len=5, seed=1, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq_len, MODEL.hidden_size, generator=generator, dtype=dtype)
