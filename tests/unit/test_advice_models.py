"""Advice about exported models, benchmark tasks, generation and kernels, followed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.advice import Advice, Told, ask, follow, says, with_words
from tests.unit.bad_exports import _exported
from tests.unit.bad_input_texts import FILES
from tests.unit.bad_inputs import Scene
from tests.unit.bad_tasks import GOOD
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.exchange import tokenizer_files
from ultramem_ds.exchange.importing import describe
from ultramem_ds.harness import tasks
from ultramem_ds.harness.names import split_names
from ultramem_ds.harness.requests import Cuts, Request
from ultramem_ds.infer.generate import stream
from ultramem_ds.infer.sampling import Sampling
from ultramem_ds.kernels import build, hugepages, ops, row_adam


def _export_again(told: Told) -> list[str]:
    """What the run gives today."""
    source = Path(told.argv[told.argv.index("--input") + 1])
    shutil.rmtree(source)
    said = ask(["export", "--checkpoint", str(told.scene.trained), "--output", str(source)])
    assert said.code == 0, said.text
    return told.argv


def _tokenizer_back(told: Told) -> list[str]:
    shutil.copy(_exported(told.scene.trained) / "tokenizer.json", told.values[0])
    return told.argv


def _another_output(told: Told) -> list[str]:
    return told.option("--output", told.scene.root / "another")


def _deepspeed_over(scene: Scene) -> list[str]:
    command = ["export", "--format", "deepspeed", "--checkpoint", str(scene.trained)]
    command += ["--output", str(scene.root / "out")]
    assert ask(command).code == 0
    return command


def _good_record(told: Told) -> list[str]:
    """A directory as the message describes it, for the task that it names."""
    record = {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}
    told.scene.file(f"tasks/{told.values[1]}/validation.jsonl", json.dumps(record) + "\n")
    return told.argv


def _wanted_split(told: Told) -> list[str]:
    directory = told.scene.root / "tasks" / "boolq"
    (directory / "train.jsonl").rename(directory / f"{told.values[2]}.jsonl")
    return told.argv


def _keep_one(told: Told) -> list[str]:
    (Path(told.values[0]).parent / told.values[1]).unlink()
    return told.argv


def _without_limit(told: Told) -> list[str]:
    at = told.argv.index("--limit")
    return [*told.argv[:at], *told.argv[at + 2 :]]


CASES: list[Any] = [
    Advice("configuration of a newer format",
           says("format_version {} is newer than {}, the last this program reads: update "
                "ultramem_ds, or export again with this version"), _export_again),
    Advice("tokenizer of another model",
           says("the tokenizer in {} has {} entries, {} says {}: it is another model's; put the "
                "exported one back"), _tokenizer_back),
    Advice("export over something", says("--output {} exists already; choose another"),
           _another_output),
]  # fmt: skip


# The harness reads thousands of files before it knows a task.
SLOW = [
    Advice("bf16 for DeepSpeed's tools",
           says("--format deepspeed keeps the fp32 masters; leave --dtype fp32"),
           with_words("--dtype", "fp32")),
    Advice(_deepspeed_over, says("{} exists already; choose another output"), _another_output,
           "DeepSpeed's layout over another"),
    Advice("task misspelt", says("unknown task {}{}"),
           lambda told: told.option("--tasks", "boolq")),
    Advice("a limit of no items",
           says("--limit {} leaves nothing to evaluate; leave it out for all items"),
           _without_limit),
    Advice("no data for a task",
           says("--task-data {} has no data for {}: a directory TASK with train, validation or "
                "test.jsonl, .arrow or .parquet; it has {}"), _good_record),
    Advice("nothing to evaluate on", says("{} has nothing to evaluate {} on: it needs {}"),
           _wanted_split),
    Advice("a split in two formats", says("{} and {} are the same split; keep one"), _keep_one),
    Advice("results into a file",
           says("--output {} is a file; name a directory", "cli/evaluate_tasks.py"),
           lambda told: [*told.argv, "--output", str(told.scene.root / "elsewhere")]),
]  # fmt: skip
CASES += [pytest.param(case, marks=pytest.mark.slow, id=case.title) for case in SLOW]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_following_helps(case: Advice, prepared: Path, trained: Path, tmp_path: Path) -> None:
    said = follow(case, Scene(tmp_path, prepared, trained))
    assert said.code == 0, said.text


NEAR = says("; near ones: {}")
GROUP = says("no task is named; `paper` is the group of the paper's ten")
OFFLINE = says("could not be loaded ({}: {}); without a network, or for gated data, give "
               "--task-data DIR")  # fmt: skip


@pytest.mark.slow
def test_names_of_tasks() -> None:
    """Near names are names, and the group that is named has ten tasks."""
    with pytest.raises(ValueError) as refusal:
        tasks.load_tasks(["bolq"], None, len)
    known = {*tasks._all_tasks().task_index, "paper"}
    assert known.issuperset(NEAR.values(refusal.value)[0].split(", "))
    with pytest.raises(ValueError) as refusal:
        split_names(",")
    GROUP.values(refusal.value)
    of_the_paper = list(tasks._expand(split_names("paper")))
    assert len(of_the_paper) >= 10 and len(of_the_paper) == len(set(of_the_paper))


@pytest.mark.slow
def test_tasks_without_a_network(tmp_path: Path) -> None:
    def load(specs: list[str]) -> None:
        raise ConnectionError("no route to host")

    with pytest.raises(ValueError) as refusal:
        tasks._load(SimpleNamespace(load=load), ["boolq"])
    OFFLINE.values(refusal.value)
    scene = Scene(tmp_path, tmp_path, tmp_path)
    scene.file("data/boolq/validation.jsonl", json.dumps(GOOD) + "\n")
    assert "boolq" in tasks.load_tasks(["boolq"], tmp_path / "data", len).local


LONGER = says("{}: an answer of {} tokens does not fit the model's {}; give --max-length a larger "
              "number")  # fmt: skip


def test_answers_longer_than_the_model() -> None:
    request = Request((1,), tuple(range(40)))
    with pytest.raises(ValueError) as refusal:
        Cuts().fit("boolq", request, 32)
    answer = int(LONGER.values(refusal.value)[1])
    assert Cuts().fit("boolq", request, answer).continuation == request.continuation


PROMPTS = says("every prompt needs at least one token; begin with the end-of-text id")


def test_empty_prompts() -> None:
    from tests.unit.exported_models import random_model

    model, sampling = random_model("dense"), Sampling(max_new_tokens=2)
    settings = {"sampling": sampling, "eos_id": 0, "vocab_size": 16}
    with pytest.raises(ValueError) as refusal:
        list(stream(model, [[]], **settings))
    PROMPTS.values(refusal.value)
    assert list(stream(model, [[0]], **settings))


NO_TOKENIZER = says("{}; there was no tokenizer: copy tokenizer.json there before generating")
OTHER_IDS = says("WARNING: AutoTokenizer would give other ids than {} in training: {} is left out; "
                 "encode with the sentencepiece library")  # fmt: skip


def test_a_model_without_a_tokenizer(trained: Path, prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "tokenizer.json").unlink()
    assert NO_TOKENIZER.values(describe(run))
    command = Scene(tmp_path, prepared, trained).generate(run, "--max-new-tokens", "1")
    assert ask(command).code == 2
    shutil.copy(prepared / "tokenizer.json", run)
    said = ask(command)
    assert said.code == 0, said.text


def test_a_tokenizer_that_transformers_reads_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sentencepiece

    monkeypatch.setattr(tokenizer_files, "_agrees", lambda tokenizer, directory: False)
    tokenizer = load_tokenizer(FILES / "llama_like.model")
    tokenizer_files.write_tokenizer(tokenizer, tmp_path, 32)
    file, left_out = OTHER_IDS.values(capsys.readouterr().err)
    assert not (tmp_path / left_out).exists()
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / file))
    for text in ("the memory of rows", "  two  spaces"):
        assert encoder.encode(text) == list(tokenizer.encode(text))


NEWER = says("config.json has format_version {}, this program reads up to {}: update ultramem_ds, "
             "or export again with this version")  # fmt: skip
ONE_DEVICE = says(
    "memory_device={} needs the one device that the rest goes to as device_map, not {}"
)
ONE_INPUT = says("give exactly one of input_ids and inputs_embeds")


@pytest.mark.slow
def test_transformers(trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    import ultramem_ds.hf  # noqa: F401 - registers the classes

    def export() -> Path:
        output = tmp_path / "exported"
        shutil.rmtree(output, ignore_errors=True)
        assert ask(["export", "--checkpoint", str(trained), "--output", str(output)]).code == 0
        return output

    def load(path: Path, **settings: object) -> torch.nn.Module:
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(path, **settings)
        return model

    path = export()
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(ValueError) as refusal:
        load(path)
    NEWER.values(refusal.value)
    model = load(export())
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError) as refusal:
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    ONE_INPUT.values(refusal.value)
    model(input_ids=ids), model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError) as refusal:
        load(path, memory_device="cpu", device_map="auto")
    ONE_DEVICE.values(refusal.value)
    load(path, memory_device="cpu", device_map="cpu")


ARRAYS = says("arrays do not fit the configuration: {} {}, need {}")
BACKWARD = says("no gradient for {}: run backward() first")


def test_interop() -> None:
    """An array of the shape that is needed, and a backward before its gradients."""
    import ast

    import numpy as np

    from tests.parity.test_reference_layer import VECTORS, build, load
    from ultramem_ds import interop

    meta, params, recorded = load(VECTORS[0])
    theirs, ours = next(iter(interop.SAME_LAYOUT.items()))
    settings = (meta["config"], meta["norm"], meta["eps"])
    with pytest.raises(ValueError) as refusal:
        interop.reference_layer({**params, theirs: np.zeros(3)}, *settings)
    name, _, needed = ARRAYS.values(refusal.value)
    assert name.split()[0] == ours
    shape = ast.literal_eval(needed)
    layer = interop.reference_layer({**params, theirs: np.zeros(shape)}, *settings)
    with pytest.raises(ValueError) as refusal:
        interop.reference_gradients(layer)
    BACKWARD.values(refusal.value)
    layer, recorded = build(VECTORS[0])
    layer(torch.from_numpy(recorded["input"])).sum().backward()
    assert interop.reference_gradients(layer)


INDICES = says("{} are {}; pass int64 or int32")
TABLE = says("the table is {} {}; pass (R, V) in fp32, bf16 or fp64")
ROWS = says("rows are {}; pass contiguous int64")
PAGES = says("advise_huge_pages wants a contiguous tensor")


def test_tensors_that_kernels_take() -> None:
    """What they ask for is taken."""
    rows_TK = torch.zeros(2, 3, dtype=torch.int64)
    scores_TKh = torch.ones(2, 3, 1)

    def lookup(values_RV: torch.Tensor, ids: torch.Tensor) -> None:
        ops.lookup_reduce(values_RV, ids, rows_TK, scores_TKh, 1, kernel="reference")

    with pytest.raises(ValueError) as refusal:
        lookup(torch.ones(4, 8), rows_TK.to(torch.int16))
    INDICES.values(refusal.value)
    for dtype in (torch.int64, torch.int32):
        lookup(torch.ones(4, 8), rows_TK.to(dtype))
    with pytest.raises(ValueError) as refusal:
        lookup(torch.ones(4, 8, dtype=torch.float16), rows_TK)
    TABLE.values(refusal.value)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        lookup(torch.ones(4, 8, dtype=dtype), rows_TK)
    arrays = [torch.zeros(4, 8) for _ in range(3)]
    rows_U = torch.tensor([0, 2])
    with pytest.raises(ValueError) as refusal:
        row_adam.check_row_adam(rows_U.to(torch.int32), torch.zeros(2, 8), *arrays)
    ROWS.values(refusal.value)
    row_adam.check_row_adam(rows_U, torch.zeros(2, 8), *arrays)
    with pytest.raises(ValueError) as refusal:
        hugepages.advise_huge_pages(torch.zeros(4, 8).T)
    PAGES.values(refusal.value)
    hugepages.advise_huge_pages(torch.zeros(4, 8).T.contiguous())


CACHE = says("cannot write {} ({}); set TORCH_EXTENSIONS_DIR")


def test_a_place_for_compiled_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "_compile", lambda compiler, path: path.touch())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(build.BuildError) as refusal:
        build.build()
    CACHE.values(refusal.value)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "directory"))
    assert build.build().is_relative_to(tmp_path / "directory")
