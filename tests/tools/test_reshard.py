"""`python -m distckpt.reshard`: every format into every other, by several workers, and nothing half there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from distckpt import Checkpointer
from distckpt.errors import Corrupt, Mismatch, RunConflict, Unsupported
from distckpt.reshard import main
from distckpt.run.source import open_source
from distckpt.tools.copy import Source, copy
from distckpt.tools.transfer import Worker
from distckpt.tools.view import Change
from tests import layouts, ranks

SOURCES = {"one": 1, "fsdp3": 3, "fsdp1x2": 2, "tp2": 2}


def _save(layout, root):
    model, optimizer = layouts.build(layout)
    layouts.make_moments(model, optimizer)
    state = layouts.train_state(model, optimizer)
    layouts.fill(state.capture())
    optimizer.param_groups[0]["lr"] = 0.123
    with Checkpointer(f"{root}/{layout}", timeout=20, wait=True) as c:
        c.save(5, state)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for layout, size in SOURCES.items():
        ranks.run(size, _save, layout, str(root))
    return root


def loaded(source, layout="one", **options):
    """Names that came back wrong of what `source` holds, and the optimizer."""
    model, optimizer = layouts.build(layout)
    layouts.zero(model, optimizer)
    state = layouts.train_state(model, optimizer)
    with Checkpointer(f"{source}.none", timeout=20, wait=True) as c, layouts.quiet():
        c.load(state, source=source, **options)
    return layouts.wrong(state.capture()), optimizer


def reshard(*arguments):
    with layouts.quiet():
        return main([str(a) for a in arguments])


@pytest.mark.parametrize("layout", SOURCES)
@pytest.mark.parametrize("to", ["distckpt", "dcp", "torch"])
def test_whatever_was_saved_comes_back_from_every_format(runs, tmp_path, layout, to):
    assert reshard(runs / layout, tmp_path / "out", "--to", to, "--verify") == 0
    wrong, optimizer = loaded(tmp_path / "out")
    assert not wrong
    assert len(optimizer.state) == 9
    assert optimizer.param_groups[0]["lr"] == 0.123
    if to == "torch":
        theirs = torch.load(tmp_path / "out", weights_only=True)
        name = "emb.weight"
        assert torch.equal(theirs["model"][name], layouts.expected(f"model.{name}", (13, 8), torch.float32))
        assert theirs["model"]["head.weight"].data_ptr() == theirs["model"][name].data_ptr()


@pytest.mark.parametrize("hop", ["dcp", "torch"])
def test_a_round_trip_through_another_format_loses_nothing(runs, tmp_path, hop):
    with layouts.quiet():  # a note says that the generators of the ranks have no place there
        copy(runs / "fsdp3", tmp_path / "there", to=hop)
        report = copy(Source(str(tmp_path / "there"), step=7), tmp_path / "back", change=Change(files=4))
    assert report.destination == str(tmp_path / "back" / "step-00000007")
    assert len(report.files) == 4
    wrong, _ = loaded(tmp_path / "back", strict=False)
    assert not wrong


def test_files_of_another_world_size_share_the_bytes_evenly(runs, tmp_path):
    report = copy(runs / "fsdp3", tmp_path / "out", change=Change(files=5))
    sizes = sorted(report.files.values())
    assert len(sizes) == 5
    assert sizes[-1] - sizes[0] < 0.35 * sizes[-1]  # three of them have a rank's own values, too
    before, after = open_source(runs / "fsdp3"), open_source(tmp_path / "out")
    assert after.manifest.rank_objects == before.manifest.rank_objects
    assert [after.rank_objects(r) for r in range(3)] == [before.rank_objects(r) for r in range(3)]
    assert after.rank_objects(4) == {}
    assert not loaded(tmp_path / "out")[0]


@pytest.mark.parametrize("alone", [True, False])
def test_weights_alone_in_another_dtype_for_inference(runs, tmp_path, alone):
    target = tmp_path / ("m.safetensors" if alone else "hf")
    more = [] if alone else ["--to", "safetensors", "--shard-size", "50KB"]
    assert reshard(runs / "fsdp1x2", target, "--only", "model", "--dtype", "bf16", *more) == 0
    if alone:
        found = load_file(target)
    else:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
        found = {n: load_file(target / f)[n] for n, f in index["weight_map"].items()}
    assert found.keys() == set(layouts.Net().state_dict()) - {"head.weight"}
    for name, tensor in found.items():
        full = layouts.expected(f"model.{name}", tensor.shape, layouts.Net().state_dict()[name].dtype)
        assert tensor.dtype == (torch.bfloat16 if full.is_floating_point() else full.dtype)
        assert torch.equal(tensor, full.to(tensor.dtype))


def test_parameters_are_renamed_with_their_moments_and_groups(runs, tmp_path):
    copy(runs / "one", tmp_path / "out", change=Change(rename=(("^up\\.", "mlp.up."), ("^emb", "embedding"))))
    content = open_source(tmp_path / "out").manifest
    assert {"model.mlp.up.weight", "optim.mlp.up.weight.exp_avg", "model.embedding.weight"} <= content.tensors.keys()
    assert content.aliases == {"model.head.weight": "model.embedding.weight"}
    groups = open_source(tmp_path / "out").object("optim")["groups"]
    assert "mlp.up.bias" in groups[0]["params"]
    with pytest.raises(Mismatch, match="the same name"):
        copy(runs / "one", tmp_path / "clash", change=Change(rename=(("weight", "bias"),)))


@pytest.mark.parametrize("to", ["distckpt", "dcp"])
def test_workers_share_the_files(runs, tmp_path, to):
    done = []
    with layouts.quiet():
        report = copy(
            runs / "fsdp3",
            tmp_path / "out",
            to=to,
            change=Change(files=6),
            worker=Worker(processes=2),
            tell=done.append,
        )
    assert sum(done) == sum(report.files.values())
    assert not loaded(tmp_path / "out")[0]


def test_tasks_of_a_job_share_the_files_through_the_file_system(runs, tmp_path):
    """As torchrun and srun start them: no process group, one plan each."""
    command = [
        sys.executable,
        "-m",
        "distckpt.reshard",
        str(runs / "fsdp3"),
        str(tmp_path / "out"),
        "--world-size",
        "4",
    ]
    tasks = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        tasks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    told = [task.communicate(timeout=60)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], told
    assert "4 files" in told[0]
    assert not loaded(tmp_path / "out")[0]


# -- nothing half there -------------------------------------------------------------------------------------------------


def test_an_interrupted_one_leaves_nothing_under_its_name_and_goes_on_where_it_stopped(runs, tmp_path, monkeypatch):
    from distckpt.tools import transfer

    make, count = transfer.Staging.make, []

    def stop(self, output):
        if len(count) == 2:
            output.write(self.data)  # and is killed before it can say so
            raise KeyboardInterrupt
        count.append(output.name)
        make(self, output)

    monkeypatch.setattr(transfer.Staging, "make", stop)
    with pytest.raises(KeyboardInterrupt):
        copy(runs / "fsdp3", tmp_path / "out", change=Change(files=4))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(transfer.Staging, "make", make)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert len(before) == 3
    copy(runs / "fsdp3", tmp_path / "out", change=Change(files=4))
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert sum(after[name] == at for name, at in before.items()) == 2, "what was finished is not written again"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not loaded(tmp_path / "out")[0]


def test_a_killed_one_leaves_nothing_under_its_name(runs, tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, signal\nfrom distckpt.tools import copy, transfer\n"
        "def die(*args):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "transfer.move_into_place = die\n"
        f"copy.copy({str(runs / 'one')!r}, {str(out)!r})\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    copy(runs / "one", out)
    assert not loaded(out)[0]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_what_is_there_already_is_never_touched(runs, tmp_path):
    copy(runs / "one", tmp_path / "run")
    with pytest.raises(RunConflict, match="holds step 5 already"):
        copy(runs / "one", tmp_path / "run")
    (tmp_path / "file.pt").write_bytes(b"mine")
    with pytest.raises(RunConflict, match="exists already"):
        copy(runs / "one", tmp_path / "file.pt", to="torch")
    assert (tmp_path / "file.pt").read_bytes() == b"mine"


def test_damage_in_the_source_is_found_and_nothing_is_made_of_it(tmp_path):
    ranks.run(1, _save, "one", str(tmp_path))
    (file,) = (tmp_path / "one").glob("step-*/rank-*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(Corrupt, match="do not match their checksum"), layouts.quiet():
        copy(tmp_path / "one", tmp_path / "out", to="dcp")
    assert not (tmp_path / "out").exists()


# -- the command --------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_writes_nothing(runs, tmp_path, capsys):
    assert reshard(runs / "fsdp3", tmp_path / "out", "--world-size", "2", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["dry_run"]
    assert len(plan["files"]) == 3, "two for the tensors, and what the third rank kept for itself"
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line_and_an_exit_code(runs, tmp_path, capsys):
    assert reshard(tmp_path / "nothing", tmp_path / "out") == 3
    assert capsys.readouterr().err.startswith(f"distckpt reshard: {tmp_path / 'nothing'}: does not exist")
    assert reshard(runs / "one", tmp_path / "out", "--only", "modle") == 1
    assert "it has" in capsys.readouterr().err
    assert reshard(runs / "one", tmp_path / "out", "--memory", "lots") == 2
    with pytest.raises(Unsupported, match="dtype 'int4'"):
        copy(runs / "one", tmp_path / "out", change=Change(dtype="int4"))


def test_sizes_of_buffers_are_bounded_by_what_is_asked(runs, tmp_path):
    assert reshard(runs / "one", tmp_path / "out", "--memory", "16MB", "--workers", "1") == 0
    assert not loaded(tmp_path / "out")[0]


def test_a_lost_task_is_named(runs, tmp_path):
    from distckpt.errors import RanksMissing

    started = time.monotonic()
    with pytest.raises(RanksMissing, match=r"workers \[1\] have not written"):
        copy(runs / "fsdp3", tmp_path / "out", change=Change(files=4), worker=Worker(0, 2, timeout=0.5))
    assert time.monotonic() - started < 20
    assert not (tmp_path / "out").exists()
