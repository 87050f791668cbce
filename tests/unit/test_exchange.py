"""Export and import: streamed, whole or absent, bit-equal there and back."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.unit.exported_models import KINDS, random_model, small_tokenizer, write_model
from ultramem_ds.checkpoint.export import export_safetensors
from ultramem_ds.config.load import to_dict
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.exchange import directory as exchange_directory
from ultramem_ds.exchange.directory import export_hf
from ultramem_ds.exchange.importing import import_model, open_exported
from ultramem_ds.exchange.shards import parse_size
from ultramem_ds.exchange.tokenizer_files import write_tokenizer
from ultramem_ds.infer.load import load_model
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.sharding.blocks import Block

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "export.md"


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind) -> LanguageModel:
    return random_model(kind)


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory) -> Path:
    return write_model(model, tmp_path_factory.mktemp("run") / "run", world_size=2)


@pytest.fixture(scope="module")
def whole(run_dir, tmp_path_factory) -> Path:
    return export_hf(run_dir, tmp_path_factory.mktemp("whole") / "x", "fp32", 10**9).directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def assert_same(model: LanguageModel, other: LanguageModel) -> None:
    """Parameters and buffers, to the last bit, after each has been used once."""
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(model.logits(ids), other.logits(ids))
    expected, got = model.state_dict(), other.state_dict()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


@pytest.mark.parametrize("world_size", [1, 3])
def test_round_trip_is_bit_equal(model, whole, world_size, tmp_path):
    """Export of two ranks' files, import into one and three; the configuration comes along."""
    import_model(whole, tmp_path / "run", world_size)
    back = load_model(tmp_path / "run")
    assert_same(model, back)
    assert to_dict(back.config) == to_dict(model.config)
    assert load_tokenizer(tmp_path / "run").hash == small_tokenizer().hash


def test_shards_and_parts(model, run_dir, tmp_path):
    """No file above the size, tables cut, every tensor in the index; the same model comes back."""
    max_bytes = 6000
    out = export_hf(run_dir, tmp_path / "x", "fp32", max_bytes).directory
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = tensors_of(out)
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    for name, tensor in stored.items():
        if ".values." in name:
            assert re.search(r"values\.part_\d+\.weight$", name) and tensor.nbytes <= max_bytes
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= max_bytes or len(tensors) == 1
    import_model(out, tmp_path / "run", 2)
    assert_same(model, load_model(tmp_path / "run"))


