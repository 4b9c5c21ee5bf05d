"""Tags of pipelines and of experts: what they are read as is what their live engines' checkpoints hold, bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState, reshard
from distckpt.errors import FormatError, NotACheckpoint, Unsupported
from distckpt.foreign.deepspeed_model import is_rounded
from distckpt.foreign.deepspeed_position import by_stage
from distckpt.run.source import open_source
from tests import deepspeeds
from tests.adapters import engines, test_zero_moe, test_zero_pipeline
from tests.foreign import parted
from tests.foreign.parted import CASES
from tests.layouts import quiet

_made = {}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (directory of `tags` and `ours`, losses of the steps after them): saved when asked for."""

    def get(name):
        if name not in _made:
            root = tmp_path_factory.mktemp(name.replace(" ", "-"))
            _made[name] = root, deepspeeds.run(CASES[name].size, parted.save, CASES[name], str(root))[0]
        return _made[name]

    yield get
    _made.clear()


@pytest.mark.parametrize("name", CASES)
def test_a_tag_is_read_as_what_its_engine_holds(name, made):
    root, _ = made(name)
    live = parted.ours(root)
    found = open_source(root / "tags", order=parted.order_in(live))
    held, read = parted.content(live), parted.content(found)
    assert read.keys() == held.keys()
    assert not [fqn for fqn in held if read[fqn] != held[fqn]]
    for what in ("groups", "values"):
        assert found.object("optim")[what] == live.object("optim")[what]
    assert found.object("lr_scheduler") == live.object("lr_scheduler")
    counted, wanted = (o.object("deepspeed")["engines"]["model"] for o in (found, live))
    assert {n: counted[n] for n in wanted if n != "loss_scale"} == {n: wanted[n] for n in wanted if n != "loss_scale"}
    assert wanted.get("loss_scale", {}).items() <= counted.get("loss_scale", {}).items()
    assert (found.object("epoch"), found.manifest.step, found.notes) == (3, 2, [])


# -- where it goes on ------------------------------------------------------------------------------------------------


def _resume(case, root):
    """What this rank holds after a resume from the tag, the engine's counters, and losses of the next steps."""
    engine = case.engine(seed=9)
    report = engines.resumed(f"{root}/tags", engine)
    held = engines.captured(engine)
    return held, (engine.global_steps, engine.global_samples), case.train(engine, 2, 4), report.notes


@pytest.mark.parametrize(
    ("name", "size", "parts", "stage"),
    [
        ("pipeline zero1", 2, 2, 1),
        ("pipeline zero1", 2, 1, 0),
        ("pipeline zero0", 4, 2, 0),
        ("pipeline zero0", 2, 2, 1),
        ("pipeline zero0", 2, 1, 1),
        ("pipeline zero0 fp16", 2, 2, 0),
        ("pipeline zero0 bf16-optimizer", 2, 2, 1),
        ("experts zero0", 4, 4, 1),
        ("experts zero0", 2, 2, 0),
        ("experts zero0 bf16", 4, 2, 0),
        ("experts zero1", 2, 1, 2),
        ("experts zero2 odd", 2, 2, 1),
        ("experts zero1 bf16-optimizer", 3, 1, 2),
    ],
)
def test_a_live_engine_of_another_size_goes_on_from_a_tag(name, size, parts, stage, made):
    root, losses = made(name)
    case = replace(CASES[name], size=size, parts=parts, stage=stage, options={})
    of_ranks = deepspeeds.run(size, _resume, case, str(root))
    held = engines.joined(held for held, *_ in of_ranks)
    wanted = parted.content(parted.ours(root))
    assert {f for f in wanted if f.startswith(("model.", "optim."))} <= held.keys()
    assert not [f for f, t in held.items() if t.numpy().tobytes() != parted.as_float32(wanted[f])]
    assert of_ranks[0][1] == (2, 24)
    assert of_ranks[0][2] == pytest.approx(losses, rel=1e-5 if case.dtype == "fp32" else 2e-2)
    assert not [note for note in of_ranks[0][3] if "names" in note]


class Layers(nn.Module):
    """The layers of `test_zero_pipeline.pipeline` in one process, under the names that a pipeline has for them."""

    def __init__(self):
        super().__init__()
        self.tied_modules = nn.ModuleDict({"words": nn.Embedding(13, 8)})
        self.add_module("1", test_zero_pipeline.Normed(23))
        self.add_module("3", test_zero_pipeline.Normed(11))

    def forward(self, x):
        words, first, second = self.tied_modules["words"], self.get_submodule("1"), self.get_submodule("3")
        return nn.functional.linear(second(torch.tanh(first(words(x)))), words.weight)


