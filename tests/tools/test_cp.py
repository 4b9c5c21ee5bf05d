"""`distckpt cp`: the same checkpoint in another place, whole or not there, and what is there is not sent again."""

from __future__ import annotations

import json
import shutil

import pytest

from distckpt import Checkpointer
from distckpt.cli import main
from distckpt.run.lease import leased
from distckpt.run.source import open_source
from distckpt.store.local import LocalStore
from distckpt.tools import copy as copier
from distckpt.tools import transfer
from tests import layouts, ranks
from tests.run.test_frozen import WIDTH, train


def _save(root):
    """Three checkpoints of two ranks that have values of their own; loss is best in the second."""
    model, optimizer = layouts.build("fsdp2")
    layouts.make_moments(model, optimizer)
    state = layouts.train_state(model, optimizer)
    layouts.fill(state.capture())
    with Checkpointer(root, timeout=20, wait=True) as c:
        for step, loss in ((4, 2.0), (5, float("nan")), (7, 1.0)):
            c.save(step, state, {"loss": loss})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("cp") / "run"
    ranks.run(2, _save, str(root))
    return root


def told(capsys, *arguments, code=0):
    got = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert got == code, (out, err)
    assert err.count("\n") == (1 if code else 0)
    return err if code else json.loads(out)


def steps(root):
    with Checkpointer(root, wait=True) as c:
        return c.steps()


def same(a, b):
    """Nothing that `diff` finds, and all that it does not look at."""
    one, other = (open_source(path) for path in (a, b))
    mine, theirs = one.manifest, other.manifest
    assert main(["diff", str(a), str(b)]) == 0
    assert (mine.step, mine.date, mine.world_size) == (theirs.step, theirs.date, theirs.world_size)
    assert repr(mine.metrics) == repr(theirs.metrics)
    assert [one.rank_objects(r) for r in range(2)] == [other.rank_objects(r) for r in range(2)]
    assert {n: one.object(n) for n in mine.objects} == {n: other.object(n) for n in theirs.objects}


def test_the_newest_comes_out_as_it_was_and_a_second_time_nothing_is_sent(saved, tmp_path, capsys):
    found = told(capsys, "cp", saved, tmp_path / "to")
    assert [r["destination"] for r in found["copied"]] == [str(tmp_path / "to" / "step-00000007")]
    same(saved, tmp_path / "to")
    capsys.readouterr()
    assert told(capsys, "cp", saved, tmp_path / "to") == {"copied": [], "there": [7]}
    assert (tmp_path / "to" / "last").resolve().name == "step-00000007"
    assert main(["verify", str(tmp_path / "to")]) == 0
    assert not leased(LocalStore(saved))


@pytest.mark.parametrize("source", ["step-00000005", "."])
def test_one_step_is_copied_by_its_path_or_its_number(saved, tmp_path, capsys, source):
    told(capsys, "cp", saved / source, tmp_path / "to", "--step", 5)
    same(saved / "step-00000005", tmp_path / "to")


def test_all_of_a_run_is_copied_and_then_what_is_new(saved, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(saved, part, symlinks=True)
    shutil.rmtree(part / "step-00000007")
    assert len(told(capsys, "cp", part, tmp_path / "to", "--all")["copied"]) == 2
    found = told(capsys, "cp", saved, tmp_path / "to", "--all")
    assert ([r["destination"][-1] for r in found["copied"]], found["there"]) == (["7"], [4, 5])
    assert steps(tmp_path / "to") == [4, 5, 7]


def test_frozen_weights_are_sent_once(tmp_path, capsys):
    train(tmp_path / "run", (1, 2, 3))
    assert told(capsys, "cp", tmp_path / "run", tmp_path / "to", "--step", "1")["copied"]
    for found in told(capsys, "cp", tmp_path / "run", tmp_path / "to", "--all")["copied"]:
        assert sum(found["files"].values()) < WIDTH * WIDTH * 4
    for step in (1, 2, 3):
        name = f"step-0000000{step}"
        assert main(["diff", str(tmp_path / "run" / name), str(tmp_path / "to" / name)]) == 0
    assert main(["verify", str(tmp_path / "to"), "--all"]) == 0
    assert main(["cp", str(tmp_path / "run"), str(tmp_path / "alone")]) == 0
    shutil.rmtree(tmp_path / "run")
    assert main(["verify", str(tmp_path / "alone")]) == 0


def test_another_checkpoint_of_the_step_is_never_touched(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "to", symlinks=True)
    ranks.run(1, _other, str(tmp_path / "other"))
    assert "holds another checkpoint of step 7" in told(capsys, "cp", tmp_path / "other", tmp_path / "to", code=4)
    same(saved, tmp_path / "to")


def _other(root):
    model, optimizer = layouts.build("one")
    with Checkpointer(root, timeout=20, wait=True) as c:
        c.save(7, layouts.train_state(model, optimizer), {"loss": 3.0})


def test_an_interrupted_one_goes_on_with_the_files_that_are_missing(saved, tmp_path, capsys, monkeypatch):
    make, made = transfer.Staging.make, []

    def stop(self, output):
        if made:
            raise KeyboardInterrupt
        made.append(output.name)
        make(self, output)

    with monkeypatch.context() as patch:
        patch.setattr(transfer.Staging, "make", stop)
        assert main(["cp", str(saved), str(tmp_path / "to")]) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
    monkeypatch.setattr(transfer.Staging, "make", lambda self, output: (made.append(output.name), make(self, output)))
    told(capsys, "cp", saved, tmp_path / "to")
    assert len(made) == 2
    assert len(set(made)) == 2, "what was finished is not written again"
    same(saved, tmp_path / "to")


def test_what_was_not_written_as_it_was_read_is_found_unless_quick(saved, tmp_path, capsys, monkeypatch):
    write = copier.write_share

    def damage(sink, staging, worker, tell):
        write(sink, staging, worker, tell)
        (file,) = (p for p in tmp_path.rglob("rank-00000*"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(copier, "write_share", damage)
    assert "do not match their checksum" in told(capsys, "cp", saved, tmp_path / "to", code=1)
    assert not (tmp_path / "to").exists()
    told(capsys, "cp", saved, tmp_path / "to", "--quick")


def test_wrong_paths_are_one_line(saved, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for arguments, code in (
        ([tmp_path / "nothing", tmp_path / "to"], 3),
        ([tmp_path / "empty", tmp_path / "to"], 3),
        ([saved, tmp_path / "to", "--step", 6], 3),
        ([saved, tmp_path / "to", "--all", "--step", 5], 2),
        ([saved, "s3x://bucket/run"], 1),
        ([saved, tmp_path / "file"], 4),
        ([saved, saved / "step-00000005"], 4),
        ([tmp_path / "empty", tmp_path / "to", "--all"], 3),
    ):
        told(capsys, "cp", *arguments, code=code)
    assert told(capsys, "cp", saved, saved) == {"copied": [], "there": [7]}
    assert not (tmp_path / "to").exists()


def test_a_plan_is_printed_and_nothing_written(saved, tmp_path, capsys):
    assert main(["cp", str(saved), str(tmp_path / "to"), "--all", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would write") == 3
    assert not (tmp_path / "to").exists()
