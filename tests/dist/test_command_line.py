"""The contract of the command line, on two launched ranks and on one process."""

from __future__ import annotations

import json
import math
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import VOCAB_SIZE
from tests.dist.launching import ROOT, environment, run_verb
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.data.validation import ValidationSet, validation_subsets
from ultramem_ds.infer.load import load_model

pytestmark = pytest.mark.dist

# A table's scheme is chosen by rates that are measured once per kind of machine, and said.
OUR_LINES = ("ultramem-debug step", "memory.partition=auto is ")

OVERRIDES = (
    "model.hidden_size=32 model.inner_size=64 model.seq_len=64 train.global_batch_size=8 "
    f"model.vocab_size={VOCAB_SIZE} train.micro_batch_size=2 train.max_steps=6 memory.knum=25 "
    "memory.top_m=4 train.eval_sequences=8"
).split()


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_with_loop(run_dir: Path, data: Path, masked: bool) -> dict[str, float]:
    """Loss of the validation sequences by subset, documents found by their last token."""
    model = load_model(run_dir)
    eos, length = load_tokenizer(data).eos_id, model.config.model.seq_len
    losses = {}
    for subset in validation_subsets(data):
        total = []
        for ids in ValidationSet(data, subset, length):
            begin, begins = 0, []
            for position, token in enumerate(ids[:-1].tolist()):
                begins.append(begin)
                begin = position + 1 if token == eos else begin
            starts = torch.tensor([begins])
            documents = (starts, torch.arange(length) - starts) if masked else (None, None)
            with torch.no_grad():
                out = model(torch.from_numpy(ids)[None], *documents, vocab_limit=VOCAB_SIZE)
            total.append(float(out["loss"]))
        losses[subset] = sum(total) / len(total)
    return losses


@pytest.mark.slow
def test_train_resume_evaluate_generate(prepared: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ["train", "--preset", "ultramem-debug", "--data", str(prepared)]
    command += ["--run-dir", str(run_dir), *OVERRIDES]
    command += ["data.document_mask=true", "data.reset_positions=true", "train.eval_sequences=0"]

    stopped = run_verb(*command, "train.stop_at_step=3", nproc=2)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert [record["step"] for record in lines(run_dir / "metrics.jsonl")] == [1, 2, 3]
    shown = (stopped.stdout + stopped.stderr).splitlines()
    assert shown and all(line.startswith(OUR_LINES) for line in shown), shown
    for name in ("rank-00000.log", "rank-00001.log", "launcher.log"):
        assert "[WARNING]" in (run_dir / "logs" / name).read_text()
    with open(run_dir / "metrics.jsonl", "a") as file:  # what a kill leaves behind
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')

    resumed = run_verb(*command, nproc=2)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resuming" in resumed.stdout
    records = lines(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["loss"] > 1 for record in records)
    keys = "step loss grad_norm tokens lr lr_values tokens_per_s step_time_s".split()
    assert set(keys) <= records[0].keys()
    assert records[-1]["tokens"] == 6 * 8 * 64
    for record in records:
        parts = math.hypot(record["grad_norm_dense"], record["grad_norm_tables"])
        assert parts == pytest.approx(record["grad_norm"], rel=1e-5) and parts > 0
        phases = [record[f"time_s/{p}"] for p in ("data", "forward", "lookup", "backward")]
        assert min(phases) > 0 and sum(phases) < record["step_time_s"]
        assert 0 < record["memory_bytes"] <= 1.1 * record["peak_memory_bytes"]
        assert record["wire_bytes/total"] > record["wire_bytes/ids"] > 0
    # Validation's lookups are no step's: the same traffic in every step.
    assert len({record["wire_bytes/ids"] for record in records}) == 1
    assert list((run_dir / "tensorboard").glob("events*"))
    assert json.loads((run_dir / "config.json").read_text())["memory"]["knum"] == 25
    saved = sorted(p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir())
    assert saved == ["step-00000003", "step-00000006"]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000006\n"
    assert (run_dir / "tokenizer.json").exists()

    finished = run_verb(*command)
    assert finished.returncode == 0 and "is finished" in finished.stdout

    changed = run_verb(*command, "optim.lr=1.0")
    assert changed.returncode == 2
    assert "optim.lr=0.002" in changed.stderr and "Traceback" not in changed.stderr

    evaluated = run_verb(
        "evaluate", "--checkpoint", str(run_dir), "--data", str(prepared), "--json",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout)
    recorded = lines(run_dir / "validation.jsonl")[-1]
    for subset in ("even", "odd", "all"):
        # One process with the whole table against two ranks with halves: fp32 sums reordered.
        assert result[subset]["loss"] == pytest.approx(recorded[subset], rel=1e-5)
        assert result[subset]["bits_per_byte"] > 0
    plain, masked = (loss_with_loop(run_dir, prepared, masked) for masked in (False, True))
    # The loop takes sequences one at a time: fp32 sums reordered. Few have a boundary inside.
    for subset, loss in masked.items():
        assert result[subset]["loss"] == pytest.approx(loss, rel=1e-5)
        assert plain[subset] != loss

    prompt = ["generate", "--checkpoint", str(run_dir), "--prompt", "The "]
    texts = [
        run_verb(*prompt, "--max-new-tokens", "8", "--temperature", "0").stdout for _ in range(2)
    ]
    assert texts[0] == texts[1] and texts[0].startswith("The ") and len(texts[0]) > 5


def test_two_nodes_without_ssh_give_the_series_of_one_process(
    prepared: Path, tmp_path: Path
) -> None:
    """Two invocations of the launcher, as on two machines, over this machine's loopback."""
    overrides = [*OVERRIDES, "train.stop_at_step=2"]
    arguments = ["train", "--preset", "ultramem-debug", "--data", str(prepared), *overrides]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    settings = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    nodes = [
        subprocess.Popen(
            ["bash", str(ROOT / "launch" / "multi_node.sh"), *arguments]
            + ["--run-dir", str(tmp_path / "nodes")],
            env=environment(NODE_RANK=str(node), **settings),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    for node in nodes:
        output, _ = node.communicate(timeout=300)
        assert node.returncode == 0, output
    assert run_verb(*arguments, "--run-dir", str(tmp_path / "one")).returncode == 0
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "nodes"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
