"""Tags that DeepSpeed saved, loaded into plain models and FSDP2: every master, moment and value, bit for bit."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from random import Random

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distckpt import Checkpointer
from distckpt.errors import Corrupt, DistckptError, FormatError, NotACheckpoint, StateWarning, Unsupported
from distckpt.foreign.open import open_foreign
from tests import deepspeeds, ranks
from tests.foreign import tags
from tests.foreign.tags import CASES

_made = {}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (directory, whole masters and states of its engine, what else it held): saved when asked for."""

    def get(name):
        if name not in _made:
            folder = tmp_path_factory.mktemp(name)
            of_ranks = deepspeeds.run(CASES[name].size, tags.save, CASES[name], str(folder))
            _made[name] = folder, tags.joined([said["held"] for said in of_ranks]), of_ranks[0]
        return _made[name]

    yield get
    _made.clear()


def load(state, folder, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Checkpointer(f"{folder}-run", wait=True).load(state, source=folder, **more)


def differing(model, optimizer, masters, rest):
    """Names of what is not, bit for bit, what the engine held."""
    wrong = [n for n, t in rest.items() if not torch.equal(model.state_dict()[n], t.to(model.state_dict()[n].dtype))]
    parameters = dict(model.named_parameters())
    wrong += [n for n in parameters if n not in rest and (n, "") not in masters]
    for (name, key), value in masters.items():
        found = optimizer.state[parameters[name]][key] if key else parameters[name].detach()
        if hasattr(found, "full_tensor"):
            found = found.full_tensor()
        if found.dtype != value.dtype or not torch.equal(found, value):
            wrong.append(f"{name} {key}")
    states = {(n, k) for n, p in parameters.items() for k in optimizer.state.get(p, {})}
    return wrong + [f"{n} {k}: not in the engine" for n, k in states - masters.keys()]


@pytest.mark.parametrize("name", CASES)
def test_a_plain_model_and_optimizer_take_every_bit_of_a_tag(name, made):
    folder, masters, said = made(name)
    model, optimizer, schedule = CASES[name].trained(seed=9)
    report = load(tags.state_of(model, optimizer, schedule), folder)
    assert not differing(model, optimizer, masters, said["rest"])
    assert schedule.last_epoch == 3
    assert [g["lr"] for g in optimizer.param_groups] == said["lr"]
    assert report.step == 3


def _load_sharded(case, folder, masters, rest):
    model = case.model(seed=9)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.up, model.still):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = case.optimizer(case.groups(model))
    load(tags.state_of(model, optimizer), folder)
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}
    model.state_dict = lambda: whole
    return differing(model, optimizer, masters, rest)


@pytest.mark.parametrize("name", ["zero1-fp16", "zero2-round-robin", "zero3-sub-groups", "zero3-bf16", "zero0-bf16"])
def test_fsdp2_on_other_ranks_takes_every_bit_of_a_tag(name, made):
    folder, masters, said = made(name)
    for wrong in ranks.run(2, _load_sharded, CASES[name], str(folder), masters, said["rest"]):
        assert not wrong


def test_what_deepspeed_counted_and_the_client_gave_are_objects(made):
    found = open_foreign(made("zero2-round-robin")[0])
    assert found.object("epoch") == 3
    assert found.object("history") == [0.5, None]
    assert found.object("lr_scheduler")["last_epoch"] == 3
    counted = found.object("deepspeed")["engines"]["model"]
    module = {"frozen": ["still.weight", "still.bias"], "dtype": "float32"}
    assert counted == {"global_steps": 3, "global_samples": 36, "skipped_steps": 0, "module": module}
    assert found.manifest.aliases == {"model.head.weight": "model.emb.weight"}
    assert not found.unreadable
    assert found.manifest.world_size == 3


def _scale_after(case, folder):
    engine = case.engine(seed=9)
    load(tags.state_of(engine, None), folder)
    return tags.held(engine), engine.global_steps, engine.optimizer.loss_scaler.cur_scale


