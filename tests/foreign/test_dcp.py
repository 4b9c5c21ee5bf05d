"""DCP directories that torch wrote, loaded into live state through the loader there is; and the damage they can have."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import warnings
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from distckpt import Checkpointer, TrainState
from distckpt.errors import Corrupt, FormatError, Mismatch, NotACheckpoint, StateWarning, Unsupported
from distckpt.foreign.open import open_foreign
from distckpt.format.box import Box
from distckpt.loading.plan import Item
from distckpt.loading.read import read
from distckpt.state import Shard
from tests import layouts, ranks


def dcp_save(state_dict, folder, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state_dict, checkpoint_id=str(folder), no_dist=True, **more)


def dcp_load(state_dict, folder, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state_dict, checkpoint_id=str(folder), no_dist=True, **more)
    return state_dict


def state_dict_of(model, optimizer):
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


SIZES = layouts.SIZES | layouts.FSDP1

# -- what torch saved in any layout, in any other ----------------------------------------------------------------


def _save(layout, folder):
    """Save the layout's expected values through dcp.save."""
    model, optimizer = layouts.build(layout)
    layouts.make_moments(model, optimizer)
    layouts.fill(layouts.train_state(model, optimizer).capture())
    optimizer.param_groups[0]["lr"] = 0.123
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state_dict_of(model, optimizer) | {"epoch": 3}, checkpoint_id=folder, no_dist=SIZES[layout] == 1)


def _resume_and_save(layout, folder):
    """What is wrong after a resume from the directory itself, and after one from what is then saved beside it."""
    model, optimizer = layouts.build(layout)
    wrong = []
    for source in ("dcp", "ours"):
        layouts.zero(model, optimizer)
        state = layouts.train_state(model, optimizer)
        with Checkpointer(folder, timeout=20, wait=True) as c:
            if source == "dcp":
                with pytest.warns(StateWarning, match="which another tool saved"):
                    report = c.resume(state)
                wrong += [("missing", n) for n in report.missing if n != "trainer_state"]
                wrong += [("unexpected", n) for n in report.unexpected if n != "epoch"]
                wrong += [] if 0 < len(report.unverified) <= len(report.loaded) else ["unverified"]
                layouts.fill(state.capture(), salt="later")
                c.save(7, state)
            else:
                assert c.resume(state).step == 7
        salt = "later" if source == "ours" else ""
        if source == "ours":
            wrong += layouts.wrong(state.capture(), salt=salt)
            continue
        with Checkpointer(folder, timeout=20, wait=True) as c, layouts.quiet():
            c.load(state, source=folder + "-original", verify=True)
        wrong += layouts.wrong(state.capture())
        moments = sum(fqn.endswith((".exp_avg", ".exp_avg_sq", ".step")) for fqn in state.capture().tensors)
        hypers = [g["lr"] for g in optimizer.param_groups]
        if moments != 3 * sum(len(g["params"]) for g in optimizer.param_groups) or hypers != [0.123, 5e-4]:
            wrong.append(f"{moments} moments, learning rates {hypers}")
    return wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("dcp")
    for layout in ("one", "fsdp2", "fsdp3", "fsdp1x2"):
        ranks.run(SIZES[layout], _save, layout, str(root / layout))
    return root


@pytest.mark.parametrize(
    ("layout", "source"),
    [
        ("one", "fsdp3"),
        ("fsdp2", "fsdp3"),
        ("fsdp3", "one"),
        ("tp2", "fsdp2"),
        ("fsdp1x2", "fsdp3"),
        ("fsdp2", "fsdp1x2"),
    ],
)
def test_a_run_resumes_from_what_dcp_saved_and_saves_beside_it(saved, layout, source, tmp_path):
    shutil.copytree(saved / source, tmp_path / "run-original")
    folder = shutil.copytree(saved / source, tmp_path / "run")
    wrong = ranks.run(SIZES[layout], _resume_and_save, layout, str(folder))
    assert not [fault for rank in wrong for fault in rank]


