"""What people do with transformers' model: place, compile, fine-tune, adapt, quantise the dtype."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")
pytest.importorskip("peft", reason="the extra hf is not installed")
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, StaticCache, Trainer, TrainingArguments

import ultramem_ds.hf
from tests.unit.exported_models import KINDS, padded, prompts_of, random_model, write_model
from ultramem_ds.exchange.directory import export_hf
from ultramem_ds.hf import UltraMemForCausalLM
from ultramem_ds.model.lm import LanguageModel
from ultramem_ds.model.memory.scores import leading_singular_vectors

PROMPTS = prompts_of(2, 5, 11, 20)
MEMORY_KINDS = [kind for kind in KINDS if kind not in ("dense", "moe")]


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    return {kind: random_model(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory) -> Path:
    """A directory with an export of every kind, tables cut into parts."""
    root = tmp_path_factory.mktemp("exports")
    for kind, model in models.items():
        run_dir = write_model(model, tmp_path_factory.mktemp(kind) / "run")
        export_hf(run_dir, root / kind, "fp32", 4000)
    return root


def load(path: Path, **arguments) -> UltraMemForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path, **arguments)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**padded(PROMPTS)).logits.float()


def close(got: torch.Tensor, expected: torch.Tensor, relative: float) -> bool:
    return float((got - expected).abs().max()) <= relative * float(expected.abs().max())


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_tables_in_parts_are_joined_and_cut_again(exports, kind, tmp_path):
    """More parts than one per shard's worth of rows, names and rows kept by ``save_pretrained``."""
    model = load(exports / kind)
    parts = model.config.memory_table_parts
    assert parts > 1
    model.save_pretrained(tmp_path)
    before: dict[str, torch.Tensor] = {}
    for shard in sorted((exports / kind).glob("model-*.safetensors")):
        before |= load_file(shard)
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(models, exports, kind):
    """Logits within bf16's rounding of ours; integers and singular vectors keep their dtype."""
    model = load(exports / kind, dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert dtypes["model.embedding.weight"] == torch.bfloat16
    for name, dtype in dtypes.items():
        if ".shuffle." in name:
            assert dtype == torch.int64
        if name.endswith("directions"):
            assert dtype == torch.float32
    # 8 bits of mantissa through four blocks; in near ties some tokens select other slots.
    row = logits_of(model)[3, -20:]
    with torch.no_grad():
        expected = models[kind].logits(torch.tensor([PROMPTS[3]]))[0]
    similarity = torch.nn.functional.cosine_similarity(row, expected, dim=-1)
    assert similarity.median() > 0.999 and similarity.min() > 0.9


def test_device_map_of_one_device_and_of_every_block(exports):
    expected = logits_of(load(exports / "ultramem"))
    assert torch.equal(logits_of(load(exports / "ultramem", device_map="cpu")), expected)
    split = {
        "model.embedding": "cpu",
        "model.blocks.0": "cpu",
        "model.blocks.1": "disk",
        "model.blocks.2": "cpu",
        "model.blocks.3": "cpu",
        "model.memories": "cpu",
        "model.final_norm": "cpu",
        "lm_head": "cpu",
    }
    with pytest.MonkeyPatch.context():
        model = load(exports / "ultramem", device_map=split, offload_folder=exports / "offload")
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_tables_stay_where_memory_device_says(exports, kind):
    """The meta device stands for an accelerator: all but the tables go there."""
    model = load(exports / kind, memory_device="cpu", device_map="meta")
    devices = {name: str(param.device) for name, param in model.named_parameters()}
    for name, device in devices.items():
        assert device == ("cpu" if name.endswith("values.weight") else "meta"), name
    at_home = load(exports / kind, memory_device="cpu")
    assert torch.equal(logits_of(at_home), logits_of(load(exports / kind)))
    assert at_home.to(torch.bfloat16).model.memories[0].values.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="needs the one device"):
        load(exports / kind, memory_device="cpu", device_map="auto")


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_takes_a_step_and_directions_follow(exports, kind, tmp_path):
    """With gradient checkpointing; the loss is ours with the auxiliary losses."""
    model = load(exports / kind)
    before = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": p[:11], "labels": p[:11]} for p in PROMPTS[2:] * 2]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.train().training_loss > 0
    after = model.state_dict()  # recomputes the directions
    still = [name for name, value in after.items() if torch.equal(value, before[name])]
    floating = {name for name, value in after.items() if value.is_floating_point()}
    stay = {n for n in floating if n.endswith("directions")}  # they may turn by less than a bit
    assert not (set(still) & floating) - stay, still
    for j, memory in enumerate(model.model.memories):
        if memory.retrieval.form is None:
            continue
        name = f"model.memories.{j}.retrieval.form."
        expected = leading_singular_vectors(
            after[name + "core"].sum(0).double(), before[name + "directions"].double()
        )
        torch.testing.assert_close(after[name + "directions"], expected.float())