@pytest.mark.parametrize("name", ["zero1-fp16", "zero3-fp16"])
def test_a_live_engine_of_another_stage_takes_masters_counters_and_loss_scale(name, made):
    folder, masters, said = made(name)
    case = replace(CASES[name], stage=4 - CASES[name].stage)
    of_ranks = deepspeeds.run(case.size, _scale_after, case, str(folder))
    assert [(steps, scale) for _, steps, scale in of_ranks] == [(3, said["scale"])] * case.size
    assert said["scale"] != 2**8  # it has moved
    again = tags.joined([held for held, _, _ in of_ranks])
    assert again.keys() == masters.keys()
    assert all(torch.equal(again[key], value) for key, value in masters.items())


# -- masters without names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero0-bf16", "zero0-fp16"])
def test_without_an_optimizer_masters_of_zero0_are_not_named_and_it_says_so(name, made):
    folder, masters, _ = made(name)
    model = CASES[name].model(seed=9)
    state = tags.state_of(model, None)
    with pytest.warns(StateWarning, match=r"keeps its fp32 master weights without names.*have lost what rounding took"):
        report = Checkpointer(f"{folder}-run", wait=True).load(state, source=folder, only=("model",))
    assert "without names" in "".join(report.notes)
    low = CASES[name].dtype.replace("bf", "bfloat").replace("fp", "float")
    assert report.cast["model.up.weight"] == f"{low} -> float32 (lossless)"
    rounded = masters["up.weight", ""].to(getattr(torch, low)).float()
    assert torch.equal(model.up.weight, rounded)
    assert not torch.equal(model.up.weight, masters["up.weight", ""])


def test_an_order_that_does_not_fit_is_not_believed(made):
    folder, _, _ = made("zero0-bf16")
    model = CASES["zero0-bf16"].model()
    order = [
        [n for n, p in model.named_parameters() if p.requires_grad and (p.dim() < 2) == vector] for vector in (0, 1)
    ]
    assert open_foreign(folder, order=order).manifest.tensors["model.up.weight"].dtype == "float32"
    swapped = [order[0][::-1], order[1]]
    for wrong in (order[:1], swapped, [order[0], ["x", *order[1][1:]]]):
        found = open_foreign(folder, order=wrong)
        assert found.manifest.tensors["model.up.weight"].dtype == "bfloat16"
        assert "without names" in found.notes[0]


def test_states_whose_shapes_contradict_the_order_are_given_to_no_parameter(made):
    folder, _, _ = made("zero0")
    model, optimizer, _ = CASES["zero0"].trained()
    order = [
        [n for n, p in model.named_parameters() if any(p is q for q in g["params"])] for g in optimizer.param_groups
    ]
    assert "optim" in open_foreign(folder, order=order).manifest.objects
    found = open_foreign(folder, order=[order[0][::-1], order[1]])
    assert "optim" not in found.manifest.objects
    assert "its states have other shapes" in found.notes[0]


def _save_fused(folder):
    """FP16_Optimizer is made only around optimizers that a compiler builds: one of torch's passes for such."""
    import deepspeed.runtime.engine as engines

    engines.FusedAdam = torch.optim.AdamW
    engine = CASES["zero0-bf16"].engine()
    for i in range(3):
        deepspeeds.step(engine, None, i)
    engine.save_checkpoint(folder, tag="first")
    owner = engine.optimizer
    found = []
    names = {id(p): n for n, p in engine.module.named_parameters()}
    for members, flat in zip(owner.fp16_groups, owner.fp32_groups_flat, strict=True):
        for state, value in {"": flat, **owner.optimizer.state[flat]}.items():
            parts = value.split([p.numel() for p in members]) if value.dim() else [value.reshape(-1)] * len(members)
            for p, part in zip(members, parts, strict=True):
                found.append((names[id(p)], state, tuple(p.shape) if value.dim() else (), 0, part.detach().clone()))
    return type(owner).__name__, found, tags.rest(engine)


