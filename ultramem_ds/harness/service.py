"""One rank reads tasks and asks, all ranks compute.

The tasks, their data and their metrics are rank 0's business alone. The other ranks wait in
:meth:`Service.serve` for lists of requests and take their share of the forwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ultramem_ds.data.tokenizers import Tokenizer
from ultramem_ds.harness.generation import Generator, Prompt
from ultramem_ds.harness.progress import Progress
from ultramem_ds.harness.requests import Request, Score
from ultramem_ds.harness.scoring import Scorer
from ultramem_ds.infer.peers import ALONE, Peers
from ultramem_ds.model.lm import LanguageModel


class Service:
    """The model of all ranks, asked by the first.

    Args:
        model: in evaluation mode, whole or sharded over the peers.
        tokenizer: of the model.
        max_tokens: of one forward, padding included.
        peers: the ranks that share the model.
        progress: whether to draw a bar.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        peers: Peers = ALONE,
        progress: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.peers = peers
        self.max_tokens = max_tokens
        self.progress = Progress(progress and peers.rank == 0)
        self._scorer = Scorer(model, tokenizer.vocab_size, max_tokens, peers, self.progress.advance)
        self._generator = Generator(model, tokenizer, max_tokens, peers, self.progress.advance)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Log-likelihoods; rank 0 only."""
        scores: list[Score] = self._do(("score", list(requests)))
        return scores

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Generated answers; rank 0 only."""
        answers: list[str] = self._do(("generate", list(prompts)))
        return answers

    @contextlib.contextmanager
    def asking(self) -> Iterator[bool]:
        """Around everything that asks: rank 0 is told True, the others serve and are told False.

        An exception on rank 0 releases the others.
        """
        if self.peers.rank:
            self._serve()
            yield False
            return
        try:
            yield True
        finally:
            self.peers.from_first(None)

    def _serve(self) -> None:
        while (job := self.peers.from_first(None)) is not None:
            self._work(job)

    def _do(self, job: tuple[str, list[Any]]) -> Any:
        if not job[1]:
            return []
        self.peers.from_first(job)
        with self.progress.over(job[0], len(job[1]), self.peers.world_size):
            return self._work(job)

    def _work(self, job: tuple[str, list[Any]]) -> Any:
        kind, items = job
        return self._scorer.score(items) if kind == "score" else self._generator.generate(items)