def _save_each_rank_alone(folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard as Cut
    from torch.distributed.tensor import distribute_tensor

    rank = dist.get_rank()
    sharded = distribute_tensor(torch.arange(10.0).reshape(5, 2), init_device_mesh("cpu", (2,)), [Cut(0)])
    tree = {"model": {"w": sharded, "same": torch.ones(3)}, "mine": torch.full((2,), float(rank)), "n": 4, "r": rank}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, checkpoint_id=folder, use_collectives=False)


def test_the_indexes_of_ranks_are_one_and_what_differs_between_ranks_is_not_taken_from_one(tmp_path):
    ranks.run(2, _save_each_rank_alone, str(tmp_path))
    assert {"__0.metadata", "__1.metadata"} <= set(os.listdir(tmp_path))
    found = open_foreign(tmp_path)
    assert {n: t.shape for n, t in found.manifest.tensors.items()} == {"model.w": (5, 2), "model.same": (3,)}
    assert set(found.manifest.objects) == {"n"}
    assert {n: "2 ranks saved it" in why for n, why in found.unreadable.items()} == {"mine": True, "r": True}
    model = named_tensors(w=torch.zeros(5, 2), same=torch.zeros(3))
    load(TrainState(model=model), tmp_path)
    assert torch.equal(model.w, torch.arange(10.0).reshape(5, 2))
    os.unlink(tmp_path / "__1.metadata")
    with pytest.raises(FormatError, match=r"model\.w: its chunks do not make up the tensor"):
        open_foreign(tmp_path)


# -- one process -------------------------------------------------------------------------------------------------


def named_tensors(**tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def load(state, source, **options):
    with Checkpointer(os.path.join(source, "..", "unused"), timeout=5, wait=True) as c, layouts.quiet():
        return c.load(state, source=source, **options)


def trained():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def fresh():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6, bias=False))
    return model, torch.optim.AdamW(model.parameters(), lr=0.5)


def test_training_goes_on_bit_for_bit_after_a_resume_from_dcp(tmp_path):
    model, optimizer = trained()
    dcp_save({"app": state_dict_of(model, optimizer)}, tmp_path)
    again, its_optimizer = fresh()
    with Checkpointer(tmp_path, wait=True) as c, pytest.warns(StateWarning, match="it has no trainer_state"):
        report = c.resume(layouts.train_state(again, its_optimizer))
    assert "unverified: 12 tensors" in str(report)
    for m, o in ((model, optimizer), (again, its_optimizer)):
        for _ in range(3):
            o.zero_grad()
            m(torch.ones(2, 6)).square().sum().backward()
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_elements_in_any_order_and_of_any_dtype_come_back(tmp_path):
    cases = {
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "column": torch.arange(12.0).reshape(3, 4)[:, 1],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "brain": torch.ones(5, dtype=torch.bfloat16) / 3,
        "float8": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
        "complex": torch.tensor([1 + 2j, 3 - 1j]),
        "bools": torch.tensor([True, False, True]),
        "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
    }
    dcp_save({"model": cases}, tmp_path)
    model = named_tensors(**{name: torch.zeros_like(t).contiguous() for name, t in cases.items()})
    load(TrainState(model=model), tmp_path, verify=True)
    for name, tensor in cases.items():
        assert torch.equal(
            getattr(model, name).reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        ), name