class Experts(nn.Module):
    """Parameters of `test_zero_moe.Net`, under its names."""

    def __init__(self):
        super().__init__()
        experts = nn.ModuleDict({"deepspeed_experts": nn.ModuleList(test_zero_moe.Expert() for _ in range(4))})
        gate = nn.ModuleDict({"wg": nn.Linear(8, 4, bias=False)})
        self.emb = nn.Embedding(13, 8)
        self.moe = nn.ModuleDict({"deepspeed_moe": nn.ModuleDict({"gate": gate, "experts": experts})})
        self.head = nn.Linear(8, 13)


@pytest.mark.parametrize("name", [n for n in CASES if "lion" not in n])
def test_a_plain_model_and_optimizer_take_every_bit_of_a_tag(name, made):
    root, losses = made(name)
    model = Layers() if CASES[name].kind == "pipeline" else Experts()
    optimizer = torch.optim.AdamW(deepspeeds.groups(model))
    with quiet():
        report = Checkpointer(root / "run", wait=True).load(
            TrainState(model=model, optimizer=optimizer, rng=False), source=root / "tags"
        )
    live = parted.ours(root)
    wanted = parted.content(live)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {f"model.{n}": t for n, t in model.state_dict().items()}
    found |= {f"optim.{n}.{k}": t for n, p in names.items() for k, t in optimizer.state[p].items()}
    assert not [f for f, t in found.items() if t.detach().numpy().tobytes() != parted.as_float32(wanted[f])]
    assert found.keys() == {f for f in wanted if f.startswith(("model.", "optim."))}
    assert not [note for note in report.notes if "names" in note]
    rates = {n: g["lr"] for g in live.object("optim")["groups"] for n in g["params"]}
    groups = optimizer.param_groups
    assert {n: g["lr"] for g in groups for n, p in names.items() if any(p is q for q in g["params"])} == rates
    if name == "pipeline zero1":
        assert [_step(model, optimizer, i) for i in (2, 3)] == pytest.approx(losses, rel=1e-5)


def _step(model, optimizer, i):
    x = torch.randint(0, 13, (12, 5), generator=torch.Generator().manual_seed(100 + i))
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), ((x + 1) % 13).flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("to", ["distckpt", "dcp", "torch", "safetensors", "deepspeed"])
@pytest.mark.parametrize("name", ["pipeline zero1 bf16", "experts zero2 odd"])
def test_it_is_converted(name, to, made, tmp_path, capsys):
    root, _ = made(name)
    target = tmp_path / {"torch": "out.pt", "safetensors": "out.safetensors"}.get(to, "out")
    of_tag = {"deepspeed": ["--zero-stage", "1", "--world-size", "2"], "safetensors": ["--only", "model"]}.get(to, [])
    assert reshard.main([str(root / "tags"), str(target), "--to", to, *of_tag]) == 0, capsys.readouterr().err
    found, wanted = parted.content(open_source(target)), parted.content(parted.ours(root))
    leads = ("model.",) if to == "safetensors" else ("model.", "optim.")
    of_both = [{f: t for f, t in held.items() if f.startswith(leads)} for held in (found, wanted)]
    assert of_both[0].keys() == of_both[1].keys()
    assert not [f for f, held in of_both[1].items() if of_both[0][f][2] != held[2]]


# -- without names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipeline zero0", "pipeline zero0 fp16", "experts zero0", "experts zero0 bf16"])
def test_without_an_order_or_with_one_that_does_not_fit_the_weights_alone_are_read(name, made):
    root, _ = made(name)
    order = parted.order_in(parted.ours(root))
    for wrong, why in (
        (None, "no optimizer says them"),
        ([order[0][1:] + order[0][:1], *order[1:]], ""),
        ([order[0][1:], *order[1:]], ""),
        ([[*order[0], "5.weight"], *order[1:]], "it has no 5.weight"),
    ):
        found = open_source(root / "tags", order=wrong)
        assert "optim" not in found.manifest.objects
        (note,) = found.notes
        assert "without names" in note
        assert why in note
        lead = "model.1.up.weight" if "pipeline" in name else "model.head.weight"
        assert found.manifest.tensors[lead].dtype == {"fp16": "float16", "bf16": "bfloat16"}.get(
            CASES[name].dtype, "float32"
        )
        if wrong is None and "pipeline" in name:
            assert "a tied layer of a pipeline as one of the places" in note
            assert "model.0.weight" in found.manifest.tensors