def test_gradients_with_checkpointing_are_those_without(exports):
    for kind in KINDS:
        found = []
        for checkpointing in (False, True):
            model = load(exports / kind).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            ids = torch.tensor([PROMPTS[3]])
            model(ids, labels=ids).loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters()})
        for name, grad in found[0].items():
            assert grad is not None, name
            torch.testing.assert_close(found[1][name], grad, msg=name)


def test_loss_and_gradients_are_ours(models, exports):
    """Cross-entropy, balance loss and eq. 12 together, the gradient of every parameter."""
    for kind in KINDS:
        ours, theirs = copy.deepcopy(models[kind]).train(), load(exports / kind).train()
        ids = torch.tensor([PROMPTS[3]])
        terms = ours(ids)
        expected = terms["loss"] + terms["aux_loss"] + terms["balance_loss"]
        # As training feeds them: the balance loss sees the inputs, not the last target.
        loss = theirs(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:]).loss
        expected.backward()
        loss.backward()
        torch.testing.assert_close(loss, expected)
        grads = {name: param.grad for name, param in theirs.named_parameters()}
        for name, param in ours.named_parameters():
            theirs_name = "lm_head.weight" if name == "head.weight" else f"model.{name}"
            grad = grads.get(theirs_name)
            if grad is None:  # one expert of a stack
                stack, _, rest = theirs_name.partition(".experts.")
                number, projection = rest.split(".")[:2]
                grad = grads[f"{stack}.experts.{projection}"][int(number)]
            scale = float(param.grad.abs().max())
            torch.testing.assert_close(grad, param.grad, rtol=0, atol=1e-5 * scale + 1e-9, msg=name)


def test_lora_on_every_linear(exports, tmp_path):
    for kind in KINDS:
        base = load(exports / kind)
        expected = logits_of(base)
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
        adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
        assert any("qkv_proj" in name for name in adapted)
        assert any("query.proj" in name for name in adapted) == (kind in MEMORY_KINDS)
        assert close(logits_of(model.eval()), expected, 1e-6)  # B is zero
        ids = torch.tensor([PROMPTS[3]])
        model.train()(ids, labels=ids).loss.backward()
        trained = {name for name, param in model.named_parameters() if param.grad is not None}
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
        model.save_pretrained(tmp_path / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(exports, kind):
    """A whole forward without a cache, by the tracer alone (no compiler needed)."""
    model = load(exports / kind)
    expected = logits_of(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(**padded(PROMPTS), use_cache=False).logits
    assert close(got, expected, 1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_static_cache_compiles_without_graph_breaks(exports, kind):
    """Prefill and steps of one token, left padding, the convolution's states in the cache."""
    model = load(exports / kind)
    batch = padded(PROMPTS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    steps = torch.randint(1, 300, (len(ids), 5), generator=torch.Generator().manual_seed(4))
    found = []
    for forward in (model, torch.compile(model, backend="eager", fullgraph=True)):
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 5)
        logits = []
        for width in range(6):
            new = ids if width == 0 else steps[:, width - 1 : width]
            seen = torch.cat([mask, mask.new_ones(len(ids), width)], 1)
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            with torch.no_grad():
                out = forward(
                    input_ids=new,
                    attention_mask=seen,
                    position_ids=positions,
                    past_key_values=cache,
                )
            logits.append(out.logits[:, -1])
        found.append(torch.stack(logits))
        torch._dynamo.reset()
    assert close(found[1], found[0], 1e-5)
    # And right: one forward over all of it, without a cache.
    whole = torch.cat([mask, mask.new_ones(len(ids), 5)], 1)
    with torch.no_grad():
        expected = model(torch.cat([ids, steps], 1), attention_mask=whole, use_cache=False).logits
    assert close(found[0], expected[:, ids.shape[1] - 1 :].transpose(0, 1), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_is_filled_as_the_program_fills_it(exports, kind):
    """``from_config``: standard deviations of the recipe, permutations those of training."""
    torch.manual_seed(0)
    config = load(exports / kind).config
    model = ultramem_ds.hf.UltraMemForCausalLM(config).eval()
    ours = random_model(kind)
    theirs = dict(model.named_parameters())
    for name, param in ours.named_parameters():
        theirs_name = "lm_head.weight" if name == "head.weight" else f"model.{name}"
        if ".conv." in name or ".experts." in name or param.numel() < 1000:
            continue
        other = theirs[theirs_name].detach()
        assert float(other.std()) == pytest.approx(float(param.detach().std()), rel=0.1), name
    loaded = load(exports / kind).state_dict()
    for name, value in model.state_dict().items():
        if ".shuffle." in name:
            assert torch.equal(value, loaded[name])
    assert torch.isfinite(logits_of(model)).all()
