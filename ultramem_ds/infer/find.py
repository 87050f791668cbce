"""A memory layer's retrieval for decode steps: one call of a kernel that fuses it.

Letters: B sequences, D hidden, K rows per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultramem_ds.kernels import resolve
from ultramem_ds.kernels.finding import Norm, RowFinder
from ultramem_ds.model.memory.expansion import BijectionShuffle, IdentityShuffle, StoredShuffle
from ultramem_ds.model.memory.keys import Fingerprint
from ultramem_ds.model.memory.layer import Located, MemoryLayer, Sought
from ultramem_ds.model.memory.query import CausalConv
from ultramem_ds.model.memory.retrieval import Selection
from ultramem_ds.model.memory.scores import ScoreForm


class FusedLocate:
    """``MemoryLayer.locate`` for steps of one token per sequence; others go the layer's own way.

    The convolution's state is moved on in place: what a step returns is the tensor it was given.
    What follows from the weights is derived once and anew whenever a weight has changed; writes
    through ``.data`` and moves of the layer need ``MemoryLayer.mark_stale``, as they do elsewhere.

    Args:
        layer: has one-sided candidates, see :func:`can_fuse`.
    """

    def __init__(self, layer: MemoryLayer) -> None:
        self._layer = layer
        self._form: ScoreForm | None = None
        self._cores: tuple[Fingerprint, ...] = ()
        self._finder: RowFinder | None = None
        self._no_loss: Tensor | None = None

    def __call__(self, sought: Sought) -> Located:
        """See ``model.memory.layer.Locate``."""
        x_BSD, doc_boundaries_BS, conv_state, recall_tokens = sought
        layer = self._layer
        conv = layer.retrieval.query.conv
        starts = isinstance(conv, CausalConv) and conv_state is None
        if x_BSD.shape[1] != 1 or starts or recall_tokens or torch.is_grad_enabled():
            return layer.retrieve_and_split(sought)
        finder = self._current()
        begins_B = None if doc_boundaries_BS is None else doc_boundaries_BS.flatten()
        kernel = resolve(layer.kernel, x_BSD.device)
        found = kernel.find_rows(finder, x_BSD.flatten(0, 1), conv_state, begins_B)
        if self._no_loss is None or self._no_loss.device != x_BSD.device:
            self._no_loss = found.scores_TKh.new_zeros(())
        selection = Selection(
            slots_TK=found.slots_TK,
            scores_TKh=found.scores_TKh,
            aux_loss=self._no_loss,
            conv_state=conv_state,
            diagnosis=None,
        )
        return Located(selection, found.permuted_TK, found.rows_TK, found.projectors_TK)

    def _current(self) -> RowFinder:
        """The finder of the weights as they are."""
        retrieval = self._layer.retrieval
        form = self._current_form()
        keys_2Hnrd, search = retrieval.keys(form.directions_2Hr)
        finder = self._finder
        known = finder is not None and finder.search_2Hnsd is search
        if finder is not None and known and finder.core_hHrr is form.core_hHrr:
            return finder
        query, shuffle = retrieval.query, self._layer.shuffle
        norm, norm_d, eps = _norm(query.norm)
        self._finder = RowFinder(
            conv_kD=query.conv.weight.detach() if isinstance(query.conv, CausalConv) else None,
            proj_OD=query.proj.weight.detach(),
            norm=norm,
            norm_d=norm_d,
            eps=eps,
            groups_2Hr=retrieval.groups(keys_2Hnrd),
            keys_2Hnrd=keys_2Hnrd,
            search_2Hnsd=search,
            core_hHrr=form.core_hHrr,
            top_m=retrieval.top_m,
            softmax=retrieval.softmax,
            rounds=shuffle.tables(search.device) if isinstance(shuffle, BijectionShuffle) else None,
            permutation=shuffle.index if isinstance(shuffle, StoredShuffle) else None,
            num_rows=self._layer.num_rows,
        )
        return self._finder

    def _current_form(self) -> ScoreForm:
        """The cores and directions, copied anew only when the cores have changed."""
        form = self._layer.retrieval.form
        cores = list(form.parameters())
        known = self._form
        same = all(seen.matches(core) for seen, core in zip(self._cores, cores))
        fresh = same and form.is_fresh
        if known is not None and fresh and known.directions_2Hr is form.directions:
            return known
        self._form = form()
        self._cores = tuple(Fingerprint(core) for core in cores)
        return self._form


def _norm(norm: nn.Module) -> tuple[Norm, Tensor | None, float]:
    """Its kind, weight and epsilon."""
    if isinstance(norm, nn.LayerNorm):
        return "layernorm", norm.weight.detach(), norm.eps
    if isinstance(norm, nn.RMSNorm):
        assert norm.eps is not None
        return "rmsnorm", norm.weight.detach(), norm.eps
    return "none", None, 0.0


def can_fuse(layer: MemoryLayer, like: Tensor) -> bool:
    """Whether the layer's kernel fuses its retrieval, with weights like this one.

    Two-sided candidates and permutations that the kernel does not know go the layer's own way.
    """
    known = isinstance(layer.shuffle, BijectionShuffle | StoredShuffle | IdentityShuffle)
    one_sided = layer.retrieval.candidates == "one-sided"
    return known and one_sided and resolve(layer.kernel, like.device).finds_rows(like)


def fuse_retrieval(layer: MemoryLayer) -> None:
    """Let a memory layer's decode steps find their rows in as few launches as there are."""
    layer.locate = FusedLocate(layer)