# -- what is not there, or not of one save ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("pipeline zero1", "layer_03-*", r"layer_03-model_states\.pt, which has 3\.\S+, is missing"),
        ("pipeline zero0", "layer_03-*", r"layer_03-model_states\.pt, which has 3\.seen, is missing"),
        ("pipeline zero1", "layer_*", r"all its layer_\*-model_states\.pt are missing"),
        ("pipeline zero1", "mp_rank_01_*", r"the model files of pipeline stages \[1\] are missing, of 2"),
        (
            "pipeline zero1",
            "zero_pp_rank_1_mp_rank_01_*",
            r"optimizer files of data-parallel ranks of pipeline stage 1",
        ),
        (
            "pipeline zero1",
            "zero_pp_rank_*_mp_rank_01_*",
            r"all its \*_optim_states\.pt of pipeline stage 1 are missing",
        ),
        ("experts zero1", "layer_0_expert_2_*", r"layer_0_expert_2_mp_rank_00_model_states\.pt"),
        ("experts zero0", "layer_0_expert_*", r"layer_0_expert_0_mp_rank_00_model_states\.pt.*4 of 4"),
        ("experts zero0", "expp_rank_1_*", r"expert-parallel ranks \(expp_rank_\*\) \[1\] are missing, of 2"),
        ("experts zero2 odd", "bf16_zero_pp_rank_3_*", r"optimizer files of data-parallel ranks \[3\] are missing"),
    ],
)
def test_a_tag_without_a_file_is_named_incomplete(name, file, message, made, tmp_path):
    tag = shutil.copytree(made(name)[0] / "tags" / "first", tmp_path / "tag")
    for path in [*tag.glob(file)]:
        path.unlink()
    with pytest.raises(NotACheckpoint, match=message):
        open_source(tag)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("pipeline zero1", "mp_rank_01_*", "global_steps is 2 in .*mp_rank_00.*, 4 in .*mp_rank_01"),
        ("pipeline zero1", "zero_pp_rank_1_mp_rank_01_*", r"the optimizer's step is \{0: 2"),
        ("pipeline zero1", "*_mp_rank_01_optim*", "the optimizer's last step is 2"),
        ("pipeline zero1", "layer_01-*", "layer_01-model_states.pt"),
        ("pipeline zero1 bf16", "layer_03-*", "layer_03-model_states.pt"),
        ("pipeline zero0 fp16", "mp_rank_01_*", "global_steps is 2"),
        ("experts zero1", "zero_pp_rank_3_*", r"the optimizer's step is \{0: 2"),
        ("experts zero2 odd", "layer_0_expert_3_*", "layer_0_expert_3_mp_rank_00_model_states.pt"),
        ("experts zero0", "expp_rank_1_*", "the optimizer's last step is 2"),
    ],
)
def test_files_of_two_saves_in_one_directory_are_told_apart(name, files, message, made, tmp_path):
    root, _ = made(name)
    tag = shutil.copytree(root / "tags" / "first", tmp_path / "tag")
    for path in (root / "tags" / "later").glob(files):
        shutil.copy(path, tag)
    with pytest.raises(FormatError, match=f"files of different saves: .*{message}"):
        open_source(tag)


def test_what_is_of_neither_kind_is_refused_by_name(made, tmp_path):
    tag = shutil.copytree(made("pipeline zero1")[0] / "tags" / "first", tmp_path / "tag")
    sliced = tag / "layer_01-model_01-model_states.pt"
    shutil.copy(tag / "layer_01-model_states.pt", sliced)
    with pytest.raises(Unsupported, match=f"{sliced.name}: a tag of tensor parallelism"):
        open_source(tag)
    sliced.rename(tag / "layer_0_expert_0_mp_rank_00_model_states.pt")
    with pytest.raises(Unsupported, match="experts in a pipeline"):
        open_source(tag)
    (tag / "layer_0_expert_0_mp_rank_00_model_states.pt").rename(tag / "expert_0_mp_rank_00_model_states.pt")
    with pytest.raises(
        Unsupported, match=r"expert_0_mp_rank_00_model_states\.pt: experts as DeepSpeed saved them before"
    ):
        open_source(tag)


