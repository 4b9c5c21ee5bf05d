"""`distckpt diff`: what two checkpoints differ in."""

from __future__ import annotations

import json

import torch

import distckpt
from distckpt.cli import main


def compared(capsys, a, b, *options, code):
    assert main(["diff", str(a), str(b), *options, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_equal_checkpoints_do_not_differ(tmp_path, capsys):
    state = {"model": {"w": torch.tensor([1.0, float("nan")]), "c": torch.randn(3, dtype=torch.complex64)}, "step": 3}
    for name in "ab":
        distckpt.save(tmp_path / name, state)
    found = compared(capsys, tmp_path / "a", tmp_path / "b", code=0)
    assert (found["equal"], found["apart"], found["objects"]) == (2, [], [])


def test_it_tells_names_shapes_dtypes_objects_and_how_far_values_are_apart(tmp_path, capsys):
    far = torch.arange(12.0).view(3, 4)
    distckpt.save(
        tmp_path / "a",
        {
            "m": {"x": far, "same": torch.ones(2), "shape": torch.ones(2), "dtype": torch.ones(2), "a": torch.ones(1)},
            "o": 1,
        },
    )
    other = far.clone()
    other[2, 1] = 10.0
    other[0, 1] = -1.0
    distckpt.save(
        tmp_path / "b",
        {
            "m": {
                "x": other,
                "same": torch.ones(2),
                "shape": torch.ones(3),
                "dtype": torch.ones(2).half(),
                "b": torch.ones(1),
            },
            "o": 2,
        },
    )
    found = compared(capsys, tmp_path / "a", tmp_path / "b", code=1)
    assert found["apart"] == [{"fqn": "m.x", "count": 2, "max_abs": 2.0, "max_rel": 2.0}]
    assert (found["only_in_a"], found["only_in_b"], found["equal"]) == (["m.a"], ["m.b"], 1)
    assert [line.split(":")[0] for line in found["unlike"]] == ["m.dtype", "m.shape"]
    assert found["objects"] == ["o"]
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    text = capsys.readouterr().out
    assert "m.x" in text
    assert "1 are apart" in text
    assert compared(capsys, tmp_path / "a", tmp_path / "b", "--only", "m.same", code=0)["equal"] == 1


def test_a_checkpoint_is_compared_with_what_another_tool_saved(tmp_path, capsys):
    weights = {"w": torch.randn(5)}
    distckpt.save(tmp_path / "ours", {"model": weights})
    torch.save(weights, tmp_path / "theirs.pt")
    assert compared(capsys, tmp_path / "ours", tmp_path / "theirs.pt", "--only", "model", code=0)["equal"] == 1


def test_large_tensors_are_read_in_slabs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distckpt.loading.read.WINDOW", 1 << 10)
    a, b = torch.randn(100, 64), torch.randn(100, 64)
    b[:99] = a[:99]
    for name, t in (("a", a), ("b", b)):
        distckpt.save(tmp_path / name, {"model": {"w": t}})
    found = compared(capsys, tmp_path / "a", tmp_path / "b", code=1)["apart"][0]
    assert found["count"] == 64
    assert found["max_abs"] == float((a.double() - b.double()).abs().max())


def test_what_is_not_there_is_one_line(tmp_path, capsys):
    distckpt.save(tmp_path / "a", {"x": torch.ones(1)})
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "none")]) == 3
    assert capsys.readouterr().err.count("\n") == 1
