"""How an optimizer step's sequences are cut up, and what a micro-batch's activations take."""

from __future__ import annotations

import os
from dataclasses import replace

import psutil
import torch

from ultramem_ds.config.deepspeed import BatchPlan
from ultramem_ds.config.schema import Config
from ultramem_ds.sharding.comm import Comm


def plan_batches(config: Config, world_size: int, free_bytes: int | None = None) -> BatchPlan:
    """Cut the global batch into micro-batches.

    ``train.micro_batch_size=auto`` takes the largest size that divides ``global_batch_size /
    world_size`` and whose activations fit into half of a rank's free memory. Ranks may see
    different amounts: a run asks :func:`agree_on_batches`.

    Args:
        config: resolved configuration.
        world_size: all ranks.
        free_bytes: memory that a rank may count on; None asks this machine.

    Raises:
        ValueError: if the ranks and micro-batches do not divide the global batch.
    """
    G = config.train.global_batch_size
    asked = config.train.micro_batch_size
    if G % world_size:
        each = world_size * (1 if asked == "auto" else asked)
        raise ValueError(
            f"train.global_batch_size={G} cannot be divided over {world_size} ranks; "
            f"the nearest that can is {max(1, round(G / each)) * each}"
        )
    per_rank = G // world_size
    if asked == "auto":
        free_bytes = free_bytes_per_rank() if free_bytes is None else free_bytes
        sizes = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        fitting = [d for d in sizes if activation_bytes(config, d) <= free_bytes // 2]
        micro = max(fitting, default=1)
    else:
        micro = asked
    if per_rank % micro:
        divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        raise ValueError(
            f"train.micro_batch_size={micro} does not divide train.global_batch_size={G} / "
            f"{world_size} ranks = {per_rank}; the nearest that does is "
            f"{min(divisors, key=lambda d: abs(d - micro))}"
        )
    return BatchPlan(G, micro, per_rank // micro)


def agree_on_batches(
    config: Config, comm: Comm, device: torch.device, recorded: int = 0
) -> BatchPlan:
    """The same plan on every rank: rank 0 decides, on the least memory that any rank has free.

    Args:
        config: resolved configuration.
        comm: all ranks, with their devices set.
        device: where this rank computes.
        recorded: sequences per forward in the checkpoint that is resumed, which ``auto`` keeps
            where it divides the batch; 0 without one.

    Raises:
        ValueError: on every rank, see :func:`plan_batches`.
    """
    if config.train.micro_batch_size != "auto":
        return plan_batches(config, comm.world_size)
    free = torch.tensor(-float(free_bytes_per_rank()), dtype=torch.float64, device=device)
    batches = plan_batches(config, comm.world_size, -int(comm.all_reduce_max_(free)))
    if recorded and config.train.global_batch_size // comm.world_size % recorded == 0:
        batches = plan_batches(
            replace(config, train=replace(config.train, micro_batch_size=recorded)),
            comm.world_size,
        )
    micro, steps = map(
        int, comm.numbers_from_first([batches.micro_batch_size, batches.accumulation_steps])
    )
    return BatchPlan(batches.global_batch_size, micro, steps)


def activation_bytes(config: Config, sequences: int) -> int:
    """Bytes that activations and logits of a forward of so many sequences take, estimated.

    Counts what autograd keeps of each block (inputs of norms, projections, attention, GELU) and of
    each memory layer; with activation checkpointing only the blocks' inputs. DeepSpeed's experts
    are dealt their tokens by products with two matrices that name every token's place among those
    of all experts: quadratic in the tokens. On top comes the larger of what does not last: the
    logits' fp32 log-probabilities and the two gradients that the loss's backward makes of them, or
    one memory layer's scores of all keys.
    """
    model, tokens = config.model, sequences * config.model.seq_len
    width = 2 if config.train.precision == "bf16" else 4
    block, memory, search = model.hidden_size, 0, 0
    if not config.train.activation_checkpointing:
        is_moe = model.kind == "moe"
        choices = config.moe.top_k if is_moe else 1
        block = 12 * model.hidden_size + 2 * choices * model.inner_size
        block += 2 * choices * tokens if is_moe else 0
    if config.has_memory:
        m = config.memory
        # Convolved and normalised queries; slots, permuted, rows and projectors; scores by core
        # and their factors; pooled values before and after the way home.
        per_layer = (model.hidden_size + 2 * m.kdim * m.num_heads) * width
        per_layer += m.rows_per_token * (4 * 8 + 4 * m.num_cores + 8 * m.tucker_rank)
        per_layer += 2 * m.expansion * m.value_dim * width
        memory = len(m.spans) * per_layer
        search = 2 * m.num_heads * m.num_keys * 4
    logits = 3 * 4 * model.vocab_size
    return tokens * (model.num_layers * block * width + memory + max(logits, search))


def free_bytes_per_rank() -> int:
    """Free memory of the current device, or this process's share of the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // max(1, _local_world_size())


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