# -- shared out unevenly ---------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Experts over two ranks, and others over four."""

    def __init__(self, widest):
        from deepspeed.moe.layer import MoE

        super().__init__()
        options = {"capacity_factor": 4.0, "eval_capacity_factor": 4.0, "use_rts": False}
        self.emb, self.head = nn.Embedding(13, 8), nn.Linear(8, 13)
        self.few = MoE(8, test_zero_moe.Expert(), 4, widest // 2, **options)
        self.many = MoE(8, test_zero_moe.Expert(), 8, widest, **options)

    def forward(self, x):
        return self.head(self.many(self.few(self.emb(x))[0])[0]).float()


def _save_two(root, stage, options):
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    deepspeeds.joined()
    torch.manual_seed(0)
    model = TwoLayers(4)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": [*model.parameters()], "name": "all"})
    engine = deepspeeds.engine(model, torch.optim.AdamW(groups), stage, **options)
    engines.train(engine, 0, 2)
    engine.save_checkpoint(f"{root}/tags")
    engines.saved(f"{root}/ours", engine)


@pytest.mark.parametrize(("stage", "options"), [(0, {}), (1, parted.DATA_FIRST), (2, parted.ODD)])
def test_layers_of_experts_over_different_numbers_of_ranks(stage, options, tmp_path):
    deepspeeds.run(4, _save_two, str(tmp_path), stage, options)
    live = parted.ours(tmp_path)
    found = open_source(tmp_path / "tags", order=parted.order_in(live))
    assert parted.content(found) == parted.content(live)


def _save_uneven(root):
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeeds.joined()
    layers = [LayerSpec(nn.Embedding, 13, 8), LayerSpec(nn.Linear, 8, 13)]
    module = PipelineModule(layers, num_stages=2, loss_fn=test_zero_pipeline._loss, partition_method="uniform")
    batches = {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2}
    engine = deepspeeds.engine(module, torch.optim.AdamW(deepspeeds.groups(module)), 0, **batches)
    test_zero_pipeline.train(engine, 0, 2)
    engine.save_checkpoint(f"{root}/tags")
    engines.saved(f"{root}/ours", engine)


def test_a_stage_without_parameters_of_a_group(tmp_path):
    deepspeeds.run(2, _save_uneven, str(tmp_path))
    live = parted.ours(tmp_path)
    found = open_source(tmp_path / "tags", order=parted.order_in(live))
    assert parted.content(found) == parted.content(live)
    assert found.object("optim")["groups"] == live.object("optim")["groups"]


def test_stages_are_told_by_counts_and_shapes_and_only_where_there_is_one_way():
    names = [[f"{i}.{n}" for i in range(96) for n in ("a", "b")], [f"{i}.c" for i in range(96)]]
    shapes = {n: (2, 3) if n[-1] == "a" else (4,) for of in names for n in of}
    wanted = [[[(2, 3), (4,)] * 6, [(4,)] * 6]] * 16
    assert by_stage(names, wanted, shapes)[3] == [
        [f"{i}.{n}" for i in range(18, 24) for n in ("a", "b")],
        [f"{i}.c" for i in range(18, 24)],
    ]
    same = {"0.w": (2,), "tied_modules.x.w": (2,)}
    assert "several ways" in by_stage([[*same]], [[[(2,)]], [[(2,)]]], same)
    assert "other parameters" in by_stage(names, wanted[:15], shapes)


@pytest.mark.parametrize(("dtype", "master", "low"), [
    ("bfloat16", 1.00390625, 1.0),
    ("bfloat16", 1.01171875, 1.015625),
    ("float16", 1e6, 1e6),
    ("float16", 0.1, 0.0999755859375),
    ("float32", 0.1, 0.1),
    ("bfloat16", float("nan"), 0.0),
])  # fmt: skip
def test_rounding_is_torchs(dtype, master, low):
    kind = getattr(torch, dtype)
    value = torch.tensor([master])
    assert is_rounded(_bytes(torch.tensor([low]).to(kind)), _bytes(value), dtype)
    assert is_rounded(_bytes(value.to(kind)), _bytes(value), dtype)
    if abs(master) < 1e4:
        assert not is_rounded(_bytes(torch.tensor([2.5]).to(kind)), _bytes(value), dtype)


def _bytes(tensor):
    return bytes(tensor.view(torch.uint8).numpy())
