"""Damage at random to every kind of file that is read: what comes of it is a whole checkpoint, or an error of ours.

    python -m tests.faults fuzz --seconds 600 --seed 1        # all formats, until the time is up

Not a crash, not a hang, not a bomb: each case has 10 seconds, and the process 2 GB more than it began with. What a
checkpoint of ours gives back is what was saved; a commit is damaged below its digest, which is made anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from distckpt import Checkpointer, Progress, TrainState, cli
from distckpt.errors import DistckptError
from distckpt.format.sealed import seal
from distckpt.run.history import History
from distckpt.run.source import open_source
from distckpt.store.local import LocalStore
from distckpt.tools.view import Change, View
from tests.faults.tally import Tally

LIMIT = 10
NUMBERS = (
    b"-1",
    b"0",
    b"1",
    b"65535",
    b"4294967296",
    b"9223372036854775807",
    b"18446744073709551616",
    b"1e999",
    b"null",
)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def trained():
    live = model()
    optimizer = torch.optim.Adam(live.parameters())
    live(torch.ones(3, 5)).sum().backward()
    optimizer.step()
    return live, optimizer


def make(folder: Path) -> dict[str, Path]:
    """One of each kind, by name."""
    live, optimizer = trained()
    with Checkpointer(folder / "run", wait=True) as c:
        for step in (1, 2):
            c.save(step, TrainState(model=live, optimizer=optimizer, progress=Progress()), {"loss": 0.5})
    state = {"model": live.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save({"model": state["model"], "note": {"a": [1, (2, "x")]}}, checkpoint_id=folder / "dcp")
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state["model"], folder / "plain.safetensors")
    (folder / "hf").mkdir()
    save_file(state["model"], folder / "hf" / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(state["model"], "model-00001-of-00001.safetensors"), "metadata": {}}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    tags = ["reshard", str(folder / "run"), str(folder / "tags"), "--to", "deepspeed", "--zero-stage", "2"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([*tags, "--world-size", "2"]) == 0
    names = ("run", "dcp", "zip.pt", "old.pt", "plain.safetensors", "hf", "tags")
    return {name: folder / name for name in names}


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes with one to four things wrong."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(made) + 1)
        match draw.randrange(8):
            case 0 if made:
                made[at % len(made)] ^= 1 << draw.randrange(8)
            case 1 if made:
                made[at % len(made)] = draw.randrange(256)
            case 2:
                del made[at:]
            case 3:
                made[at : at + draw.randrange(1, 64)] = b""
            case 4:
                made[at : at + draw.randrange(64)] = bytes(draw.randrange(1, 64))
            case 5:
                other = draw.randrange(len(made) + 1)
                made[at:at] = made[other : other + draw.randrange(1, 200)]
            case _:
                digits = [i for i in range(len(made)) if 48 <= made[i] <= 57]
                if digits:
                    at = stop = draw.choice(digits)
                    while stop < len(made) and 48 <= made[stop] <= 57:
                        stop += 1
                    made[at:stop] = draw.choice(NUMBERS)
    return bytes(made)


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file of it. Which."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
    file = draw.choice(files)
    data = file.read_bytes()
    if file.name == "commit.json" and draw.random() < 0.9:  # sealed anew, so that what is read is what is damaged
        body = damaged(data[: data.rindex(b',"digest"')] + b"}", draw)
        with contextlib.suppress(ValueError):
            file.write_bytes(seal(json.loads(body)))
            return file.name
        data = body
    file.write_bytes(damaged(data, draw))
    return file.name


def read(kind: str, path: Path):
    """All that can be read of it. A run's tensors must be what was saved."""
    source = open_source(path)
    view = View(source, Change())
    view.read_all()
    for name in source.manifest.objects:
        source.object(name)
    source.rank_objects(0)
    if kind == "run":
        with Checkpointer(path, timeout=5) as c:
            live, optimizer = trained()
            with torch.no_grad():
                for p in live.parameters():
                    p.zero_()
            c.load(TrainState(model=live, optimizer=optimizer, progress=Progress()))
        wanted, _ = trained()
        assert all(torch.equal(a, b) for a, b in zip(live.parameters(), wanted.parameters(), strict=True)), "other bits"
        list(History(LocalStore(path)).committed())


def _late(*_):
    raise TimeoutError("a hang")


def campaign(seed: int, seconds: float, most: int = 1 << 62) -> Tally:
    """Damage and read, until the time is up or so many cases are done."""
    draw, tally = random.Random(seed), Tally()
    old = signal.signal(signal.SIGALRM, _late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), limits[1]))
    until = time.monotonic() + seconds
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kinds = make(Path(folder))
            while time.monotonic() < until and tally.cases < most:
                kind = draw.choice(list(kinds))
                _case(kind, kinds[kind], Path(folder) / "case", draw, tally, f"case {tally.cases} of seed {seed}")
    finally:
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return tally


def _case(kind, whole: Path, case: Path, draw, tally: Tally, name: str) -> None:
    at = case / kind
    case.mkdir()
    (shutil.copytree if whole.is_dir() else shutil.copy)(whole, at)
    file = damage(at, draw)
    signal.alarm(LIMIT)
    try:
        read(kind, at)
        tally.add(kind, "whole")
    except DistckptError as e:
        tally.add(kind, type(e).__name__)
    except Exception as e:
        told = "".join(traceback.format_exception(e)[-4:])
        tally.add(kind, "PROBLEM", f"{name}: {kind}, {file}: {told}")
    finally:
        signal.alarm(0)
    shutil.rmtree(case)
