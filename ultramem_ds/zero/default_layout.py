"""DeepSpeed's default layout: a checkpoint that its own tools read.

``zero_to_fp32.py`` and ``ds_to_universal`` assume that every parameter is cut into equal flat
slices over all ranks. Value tables by columns, in sub-groups or under the row-sparse optimizer are
not; :func:`write_default_layout` makes a checkpoint that is.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ultramem_ds.checkpoint.directory import (
    LATEST,
    TRAINER,
    checkpoints_dir,
    find_checkpoint,
    read_trainer_state,
)
from ultramem_ds.checkpoint.reader import CheckpointReader
from ultramem_ds.checkpoint.record import Store, write_layout, write_rank_layout
from ultramem_ds.checkpoint.state import KINDS, MASTER, MOMENTS
from ultramem_ds.config.load import from_dict
from ultramem_ds.config.schema import Config
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.optim.param_groups import build_param_groups
from ultramem_ds.sharding.blocks import Block, Piece
from ultramem_ds.utils.files import fsync_directory, write_json, write_text
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.engine_checkpoint import ZERO


def write_default_layout(path: Path, output: Path, world_size: int) -> Path:
    """Rewrite a dense, PKM or UltraMem checkpoint as ZeRO-3 would save it, tables row-contiguous.

    The result is a checkpoint like any other, in ``output/checkpoints/<tag>``: training resumes
    from it, and DeepSpeed's tools read it. Memory: 1/world_size of masters and moments.

    Args:
        path: a run directory or a checkpoint directory.
        output: a new run directory.
        world_size: ranks P of the new checkpoint.

    Returns:
        The new checkpoint's directory.

    Raises:
        ValueError: the checkpoint is MoE's or damaged, or ``output`` holds one already.
    """
    source = find_checkpoint(path)
    state = read_trainer_state(source)
    config = from_dict(state.config)
    if config.model.kind == "moe":
        raise ValueError(f"{source} is of kind moe, whose experts ZeRO-3 cannot hold")
    if world_size < 1:
        raise ValueError(f"world size {world_size} must be at least 1")
    target = checkpoints_dir(output) / source.name
    if target.exists():
        raise ValueError(f"{target} exists already; choose another output")
    reader = CheckpointReader(source)
    layout = DefaultLayout.of(reader, config, world_size)
    staging = target.with_name(f".tmp-{source.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    prefix = "bf16_" if config.train.precision == "bf16" else ""
    for rank in range(world_size):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        file = f"{prefix}{name}_optim_states.pt"
        torch.save(_optimizer_states(reader, layout, rank), staging / file)
        torch.save(_model_states(reader, layout), staging / f"{name}_model_states.pt")
        stores = {ZERO: Store(file, "AdamW", layout.pieces(rank))}
        write_rank_layout(staging, rank, stores, [file, f"{name}_model_states.pt"])
    partition = "number-wise" if config.has_memory else ""
    written = replace(state, world_size=world_size, partition=partition, zero_stage=3)
    write_json(staging / TRAINER, asdict(written))
    write_layout(staging, world_size, reader.parameters)
    staging.rename(target)
    fsync_directory(target.parent)
    write_json(output / "config.json", state.config)
    write_text(target.parent / LATEST, target.name + "\n")
    return target


@dataclass(frozen=True)
class DefaultLayout:
    """Every parameter in equal row-contiguous slices over all ranks, one buffer per group.

    Attributes:
        blocks: whole parameters by name, per optimizer group.
        shapes: their shapes as ZeRO-3 sees them, tables padded to a multiple of P rows.
        param_groups: hyper-parameters as torch's AdamW saves them.
        world_size: ranks P.
    """

    blocks: list[dict[str, Block]]
    shapes: list[dict[str, torch.Size]]
    param_groups: list[dict[str, Any]]
    world_size: int

    @classmethod
    def of(cls, reader: CheckpointReader, config: Config, world_size: int) -> DefaultLayout:
        """The layout that training of ``config`` would write on ``world_size`` ranks."""
        with torch.device("meta"):
            model = LanguageModel(config)
        names = {id(param): name for name, param in model.named_parameters()}
        groups = build_param_groups(model.named_parameters(), config.optim)
        blocks: list[dict[str, Block]] = []
        shapes: list[dict[str, torch.Size]] = []
        for group in groups:
            members = {names[id(p)]: reader.parameters[names[id(p)]] for p in group["params"]}
            blocks.append({name: record.block for name, record in members.items()})
            shapes.append(
                {
                    name: torch.Size((_padded(record.shape[0], world_size), record.shape[1]))
                    if record.is_table
                    else torch.Size(record.shape)
                    for name, record in members.items()
                }
            )
        optim = config.optim
        adam = torch.optim.AdamW(
            [dict(group) for group in groups],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )
        saved = adam.state_dict()["param_groups"]
        param_groups = [{**group, "params": [index]} for index, group in enumerate(saved)]
        return cls(blocks, shapes, param_groups, world_size)

    def pieces(self, rank: int) -> list[Piece]:
        """What ``rank`` holds, slices that are all padding left out."""
        found = []
        for buffer, members in enumerate(self.blocks):
            offset = 0
            for name, block in members.items():
                rows = _padded(block.num_rows, self.world_size) // self.world_size
                held = min(rows, block.num_rows - rank * rows)
                if held > 0:
                    part = Block(rank * rows, held, 0, block.num_columns)
                    found.append(Piece(name, buffer, offset, part))
                offset += rows * block.num_columns
        return found

    def buffer_numels(self) -> list[int]:
        """Elements of each flat buffer of one rank, padding included."""
        return [
            sum(_padded(b.num_rows, self.world_size) * b.num_columns for b in members.values())
            // self.world_size
            for members in self.blocks
        ]


def _padded(num_rows: int, world_size: int) -> int:
    return -(-num_rows // world_size) * world_size


def _optimizer_states(reader: CheckpointReader, layout: DefaultLayout, rank: int) -> dict[str, Any]:
    flats = {kind: [torch.zeros(numel) for numel in layout.buffer_numels()] for kind in KINDS}
    for piece in layout.pieces(rank):
        for kind in KINDS:
            out_RC = piece.view(flats[kind][piece.buffer])
            reader.read(piece.name, kind, piece.block, out_RC)
    adam = {
        "state": {
            i: {"step": torch.tensor(float(reader.step())), **{k: flats[k][i] for k in MOMENTS}}
            for i in range(len(layout.blocks))
        },
        "param_groups": layout.param_groups,
    }
    zero = {
        "zero_stage": deepspeed.runtime.zero.config.ZeroStageEnum.weights,
        "loss_scaler": deepspeed.runtime.fp16.loss_scaler.LossScaler(scale=1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": layout.world_size,
        "optimizer_state_dict": adam,
        "fp32_flat_groups": flats[MASTER],
    }
    return {"optimizer_state_dict": zero, "ds_version": deepspeed.__version__}


def _model_states(reader: CheckpointReader, layout: DefaultLayout) -> dict[str, Any]:
    """DeepSpeed's model file: no weights, but their shapes; buffers and counters."""
    old = reader.model_states()
    placeholders = {name: torch.empty(0) for members in layout.blocks for name in members}
    buffers = {name: old["module"][name].clone() for name in old["buffer_names"]}
    return {
        **old,
        "module": {**placeholders, **buffers},
        "param_shapes": layout.shapes,
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": {},
        "dp_world_size": layout.world_size,
    }
