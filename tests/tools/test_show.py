"""`distckpt show --tensor` and `--svg`: the statistics of one tensor, and a picture of who wrote what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

import distckpt
from distckpt.cli import main
from distckpt.format.box import Box, Run
from distckpt.format.manifest import FileInfo, Manifest, TensorInfo
from distckpt.format.partition import Copies, FlatEven, Grid, Pieces, Split
from distckpt.tools.shardmap import MOST_COLOURS, shard_map

HERE = Path(__file__).parent.parent.parent


def stats(capsys, path, fqn):
    assert main(["show", str(path), "--tensor", fqn, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tensors of many kinds."""
    torch.manual_seed(0)
    values = {
        "normal": torch.randn(700, 1001) * 3 + 5,
        "half": torch.randn(33).bfloat16(),
        "odd": torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 2.0]),
        "none": torch.empty(0, 4),
        "nans": torch.full((3,), float("nan")),
        "huge": torch.tensor([1e300, -1e300], dtype=torch.float64),
        "int": torch.arange(-3, 10),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.tensor([3 + 4j, 0j]),
        "scalar": torch.tensor(2.5),
        "f8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    }
    path = tmp_path_factory.mktemp("show") / "run"
    distckpt.save(path, {"t": values})
    return path, values


@pytest.mark.parametrize("name", ["normal", "half", "int", "bool", "scalar", "f8"])
def test_statistics_are_torch_s_own(saved, name, capsys):
    path, values = saved
    want = values[name].to(torch.float64)
    found = stats(capsys, path, f"t.{name}")
    assert (found["elements"], found["nan"], found["inf"]) == (want.numel(), 0, 0)
    assert found["zero"] == int((want == 0).sum())
    assert (found["min"], found["max"]) == (want.min().item(), want.max().item())
    assert found["mean"] == pytest.approx(want.mean().item(), rel=1e-12)
    assert found["std"] == pytest.approx(want.std(correction=0).item(), rel=1e-12)
    assert found["norm"] == pytest.approx(want.norm().item(), rel=1e-12)
    assert found["shape"] == list(values[name].shape)


def test_what_is_not_finite_is_counted_and_counts_for_nothing_else(saved, capsys):
    path, _ = saved
    odd = stats(capsys, path, "t.odd")
    assert (odd["elements"], odd["nan"], odd["inf"], odd["zero"]) == (6, 1, 2, 2)
    assert (odd["min"], odd["max"], odd["mean"], odd["norm"]) == (0.0, 2.0, pytest.approx(2 / 3), 2.0)
    for name in ("none", "nans"):
        found = stats(capsys, path, f"t.{name}")
        assert (found["min"], found["mean"], found["std"], found["norm"]) == (None, None, None, None)
    assert stats(capsys, path, "t.huge")["norm"] == pytest.approx(2**0.5 * 1e300)
    assert stats(capsys, path, "t.complex")["norm"] == 5.0


def test_a_name_that_is_not_there_is_told_with_those_that_are_alike(saved, capsys):
    assert main(["show", str(saved[0]), "--tensor", "t.nrmal"]) == 2
    assert "there are t.normal" in capsys.readouterr().err


def test_a_damaged_tensor_has_no_statistics(tmp_path, capsys):
    distckpt.save(tmp_path / "run", {"t": torch.ones(5000)})
    (file,) = (tmp_path / "run").glob("step-*/rank-*")
    data = bytearray(file.read_bytes())
    data[4100] ^= 1
    file.write_bytes(data)
    assert main(["show", str(tmp_path / "run"), "--tensor", "t"]) == 1
    assert "do not match their checksum" in capsys.readouterr().err


