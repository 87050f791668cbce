"""AdamW for value tables whose step costs what the touched rows cost, not what the table costs.

Two forms of what happens to a row in the steps that do not touch it:

- :class:`LazyRowAdam` (``memory.table_optimizer=row-sparse``): nothing. Its moments do not decay,
  it has no weight decay, and its momentum does not move it until it is touched again.
- :class:`CatchUpRowAdam` (``row-sparse-catch-up``): what dense AdamW would have done, made up for
  when the row is next read. With zero gradients the moments after k steps are ``beta1^k m`` and
  ``beta2^k v``, and each step moves the row along the same direction ``m / sqrt(v)``: the k moves
  are one move times a scalar that depends on the step of the last touch alone,

      W(t0, t) = sum over s in t0+1..t of  lr_s c_s rho^(s-t0) A(s, t),
      A(s, t) = prod over l in s+1..t of (1 - lr_l wd),
      c_s = sqrt(1 - beta2^s) / (1 - beta1^s),  rho = beta1 / sqrt(beta2),

  kept for every t0 by adding one geometric tail per step. This is exact but for Adam's eps, which
  dense AdamW adds to ``sqrt(v)`` anew in each skipped step while v decays; here it is the first
  skipped step's. Exact also with eps for a gap of one step, and off by less than about
  ``eps / sqrt(v)``, relative to the moves made up for, beyond.

Letters: R rows and V columns of this rank's shard, U touched rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ultramem_ds.config.schema import OptimConfig
from ultramem_ds.kernels import row_adam_
from ultramem_ds.kernels.hugepages import resident_zeros
from ultramem_ds.optim.gradient_signal import MomentSums, row_sums, signal_and_power

NEGLIGIBLE = 1e-17  # rho^k below this moves nothing in fp32
SETTLE_ROWS = 1 << 16  # rows brought up to date at a time


class LazyRowAdam:
    """AdamW on the rows of one shard.

    Args:
        values: returns the shard (R, V) that lookups read; it may move.
        optim: betas, eps, weight decay.
        kernel: ``memory.kernel``, which fused update to use.

    Attributes:
        step: updates taken.
        exp_avg_RV: first moments, fp32.
        exp_avg_sq_RV: second moments, fp32.
        updates_R: updates that each row's moments have seen, int32; after a load all of them are
            taken to have seen every one.
    """

    def __init__(self, values: Callable[[], Tensor], optim: OptimConfig, kernel: str) -> None:
        self.values = values
        self.optim = optim
        self.kernel = kernel
        self.step = 0
        now_RV = values()
        make_zeros = partial(resident_zeros, now_RV.shape, torch.float32, now_RV.device)
        self._master_RV = None
        if now_RV.dtype != torch.float32:
            self._master_RV = make_zeros().copy_(now_RV)
        self.exp_avg_RV = make_zeros()
        self.exp_avg_sq_RV = make_zeros()
        self.updates_R = torch.zeros(len(now_RV), dtype=torch.int32, device=now_RV.device)

    @property
    def master_RV(self) -> Tensor:
        """The fp32 values: the shard itself, or a copy beside a shard of lower precision."""
        return self.values() if self._master_RV is None else self._master_RV

    def refresh(self, rows_U: Tensor) -> None:
        """Bring distinct rows up to date, before they are read in training."""

    def read(self, rows_U: Tensor) -> Tensor:
        """Up-to-date values (U, V) of distinct rows, in the shard's dtype; changes nothing."""
        return self.values().index_select(0, rows_U)

    def settle(self) -> None:
        """Bring all rows up to date."""

    def update(self, rows_U: Tensor, grad_UV: Tensor, lr: float, grad_scale: float) -> None:
        """One step on distinct ascending rows; ``grad_scale`` averages and clips."""
        self.step += 1
        optim = self.optim
        row_adam_(
            rows_U,
            grad_UV,
            self.master_RV,
            self.exp_avg_RV,
            self.exp_avg_sq_RV,
            step=self.step,
            lr=lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.table_weight_decay,
            grad_scale=grad_scale,
            kernel=self.kernel,
        )
        self.updates_R[rows_U] += 1
        self._follow(rows_U)

    def signal_and_power(self) -> Tensor:
        """See :mod:`ultramem_ds.optim.gradient_signal`: (2,) float64, over the steps that touched
        a row; one pass over the shard, which changes nothing.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.exp_avg_RV.device)
        for sums in row_sums(self.exp_avg_RV, self.exp_avg_sq_RV, self.updates_R):
            total += signal_and_power(self._now(sums), self.optim.beta1, self.optim.beta2)
        return total

    def _now(self, sums: MomentSums) -> MomentSums:
        """Of moments that all steps so far have reached."""
        return sums

    def set_step(self, step: int) -> None:
        """After values and moments have been loaded: all rows are at ``step``."""
        self.step = step
        self.updates_R.fill_(step)
        if self._master_RV is not None:
            self.values().copy_(self._master_RV)

    def _follow(self, rows_U: Tensor) -> None:
        """Copy masters into a shard of lower precision."""
        if self._master_RV is not None:
            values_RV = self.values()
            rows_UV = self._master_RV.index_select(0, rows_U).to(values_RV.dtype)
            values_RV.index_copy_(0, rows_U, rows_UV)


class CatchUpRowAdam(LazyRowAdam):
    """AdamW on the rows of one shard, skipped steps made up for at the next read.

    Raises:
        ValueError: beta1 is not below sqrt(beta2), so that momentum outlives the second moment.
    """

    def __init__(self, values: Callable[[], Tensor], optim: OptimConfig, kernel: str) -> None:
        super().__init__(values, optim, kernel)
        if not 0 < optim.beta1**2 < optim.beta2:
            raise ValueError(
                f"memory.table_optimizer=row-sparse-catch-up needs 0 < optim.beta1 < "
                f"sqrt(optim.beta2), not {optim.beta1} and {optim.beta2}; use row-sparse"
            )
        rho = optim.beta1 / math.sqrt(optim.beta2)
        self._window = math.ceil(math.log(NEGLIGIBLE) / math.log(rho))
        self._powers = rho ** torch.arange(self._window, 0, -1, dtype=torch.float64)
        self._restart()

    def _restart(self) -> None:
        """Forget the schedule before the current step: no row is older."""
        self._base = self.step
        # By step since the base: log of the decay so far, and W divided by that decay.
        self._log_decay = torch.zeros(1, dtype=torch.float64)
        self._moves = torch.zeros(1, dtype=torch.float64)

    def set_step(self, step: int) -> None:
        """See :class:`LazyRowAdam`."""
        super().set_step(step)
        self._restart()

    def update(self, rows_U: Tensor, grad_UV: Tensor, lr: float, grad_scale: float) -> None:
        """One step on distinct ascending rows, whoever looked them up.

        With several copies of a table some rows were read, hence refreshed, in another copy only.
        """
        self.refresh(rows_U)
        super().update(rows_U, grad_UV, lr, grad_scale)
        self._append(lr)

    def _append(self, lr: float) -> None:
        """Let the schedule know this step's learning rate."""
        optim = self.optim
        now = self.step - self._base
        if now >= len(self._log_decay):
            self._log_decay = torch.cat([self._log_decay, torch.zeros_like(self._log_decay)])
            self._moves = torch.cat([self._moves, torch.zeros_like(self._moves)])
        self._log_decay[now] = self._log_decay[now - 1] + math.log1p(-lr * optim.table_weight_decay)
        correction = math.sqrt(1 - optim.beta2**self.step) / (1 - optim.beta1**self.step)
        tail = self._moves[max(0, now - self._window) : now]
        tail += lr * correction * self._powers[-len(tail) :] * math.exp(-self._log_decay[now])

    def refresh(self, rows_U: Tensor) -> None:
        """See the module: decay, moments and moves of the skipped steps, in one."""
        rows_U = rows_U[self._stale(rows_U)]
        if rows_U.numel() == 0:
            return
        values_UV, avg_UV, avg_sq_UV = self._caught_up(rows_U)
        self.exp_avg_RV.index_copy_(0, rows_U, avg_UV)
        self.exp_avg_sq_RV.index_copy_(0, rows_U, avg_sq_UV)
        self.master_RV.index_copy_(0, rows_U, values_UV)
        self.updates_R[rows_U] = self.step
        self._follow(rows_U)

    def read(self, rows_U: Tensor) -> Tensor:
        """See :class:`LazyRowAdam`: evaluation leaves no trace, so copies of a table stay equal."""
        values_UV = super().read(rows_U)
        stale_U = self._stale(rows_U)
        if stale_U.any():
            values_UV[stale_U] = self._caught_up(rows_U[stale_U])[0].to(values_UV.dtype)
        return values_UV

    def _stale(self, rows_U: Tensor) -> Tensor:
        return self.updates_R.index_select(0, rows_U) < self.step

    def _caught_up(self, rows_U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values and both moments (U, V) of stale rows as dense AdamW has them now."""
        optim, device = self.optim, rows_U.device
        last_U = self.updates_R.index_select(0, rows_U).long()
        since_U = (last_U - self._base).cpu()
        log_decay_now = self._log_decay[self.step - self._base]
        decay_U1 = torch.exp(log_decay_now - self._log_decay[since_U])[:, None]
        moves_U1 = self._moves[since_U][:, None] * torch.exp(log_decay_now)
        gap_U1 = (self.step - last_U)[:, None].double().cpu()
        first_U1 = (last_U + 1)[:, None].double().cpu()
        eps_U1 = optim.eps * torch.sqrt((1 - optim.beta2**first_U1) / optim.beta2)
        avg_UV = self.exp_avg_RV.index_select(0, rows_U)
        avg_sq_UV = self.exp_avg_sq_RV.index_select(0, rows_U)
        values_UV = self.master_RV.index_select(0, rows_U)
        direction_UV = avg_UV / (avg_sq_UV.sqrt() + eps_U1.to(device, torch.float32))
        values_UV *= decay_U1.to(device, torch.float32)
        values_UV -= moves_U1.to(device, torch.float32) * direction_UV
        avg_UV *= (optim.beta1**gap_U1).to(device, torch.float32)
        avg_sq_UV *= (optim.beta2**gap_U1).to(device, torch.float32)
        return values_UV, avg_UV, avg_sq_UV

    def settle(self) -> None:
        """See :class:`LazyRowAdam`; afterwards the schedule so far is not needed any more."""
        num_rows = len(self.updates_R)
        for first in range(0, num_rows, SETTLE_ROWS):
            end = min(num_rows, first + SETTLE_ROWS)
            self.refresh(torch.arange(first, end, device=self.updates_R.device))
        self._restart()

    def _now(self, sums: MomentSums) -> MomentSums:
        """See :class:`LazyRowAdam`: zero gradients of the skipped steps are still to come."""
        gap_N = (self.step - sums.updates_N).double()
        return MomentSums(
            sums.squares_N * self.optim.beta1 ** (2 * gap_N),
            sums.avg_sq_N * self.optim.beta2**gap_N,
            torch.full_like(sums.updates_N, self.step),
        )


ROW_OPTIMIZERS = {"row-sparse": LazyRowAdam, "row-sparse-catch-up": CatchUpRowAdam}
