"""Our model of lm-evaluation-harness against its own ``hf`` model: same answers? how much faster?

    ultramem-ds export --checkpoint RUN --output EXPORT
    python benchmarks/harness_against_hf.py --checkpoint RUN --export EXPORT --task-data DIR

One checkpoint, its transformers export, fp32, the same requests to both on the same machine, one
after the other, timed in CPU seconds after a first request to each: letters (MMLU, 5 shots),
endings (HellaSwag), sentences (WinoGrande, 5 shots), generated answers (TriviaQA, 5 shots, cut to
``--new-tokens``) and whole passages (BoolQ's). ``hf`` runs with each batch size of
``--batch-sizes`` and its best time counts. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
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


def difference(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[float, int]:
    """Largest difference of log-likelihoods, and how many choices or texts differ."""
    worst, unequal = 0.0, 0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, str):
            unequal += a != b
        elif isinstance(a, tuple):
            worst, unequal = max(worst, abs(a[0] - b[0])), unequal + (bool(a[1]) != bool(b[1]))
        else:
            worst = max(worst, abs(a - b))
    return worst, unequal


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True, help="written by `export`")
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200, help="of each part")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-sizes", default="8,32", help="of hf")
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args()
    require_lm_eval()
    tokenizer = load_tokenizer(run_dir_of(args.checkpoint))
    model = load_model(args.checkpoint)
    budget = max_tokens(model.config, torch.device("cpu"), torch.float32)
    service = Service(model, tokenizer, max_tokens=budget)
    theirs_model = AutoModelForCausalLM.from_pretrained(args.export, dtype=torch.float32).eval()
    theirs_tokenizer = AutoTokenizer.from_pretrained(args.export)
    rows = []
    for part in args.parts.split(","):
        name, shots, kind = PARTS[part]
        requests = requests_of(name, shots, kind, args)
        lm = HarnessLM(service, max_length=args.max_length)
        getattr(lm, kind)(requests[:4])
        ours, our_s = timed(lambda kind=kind, lm=lm, r=requests: getattr(lm, kind)(r))
        best_s, theirs = float("inf"), []
        for size in map(int, args.batch_sizes.split(",")):
            hf = HFLM(
                pretrained=theirs_model,
                tokenizer=theirs_tokenizer,
                batch_size=size,
                max_length=args.max_length,
                add_bos_token=False,
            )
            getattr(hf, kind)(requests[:4], disable_tqdm=True)
            answer = lambda kind=kind, hf=hf, r=requests: getattr(hf, kind)(r, disable_tqdm=True)  # noqa: E731
            theirs, their_s = timed(answer)
            best_s = min(best_s, their_s)
        worst, unequal = difference(ours, theirs)
        rows.append(
            [
                part,
                kind,
                f"{len(requests)}",
                f"{worst:.1e}",
                f"{unequal}",
                f"{len(requests) / our_s:.1f}",
                f"{len(requests) / best_s:.1f}",
                f"{best_s / our_s:.2f}",
            ]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    header = ["part", "method", "requests", "largest difference", "answers that differ"]
    print(markdown_table([*header, "ours, requests/CPU s", "hf, requests/CPU s", "ratio"], rows))


if __name__ == "__main__":
    main()