def test_tied_parameters_that_dcp_saved_twice_load_into_tied_ones_if_they_are_equal(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.emb.weight

    model = Tied()
    dcp_save({"model": model.state_dict()}, tmp_path / "equal")
    dcp_save({"model": model.state_dict() | {"head.weight": torch.zeros(5, 3)}}, tmp_path / "other")
    again = Tied()
    load(TrainState(model=again), tmp_path / "equal")
    assert torch.equal(again.emb.weight, model.emb.weight)
    with pytest.raises(Mismatch, match=r"head\.weight: saved with values of its own, but tied"):
        load(TrainState(model=again), tmp_path / "other")


def test_compressed_records_are_read_whatever_their_number_of_windows(tmp_path):
    pytest.importorskip("zstandard")
    tensors = {"big": torch.randint(0, 9, (9 << 20,), dtype=torch.int8), "small": torch.arange(5.0)}
    writer = FileSystemWriter(str(tmp_path), _extensions=[ZStandard()])
    dcp_save({"model": tensors, "n": 5}, tmp_path, storage_writer=writer)
    model = named_tensors(**{n: torch.zeros_like(t) for n, t in tensors.items()})
    report = load(TrainState(model=model), tmp_path, verify=True)
    assert all(torch.equal(getattr(model, n), t) for n, t in tensors.items())
    assert report.unexpected == ["n"]
    assert not report.unverified


def test_a_slice_reads_little_more_than_itself(tmp_path):
    """66 KB of a chunk of 67 MB; DCP would read it whole."""
    whole = torch.arange(1 << 24, dtype=torch.float32).reshape(1024, 1 << 14)
    dcp_save({"model": {"w": whole}}, tmp_path / "dcp")
    with Checkpointer(tmp_path / "ours", wait=True) as c:
        c.save(1, TrainState(model=named_tensors(w=whole), rng=False))
        ours = next(iter(c._history.valid()))
    for checkpoint in (open_foreign(tmp_path / "dcp"), ours):
        before = checkpoint.bytes_read
        part = Shard(Box((500, 0), (1, 1 << 14)), torch.zeros(1, 1 << 14))
        read(
            checkpoint, [Item("model.w", 0, "model.w", Box.whole(whole.shape), tuple(whole.shape), torch.float32, part)]
        )
        assert torch.equal(part.tensor, whole[500:501])
        assert checkpoint.bytes_read - before < 2_200_000
        assert checkpoint.bytes_read < 2_200_000


def test_a_value_that_cannot_be_read_safely_matters_only_to_who_wants_it(tmp_path):
    model, optimizer = trained()
    tree = state_dict_of(model, optimizer)
    tree["optim"]["param_groups"][0]["hook"] = os.getcwd
    dcp_save(tree | {"args": shutil.copy}, tmp_path)
    again, its_optimizer = fresh()
    assert load(TrainState(model=again), tmp_path, only=("model",)).unexpected == []
    assert torch.equal(again[0].weight, model[0].weight)
    with pytest.raises(Mismatch, match=r"optim: cannot be read.*posix\.getcwd.*neither imported nor called"):
        load(TrainState(model=again, optimizer=its_optimizer), tmp_path)


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (lambda m, o: {"state_dict": m, "optimizer": o, "scheduler": {"last_epoch": 4}}, None),
        (lambda m, o: {"app": {"model": m, "optim": o}}, None),
        (lambda m, o: {"train": {"ema": m, "net": {}, "opts": o}}, {"train.ema": "model", "train.opts": "optim"}),
        (lambda m, o: m | {"optimizer": o}, None),
        (lambda m, o: {"model": {f"module.{k}": v for k, v in m.items()}, "optims": o}, None),
    ],
)
def test_the_usual_names_of_others_are_known_and_any_can_be_given(tree, names, tmp_path):
    model, optimizer = trained()
    parts = state_dict_of(model, optimizer)
    dcp_save(tree(parts["model"], parts["optim"]), tmp_path)
    again, its_optimizer = fresh()
    load(TrainState(model=again, optimizer=its_optimizer), tmp_path, names=names)
    assert torch.equal(again[1].weight, model[1].weight)
    assert torch.equal(its_optimizer.state[again[1].weight]["exp_avg"], optimizer.state[model[1].weight]["exp_avg"])
    assert its_optimizer.param_groups[0]["lr"] == 0.01


def test_a_source_that_does_not_fit_is_one_error_that_says_everything(tmp_path):
    model, optimizer = trained()
    dcp_save(
        {"model": {"0.weight": torch.zeros(4, 5), "more": torch.zeros(1)}, "whatsit": {"ever": torch.ones(1)}}, tmp_path
    )
    state = TrainState(model=model, optimizer=optimizer)
    with pytest.raises(Mismatch) as caught:
        load(state, tmp_path)
    for line in (
        "0.weight: saved with shape [4, 5], the state has [4, 6]",
        "model.0.bias: missing",
        "optim: missing",
        "model.more: in the checkpoint, but not in the state",
        "only=('model',)",
        "names=",
    ):
        assert line in str(caught.value)
    assert "whatsit" not in str(caught.value)
    with pytest.raises(Mismatch, match=r"the source has .*'whatsit'"):
        load(state, tmp_path, names={"nothing": "model"})


