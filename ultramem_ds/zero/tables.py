"""Value tables as ZeRO-3 partitioned parameters that are never gathered: every special case of it.

Phases, and who holds what:

1. *Construction.* The model is built under ``deepspeed.zero.Init``, which partitions each parameter
   as soon as its module exists. A value table is built as a placeholder of one element per rank;
   :func:`install_shard` then swaps in this rank's rows, so that no rank ever holds more than its
   own ``(R, V)`` slice, R = padded rows / P.
2. *Forward and backward.* ZeRO-3 gathers the parameters of modules whose ``forward`` runs. A
   table's holder has none, so its ``param.ds_tensor`` stays this rank's rows; the sharded lookup
   reads them and accumulates their gradient (summed over the ranks' tokens) in fp32.
3. *Optimizer step.* :meth:`Zero3Tables.publish_gradients` hands the accumulated gradient over,
   divided by the world size, since ZeRO averages; without offload it has accumulated in ZeRO's own
   gradient partition. From here on the table is any ZeRO-3 parameter:
   clipping, Adam, offload, checkpoints.

Letters: N physical rows, V value width, R rows on this rank, P ranks that share one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_ds.checkpoint.state import OwnState
from ultramem_ds.kernels.hugepages import advise_huge_pages
from ultramem_ds.model.memory.layer import MemoryLayer
from ultramem_ds.model.memory.lookup import ValueTable
from ultramem_ds.optim.decision import Decision
from ultramem_ds.sharding.blocks import Block
from ultramem_ds.sharding.comm import Comm
from ultramem_ds.sharding.shard import TableShard
from ultramem_ds.zero.deepspeed_import import deepspeed
from ultramem_ds.zero.state import flat_slice


def partitioned_construction(engine_config: dict[str, Any]) -> Any:
    """Context in which modules partition their parameters as soon as they are built.

    The dtype comes from the config: given as an argument, fp32 would become bf16 on CPUs.
    """
    return deepspeed.zero.Init(config_dict_or_path=engine_config)


def fill_partitioned(
    named_parameters: Sequence[tuple[str, nn.Parameter]],
    fill: Callable[[str, nn.Parameter], None],
) -> None:
    """Initialise partitioned parameters one at a time; every rank holds one whole at most.

    ``fill`` is deterministic in the name, but only rank 0's result is used (ZeRO broadcasts it).
    """
    for name, param in named_parameters:
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
            if deepspeed.comm.get_rank() == 0:
                fill(name, param)


class TablePlaceholder(ValueTable):
    """A value table before its shards are installed: one element per rank that shares a copy.

    Args:
        comm: the ranks that share one copy; ZeRO-3 partitions over them.
        table_index: 0-based number of the memory layer.
    """

    def __init__(self, comm: Comm, table_index: int) -> None:
        super().__init__(comm.world_size, 1, table_index)
        if comm.group is not None:  # read by zero.Init when this constructor returns
            self.weight.ds_zero_partition_process_group = comm.group  # type: ignore[attr-defined]


def shard_reader(param: Any) -> Callable[[], Tensor]:
    """What a :class:`TableShard` reads: the partition, wherever ZeRO keeps it at that moment."""
    return lambda: param.ds_tensor


def install_shard(param: Any, values: Tensor, full_shape: tuple[int, ...]) -> None:
    """Replace a placeholder's partition by this rank's rows; call before ``deepspeed.initialize``.

    Args:
        param: a partitioned placeholder.
        values: this rank's slice, flat or ``(R, V)``, the parameter's dtype; not copied.
        full_shape: shape of the whole parameter; its product is ``values.numel() * P``.
    """
    numel = torch.Size(full_shape).numel()
    assert numel == values.numel() * param.ds_zero_partition_world_size
    old = param.ds_tensor
    # No view: DeepSpeed moves the slice into its flat buffer, and a view would keep what it moved
    # from, a second copy of the table.
    new: Any = torch.empty(0, dtype=values.dtype, device=values.device)
    new.data = values.detach().reshape(-1)
    new.ds_numel = values.numel()
    new.status = old.status
    new.final_location = old.final_location
    param.ds_tensor = new
    param.ds_shape = torch.Size(full_shape)
    param.ds_numel = numel
    param.ds_numel_aligned = numel
    param.ds_persist = False
    # deepspeed.initialize gathers every trainable parameter once, only to hook its gradient, and
    # partitions it again, which does nothing to a parameter that was not gathered.
    param.all_gather = _stay_partitioned


def _stay_partitioned(*args: Any, **kwargs: Any) -> None:
    """In place of a table's ``all_gather`` while ``deepspeed.initialize`` runs."""


