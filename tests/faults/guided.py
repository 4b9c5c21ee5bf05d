"""Fuzzing led by coverage (atheris): what no hand would write, read by every parser of what lies in a directory.

    python -m tests.faults guided --seconds 600 --seed 1

Each target runs in a process of its own: libFuzzer ends it at an exception that is none of ours, a hang of 10 seconds,
or 2 GB. It begins with what real saves have written; where a digest stands before all else, it is made anew.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from tests.faults.tally import Tally

_PARSED = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERED = re.compile(r"cov: (\d+)")


def _commit(data, _):
    from distckpt.format import manifest

    manifest.decode(_sealed(data), None)


def _sealed(text):
    from distckpt.format.checksum import digest

    return text + f',"digest":"{digest(text)}"}}\n'.encode()


def _header(data, _):
    from distckpt.format.datafile import decode_header

    header = struct.pack("<Q", len(data)) + data
    size = int.from_bytes(data[-3:], "little") if len(data) > 3 else 0  # the file's, which is not in the header
    decode_header(header, size)


def _objects(data, _):
    from distckpt.format import objects

    objects.decode(data)


def _table(data, _):
    from distckpt.format.checksum import BLOCK, CRC32C, SHA256
    from distckpt.format.datafile import decode_table

    decode_table(data, BLOCK * (len(data) // 32), SHA256 if len(data) % 2 else CRC32C)


RECORDS = ("last.json", "best.json", "meta.json", "launches/0001.json", "launches/0001.beat.json", "leases/x.json",
           "step-00000001/ack-00000.0123456789ab.json")  # fmt: skip


def _records(data, _):
    """Pointers, registry, launches, beats, leases, acks: the first byte says which this is."""
    from distckpt.run.heartbeat import living
    from distckpt.run.history import History
    from distckpt.run.publish import pointing, recorded_rules
    from distckpt.store.memory import MemoryStore

    store, key = MemoryStore(), RECORDS[data[0] % len(RECORDS)] if data else RECORDS[0]
    store._data[key] = _sealed(data[1:]) if "launches/0001.json" in key or "ack" in key else data[1:]
    for read in (pointing, recorded_rules, lambda s: living(s, 0.0), lambda s: list(History(s).committed()),
                 lambda s: History(s).roll_forward()):  # fmt: skip
        _ours(lambda: read(store))


def _foreign(path):
    """Reads a directory of another tool, of which this file has these bytes in place of its own."""

    def target(data, folder):
        from distckpt.foreign.open import open_foreign
        from distckpt.tools.view import Change, View

        (folder / path).write_bytes(data)
        top = folder / path.partition("/")[0]
        found = open_foreign(top)
        if found is not None:
            View(found, Change()).read_all()

    return target


TARGETS = {
    "commit.json": _commit,
    "header": _header,
    "objects": _objects,
    "checksum table": _table,
    "records": _records,
    **{
        path: _foreign(path)
        for path in (
            "dcp/.metadata",
            "zip.pt",
            "old.pt",
            "plain.safetensors",
            "hf/model.safetensors.index.json",
            "tag/mp_rank_00_model_states.pt",
            "tag/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        )
    },
}
"""What is read -> how, from bytes and a folder with one of each kind of directory."""


def _planted(data, _):
    if b"\xff\xff" in data:
        raise ValueError("a planted fault")


PLANTED = {"a planted fault": _planted}
"""Shows that a fault would be found."""


def _seeds(name, made):
    """What a target begins with: what real saves have written, without what is made anew."""
    step = made / "run" / "step-00000002"
    data = next(step.glob("rank-*")).read_bytes()
    unsealed = [
        p.read_bytes().rpartition(b',"digest"')[0] for p in (step / "commit.json", made / "run/launches/0001.json")
    ]
    match name:
        case "commit.json":
            return unsealed[:1]
        case "header":
            return [data[8 : 8 + struct.unpack_from("<Q", data)[0]].rstrip()]
        case "objects":
            return [p.read_bytes() for p in step.glob("*.json") if p.name != "commit.json"]
        case "checksum table":
            return [b"crc32c\0\0\0\0\0\0\0\0\x10\0" + bytes(36), b"sha256\0\0\0\0\0\0\0\0\x10\0" + bytes(33)]
        case "a planted fault":
            return [b"\xff"]
        case "records":
            plain = [(made / "run" / key).read_bytes() for key in RECORDS if (made / "run" / key).is_file()]
            return [bytes([number]) + text for text in (*plain, *unsealed) for number in range(len(RECORDS))]
    return [(made / name).read_bytes()]


def fuzz(name, seed, seconds, folder):
    """Fuzz one target in a process of its own: (inputs, branches covered, what it died of or None)."""
    corpus = folder / "corpus" / name.replace("/", "-").replace(" ", "-")
    corpus.mkdir(parents=True)
    for number, data in enumerate(_seeds(name, folder)):
        (corpus / str(number)).write_bytes(data)
    options = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed + 1}", "-rss_limit_mb=3000", "-malloc_limit_mb=2000",
               "-timeout=10", "-print_final_stats=1", f"-artifact_prefix={folder}/found-", "-max_len=20000"]  # fmt: skip
    command = [sys.executable, "-m", "tests.faults.guided", name, str(folder), *options, str(corpus)]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds + 120, check=False
        )
    except subprocess.TimeoutExpired:
        return 0, 0, "it did not end"
    told = ran.stderr + ran.stdout
    executed, covered = _PARSED.search(told), _COVERED.findall(told)
    found = "" if ran.returncode == 0 else f"exit {ran.returncode}: {told[-1500:]}"
    return int(executed[1]) if executed else 0, int(covered[-1]) if covered else 0, found


def campaign(seed, seconds, names=tuple(TARGETS)):
    """Fuzz each target for its share of the time."""
    from tests.faults.fuzz import make

    tally = Tally()
    if importlib.util.find_spec("atheris") is None:
        tally.problems.append("atheris is not installed: pip install atheris")
        return tally
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place)
        make(folder)
        shutil.copytree(folder / "tags" / "global_step2", folder / "tag")
        for name in names:
            inputs, covered, found = fuzz(name, seed, seconds / len(names), folder)
            tally.counts[name, "parsed or refused"] += inputs
            tally.figures[f"{name}: branches of our code covered"] = covered
            if found:
                tally.add(name, "PROBLEM", f"{name}, seed {seed}: {found}")
    return tally


def _ours(read):
    from distckpt.errors import DistckptError

    with contextlib.suppress(DistckptError):
        read()


def _child():
    """Be the process of one target."""
    import atheris

    name, folder, *options = sys.argv[1:]
    files = {path: path.partition("/")[0] for path in TARGETS if (Path(folder) / path).is_file()}
    with atheris.instrument_imports(include=["distckpt"]):
        import distckpt.run.heartbeat
        import distckpt.run.publish

        if name in files:
            import distckpt.foreign.open
            import distckpt.tools.view  # noqa: F401
    warnings.simplefilter("ignore")
    own = Path(tempfile.mkdtemp(dir=folder))
    for kind in {*files.values()}:
        (shutil.copytree if (Path(folder) / kind).is_dir() else shutil.copy)(Path(folder) / kind, own / kind)
    read = (TARGETS | PLANTED)[name]
    atheris.Setup([sys.argv[0], *options], lambda data: _ours(lambda: read(data, own)))
    atheris.Fuzz()


if __name__ == "__main__":
    _child()
