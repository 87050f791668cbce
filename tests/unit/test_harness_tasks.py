"""Tasks through lm-evaluation-harness on small models: chance, knowledge, perplexity, seeds."""

import json
import math
import random

import pytest
import torch

pytest.importorskip("lm_eval")

from tests.harness_toys import byte_tokenizer, harness_lm, small_model, write_toy_tasks
from ultramem_ds.harness.evaluation import run_tasks
from ultramem_ds.harness.paper import BENCHMARKS, paper_numbers
from ultramem_ds.harness.summary import summarise
from ultramem_ds.harness.tasks import load_tasks

# Task -> chance.
CHOICES = {
    "boolq": 0.5,
    "arc_challenge": 0.25,
    "arc_challenge_letter": 0.25,
    "mmlu_anatomy": 0.25,
    "hellaswag": 0.25,
    "winogrande": 0.5,
    "gpqa_main_zeroshot": 0.25,
    "agieval_sat_en": 0.25,
}
COUNT = 120


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys") / "tasks"
    return root, write_toy_tasks(root, COUNT)


def evaluated(model, tokenizer, names, data, **settings):
    tasks = load_tasks(names, data, lambda text: len(tokenizer.encode(text)))
    lm = harness_lm(model, tokenizer, max_tokens=2000, **settings)
    results = run_tasks(lm, tasks, bootstrap=0)
    return summarise(results, tasks, lm.cuts, "dense-debug"), results


def test_an_untrained_model_is_at_chance(tokenizer, toys):
    model = small_model("ultramem")
    before = (random.getstate(), torch.get_rng_state())
    rows, _ = evaluated(model, tokenizer, list(CHOICES), toys[0])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    found = {row.task: row for row in rows if row.metric.startswith("acc,")}
    assert set(found) == set(CHOICES)
    for task, chance in CHOICES.items():
        # Answers are drawn by lot, so that any model's hits are binomial.
        error = math.sqrt(chance * (1 - chance) / COUNT)
        assert abs(found[task].value - chance) < 3 * error, task
        assert found[task].items == COUNT


def test_a_model_that_has_seen_the_answers_is_above_chance(tokenizer, tmp_path):
    count = 24
    answers = write_toy_tasks(tmp_path, count)
    model = small_model("dense")
    known = [prompt + answer for prompt, answer in answers.items()]
    rows = [[0, *tokenizer.encode(text)] for text in known]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(300):
        optimizer.zero_grad()
        model(tokens)["loss"].backward()
        optimizer.step()
    for task in ("boolq", "arc_challenge"):
        (row,) = [
            row
            for row in evaluated(model.eval(), tokenizer, [task], tmp_path)[0]
            if row.metric.startswith("acc,")
        ]
        error = math.sqrt(CHOICES[task] * (1 - CHOICES[task]) / count)
        assert row.value > CHOICES[task] + 3 * error, (task, row.value)


def test_perplexity_of_a_file_counts_words_bytes_and_tokens(tokenizer, tmp_path):
    texts = ["one two three", "zażółć " * 30, "x"]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = small_model("dense")
    rows, results = evaluated(model, tokenizer, [str(path)], None)
    values = {row.metric.partition(",")[0]: row.value for row in rows}
    lm = harness_lm(model, tokenizer)
    nats = 0.0
    from tests.unit.test_harness_scoring import instances

    for text in texts:
        nats -= lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))[0]
    words = sum(len(text.split(" ")) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert values["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert values["byte_perplexity"] == pytest.approx(math.exp(nats / num_bytes), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-4)
    # A byte is a token of this tokenizer.
    assert values["token_perplexity"] == pytest.approx(values["byte_perplexity"], rel=1e-4)
    assert "mine" in results["results"]


def test_shuffled_choices_are_shuffled_once(toys):
    first, second = (
        load_tasks(["gpqa_main_zeroshot"], toys[0], len).loaded["tasks"]["gpqa_main_zeroshot"]
        for _ in range(2)
    )
    assert [doc["answer"] for doc in first.eval_docs] == [doc["answer"] for doc in first.eval_docs]
    assert [doc["answer"] for doc in first.eval_docs] == [doc["answer"] for doc in second.eval_docs]
    assert len({doc["answer"] for doc in first.eval_docs}) == 4


def test_the_papers_numbers_are_its_averages():
    from ultramem_ds.config.presets import PRESETS

    columns = list(dict.fromkeys(benchmark.column for benchmark in BENCHMARKS))
    rows = {preset: paper_numbers(preset) for preset in PRESETS}
    rows = {preset: row for preset, row in rows.items() if row}
    assert len(rows) == 13
    for preset, row in rows.items():
        mean = sum(row[column] for column in columns) / len(columns)
        if preset == "dense-1.6b":  # a misprint: its columns average 34.40, it says 34.81
            continue
        # Its own averages are rounded to two digits.
        assert mean == pytest.approx(row["Avg"], abs=0.011), preset


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["helaswag"], r"unknown task 'helaswag'; near ones: hellaswag"),
        (["papr"], r"unknown task 'papr'; near ones: .*paper"),
        (["hellaswag", "drop"], r"has no data for drop: a directory TASK with train.*; it has agi"),
        (["mmlu"], r"has no data for mmlu_.* and \d\d more"),
        (["nothing.jsonl"], r"nothing.jsonl: no such file"),
    ],
)
def test_bad_names_and_missing_data_are_one_sentence(names, message, toys):
    with pytest.raises(ValueError, match=message):
        load_tasks(names, toys[0], len)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("boolq", '{"passage": "p", "question": "q", "answer": true}\n', "boolq lack label; they"),
        ("boolq", "", "holds no record"),
        ("boolq", "{torn", "line 1 is not JSON"),
        ("triviaqa", '{"question": "q"}\n', "'answer' is undefined"),
    ],
)
def test_bad_records_are_one_sentence(task, content, message, tmp_path):
    (tmp_path / task).mkdir()
    (tmp_path / task / "validation.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tasks([task], tmp_path, len)


def test_a_missing_split_is_named_once(tokenizer, toys):
    """ARC's letters ask for the training split twice: as such, and for their shots."""
    tasks = load_tasks(["arc_challenge_letter"], toys[0], len)
    assert tasks.local["arc_challenge_letter"].notes == ["no train split", "no test split"]
