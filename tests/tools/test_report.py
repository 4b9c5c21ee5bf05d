"""`distckpt report`: one page that says what became of a run, opened in a real browser."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
import torch

import distckpt
from distckpt import Checkpointer, Keep, TrainState
from distckpt.cli import main
from distckpt.format.layout import StepDir
from distckpt.run import events
from distckpt.run.launches import open_launch
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore
from distckpt.tools.charts import Point, Save, curve, seconds_text, timeline
from tests.tools import browser

EVIL = "<script>pwned=1</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as they are: three launches, a rewind, retention, a save that failed, one that was cut off, damage."""
    root = tmp_path_factory.mktemp("report") / f"run {EVIL.replace('/', '')} & co"
    state = TrainState(model=torch.nn.Linear(8, 8), rng=False)
    keep = Keep(last=4, every_steps=500, best=("val_loss", "min", 1))
    for steps, resume in (
        (range(100, 1300, 100), None),
        (range(1300, 2100, 100), None),
        (range(1600, 2200, 100), 1500),
    ):
        with Checkpointer(root, keep=keep, wait=True) as c:
            c.resume(state, **({"step": resume} if resume else {}))
            for step in steps:
                c.save(step, state, {"val_loss": 3 - step / 1e3, EVIL: 1e5 * step, "epoch": step // 500})
    store = LocalStore(root)
    open_launch(store, StepDir(2000), 8, "2026-01-01T00:00:00+00:00")  # so 2100 is superseded
    events.record(store, "launched", launch=4, step=2000, world_size=8)
    events.record(store, "failed", launch=4, step=2100, error=f"no space left {EVIL}")
    write_all(store, "step-00009000/rank-00000.aaaaaaaaaaaa.safetensors", b"half")
    (file,) = (root / "step-00001000").glob("rank-*")
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    return root


def reported(run, out, capsys, *options):
    assert main(["report", str(run), "-o", str(out), *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out), out.read_text()


class _Balanced(HTMLParser):
    """Every tag that opens closes, in order; and what the page would load."""

    _VOID = {"meta", "br", "link", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in {"src", "href", "xlink:href"}]
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def well_formed(text):
    parser = _Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.links == []
    assert "<script" not in text
    assert "url(" not in text
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(picture)


def test_a_report_is_one_page_that_needs_nothing_else(run, tmp_path, capsys):
    value, text = reported(run, tmp_path / "report.html", capsys)
    well_formed(text)
    assert value["state"] == "resumable"
    assert list(value["problems"]) == ["step-00001000"]
    for part in ("step-00009000", "superseded", "incomplete", "damaged", "one of the 1 best by val_loss"):
        assert part in text
    assert "no space left &lt;script&gt;" in text
    assert "the first at or after each multiple of 500 steps" in text
    assert text.count("left behind</title>") >= 6  # dots of what the rewind left, of checkpoints that are gone, too


def test_a_report_is_legible_in_a_browser_wide_and_narrow(run, tmp_path, capsys):
    reported(run, tmp_path / "report.html", capsys)
    found = browser.measured(tmp_path / "report.html", tmp_path, 1280, 400)
    for width, page in found.items():
        assert page["width"] <= width
        assert page["scroll"] <= page["width"], f"at {width} the page must be scrolled sideways"
        assert page["wide"] == []
        assert page["pictures"] == 2 + 2  # saves, two metrics, who wrote what; each once
        assert min(page["small"]) > 0.85, "letters of pictures are too small to read"
        assert page["loaded"] == []
        assert not page["pwned"]
        for part in ("Saves", "Checkpoints", "Launches", "Who wrote what", "step-00002000", EVIL, "no word: killed"):
            assert part in page["text"]


def test_full_reads_every_byte_and_none_reads_no_file(run, tmp_path, capsys):
    (file,) = (run / "step-00000500").glob("rank-*")
    data = bytearray(file.read_bytes())
    data[4100] ^= 1
    file.write_bytes(data)
    try:
        for how, wrong in (("none", 0), ("quick", 1), ("full", 2)):
            value, _ = reported(run, tmp_path / "r.html", capsys, "--verify", how)
            assert len(value["problems"]) == wrong
    finally:
        data[4100] ^= 1
        file.write_bytes(data)


def test_a_run_without_launches_events_or_metrics_is_reported(tmp_path, capsys):
    distckpt.save(tmp_path / "run", {"t": torch.ones(3)})
    value, text = reported(tmp_path / "run", tmp_path / "r.html", capsys)
    well_formed(text)
    assert value["checkpoints"] == 1
    assert "Nothing wrong was found" in text
    assert "No checkpoint has numbers" in text


def test_a_run_of_which_nothing_counts_is_reported(run, tmp_path, capsys):
    import shutil

    shutil.copytree(run, tmp_path / "run", symlinks=True)
    for commit in (tmp_path / "run").glob("*/commit.json"):
        commit.write_bytes(b"{}")
    value, text = reported(tmp_path / "run", tmp_path / "r.html", capsys)
    well_formed(text)
    assert value["state"] == "dead"
    assert "there is nothing to resume from" in text


def test_a_report_that_cannot_be_written_is_told_and_leaves_nothing(run, tmp_path, capsys):
    for out in (tmp_path, tmp_path / "no" / "r.html"):
        assert main(["report", str(run), "-o", str(out)]) == 4
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# -- charts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 30, 5000])
@pytest.mark.parametrize("width", [1150, 360])
def test_a_timeline_of_any_length_is_small_and_well_formed(count, width):
    saves = [
        Save(i, 1 + i // 900, "now", 0.1 * i, i / 7, 10**i if i < 15 else 0, "x<" * (i % 5 == 4)) for i in range(count)
    ]
    text = timeline(saves, width)
    ET.fromstring(text)
    assert len(text) < 900_000
    for x in re.findall(r' x="([-0-9.]+)"', text):
        assert -1 <= float(x) <= width


def test_a_timeline_of_saves_of_which_nothing_is_known_is_a_picture():
    ET.fromstring(timeline([Save(1, 1, "now")], 360))


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [1e-9, 1e9], [-5.0, 1e300], [0.0, 3.0]])
def test_a_curve_stays_within_its_picture(values):
    text = curve([Point(10 * i, 1, v) for i, v in enumerate(values)] + [Point(3, 2, values[0], counts=False)])
    ET.fromstring(text)
    for y in re.findall(r' cy="([^"]+)"', text):
        assert 0 <= float(y) <= 170


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00123, "1.23 ms"), (0.9999, "1 s"), (59, "59 s"), (61, "1 min"), (7500, "2 h 5 min"), (90000, "1 d 1 h")],
)
def test_seconds_as_people_read_them(seconds, text):
    assert seconds_text(seconds) == text


def test_without_a_browser_the_test_skips_and_in_ci_it_fails(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="chromium"):
        browser.require()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="chromium"):
        browser.require()
