"""lm-evaluation-harness' view of a model of ours.

Everything that the harness asks is turned into token ids here, cut to the model's length, counted,
and handed to the :class:`Service`. The class is a ``TemplateLM`` of world size 1: distribution over
ranks happens behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ultramem_ds.harness.generation import Prompt
from ultramem_ds.harness.requests import Cuts, Request
from ultramem_ds.harness.service import Service
from ultramem_ds.infer.sampling import Sampling

# Settings of a generation beside its length and its stop strings that are understood here.
_SAMPLING = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks"}


class HarnessLM(TemplateLM):
    """A model behind a :class:`Service`.

    Args:
        service: computes.
        max_length: tokens that the model reads at once.
        overlap: tokens of text before each window of ``loglikelihood_rolling`` that are read again
            as its context; the windows of text are disjoint all the same.
        seed: of generations that sample.

    Attributes:
        cuts: requests that did not fit, by task.
    """

    def __init__(self, service: Service, *, max_length: int, overlap: int = 0, seed: int = 0):
        super().__init__()
        if not 0 <= overlap < max_length:
            raise ValueError(
                f"--window-overlap {overlap} must be in [0, {max_length}), the model's length"
            )
        self.service = service
        self.max_length = max_length
        self.max_gen_toks = 256  # where a task does not say; lm-eval's own default
        self.overlap = overlap
        self.seed = seed
        self.cuts = Cuts()

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which is also the prefix of requests without a context."""
        return self.service.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer by its content."""
        return self.service.tokenizer.hash

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; no special token is ever added or recognised in text."""
        return self.service.tokenizer.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """See ``LM.loglikelihood``."""
        pairs = self._encode_pairs([request.args for request in requests])
        fitted = [
            self.cuts.fit(instance.task_name, Request(context, continuation), self.max_length)
            for instance, (context, continuation) in zip(requests, pairs)
        ]
        return [(score.logprob, score.is_greedy) for score in self.service.score(fitted)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        fitted = [
            self.cuts.fit("", Request(context, continuation), self.max_length)
            for _, context, continuation in requests
        ]
        return [(score.logprob, score.is_greedy) for score in self.service.score(fitted)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See ``LM.loglikelihood_rolling``."""
        texts = [instance.args[0] for instance in requests]
        windows: list[Request] = []
        owners: list[int] = []
        for index, ids in enumerate(self.service.tokenizer.encode_batch(texts)):
            self.cuts.asked[requests[index].task_name] += 1
            rolled = get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1 + self.overlap,
            )
            for context, continuation in map(make_disjoint_window, rolled):
                windows.append(Request(context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.service.score(windows)):
            totals[owner] += score.logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See ``LM.generate_until``."""
        encoded = self.service.tokenizer.encode_batch([request.args[0] for request in requests])
        prompts = []
        for instance, ids in zip(requests, encoded):
            settings = normalize_gen_kwargs(instance.args[1], self.max_gen_toks)
            unknown = sorted(set(settings) - _SAMPLING)
            if unknown:
                raise ValueError(
                    f"{instance.task_name} asks for generation settings that are not known here: "
                    f"{', '.join(unknown)}"
                )
            tokens, max_new = self.cuts.fit_prompt(
                instance.task_name,
                ids or [self.prefix_token_id],
                settings["max_gen_toks"],
                self.max_length,
            )
            sampled = bool(settings["do_sample"])
            sampling = Sampling(
                max_new_tokens=max_new,
                temperature=float(settings["temperature"]) if sampled else 0.0,
                top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
                top_k=int(settings.get("top_k", 0)) if sampled else 0,
                seed=self.seed,
            )
            prompts.append(Prompt(tokens, tuple(settings["until"]), sampling))
        return self.service.generate(prompts)

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Context and continuation as token ids, split where the context's own ids end.

        As ``TemplateLM._encode_pair`` has it: white space at the end of a context belongs to the
        continuation, and both are encoded together. A context is encoded once for all of its
        continuations.
        """
        moved = []
        for context, continuation in pairs:
            kept = context.rstrip()
            moved.append((kept, context[len(kept) :] + continuation))
        encode = self.service.tokenizer.encode_batch
        contexts = list(dict.fromkeys(context for context, _ in moved))
        length_of = dict(zip(contexts, map(len, encode(contexts))))
        found = []
        for (context, continuation), ids in zip(moved, encode(["".join(pair) for pair in moved])):
            at = length_of[context]
            if not at:  # no context: the prefix token, unless the text begins with it
                begins = bool(ids) and ids[0] == self.prefix_token_id
                ids, at = (ids, 1) if begins else ([self.prefix_token_id, *ids], 1)
            if at >= len(ids):
                raise ValueError(
                    f"the continuation {continuation!r} has no token of its own after its context"
                )
            found.append((ids[:at], ids[at:]))
        return found
