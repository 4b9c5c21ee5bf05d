"""`distckpt verify`: which tensors damage hits, what --quick sees, and that it tells how far it is."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import distckpt
from distckpt.cli import main
from distckpt.tools import progress, verify

MIB = 1 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two tensors that no block holds both of, and one of a few bytes."""
    path = tmp_path_factory.mktemp("verify") / "run"
    distckpt.save(path, {"a": torch.ones(MIB), "b": torch.ones(MIB), "c": torch.ones(3, dtype=torch.uint8)})
    return path


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def verified(capsys, run, *options, code):
    assert main(["verify", str(run), *options, "--json"]) == code
    (found,) = json.loads(capsys.readouterr().out)
    return found


def damage(run, *offsets):
    (file,) = run.glob("step-*/rank-*")
    data = bytearray(file.read_bytes())
    for at in offsets:
        data[at] ^= 1
    file.write_bytes(data)
    return f"{file.parent.name}/{file.name}"


def test_every_damaged_block_is_told_with_its_file_and_the_tensors_in_it(run, capsys):
    name = damage(run, MIB + 5, 6 * MIB)
    found = verified(capsys, run, code=1)
    assert [(d["file"], d["tensors"]) for d in found["damage"]] == [(name, ["a"]), (name, ["b"])]
    assert found["tensors"] == ["a", "b"]
    assert main(["verify", str(run)]) == 1
    text = capsys.readouterr().out
    assert f"bytes {MIB} to {2 * MIB}" in text
    assert "2 tensors are hit: a, b" in text


def test_quick_reads_no_tensor_and_sees_headers_sizes_and_tables(run, capsys):
    found = verified(capsys, run, "--quick", code=0)
    assert found["bytes"] < 10_000
    damage(run, MIB + 5)
    assert not verified(capsys, run, "--quick", code=0)["problems"]
    damage(run, 100)
    found = verified(capsys, run, "--quick", code=1)
    assert found["tensors"] == ["a", "b", "c"]
    assert "header or checksum table" in found["problems"][0]
    (file,) = run.glob("step-*/rank-*")
    file.unlink()
    assert verified(capsys, run, "--quick", code=1)["tensors"] == ["a", "b", "c"]


def test_where_there_is_no_terminal_it_says_how_far_it_is_in_lines(run, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    verified_line = main(["verify", str(run)])
    assert verified_line == 0
    assert "step-00000000: 8.4 MB of 8.4 MB\n" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar(run, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["verify", str(run)]) == 0
    assert "%|" in capsys.readouterr().err


def test_all_and_one_step_do_not_go_together(run, capsys):
    assert main(["verify", str(run), "--all", "--step", "0"]) == 2


def test_what_is_removed_while_it_is_verified_is_no_damage(tmp_path, capsys, monkeypatch):
    for step in (1, 2):
        distckpt.save(tmp_path / "run" / f"step-0000000{step}", {"t": torch.ones(3)})
    damage = verify.damage

    def slow(checkpoint, **options):
        if checkpoint.directory.step == 1:
            shutil.rmtree(tmp_path / "run" / "step-00000001")
        return damage(checkpoint, **options)

    monkeypatch.setattr(verify, "damage", slow)
    assert main(["verify", str(tmp_path / "run"), "--all", "--json"]) == 0
    assert [row["path"] for row in json.loads(capsys.readouterr().out)] == ["step-00000002"]
