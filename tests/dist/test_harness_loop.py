"""Benchmark tasks in the training loop: written down, and training does not notice."""

import json

import pytest

pytest.importorskip("lm_eval")

from tests.dist.launching import run_verb
from tests.harness_toys import write_toy_tasks
from ultramem_ds.telemetry.metrics import METRICS, VALIDATION, read_lines

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TRAIN = (
    "model.hidden_size=32 model.inner_size=64 model.seq_len=32 train.global_batch_size=4 "
    "model.vocab_size=512 train.micro_batch_size=1 train.max_steps=4 memory.top_m=4 "
    "model.dropout=0.1 train.eval_every=0 train.eval_sequences=2 data.num_workers=0"
).split()


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("ultramem", ["memory.knum=10", "memory.kdim=8"]), ("moe", ["moe.num_experts=4"])],
)
def test_training_is_the_same_to_the_last_digit(kind, overrides, prepared, tmp_path):
    write_toy_tasks(tmp_path / "tasks")
    series = {}
    for name, tasks in (
        ("without", []),
        (
            "with",
            [
                "train.tasks=boolq,arc_challenge",
                "train.tasks_every=2",
                "train.tasks_limit=7",
                f"train.task_data={tmp_path / 'tasks'}",
            ],
        ),
    ):
        run_dir = tmp_path / name
        result = run_verb(
            "train", "--preset", f"{kind}-debug", "--data", str(prepared),
            "--run-dir", str(run_dir), *TRAIN, *overrides, *tasks, nproc=2,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-4000:]
        series[name] = [(r["loss"], r["grad_norm"]) for r in read_lines(run_dir / METRICS)]
    assert series["with"] == series["without"]
    lines = [r for r in read_lines(tmp_path / "with" / VALIDATION) if "tasks" in r]
    assert [line["step"] for line in lines] == [2, 4]
    scored = {"boolq/acc", "arc_challenge/acc", "arc_challenge/acc_norm"}
    assert all(set(line["tasks"]) == scored for line in lines)
    if kind == "moe":
        return
    report = run_verb("report", str(tmp_path / "with"), "--output", str(tmp_path / "report"))
    assert report.returncode == 0, report.stderr
    assert "boolq/acc" in (tmp_path / "report" / "report.md").read_text()
    # The same numbers from the checkpoint of the last step, over two ranks with sharded tables.
    evaluated = run_verb(
        "evaluate", "--checkpoint", str(tmp_path / "with"), "--tasks", "boolq,arc_challenge",
        "--task-data", str(tmp_path / "tasks"), "--limit", "7", "--json", nproc=2,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr[-4000:]
    document = json.loads(evaluated.stdout[evaluated.stdout.index("{") :])
    found = {f"{r['task']}/{r['metric'].split(',')[0]}": r["value"] for r in document["summary"]}
    assert found == lines[-1]["tasks"]
    assert document["ultramem"]["ranks"] == 2
