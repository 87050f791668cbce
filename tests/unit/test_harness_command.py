"""``evaluate --tasks`` as it is typed, on a small run."""

import importlib.util
import json

import pytest

pytest.importorskip("lm_eval")

from tests.harness_toys import write_toy_tasks
from ultramem_ds.cli.main import main


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys") / "tasks"
    write_toy_tasks(root, 12)
    return root


def test_results_are_lm_evals_json_and_a_table(trained, toys, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["evaluate", "--checkpoint", str(trained), "--tasks", "boolq,winogrande,hellaswag"]
    command += ["--task-data", str(toys), "--limit", "8"]
    assert main([*command, "--output", str(output), "--max-length", "8"]) == 0
    printed = capsys.readouterr()
    document = json.loads((output / "results.json").read_text())
    for key in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert key in document  # as lm-eval's own command writes them
    assert document["results"]["boolq"]["acc_stderr,none"] > 0
    facts = document["ultramem"]
    assert facts["prefix_token"]["text"] == "<|endoftext|>"
    assert facts["max_length"] == 8
    assert set(facts["seeds"]) == {"random", "numpy", "torch", "fewshot"}
    assert {"lm_eval", "torch", "ultramem_ds"} <= set(facts["versions"])
    assert facts["local_data_lacks"]["boolq"] == ["no train split"]
    table = (output / "results.md").read_text()
    assert table in printed.out
    assert "end-of-text" in table
    # 8 tokens do not hold every prompt: said in the file, in the table and on standard error.
    cut = facts["requests"]["boolq"]["truncated"]
    assert 0 < cut <= facts["requests"]["boolq"]["asked"] == 16
    sentence = f"boolq: {cut} of 16 requests were too long for the model"
    assert sentence in table
    assert sentence in printed.err
    # A longer reach cuts nothing.
    assert main([*command, "--max-length", "200", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert all(cuts["truncated"] == 0 for cuts in again["ultramem"]["requests"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "boolq", "--limit", "0"], "--limit 0 leaves nothing to evaluate"),
        (["--tasks", ","], "no task is named"),
        (["--tasks", "bolq"], "unknown task 'bolq'; near ones: boolq"),
        (["--tasks", "boolq", "--task-data", "/nowhere"], "--task-data /nowhere: no such dir"),
        (["--tasks", "boolq", "--max-length", "1"], "--max-length 1 must be at least 2"),
        (["--tasks", "boolq", "--window-overlap", "32"], "--window-overlap 32 must be in [0, 32)"),
        (["--tasks", "boolq", "--window-overlap", "-1"], "--window-overlap must not be negative"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, trained, toys, capsys):
    if "--task-data" not in arguments:
        arguments = [*arguments, "--task-data", str(toys)]
    assert main(["evaluate", "--checkpoint", str(trained), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_without_the_harness_the_extra_is_named(trained, monkeypatch, capsys):
    own = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "lm_eval" else own(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    assert main(["evaluate", "--checkpoint", str(trained), "--tasks", "boolq"]) == 2
    assert "pip install 'ultramem_ds[eval]'" in capsys.readouterr().err
