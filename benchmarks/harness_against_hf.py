"""Our model of lm-evaluation-harness against its own ``hf`` model: same answers? how much faster?

    ultramem-ds export --checkpoint RUN --output EXPORT
    python benchmarks/harness_against_hf.py --checkpoint RUN --export EXPORT --task-data DIR

One checkpoint, its transformers export, the same requests to both on the same machine, one
after the other: letters (MMLU, 5 shots), endings (HellaSwag), sentences (WinoGrande, 5 shots, two
contexts to one ending), generated answers (TriviaQA, 5 shots, cut to ``--new-tokens``) and whole
passages (BoolQ's). Prints Markdown.

Answers are compared with ``softmax_dtype=float64``, an option of ``hf``: by default it adds up a
passage's log-likelihood of -2,000 in fp32, whose digits there are 1e-4 apart; the column "hf to
itself" has what that costs it. Times are of its default, in CPU seconds after a first request to
each, the best of ``--batch-sizes``; ``--no-speed`` leaves them out.

A memory layer selects slots: where two score the same to fp32's last digits, two programs may take
different ones, and what follows differs by more than rounding. ``--dtype fp64`` tells such ties
(the difference is gone) from errors (it stays).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ultramem_ds.hf  # noqa: F401  (registers the model family)
from ultramem_ds.checkpoint.directory import run_dir_of
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.harness.budget import max_tokens
from ultramem_ds.harness.extra import require_lm_eval
from ultramem_ds.harness.lm import HarnessLM
from ultramem_ds.harness.quiet import without_bars
from ultramem_ds.harness.service import Service
from ultramem_ds.harness.tasks import SEED, load_tasks
from ultramem_ds.infer.load import load_model
from ultramem_ds.telemetry.markdown import markdown_table

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
TOLERANCE = 1e-4

# Row of the table -> task, shots, method.
PARTS = {
    "MMLU": ("mmlu_high_school_psychology", 5, "loglikelihood"),
    "HellaSwag": ("hellaswag", 0, "loglikelihood"),
    "WinoGrande": ("winogrande", 5, "loglikelihood"),
    "TriviaQA": ("triviaqa", 5, "generate_until"),
    "passages": ("boolq", 0, "loglikelihood_rolling"),
}


def requests_of(name: str, shots: int, kind: str, args: argparse.Namespace) -> list[Instance]:
    """The first requests of a task."""
    tasks = load_tasks([name], args.task_data, len)
    (task,) = tasks.loaded["tasks"].values()
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=SEED)
    with without_bars():
        task.build_all_requests(limit=args.requests)
    found: list[Instance] = list(task.instances)[: args.requests]
    for instance in found:
        if kind == "loglikelihood_rolling":
            instance.arguments = (instance.doc["passage"],)
        elif kind == "generate_until":
            settings = {**instance.args[1], "max_gen_toks": args.new_tokens}
            instance.arguments = (instance.args[0], settings)
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Result and CPU seconds of all threads: others may be at work on the machine."""
    begin = time.process_time()
    result = work()
    return result, time.process_time() - begin


def differences(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[list[float], int]:
    """Differences of log-likelihoods, and how many texts or "is greedy" differ."""
    found, unequal = [0.0], 0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, str):
            unequal += a != b
        elif isinstance(a, tuple):
            found.append(abs(a[0] - b[0]))
            unequal += bool(a[1]) != bool(b[1])
        else:
            found.append(abs(a - b))
    return found, unequal


def choices(requests: Sequence[Instance], answers: Sequence[Any]) -> list[tuple[int, int]]:
    """Of each question: the likeliest of its answers, and the likeliest for its length."""
    by_doc: dict[int, list[tuple[float, float]]] = {}
    for request, (logprob, _) in zip(requests, answers, strict=True):
        length = len(request.args[1].encode())
        by_doc.setdefault(request.doc_id, []).append((logprob, logprob / length))
    return [
        (max(range(len(o)), key=lambda i: o[i][0]), max(range(len(o)), key=lambda i: o[i][1]))
        for o in by_doc.values()
    ]


def ask(lm: TemplateLM, kind: str, requests: list[Instance]) -> list[Any]:
    """Answers without progress bars."""
    answers: list[Any] = getattr(lm, kind)(requests, disable_tqdm=True)
    return answers


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True, help="written by `export`")
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200, help="of each part")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-sizes", default="8,32", help="of hf, timed")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--no-speed", action="store_true", help="agreement alone")
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args()
    require_lm_eval()
    tokenizer = load_tokenizer(run_dir_of(args.checkpoint))
    dtype = DTYPES[args.dtype]
    model = load_model(args.checkpoint, dtype=dtype)
    budget = max_tokens(model.config, torch.device("cpu"), dtype)
    service = Service(model, tokenizer, max_tokens=budget)
    theirs_model = AutoModelForCausalLM.from_pretrained(args.export, dtype=dtype).eval()
    theirs_tokenizer = AutoTokenizer.from_pretrained(args.export)
    rows, header = [], ["part", "method", "requests", "largest difference", "beyond 1e-4"]
    header += ["answers that differ", "questions", "choices that differ"]
    if not args.no_speed:
        header += ["hf to itself", "ours, requests/CPU s", "hf, requests/CPU s", "ratio"]

    def hf(batch_size: int, **settings: Any) -> HFLM:
        return HFLM(
            pretrained=theirs_model,
            tokenizer=theirs_tokenizer,
            batch_size=batch_size,
            max_length=args.max_length,
            add_bos_token=False,
            **settings,
        )

    for part in args.parts.split(","):
        name, shots, kind = PARTS[part]
        requests = requests_of(name, shots, kind, args)
        lm = HarnessLM(service, max_length=args.max_length)
        ask(lm, kind, requests[:4])
        ours, our_s = timed(functools.partial(ask, lm, kind, requests))
        exact = ask(hf(8, softmax_dtype=torch.float64), kind, requests)
        apart, unequal = differences(ours, exact)
        beyond = sum(each > TOLERANCE for each in apart)
        row = [part, kind, f"{len(requests)}", f"{max(apart):.1e}", f"{beyond}", f"{unequal}"]
        if kind == "loglikelihood":
            chosen = list(zip(choices(requests, ours), choices(requests, exact), strict=True))
            row += [f"{len(chosen)}", f"{sum(a != b for a, b in chosen)}"]
        else:
            row += ["", ""]
        if not args.no_speed:
            best_s, theirs = float("inf"), []
            for size in map(int, args.batch_sizes.split(",")):
                other = hf(size)
                ask(other, kind, requests[:4])
                theirs, their_s = timed(functools.partial(ask, other, kind, requests))
                best_s = min(best_s, their_s)
            rates = [len(requests) / our_s, len(requests) / best_s, best_s / our_s]
            row += [f"{max(differences(theirs, exact)[0]):.1e}", *(f"{rate:.2f}" for rate in rates)]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