def test_any_block_is_read_out_of_an_export(model, run_dir, whole, tmp_path):
    """Rows over the seams of parts, and columns, as ranks that share a table hold them."""
    parts = export_hf(run_dir, tmp_path / "x", "fp32", 2000).directory
    tables = {name: p.detach() for name, p in model.named_parameters() if ".values." in name}
    for directory in (whole, parts):
        weights = open_exported(directory, "--input").weights
        for name, table_NV in tables.items():
            rows, width = table_NV.shape
            for block in (
                Block(0, rows, 0, width // 2),
                Block(0, rows, width // 2, width // 2),
                Block(rows // 3, rows // 2, 3, width - 5),
                Block(rows // 3, rows // 2, 0, width),
            ):
                found_RC = torch.full((block.num_rows, block.num_columns), torch.nan)
                weights.read(name, block, found_RC)
                expected_RC = table_NV[block.first_row :, block.first_column :]
                assert torch.equal(found_RC, expected_RC[: block.num_rows, : block.num_columns]), (
                    name,
                    block,
                )


def test_bf16_rounds_weights_and_nothing_else(model, run_dir, whole, tmp_path):
    """Integers are the same; singular vectors are fp32 and those of the rounded cores."""
    out = export_hf(run_dir, tmp_path / "x", "bf16", 10**9).directory
    exact, rounded = tensors_of(whole), tensors_of(out)
    assert exact.keys() == rounded.keys()
    for name, value in exact.items():
        if name.endswith("directions"):
            assert rounded[name].dtype == torch.float32
            core = rounded[name.replace("directions", "core")].double().sum(0)
            u, v = rounded[name].double()
            leading = torch.einsum("ha,hab,hb->h", u, core, v)
            torch.testing.assert_close(leading, torch.linalg.svdvals(core)[:, 0])
        elif value.is_floating_point():
            assert torch.equal(rounded[name], value.bfloat16()), name
        else:
            assert torch.equal(rounded[name], value), name
    import_model(out, tmp_path / "run", 1)  # masters are the rounded values
    back = load_model(tmp_path / "run")
    expected = model.state_dict()["embedding.weight"].bfloat16().float()
    assert torch.equal(back.state_dict()["embedding.weight"], expected)


def test_document_names_every_tensor_and_key(whole):
    """docs/export.md is the contract: what is written is there, with that many dimensions."""
    text = DOCUMENT.read_text()
    patterns = {}
    for names, shape in re.findall(r"^\| (`(?:model|lm_head)\.\S+`) \| \(([^)]*)\)", text, re.M):
        pattern = re.escape(names.strip("`"))
        for letter in ("i", "j", "x"):
            pattern = pattern.replace(rf"\.{letter}\.", r"\.\d+\.")
        pattern = pattern.replace("part_p", r"part_\d+")
        patterns[pattern] = len([part for part in shape.split(",") if part.strip()])
    for name, tensor in tensors_of(whole).items():
        found = [ndim for pattern, ndim in patterns.items() if re.fullmatch(pattern, name)]
        assert found == [tensor.ndim], name
    keys = set(json.loads((whole / "config.json").read_text()))
    assert keys <= set(re.findall(r"`([a-z_]+)`", text)), keys


def test_safetensors_format_keeps_integers(model, run_dir, tmp_path):
    """Of buffers that are ids nothing may be rounded, whatever the weights are written in."""
    export_safetensors(run_dir, tmp_path / "model.safetensors", "bf16")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        expected = model.state_dict()[name]
        kept = expected.bfloat16() if expected.is_floating_point() else expected
        assert torch.equal(value, kept), name


def test_export_that_fails_leaves_nothing(run_dir, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(exchange_directory, "write_shards", full)
    with pytest.raises(OSError, match="No space"):
        export_hf(run_dir, tmp_path / "x", "fp32", 10**9)
    assert not list(tmp_path.iterdir())


def test_model_saved_by_others_has_defaults_for_training(whole, tmp_path):
    """Without ``ultramem_run.json`` the architecture is the file's, the rest the schema's."""
    copied = tmp_path / "x"
    copied.mkdir()
    for file in whole.iterdir():
        if file.name != "ultramem_run.json":
            (copied / file.name).symlink_to(file)
    config = open_exported(copied).config
    expected = open_exported(whole).config
    assert config.preset == "imported"
    assert config.model == expected.model
    if config.has_memory:
        assert config.memory.spans == expected.memory.spans
        assert config.memory.shuffle == expected.memory.shuffle


def test_card_and_run_record_say_what_the_run_was(model, whole):
    card = (whole / "README.md").read_text()
    assert f"| preset | {model.config.preset} |" in card
    assert "| optimizer steps | 0 of" in card
    record = json.loads((whole / "ultramem_run.json").read_text())
    assert record["tokenizer_hash"] == small_tokenizer().hash


def released(model: LanguageModel, tied: bool = False) -> dict[str, Tensor]:
    """``model`` under the names of the authors' state dict."""
    theirs: dict[str, Tensor] = {}
    outer = {"embedding": "wte", "final_norm": "ln_f", "head": "ff_out"}
    inner = {
        "attention_norm": "attn_norm",
        "attention.qkv_proj": "att_proj",
        "attention.out_proj": "attn_out",
        "mlp_norm": "ff_norm",
        "mlp.up_proj": "ff_proj",
        "mlp.down_proj": "ff_out",
        "retrieval.query.proj": "query_proj",
        "retrieval.query.norm": "query_norm",
        "retrieval.keys.norm": "keys_norm",
        "value_proj": "values_proj",
    }
    for name, value in model.state_dict().items():
        kind, _, rest = name.removesuffix(".weight").partition(".")
        if kind in outer:
            theirs[f"transformer.{outer[kind]}.weight"] = value
            continue
        number, _, rest = rest.partition(".")
        layer = f"transformer.{'blocks' if kind == 'blocks' else 'mem_blocks'}.{number}."
        if rest == "retrieval.keys":
            theirs[f"{layer}keys"] = value.permute(1, 0, 2, 4, 3).contiguous()
        elif rest == "retrieval.form.core":
            theirs |= {f"{layer}tucker_core.{i}": core for i, core in enumerate(value)}
        elif rest == "retrieval.form.directions":
            for letter, vectors in zip("uv", value):
                theirs[f"{layer}tucker_core_{letter}"] = vectors[None, :, None]
        elif rest == "shuffle.index":
            theirs[f"{layer}shuffle_index"] = value
        elif rest == "values":
            theirs[f"{layer}values_for_look_up"] = value
        else:
            theirs[f"{layer}{inner[rest]}.weight"] = value
    if tied:
        del theirs["transformer.ff_out.weight"]
    return theirs


RELEASED = """
model: {d_model: 32, n_heads: 2, n_layers: 4, mlp_hidden_size: 64, activation_type: gelu,
  rope: true, layer_norm_type: default, vocab_size: 320, max_sequence_length: 64,
  weight_tying: false, mem_type: ultramem_v1, mem_insert_way: "0:1/2:3", mem_knum: 12,
  mem_kdim: 8, mem_vdim: 16, mem_knn: 4, mem_head: 2}
"""


def write_released(directory: Path, state: dict[str, Tensor], config: str = RELEASED) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text(config)
    torch.save(state, directory / "model.pt")
    return directory


def test_released_layout_is_read_as_a_whole_model(tmp_path):
    """Names and layouts as the release has them; of a model made here, for none can be had."""
    model = random_model("ultramem", ("memory.shuffle=stored", "memory.query_conv=0"))
    state = released(model)
    import_model(write_released(tmp_path / "x", state), tmp_path / "run", 2)
    assert_same(model, load_model(tmp_path / "run"))
    tied = write_released(tmp_path / "tied", released(model, tied=True))
    import_model(tied, tmp_path / "tied-run", 1)
    back = load_model(tmp_path / "tied-run").state_dict()
    assert torch.equal(back["head.weight"], back["embedding.weight"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("gelu", "swiglu", "activation_type='swiglu', not gelu"),
        ("rope: true", "rope: false", "rope is off"),
        ("ultramem_v1", "memory_plus", "mem_type='memory_plus'"),
        ("mem_knum: 12", "mem_knum: 13", "mem_blocks.0.keys is"),
        ("rope: true", "rope: true, clip_qkv: 8.0", "clip_qkv=8.0"),
        ("d_model: 32, ", "", "lacks 'd_model'"),
    ],
)
def test_what_our_models_have_not_is_refused_by_name(tmp_path, old, new, said):
    model = random_model("ultramem", ("memory.shuffle=stored", "memory.query_conv=0"))
    source = write_released(tmp_path / "x", released(model), RELEASED.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(said)):
        import_model(source, tmp_path / "run", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kind_of_model", ["bpe", "unigram"])
def test_sentencepiece_is_exported_only_as_what_it_is(tmp_path, capsys, kind_of_model):
    """Of a unigram model transformers makes another tokenizer: better none, and a word of it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENT.read_text().splitlines()),
        model_writer=content,
        vocab_size=400,
        model_type=kind_of_model,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(content.getvalue())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    out = tmp_path / "out"
    out.mkdir()
    written = write_tokenizer(tokenizer, out, 64)
    described = "tokenizer_config.json" in written
    assert described == (out / "tokenizer_config.json").exists()
    assert ("other ids" in capsys.readouterr().err) != described
    if kind_of_model == "unigram":
        assert not described
    if described:
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        text = "  def f(x):\n    return x  # 東京"
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "1.5 mb", "100KB")] == [5 * 10**9, 1500000, 10**5]
    for text in ("5", "0GB", "-1GB", "many", "5 GiB"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)
