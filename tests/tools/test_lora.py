"""LoRA: adapters in PEFT's own format, and merged weights that are PEFT's bit for bit."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

from distckpt import Checkpointer, TrainState
from distckpt.errors import StateWarning
from distckpt.run.source import open_source
from tests import ranks
from tests.tools.test_export import MINILM, answers, limited, minilm, said, tied

LAYERS = [f"transformer.h.{i}" for i in range(2)]


def llama(dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype):
    return tied().to(dtype)


def classifier(dtype):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).to(dtype).eval()


VARIANTS = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "square conv1d": (gpt2, {"target_modules": ["attn.c_proj"]}),
    "conv1d and a linear": (gpt2, {"target_modules": ["attn.c_proj", "wte"]}),
    "square conv1d and a tied linear": (gpt2, {"target_modules": ["attn.c_proj", "lm_head"]}),
    "patterns": (
        llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 5},
            "alpha_pattern": {r"layers\.0\.mlp\.\w+": 7, "o_proj": 3},
        },
    ),
    "rslora": (llama, {"target_modules": ["q_proj", "k_proj"], "use_rslora": True, "r": 6}),
    "dora": (llama, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "dora of conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": (gpt2, {"target_modules": ["wte"]}),
    "modules to save": (classifier, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "norms, each": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),  # input_layernorm, too
    "biases of lora": (classifier, {"target_modules": ["query"], "bias": "lora_only"}),
    "all biases": (classifier, {"target_modules": ["query"], "bias": "all"}),
    "lora's own bias": (classifier, {"target_modules": ["query", "dense"], "lora_bias": True}),
}


def wrapped(variant, dtype=torch.float32, **more):
    """A model with an adapter whose every tensor has been trained."""
    make, options = VARIANTS[variant]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10} | options | more))
        model = peft.get_peft_model(make(dtype), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save(root, model, step=3):
    with Checkpointer(root, wait=True) as c:
        c.save(step, TrainState(model=model, rng=False))
    return root


def merged(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {n: t for n, t in model.merge_and_unload().state_dict().items()}


def equal(mine, theirs, tied=()):
    assert mine.keys() == theirs.keys() - set(tied)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def quiet(load, *arguments, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*arguments, **more)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [  # each variant once in CI, of one dtype or the other
        pytest.param(v, dtype, marks=[pytest.mark.full] if (i + j) % 2 else [], id=f"{v} {dtype}")
        for i, v in enumerate(VARIANTS)
        for j, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
)
def test_merged_weights_are_those_of_peft_bit_for_bit(variant, dtype, tmp_path, capsys):
    model = wrapped(variant, dtype)
    save(tmp_path / "run", model)
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "m.safetensors", "--merge")
    tied = ["lm_head.weight"] if VARIANTS[variant][0] is gpt2 else []
    equal(load_file(tmp_path / "m.safetensors"), merged(model), tied)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[pytest.mark.full] if i % 3 else []) for i, v in enumerate(VARIANTS)],
)
def test_an_adapter_is_written_as_peft_writes_it_and_read_back(variant, tmp_path, capsys):
    model = wrapped(variant)
    save(tmp_path / "run", model)
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "mine", "--to", "peft")
    quiet(model.save_pretrained, tmp_path / "theirs", save_embedding_layers=False)
    mine, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("mine", "theirs"))
    equal(mine, theirs)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("mine", "theirs")]
    for config in configs:
        for key in ("target_modules", "modules_to_save"):
            config[key] = sorted(config[key]) if isinstance(config[key], list) else config[key]
    assert configs[0] == configs[1]
    make = VARIANTS[variant][0]
    opened = quiet(peft.PeftModel.from_pretrained, make(torch.float32), tmp_path / "mine")
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in opened.state_dict().items() if "lora" in name)
    said(capsys, "import", tmp_path / "mine", tmp_path / "again")
    names = open_source(tmp_path / "again").manifest.tensors
    assert names.keys() <= open_source(tmp_path / "run").manifest.tensors.keys()
    said(capsys, "export", tmp_path / "again", "-o", tmp_path / "once more", "--to", "peft")
    equal(load_file(tmp_path / "once more" / "adapter_model.safetensors"), mine)


@pytest.mark.parametrize(
    ("variant", "source"),
    [
        ("conv1d", "run"),
        ("modules to save", "adapter"),
        *(
            pytest.param(variant, source, marks=pytest.mark.full)
            for variant in ("llama", "conv1d", "modules to save", "biases of lora", "lora's own bias", "dora")
            for source in ("run", "adapter")
        ),
    ],
)
def test_a_base_from_elsewhere_is_merged_into(variant, source, tmp_path, capsys):
    """The adapter's run, or PEFT's directory of the adapter; the base as transformers saves it."""
    model = wrapped(variant)
    make = VARIANTS[variant][0]
    make(torch.float32).save_pretrained(tmp_path / "base")
    if source == "run":
        save(tmp_path / "whole", model)
        said(capsys, "export", tmp_path / "whole", "-o", tmp_path / "adapter", "--to", "peft")
        said(capsys, "import", tmp_path / "adapter", tmp_path / "run")
    else:
        quiet(model.save_pretrained, tmp_path / "adapter")
    said(capsys, "export", tmp_path / source, "-o", tmp_path / "out", "--merge", "--base", tmp_path / "base")
    wanted = merged(model)
    found = quiet(type(make(torch.float32)).from_pretrained, tmp_path / "out").state_dict()
    equal(found, wanted)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_real_model_with_an_adapter_says_the_same_merged_and_not(tmp_path, capsys):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["query", "value"], r=4, task_type="FEATURE_EXTRACTION")
    model = peft.get_peft_model(minilm(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save(tmp_path / "run", model.eval())
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "adapter", "--to", "peft")
    opened = peft.PeftModel.from_pretrained(minilm(), tmp_path / "adapter").eval()
    wanted = answers(MINILM, model)
    assert torch.equal(answers(MINILM, opened), wanted)
    assert not torch.allclose(answers(MINILM), wanted, atol=1e-3)
    said(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "merged", "--merge", "--base", MINILM)
    assert torch.equal(answers(tmp_path / "merged"), answers(MINILM, model.merge_and_unload()))
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "also", "--merge", "--config", MINILM)
    other, mine = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "also"))
    equal(mine, {name: tensor for name, tensor in other.items() if name != "embeddings.position_ids"})


@pytest.mark.parametrize("variant", ["llama", "conv1d", pytest.param("embedding", marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_an_adapter_of_16_bits_is_merged_with_the_same_rounding(variant, dtype, tmp_path, capsys):
    model = wrapped(variant, dtype).to(dtype)
    save(tmp_path / "run", model)
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "m.safetensors", "--merge")
    equal(load_file(tmp_path / "m.safetensors"), merged(model), ["lm_head.weight"] if variant == "conv1d" else [])


def test_an_embedding_trained_as_a_whole_is_noted_where_the_base_may_tie_another_to_it(tmp_path, capsys):
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"], fan_in_fan_out=True)
    model = quiet(peft.get_peft_model, gpt2(torch.float32), config)
    with torch.no_grad():
        model.base_model.model.transformer.wte.modules_to_save["default"].weight.add_(1)
    save(tmp_path / "run", model)
    quiet(model.save_pretrained, tmp_path / "adapter")
    gpt2(torch.float32).save_pretrained(tmp_path / "base")
    base = ["--base", tmp_path / "base"]
    text = said(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "m.safetensors", "--merge", *base)
    assert "transformer.wte.weight: is the adapter's. If the base ties another weight to it" in text
    assert "note" not in said(capsys, "export", tmp_path / "run", "-o", tmp_path / "both.safetensors", "--merge")
    equal(load_file(tmp_path / "both.safetensors"), merged(model))


def test_the_adapter_that_is_meant_is_taken(tmp_path, capsys):
    model = wrapped("llama")
    quiet(model.add_adapter, "other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["k_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.normal_(std=0.1)
    save(tmp_path / "run", model)
    for name in ("default", "other"):
        said(capsys, "export", tmp_path / "run", "-o", tmp_path / f"{name}.safetensors", "--merge", "--adapter", name)
        said(capsys, "export", tmp_path / "run", "-o", tmp_path / name, "--to", "peft", "--adapter", name)
        opened = peft.PeftModel.from_pretrained(llama(torch.float32), tmp_path / name)
        equal(load_file(tmp_path / f"{name}.safetensors"), merged(opened))
    assert "no adapter 'third', but default, other" in said(
        capsys, "export", tmp_path / "run", "-o", tmp_path / "x", "--merge", "--adapter", "third", code=1
    )


def test_an_adapter_that_transformers_has_added_is_one_of_peft_too(tmp_path, capsys):
    model = llama(torch.float32)
    quiet(model.add_adapter, peft.LoraConfig(r=2, target_modules=["k_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
    save(tmp_path / "run", model)
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "adapter", "--to", "peft")
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "m.safetensors", "--merge")
    opened = peft.PeftModel.from_pretrained(llama(torch.float32), tmp_path / "adapter")
    equal(load_file(tmp_path / "m.safetensors"), merged(opened))


def _trained_by_ranks(root):
    model = wrapped("conv1d")
    for block in model.base_model.model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    save(root, model)


@pytest.mark.full
def test_what_ranks_have_trained_together_is_one_adapter(tmp_path, capsys):
    ranks.run(2, _trained_by_ranks, str(tmp_path / "run"))
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "m.safetensors", "--merge")
    equal(load_file(tmp_path / "m.safetensors"), merged(wrapped("conv1d")), ["lm_head.weight"])
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "dcp", "--merge", "--to", "dcp")
    said(capsys, "export", tmp_path / "dcp", "-o", tmp_path / "again.safetensors")
    equal(*(load_file(tmp_path / f"{name}.safetensors") for name in ("again", "m")))
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "adapter", "--to", "peft")
    quiet(wrapped("conv1d").save_pretrained, tmp_path / "theirs")
    equal(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "theirs")))


def test_a_resume_with_another_scaling_is_warned_of(tmp_path):
    save(tmp_path / "run", wrapped("llama"))
    with Checkpointer(tmp_path / "run", wait=True) as c:
        report = c.resume(TrainState(model=wrapped("llama"), rng=False))
        assert not [note for note in report.notes if "peft" in note]
    with (
        Checkpointer(tmp_path / "run", wait=True) as c,
        pytest.warns(StateWarning, match="peft: default: lora_alpha was 10, is 20"),
    ):
        c.resume(TrainState(model=wrapped("llama", lora_alpha=20), rng=False))


# -- what cannot be is one line ----------------------------------------------------------------------------------------

REFUSED = {
    "trainable_token_indices": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "aLoRA": (llama, {"target_modules": ["q_proj"], "alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}),
    "target_parameters": (llama, {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
}


def test_dora_of_an_embedding_and_matrices_that_do_not_fit_are_refused(tmp_path, capsys):
    config = peft.LoraConfig(target_modules=["embed_tokens"], use_dora=True, r=2)
    save(tmp_path / "dora", quiet(peft.get_peft_model, llama(torch.float32), config))
    text = said(capsys, "export", tmp_path / "dora", "-o", tmp_path / "m.safetensors", "--merge", code=1)
    assert "lora_magnitude_vector.weight, which is not merged here: PEFT does it" in text
    quiet(wrapped("lora's own bias").save_pretrained, tmp_path / "adapter")
    classifier(torch.float32).save_pretrained(tmp_path / "base")
    capsys.readouterr()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    good = load_file(file)
    name = next(n for n in good if "layer.0" in n and n.endswith("query.lora_A.weight"))
    for odd in (torch.ones(2, 16), torch.ones(4, 5), torch.ones(4, 16, dtype=torch.int32), torch.ones(4)):
        save_file(good | {name: odd}, file)
        arguments = ["--merge", "--base", tmp_path / "base"]
        text = said(capsys, "export", tmp_path / "adapter", "-o", tmp_path / "m.safetensors", *arguments, code=1)
        assert "layer.0.attention.self.query: " in text
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_merged_right_is_refused_by_name(kind, tmp_path, capsys):
    make, options = REFUSED[kind]
    save(tmp_path / "run", quiet(peft.get_peft_model, make(torch.float32), peft.LoraConfig(**options)))
    text = said(capsys, "export", tmp_path / "run", "-o", tmp_path / "out", "--merge", code=1)
    assert "PEFT's merge_and_unload does it" in text
    assert not (tmp_path / "out").exists()


def test_other_methods_of_peft_are_refused_by_name(tmp_path, capsys):
    model = quiet(peft.get_peft_model, llama(torch.float32), peft.VeraConfig(target_modules=["q_proj"], r=2))
    save(tmp_path / "run", model)
    assert "no LoRA adapter" in said(capsys, "export", tmp_path / "run", "-o", tmp_path / "o", "--to", "peft", code=1)


def test_a_convolution_is_left_to_peft(tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3))
    save(tmp_path / "run", peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2)))
    assert "4 dimensions" in said(capsys, "export", tmp_path / "run", "-o", tmp_path / "o", "--merge", code=1)
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "adapter", "--to", "peft")


def test_wrong_use_is_one_line(tmp_path, capsys):
    plain, run, adapter, out = (tmp_path / name for name in ("plain", "run", "adapter", "out"))
    save(plain, llama(torch.float32))
    save(run, wrapped("llama"))
    quiet(wrapped("llama").save_pretrained, adapter)
    gpt2(torch.float32).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    for arguments, code, text in (
        ([plain, "--merge"], 1, "holds no LoRA adapter"),
        ([plain, "--to", "peft"], 1, "holds no LoRA adapter"),
        ([run], 1, "--merge, or --to peft"),
        ([adapter, "--merge"], 1, "--base DIR says where it lies"),
        ([adapter, "--merge", "--base", tmp_path / "other"], 1, "is it the adapter's base model?"),
        ([run, "--base", tmp_path / "other"], 2, "--base is for --merge"),
        ([run, "--merge", "--base", tmp_path / "nothing"], 2, "is no directory"),
        ([run, "--merge", "--all"], 2, "neither --all nor --only"),
        ([run, "--merge", "--to", "peft"], 2, "--merge is for"),
        ([run, "--adapter", "x"], 2, "--adapter is for"),
    ):
        assert text in said(capsys, "export", *arguments, "-o", out, code=code), arguments
    good = json.loads((adapter / "adapter_config.json").read_text())
    for odd in (
        [],
        good | {"peft_type": 3},
        good | {"lora_alpha": "much"},
        good | {"alpha_pattern": {"(": 3}},
        good | {"alpha_pattern": ["q_proj"]},
        good | {"modules_to_save": "head"},
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(odd))
        assert "adapter_config.json: " in said(capsys, "export", adapter, "-o", out, "--to", "peft", code=1)
    (adapter / "adapter_config.json").write_text("{")
    said(capsys, "export", adapter, "-o", out, "--to", "peft", code=1)
    (adapter / "adapter_config.json").unlink()
    assert "--config DIR" in said(capsys, "export", adapter, "-o", out, "--to", "peft", code=1)
    assert not out.exists()


def test_an_adapter_saved_without_its_configuration_takes_one_from_a_directory(tmp_path, capsys):
    model = wrapped("llama")
    quiet(model.save_pretrained, tmp_path / "theirs")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    said(capsys, "import", tmp_path / "model.pt", tmp_path / "run")
    assert "--config DIR" in said(capsys, "export", tmp_path / "run", "-o", tmp_path / "x", "--merge", code=1)
    config = ["--config", tmp_path / "theirs"]
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "m.safetensors", "--merge", *config)
    equal(load_file(tmp_path / "m.safetensors"), merged(model))


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_merging_holds_one_weight_at_a_time(tmp_path):
    """24 weights of 16 MiB, with room for a few of them."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(24)))
    model = peft.get_peft_model(layers, peft.LoraConfig(target_modules=[str(i) for i in range(24)], r=2))
    save(tmp_path / "run", model)
    done = limited(
        192 << 20, "export", tmp_path / "run", "-o", tmp_path / "m.safetensors", "--merge", "--memory", "64MB"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "m.safetensors").stat().st_size > 24 << 24
