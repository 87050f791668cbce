"""``evaluate --tasks``: benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import argparse
import sys

from ultramem_ds.harness.names import split_names


def evaluate_tasks(arguments: argparse.Namespace) -> int:
    """Check everything, load tasks, then the model; evaluate, print and write."""
    from ultramem_ds.data.tokenizers import load_tokenizer
    from ultramem_ds.harness.extra import require_lm_eval
    from ultramem_ds.infer.place import place

    names = _check(arguments)
    require_lm_eval()
    from ultramem_ds.harness.budget import max_tokens
    from ultramem_ds.harness.evaluation import run_tasks
    from ultramem_ds.harness.facts import describe
    from ultramem_ds.harness.lm import HarnessLM
    from ultramem_ds.harness.report import (
        cut_lines,
        results_json,
        results_markdown,
        write_results,
    )
    from ultramem_ds.harness.service import Service
    from ultramem_ds.harness.summary import summarise
    from ultramem_ds.harness.tasks import load_tasks
    from ultramem_ds.infer.source import open_source

    source = open_source(arguments.checkpoint)
    tokenizer = load_tokenizer(source.tokenizer_dir)
    with place() as here:
        tasks = None
        with here.peers.raising_together(ValueError):
            if here.is_main:
                tasks = load_tasks(
                    names, arguments.task_data, lambda text: len(tokenizer.encode(text))
                )
        model = here.load(source, arguments.precision)
        config, dtype = model.config, model.embedding.weight.dtype
        service = Service(
            model,  # as trained: weights packed for decoding are slow at thousands of rows
            tokenizer,
            max_tokens=arguments.max_tokens or max_tokens(config, here.device, dtype),
            peers=here.peers,
            progress=True,
        )
        lm = HarnessLM(
            service,
            max_length=arguments.max_length or config.model.seq_len,
            overlap=arguments.window_overlap,
        )
        with service.asking() as asks:
            if not asks or tasks is None:
                return 0
            results = run_tasks(lm, tasks, arguments.limit)
        facts = describe(
            lm,
            tasks,
            limit=arguments.limit,
            checkpoint=str(source.path),
            step=source.step,
            preset=source.config.preset,
            kind=config.model.kind,
            precision=str(dtype).removeprefix("torch."),
            device=str(here.device),
            partition=config.memory.partition if config.has_memory else "",
        )
    rows = summarise(results, tasks, lm.cuts, source.config.preset)
    print(results_json(results, rows, facts) if arguments.json else results_markdown(rows, facts))
    for line in cut_lines(rows):
        print(f"WARNING: {line}", file=sys.stderr)
    if arguments.output is not None:
        for path in write_results(arguments.output, results, rows, facts):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> list[str]:
    """The names asked for.

    Raises:
        ValueError: a number that cannot be, or an output that is a file.
    """
    names = split_names(arguments.tasks)
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(
            f"--limit {arguments.limit} leaves nothing to evaluate; leave it out for all items"
        )
    if arguments.max_length is not None and arguments.max_length < 2:
        raise ValueError(f"--max-length {arguments.max_length} must be at least 2")
    for key in ("max_tokens", "window_overlap"):
        if getattr(arguments, key) < 0:
            raise ValueError(f"--{key.replace('_', '-')} must not be negative")
    output = arguments.output
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a directory")
    return names