def test_one_flat_buffer_for_all_ranks_is_read_with_the_optimizers_order(tmp_path):
    (kind, held, rest), _ = deepspeeds.run(2, _save_fused, str(tmp_path))
    assert kind == "FP16_Optimizer"
    model, optimizer, schedule = CASES["zero0-bf16"].trained(seed=9)
    load(tags.state_of(model, optimizer, schedule), tmp_path)
    assert not differing(model, optimizer, tags.joined([held]), rest)
    with pytest.warns(StateWarning, match="without names"):
        Checkpointer(tmp_path / "run", wait=True).load(tags.state_of(model, None), source=tmp_path, only=("model",))


# -- what is not there, or not of one save ---------------------------------------------------------------------------


def _copy(made, name, tmp_path):
    shutil.copytree(made(name)[0], tmp_path / name)
    return tmp_path / name, tmp_path / name / "first"


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        (
            "zero2-bf16",
            "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
            r"optimizer files of data-parallel ranks \[1\]",
        ),
        ("zero1", "zero_pp_rank_1_mp_rank_00_optim_states.pt", r"optimizer files of data-parallel ranks \[1\]"),
        ("zero3", "zero_pp_rank_1_mp_rank_00_model_states.pt", r"model files of data-parallel ranks \[1\]"),
        ("zero3", "zero_pp_rank_0_mp_rank_00_optim_states.pt", r"optimizer files of data-parallel ranks \[0\]"),
        ("zero0", "mp_rank_00_model_states.pt", r"has no \*_model_states\.pt"),
        ("zero1", "zero_pp_rank_*", r"all its \*_optim_states\.pt are missing"),
    ],
)
def test_a_tag_without_a_ranks_file_is_named_incomplete(name, file, message, made, tmp_path):
    folder, tag = _copy(made, name, tmp_path)
    for path in tag.glob(file):
        path.unlink()
    with pytest.raises(NotACheckpoint, match=message):
        open_foreign(folder)


@pytest.mark.parametrize("length", [0, 1, 14, 1000])
def test_a_file_that_a_kill_cut_short_is_named(length, made, tmp_path):
    folder, tag = _copy(made, "zero2-bf16", tmp_path)
    path = tag / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(Corrupt, match=r"bf16_zero_pp_rank_1_mp_rank_00_optim_states\.pt.*save that did not finish"):
        open_foreign(folder)


def test_latest_may_name_what_is_gone_and_never_leads_outside(made, tmp_path):
    folder, tag = _copy(made, "zero1", tmp_path)
    tag.rename(folder / "moved")
    with pytest.raises(NotACheckpoint, match=r"first: does not exist, though .*latest names it"):
        open_foreign(folder)
    assert open_foreign(folder / "moved").manifest.step == 3
    for name in ("../zero1/moved", "/etc", "", "a//b"):
        (folder / "latest").write_text(name)
        with pytest.raises(FormatError, match="not a plain path below"):
            open_foreign(folder)


def _save_twice(case, folder):
    engine = case.engine()
    for tag in ("early", "late"):
        deepspeeds.step(engine, None, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.save_checkpoint(folder, tag=tag)


@pytest.mark.parametrize(("name", "file"), [("zero2-bf16", "bf16_zero_pp_rank_2_"), ("zero3", "zero_pp_rank_1_")])
def test_files_of_two_saves_in_one_directory_are_told_apart(name, file, tmp_path):
    deepspeeds.run(CASES[name].size, _save_twice, CASES[name], str(tmp_path))
    for path in (tmp_path / "early").glob(f"{file}*optim_states.pt"):
        shutil.copy(path, tmp_path / "late")
    with pytest.raises(FormatError, match=r"files of different saves: the optimizer's step is \{0: 2.*\{0: 1"):
        open_foreign(tmp_path)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ("zero1", "zero1-padding", "saved by 2 data-parallel ranks, the optimizer by 4"),
        ("zero1", "zero2-norm", "(groups, the optimizer's fp32 buffers|different saves)"),
        ("zero3", "zero1", "the model is one of stage 3, the optimizer is not"),
    ],
)
def test_files_of_two_runs_in_one_directory_are_told_apart(left, right, message, made, tmp_path):
    folder, tag = _copy(made, left, tmp_path)
    for path in (made(right)[0] / "first").glob("*optim_states.pt"):
        shutil.copy(path, tag)
    with pytest.raises(FormatError, match=message):
        open_foreign(folder)