def test_a_run_and_a_step_of_it_are_sources_too(tmp_path):
    model, optimizer = trained()
    with Checkpointer(tmp_path / "first", wait=True) as c:
        c.save(1, layouts.train_state(model, optimizer))
        with torch.no_grad():
            model[0].weight.fill_(2.0)
        c.save(2, layouts.train_state(model, optimizer))
    again, its_optimizer = fresh()
    state = layouts.train_state(again, its_optimizer)
    with Checkpointer(tmp_path / "second", wait=True) as c:
        assert c.load(state, source=tmp_path / "first").step == 2
        assert (again[0].weight == 2).all()
        for source, step in (("first", 1), ("first/step-00000001", None)):
            with torch.no_grad():
                again[0].weight.fill_(3.0)
            report = c.load(state, source=tmp_path / source, step=step, verify=True)
            assert report.step == 1
            assert not report.unverified
            assert (again[0].weight < 2).all()
        with pytest.raises(NotACheckpoint, match="neither a run of distckpt nor one of its steps, nor a DCP directory"):
            c.load(state, source=tmp_path)
        with pytest.raises(NotACheckpoint, match="does not exist"):
            c.load(state, source=tmp_path / "nowhere")
    assert not (tmp_path / "second").exists()
    assert sorted(os.listdir(tmp_path / "first" / "launches")) == ["0001.beat.json", "0001.json"]  # no launch of ours


# -- damage and malice: first what DCP does ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A directory with one tensor in two chunks, and one in one."""
    dcp_save({"model": {"w": torch.arange(1000.0).reshape(10, 100), "v": torch.ones(7)}, "n": 3}, tmp_path / "dcp")
    return tmp_path / "dcp"


def target():
    return named_tensors(w=torch.full((10, 100), -1.0), v=torch.zeros(7))


def edit(folder, change):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def data_at(folder, key="model.w", offset=(0, 0)):
    """Byte of the file at which the elements of a chunk begin."""
    info = pickle.loads((folder / ".metadata").read_bytes()).storage_data[MetadataIndex(key, offset)]
    data = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    with zipfile.ZipFile(__import__("io").BytesIO(data)) as z:
        at = z.getinfo("archive/data/0").header_offset
    return folder / info.relative_path, info.offset + at + 30 + sum(struct.unpack("<26xHH", data[at : at + 30]))


class Runs:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_an_index_that_runs_code_runs_it_in_dcp_and_is_refused_by_name_here(folder, tmp_path):
    marker = tmp_path / "it-ran"
    edit(folder, lambda m: m.storage_meta.modules.append(Runs(marker)))
    FileSystemReader(str(folder)).read_metadata()
    assert marker.exists()
    marker.unlink()
    with pytest.raises(
        FormatError, match=r"posix\.system, which no such file needs; it was neither imported nor called"
    ):
        load(TrainState(model=target()), folder)
    with Checkpointer(folder, wait=True) as c, pytest.raises(FormatError, match=r"posix\.system"):
        c.resume(TrainState(model=target()))
    assert not marker.exists()


def test_a_value_that_runs_code_runs_it_in_dcp_and_is_only_reported_here(tmp_path):
    marker = tmp_path / "it-ran"
    dcp_save({"model": {"w": torch.ones(2)}, "evil": Runs(marker)}, tmp_path / "dcp")
    dcp_load({"evil": None}, tmp_path / "dcp")
    assert marker.exists()
    marker.unlink()
    load(TrainState(model=named_tensors(w=torch.zeros(2))), tmp_path / "dcp")
    assert not marker.exists()
    assert "posix.system" in open_foreign(tmp_path / "dcp").unreadable["evil"]


def test_a_chunk_missing_from_the_index_leaves_a_hole_in_dcp_and_is_an_error_here(folder):
    edit(folder, lambda m: m.state_dict_metadata["model.w"].chunks.clear())
    live = {"model": {"w": torch.full((10, 100), -1.0)}}
    dcp_load(live, folder)
    assert (live["model"]["w"] == -1).all()  # "loaded"
    with pytest.raises(FormatError, match=r"model\.w: its chunks do not make up the tensor"):
        load(TrainState(model=target()), folder)


