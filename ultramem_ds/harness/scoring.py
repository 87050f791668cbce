"""Log-likelihoods of a list of requests, over all ranks of a model.

Batches are dealt out to the ranks in rounds. In every round all ranks make the same forwards: one
for each level that some rank's batch has; a rank without such a level runs one token of nothing.

Letters: B rows, S columns, M scored positions, N scored tokens, G scored tokens that no other
scores above, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem_ds.harness.plan import ANSWERS, Batch, Level, Pick, plan_batches
from ultramem_ds.harness.requests import Request, Score
from ultramem_ds.infer.branch import Branch
from ultramem_ds.infer.peers import Peers
from ultramem_ds.model.lm import LanguageModel, Scored

# Logits taken at a time: on a CPU what its cache holds, elsewhere what keeps the device busy.
CPU_ELEMENTS, DEVICE_ELEMENTS = 1 << 18, 1 << 24

# (requests, log-probability (N,), whether most likely (N,)) of one level.
_Part = tuple[list[int], Tensor, Tensor]


@dataclass(frozen=True)
class Scorer:
    """A model as log-likelihoods need it.

    Attributes:
        model: in evaluation mode.
        vocab_size: entries of the tokenizer; the model's padding has no probability.
        max_tokens: of one forward, padding included.
        peers: the ranks that share the model.
        advance: told the number of requests answered on this rank, for a progress bar.
    """

    model: LanguageModel
    vocab_size: int
    max_tokens: int
    peers: Peers
    advance: Callable[[int], None] = lambda count: None

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Answers in the order of ``requests``, the same on all ranks; all call this together."""
        batches = plan_batches(requests, self.max_tokens)
        mine: dict[int, tuple[float, bool]] = {}
        ranks = self.peers.world_size
        for begin in range(0, len(batches), ranks):
            round_ = batches[begin : begin + ranks]
            wanted = sorted({number for b in round_ for number in b.levels})
            batch = round_[self.peers.rank] if self.peers.rank < len(round_) else Batch({})
            answers = self._run(batch, wanted)
            mine.update(answers)
            self.advance(len(answers))
        found: dict[int, tuple[float, bool]] = {}
        for part in self.peers.gather_objects(mine):
            found.update(part)
        return [Score(*found[index]) for index in range(len(requests))]

    def _run(self, batch: Batch, wanted: Sequence[int]) -> dict[int, tuple[float, bool]]:
        """One forward for each wanted level."""
        answers: dict[int, tuple[float, bool]] = {}
        past: Branch | None = None
        for number in wanted:
            level = batch.levels.get(number)
            if level is None:
                self._keep_company()
                continue
            branch, (requests, logprob_N, greedy_N) = self._forward(level, past)
            past = branch if number < ANSWERS else past
            for request, logprob, greedy in zip(requests, logprob_N.tolist(), greedy_N.tolist()):
                so_far, all_greedy = answers.get(request, (0.0, True))
                answers[request] = (so_far + logprob, all_greedy and bool(greedy))
        return answers

    def _forward(self, level: Level, past: Branch | None) -> tuple[Branch, _Part]:
        device = self.model.embedding.weight.device
        lengths = [len(row) for row in level.rows]
        width = max(lengths)
        padded = [list(row) + [0] * (width - len(row)) for row in level.rows]
        branch = Branch(self.model, lengths, past if level.owners else None, level.owners)
        places: dict[int, int] = {}  # flat position -> its number among the scored ones
        index = [places.setdefault(p.row * width + p.column, len(places)) for p in level.picks]
        picks_M = torch.tensor(list(places) or [0], device=device)
        tokens_BS = torch.tensor(padded, device=device)
        logits_MW = self.model(tokens_BS, scored=Scored(branch, picks_M))
        return branch, self._judge(logits_MW, level.picks, index)

    def _judge(self, logits_MW: Tensor, picks: Sequence[Pick], index: Sequence[int]) -> _Part:
        """Log-probability of each pick's target, and whether it is the most likely token."""
        device = logits_MW.device
        logits_MW = logits_MW[:, : self.vocab_size]
        best_M, norms_M = _norms(logits_MW)
        index_N = torch.tensor(index, dtype=torch.int64, device=device)
        targets_N = torch.tensor([p.target for p in picks], dtype=torch.int64, device=device)
        scores_N = logits_MW[index_N, targets_N].float()
        logprob_N = scores_N - norms_M[index_N]
        # Few targets score highest; only theirs are searched for an earlier token that ties.
        greedy_N = scores_N == best_M[index_N]
        highest_G = greedy_N.nonzero().squeeze(1)
        first_G = logits_MW[index_N[highest_G]].argmax(-1)
        greedy_N[highest_G] = first_G == targets_N[highest_G]
        return [p.request for p in picks], logprob_N.double().cpu(), greedy_N.cpu()

    def _keep_company(self) -> None:
        """A forward of one token, where other ranks have rows and this one has none."""
        device = self.model.embedding.weight.device
        tokens_11 = torch.zeros((1, 1), dtype=torch.int64, device=device)
        picks_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.model(tokens_11, scored=Scored(Branch(self.model, [1]), picks_1))


def _norms(logits_MW: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of each position, and the logarithm of the sum of their exponentials; fp32."""
    elements = CPU_ELEMENTS if logits_MW.device.type == "cpu" else DEVICE_ELEMENTS
    best, norms = [], []
    for part_RW in logits_MW.split(max(1, elements // logits_MW.shape[1])):
        part_RW = part_RW.float()
        best_R = part_RW.amax(-1)
        sums_R = (part_RW - best_R.unsqueeze(1)).exp_().sum(-1)
        best.append(best_R)
        norms.append(best_R + sums_R.log_())
    return torch.cat(best), torch.cat(norms)
