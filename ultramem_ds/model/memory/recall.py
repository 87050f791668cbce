"""How much of the exhaustive top-m the two-stage search finds: a diagnostic."""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem_ds.model.memory.forms import ScoreForm

# T tokens, H heads, r Tucker rank, n keys per side, m top-m. A leading 2 is the side.


def exhaustive_top(row_1nr: Tensor, col_1nr: Tensor, form: ScoreForm, top_m: int) -> Tensor:
    """Slots of the top-m of all n*n pairs, per head.

    The top-m lie in the m rows of largest maximum, so the second pass sees m*n pairs only.

    Args:
        row_1nr: One token's row scores, (H, n, r).
        col_1nr: Its column scores.
        form: Scores pairs.
        top_m: m.

    Returns:
        (H, m) slot ids row * n + col, best first.
    """
    grid_Hnn = form.grid(row_1nr[None], col_1nr[None])[0]
    num_keys = grid_Hnn.shape[-1]
    best_rows_Hm = grid_Hnn.amax(-1).topk(top_m).indices
    kept_Hmn = grid_Hnn.gather(1, best_rows_Hm[..., None].expand(-1, -1, num_keys))
    best_Hm = kept_Hmn.flatten(1).topk(top_m).indices
    return best_rows_Hm.gather(1, best_Hm // num_keys) * num_keys + best_Hm % num_keys


@torch.no_grad()
def exhaustive_recall(form: ScoreForm, scores_2THnr: Tensor, slots_THm: Tensor) -> Tensor:
    """Share of the exhaustive top-m that a selection found.

    Args:
        form: Scores pairs.
        scores_2THnr: Row and column scores of all keys, of a few tokens.
        slots_THm: What the search selected for them.

    Returns:
        0-dim fp32 in [0, 1]; 1 for product keys but for ties. One token's n*n grid per head is held
        at a time.
    """
    wide = torch.promote_types(scores_2THnr.dtype, torch.float32)
    found = []
    for token, slots_Hm in enumerate(slots_THm):
        row_Hnr, col_Hnr = scores_2THnr[:, token].to(wide)
        exact_Hm = exhaustive_top(row_Hnr, col_Hnr, form, slots_Hm.shape[-1])
        found.append((exact_Hm[..., None] == slots_Hm[:, None, :]).any(-1).float().mean())
    return torch.stack(found).mean()