def test_a_chunk_that_is_stored_nowhere_is_an_error(folder):
    edit(folder, lambda m: m.storage_data.pop(MetadataIndex("model.w", (0, 0))))
    with pytest.raises(FormatError, match=r"model\.w: the index does not say where its chunk at \[0, 0\] is stored"):
        load(TrainState(model=target()), folder)


def test_a_flipped_bit_loads_in_dcp_and_is_found_here_by_verify(folder):
    path, start = data_at(folder)
    data = bytearray(path.read_bytes())
    data[start + 4 * 321] ^= 1
    path.write_bytes(data)
    live = {"model": {"w": torch.zeros(10, 100)}}
    dcp_load(live, folder)
    assert not torch.equal(live["model"]["w"], torch.arange(1000.0).reshape(10, 100))  # "loaded"
    state = TrainState(model=target())
    with pytest.raises(Corrupt, match=r"__0_0\.distcp: model\.w: bytes \d+ to \d+ do not match the CRC-32"):
        load(state, folder, verify=True)
    assert (state.capture().tensors["model.w"].shards[0].tensor == -1).all()  # nothing had moved
    assert load(state, folder).unverified == ["model.v", "model.w"]


def test_a_file_that_is_gone_or_cut_short_is_named_with_what_it_held(folder):
    path = folder / "__0_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(Corrupt, match=r"__0_0\.distcp: has \d+ bytes; model\.\w is at .*: the file was cut short"):
        load(TrainState(model=target()), folder)
    path.unlink()
    with pytest.raises(Corrupt, match=r"model\.\w: .*__0_0\.distcp: no such file, though the index names it"):
        load(TrainState(model=target()), folder)


def test_a_record_that_is_not_what_the_index_says_is_corrupt(folder):
    def change(metadata):
        metadata.state_dict_metadata["model.w"].properties.dtype = torch.int32

    edit(folder, change)
    model = named_tensors(w=torch.zeros(10, 100, dtype=torch.int32), v=torch.zeros(7))
    with pytest.raises(Corrupt, match=r"model\.w: the record holds float32 of shape \[10, 100\], the index says int32"):
        load(TrainState(model=model), folder)


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/passwd", "a/../../b", "", "x\0y"])
def test_an_index_does_not_lead_out_of_its_directory(folder, path):
    def change(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = path

    edit(folder, change)
    with pytest.raises(FormatError, match="not a plain path below"):
        load(TrainState(model=target()), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.state_dict_metadata.update({"model.w": 5}), "is not as torch.distributed.checkpoint writes it"),
        (lambda m: m.planner_data.update({"model.w": ("model", "v")}), "two entries have the path"),
        (
            lambda m: m.planner_data.update({"model.w": ("model", "v", "x")}),
            "leads through a value|two entries have the path",
        ),
        (lambda m: m.planner_data.update({"model.w": ("list", 5)}), r"the members of a list are \[5\]"),
        (lambda m: setattr(m, "storage_data", None), "storage_data of"),
        (lambda m: setattr(m.state_dict_metadata["model.w"], "size", [1 << 70]), "a chunk of model.w"),
    ],
)
def test_an_index_that_was_tampered_with_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(FormatError, match=message):
        open_foreign(folder)


@pytest.mark.parametrize("length", [0, 1, 100, 700])
def test_a_truncated_index_is_refused(folder, length):
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FormatError, match=r"\.metadata: not a pickle that can be read"):
        open_foreign(folder)


def test_a_save_that_did_not_finish_is_told_and_no_fresh_start_is_made_beside_it(folder):
    (folder / ".metadata").unlink()
    with (
        Checkpointer(folder, wait=True) as c,
        pytest.raises(NotACheckpoint, match=r"no \.metadata: a dcp\.save that did not finish"),
    ):
        c.resume(TrainState(model=target()))


def test_another_transform_than_zstd_is_refused_by_name(folder):
    def change(metadata):
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["stream.rot13/1"]

    edit(folder, change)
    with pytest.raises(Unsupported, match=r"written through stream\.rot13/1"):
        open_foreign(folder)