@pytest.mark.parametrize("name", ["zero2-bf16", "zero3", "zero0-fp16"])
def test_whatever_is_changed_in_a_tags_pickles_every_error_is_ours(name, made, tmp_path):
    """Bytes of a pickle are changed, its CRC-32 with them, so that the change reaches the reader."""
    folder, tag = _copy(made, name, tmp_path)
    random = Random(11)
    order = [["up.weight"], ["up.bias"]]
    for path in sorted(tag.glob("*.pt")):
        whole = path.read_bytes()
        for _ in range(20):
            _with_changed_pickle(path, whole, random)
            with contextlib.suppress(DistckptError):
                open_foreign(folder, order=order)
        path.write_bytes(whole)
    assert open_foreign(folder).manifest.tensors


def _with_changed_pickle(path, whole, random):
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            data = bytearray(old.read(info))
            if info.filename.endswith("data.pkl"):
                for _ in range(random.randrange(1, 4)):
                    data[random.randrange(len(data))] = random.randrange(256)
            new.writestr(info.filename, bytes(data))
    path.write_bytes(out.getvalue())


def test_a_tag_is_read_where_deepspeed_is_not_installed(made):
    program = """
import json, sys
sys.modules["deepspeed"] = None
from distckpt.foreign.open import open_foreign
print(json.dumps([len(open_foreign(path).manifest.tensors) for path in sys.argv[1:]]))
"""
    folders = [str(made(name)[0]) for name in ("zero1", "zero3", "zero0-bf16")]
    done = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True, check=True)
    assert all(count > 30 for count in json.loads(done.stdout))


# -- other forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_files_in_torchs_old_form_are_read(name, tmp_path):
    case = replace(CASES[name], options={"checkpoint": {"checkpoint_serialization": False}})
    of_ranks = deepspeeds.run(case.size, tags.save, case, str(tmp_path))
    assert all(path.read_bytes()[:2] == b"\x80\x02" for path in (tmp_path / "first").glob("*optim_states.pt"))
    model, optimizer, schedule = case.trained(seed=9)
    load(tags.state_of(model, optimizer, schedule), tmp_path)
    assert not differing(model, optimizer, tags.joined([said["held"] for said in of_ranks]), of_ranks[0]["rest"])
    with pytest.raises(Unsupported, match=r"nor does torch\.save's old form"):
        load(tags.state_of(model, optimizer, schedule), tmp_path, verify=True)


def _to_universal(folder):
    import argparse

    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    places = {"input_folder": f"{folder}/first", "output_folder": f"{folder}/universal"}
    main(argparse.Namespace(**options, **places, inject_missing_state=True))


@pytest.mark.parametrize("name", ["zero3", "zero2-norm", "zero3-sub-groups"])
def test_what_ds_to_universal_made_is_read(name, made, tmp_path):
    folder, _ = _copy(made, name, tmp_path)
    deepspeeds.run(1, _to_universal, str(folder))
    _, masters, said = made(name)
    for path in (folder / "universal", folder):
        (folder / "latest").unlink(missing_ok=True)  # latest_universal is left
        model, optimizer, schedule = CASES[name].trained(seed=9)
        load(tags.state_of(model, optimizer, schedule), path)
        assert not differing(model, optimizer, masters, said["rest"])
    next((folder / "universal" / "zero").glob("*/exp_avg.pt")).unlink()
    with pytest.raises(NotACheckpoint, match="a conversion cut short"):
        open_foreign(folder / "universal")