def _refuse_to_gather(*args: Any, **kwargs: Any) -> None:
    """In place of a table's ``all_gather`` from then on."""
    raise RuntimeError(
        "a value table was about to be gathered, which no rank has the memory for; does the "
        "DeepSpeed JSON set stage3_gather_16bit_weights_on_model_save, or code outside this "
        "project use deepspeed.zero.GatheredParameters on it?"
    )


class Zero3Tables:
    """The value tables of one model on this rank, between the lookups and the ZeRO-3 optimizer.

    Args:
        params: the tables' parameters, shards installed.
        shards: what the lookups read and accumulate into, in the same order.
        world_size: all ranks of the data-parallel group.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], shards: Sequence[TableShard], world_size: int
    ) -> None:
        self.params = list(params)
        self.shards = list(shards)
        self.world_size = world_size

    def keep_partitioned(self, engine: Any) -> None:
        """Exempt the tables from ``stage3_param_persistence_threshold``, and refuse any gather.

        ZeRO-3 keeps parameters below the threshold gathered on every rank; small tables would be
        among them and their ``ds_tensor`` would go stale. Call once after ``deepspeed.initialize``.
        """
        tables = {id(param) for param in self.params}
        persistent = engine.optimizer.persistent_parameters
        persistent[:] = [param for param in persistent if id(param) not in tables]
        param: Any
        for param in self.params:
            param.ds_persist = False
            param.all_gather = _refuse_to_gather
        self._lend_gradients(engine.optimizer)

    def _lend_gradients(self, zero: Any) -> None:
        """Let the shards accumulate in ZeRO's own gradient partitions, where those lie here."""
        if zero.offload_optimizer:  # its buffers are on another device, or in files
            return
        advise_huge_pages(zero.grad_partitions_flat_buffer)
        for param, shard in zip(self.params, self.shards):
            shard.borrow_gradient(lambda p=param: zero._get_fp32_grad_state_partition(p, False)[0])  # type: ignore[misc]

    def readers(self, layers: Sequence[MemoryLayer]) -> dict[str, Callable[[], Tensor]]:
        """This rank's pieces of the memory layers' values and keys, by what statistics call them.

        Args:
            layers: in the order of the tables.
        """
        found: dict[str, Callable[[], Tensor]] = {}
        for index, (layer, shard) in enumerate(zip(layers, self.shards)):
            found[f"layer_{index}/value"] = shard.own_values
            keys = layer.retrieval.keys.weight
            found[f"layer_{index}/key"] = lambda p=keys: p.ds_tensor[: flat_slice(p).numel]  # type: ignore[misc]
        return found

    def publish_gradients(self) -> None:
        """Hand the gradients to ZeRO; once per optimizer step, before ``engine.step``."""
        for param, shard in zip(self.params, self.shards):
            grad_RV = shard.reduced_gradient()
            if self.world_size > 1:
                grad_RV.div_(self.world_size)
            if not shard.borrows_gradient:
                deepspeed.utils.safe_set_local_grad(param, grad_RV.flatten())
            shard.zero_gradient()

    def finish_step(self, lr: float, decision: Decision) -> None:
        """After ``engine.step``: nothing is left, ZeRO has stepped the tables.

        Args:
            lr: the tables' learning rate of this step.
            decision: whether ZeRO took the step, and how it clipped.
        """

    def joined_norm(self) -> Tensor:
        """Global norm of gradients that ZeRO does not see, the same on all ranks: none here."""
        return torch.zeros(())

    def signal_and_power(self) -> Tensor:
        """Of gradients that ZeRO does not see, see ``optim.gradient_signal``: none here."""
        return torch.zeros(2, dtype=torch.float64)

    def own_states(self) -> dict[str, OwnState]:
        """Optimizer state that ZeRO does not hold, by name of its files: none here."""
        return {}

    def blocks(self) -> dict[int, Block]:
        """The rows and columns of its table that each shard holds, by the parameter's id."""
        return {id(p): shard.layout.block(shard.spec) for p, shard in zip(self.params, self.shards)}
