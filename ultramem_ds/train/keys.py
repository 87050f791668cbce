"""What may differ when a run goes on: one table of configuration keys.

A run goes on in one of three ways. It *resumes* by itself from its own checkpoint; with
``--extend`` it does so under settings that somebody has changed on purpose; with ``--init-from`` a
new run starts from the weights of another. Keys that no line of the table names decide what the
parameters are or mean: whatever the way, they stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ultramem_ds.config.load import changed_keys, to_dict
from ultramem_ds.config.schema import Config


class Freedom(IntEnum):
    """When a key may differ from what it was."""

    RESUME = 0  # always: the mathematics stays
    EXTEND = 1  # with --extend: the same weights and samples so far, another way from here
    START = 2  # in a new run from these weights only
    MODEL = 3  # never: other parameters, or another meaning of them


DATA = "data"  # stands for what is not a key: the prepared data, by their fingerprint

TABLE: Mapping[Freedom, tuple[str, ...]] = {
    Freedom.RESUME: (
        "memory.partition",
        "memory.shard_group_size",
        "memory.dedup",
        "memory.wire_gb_per_s",
        "memory.memory_gb_per_s",
        "memory.rates_file",
        "memory.async_lookup",
        "memory.kernel",
        "memory.compile",
        "memory.stats_every",
        "moe.expert_parallel_size",
        "train.micro_batch_size",
        "train.activation_checkpointing",
        "train.compile",
        "train.log_every",
        "train.eval_every",
        "train.eval_sequences",
        "train.save_every",
        "train.keep_last",
        "train.keep_every",
        "train.background_save",
        "train.stop_at_step",
        "train.max_bad_steps",
        "train.grad_spike_sigma",
        "train.watchdog_s",
        "train.desync_every",
        "train.tasks",
        "train.tasks_every",
        "train.tasks_limit",
        "train.task_data",
        "data.num_workers",
        "data.prefetch",
    ),
    Freedom.EXTEND: (
        "preset",
        "model.dropout",
        "memory.candidates",
        "memory.aux_loss_weight",
        "memory.aux_loss_margin",
        "memory.wire_dtype",
        "memory.table_optimizer",
        "moe.balance_loss_weight",
        "moe.drop_tokens",
        "moe.capacity_factor",
        "moe.use_rts",
        "moe.top2_2nd_expert_sampling",
        "optim.lr",
        "optim.lr_end_ratio",
        "optim.warmup_ratio",
        "optim.beta1",
        "optim.beta2",
        "optim.eps",
        "optim.weight_decay",
        "optim.decay_norms",
        "optim.clip_grad",
        "optim.value_lr_schedule",
        "optim.value_lr_multiplier",
        "optim.value_lr",
        "train.seed",
        "train.max_steps",
        "train.grad_spike",
        "train.rollback",
        "data.weights",
        "data.document_mask",
        "data.reset_positions",
        DATA,
    ),
    Freedom.START: (
        "model.seq_len",
        "model.init_std",
        "model.embedding_std",
        "memory.init",
        "train.global_batch_size",
        "train.precision",
    ),
}

_FREEDOM = {key: freedom for freedom, keys in TABLE.items() for key in keys}


def freedom_of(key: str) -> Freedom:
    """When ``section.key`` may differ."""
    return _FREEDOM.get(key, Freedom.MODEL)


@dataclass(frozen=True)
class Change:
    """A key that differs.

    Attributes:
        key: as ``section.key``; ``data`` for the fingerprint of the prepared data.
        before: its plain value in what is gone on from.
        after: its plain value now.
    """

    key: str
    before: Any
    after: Any

    @property
    def freedom(self) -> Freedom:
        """When this may differ."""
        return freedom_of(self.key)

    def describe(self) -> str:
        """In a few words."""
        return f"{self.key} {_short(self.before)} -> {_short(self.after)}"


def changes_between(old: Config, new: Config) -> list[Change]:
    """Keys that differ and mean something to models of this kind, in schema order."""
    before, after = to_dict(old), to_dict(new)
    found = []
    for key in changed_keys(old, new):
        section, _, name = key.partition(".")
        if (section == "memory" and not (old.has_memory or new.has_memory)) or (
            section == "moe" and "moe" not in (old.model.kind, new.model.kind)
        ):
            continue
        values = (v[section][name] if name else v[section] for v in (before, after))
        found.append(Change(key, *values))
    return found


def _short(value: Any) -> str:
    """Fingerprints by their beginning."""
    text = str(value)
    return text if len(text) < 40 else text[:12]