@pytest.mark.full
def test_statistics_of_a_large_tensor_take_little_memory(tmp_path):
    distckpt.save(tmp_path / "run", {"t": torch.ones(1, 1 << 27), "small": torch.ones(1)})  # 512 MiB, of one row
    program = (
        "import resource, sys; from distckpt.cli import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    took = {}
    for name in ("small", "t"):
        line = [sys.executable, "-c", program, "show", str(tmp_path / "run"), "--tensor", name, "--json"]
        done = subprocess.run(line, cwd=HERE, capture_output=True, text=True, timeout=100)
        assert json.loads(done.stdout)["mean"] == 1.0, done.stderr
        took[name] = int(done.stderr.split()[-1])
    assert took["t"] - took["small"] < 200 << 10


# -- the picture -------------------------------------------------------------------------------------------------------


def made(tensors, world):
    files = tuple(FileInfo(f"rank-{i:05d}.{'a' * 12}.safetensors", 1 << 40, 4096, "0" * 32) for i in range(world + 1))
    return Manifest(7, 1, 1, "a" * 12, "2026-01-01T00:00:00+00:00", world, tensors, files)


def even(shape, world, first=0):
    return TensorInfo(shape, "float32", Grid(shape, ((Split(world, 1),), *((),) * (len(shape) - 1)), first))


def shapes(svg):
    root = ET.fromstring(svg)
    lead = "{http://www.w3.org/2000/svg}"
    return root, [e for e in root.iter() if e.tag == f"{lead}path"], [e for e in root.iter() if e.tag == f"{lead}g"]


@pytest.mark.parametrize("world", [1, 2, 8, 64, 1000])
@pytest.mark.parametrize("count", [0, 10, 5000])
def test_a_picture_is_well_formed_and_no_larger_than_can_be_read(world, count):
    tensors = {f"model.layers.{i // 9}.w{i % 9}.weight": even((64 * 1000, 8), world) for i in range(count)}
    svg = shard_map(made(tensors, world))
    _, paths, areas = shapes(svg)
    assert len(paths) == (min(world, MOST_COLOURS) if world <= 64 else 63) * bool(count)
    assert min(count, 10) <= len(areas) <= 121
    assert len(svg) < 700_000
    assert f"{count} tensors" in svg


def test_a_picture_covers_each_tensor_whatever_its_partition():
    grid = Grid((6, 4), ((Split(2, 2),), (Split(2, 1),)), 0)
    pieces = Pieces((2, 2), ((0, Box((0, 0), (1, 2))), (1, Run(2, 4))))
    tensors = {
        "model.grid": TensorInfo((6, 4), "float32", grid),
        "model.flat": TensorInfo((5, 5), "float32", FlatEven((5, 5), 7, 3, 0)),
        "model.copies": TensorInfo((9,), "float32", Copies((9,), 0, 4)),
        "model.pieces": TensorInfo((2, 2), "float32", pieces),
        "model.scalar": TensorInfo((), "float32", Grid((), (), 1)),
        "model.empty": TensorInfo((0, 3), "float32", Grid((0, 3), ((), ()), 1)),
        "frozen": TensorInfo((3,), "float32", Grid((3,), ((),), 4)),
    }
    svg = shard_map(made(tensors, 4))
    _, paths, areas = shapes(svg)
    covered = 0.0
    for path in paths:
        for part in path.get("d").split("M")[1:]:
            w, h = (float(n) for n in part.split("h", 1)[1].replace("v", " ").split("h")[0].split())
            covered += w * h
    outlined = sum(float(r.get("width")) * float(r.get("height")) for r in (area[1] for area in areas))
    assert covered == pytest.approx(outlined, rel=1e-3)
    assert len(areas) == 6
    assert "earlier step" in svg


def test_a_picture_escapes_what_names_hold():
    svg = shard_map(made({"model.<script>&\"'\x00\x1b": even((400, 400), 2)}, 2))
    root, _, _ = shapes(svg)
    assert "<script>" not in svg
    assert any("<script>&\"'\ufffd\ufffd" in (e.text or "") for e in root.iter())


def test_show_writes_the_picture(saved, tmp_path, capsys):
    out = tmp_path / "who wrote.svg"
    assert main(["show", str(saved[0]), "--svg", str(out)]) == 0
    assert f"svg: {out}" in capsys.readouterr().out
    shapes(out.read_text())
    assert main(["show", str(saved[0]), "--svg", str(tmp_path / "no" / "such.svg")]) == 4
    assert "such.svg" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["who wrote.svg"]
