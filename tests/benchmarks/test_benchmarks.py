"""The benchmarks run, tell what they are to tell, and find out a peer that loads something else, or from memory."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import __main__ as command
from benchmarks import rounds
from benchmarks.agreed import agreement_of
from benchmarks.cache import StillCached, evict, resident
from benchmarks.covers import Uncovered, _check_tiles, any_region, served, written_once
from benchmarks.meter import Failed, measure
from benchmarks.peers import Distckpt, Raw, TorchSave
from benchmarks.ranks import Ranks
from benchmarks.simulated import MODELS, PARALLELISMS
from benchmarks.workload import Sharded
from distckpt import comm
from distckpt.format.box import Box, Run
from distckpt.format.partition import FlatEven, Grid, Pieces, Split
from distckpt.saving.divide import divide
from distckpt.saving.merge import Agreed
from distckpt.state import Layout
from tests import ranks

PEERS = {"vs_torch_save", "vs_dcp", "vs_dcp_2_threads", "vs_safetensors", "vs_raw"}


def _joined(folder):
    """The ranks of the test, meeting anew for each world that a benchmark asks for."""
    rank, size = comm.current()
    if size > 1:
        dist.destroy_process_group()
    return Ranks(dist.FileStore(f"{folder}/meeting", size), rank, size)


def _benchmark(folder, *argv):
    """What a benchmark prints on this rank."""
    asked = command.parse([*argv, "--quick", "--rounds", "1", "--gb", "0.001", "--folder", folder])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        command.run_all(asked, _joined(folder))
    return said.getvalue()


def told(tmp_path, *argv, size=2, preload=()):
    """Ratios in the last line of a benchmark's output."""
    output, *others = ranks.run(size, _benchmark, str(tmp_path), *argv, preload=preload, timeout=110)
    assert others == [""] * (size - 1)
    last = json.loads(output.splitlines()[-1])
    assert last["bench"] == argv[0]
    assert all(isinstance(value, (int, float)) for value in last["ratios"].values())
    assert all(value > 0 for key, value in last["ratios"].items() if "vs_" in key)
    assert not list(tmp_path.glob("distckpt-bench-*"))
    return last["ratios"]


def test_save_tells_a_ratio_over_every_peer_on_both_media(tmp_path):
    file = tmp_path / "found.json"
    found = told(tmp_path, "save", "--json", str(file), preload=("tests.deepspeed_loaded",))
    assert {f"{m}.{key}" for m in ("disk", "tmpfs") for key in PEERS | {"vs_deepspeed"}} <= found.keys()
    content = json.loads(file.read_text())
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert content["benches"][0]["ratios"]["disk.vs_dcp"]["rounds"] == 1
    assert (tmp_path / content["picture"]).stat().st_size > 1000


def test_load_tells_cold_and_warm(tmp_path):
    found = told(tmp_path, "load")
    assert {f"{lead}{key}" for lead in ("disk.", "disk.warm_", "tmpfs.") for key in PEERS} <= found.keys()


def test_small_tells_saves_loads_and_cpu(tmp_path):
    found = told(tmp_path, "small")
    wanted = ("vs_dcp", "vs_large", "cpu_vs_dcp", "load_vs_dcp", "load_cpu_vs_dcp")
    assert {f"{m}.{key}" for m in ("disk", "tmpfs") for key in wanted} <= found.keys()


@pytest.mark.full
def test_async_tells_stalls_and_the_slowdown_of_a_loop(tmp_path):
    found = told(tmp_path, "async")
    wanted = {"stall_over_memcpy", "disk.vs_dcp_async", "tmpfs.stall_over_memcpy", "first_stall_over_later"}
    assert wanted | {"loop_slowdown", "loop_slowdown_python", "loop_slowdown_torch"} <= found.keys()


def test_reshard_tells_bytes_time_and_memory_of_each_change(tmp_path):
    found = told(tmp_path, "reshard", size=4)
    for change in ("fsdp_to_tp", "zero_to_fsdp", "4_to_3", "hsdp_to_fsdp"):
        assert found[f"{change}_bytes_over_needed"] >= 1
        assert {f"disk.{change}_vs_dcp", f"{change}_over_same_layout", f"{change}_memory_mib"} <= found.keys()
    assert found["bytes_over_needed"] == max(v for k, v in found.items() if k.endswith("_bytes_over_needed"))


@pytest.mark.parametrize("name", ["partial", "replicated"])
def test_partial_and_replicated_tell_bytes_over_needed(tmp_path, name):
    found = told(tmp_path, name)
    for medium in ("disk", "tmpfs"):
        assert found[f"{medium}.bytes_over_needed"] >= 1
        assert {f"{medium}.vs_{peer}" for peer in ("dcp", "torch_save", "safetensors")} <= found.keys()


def test_integrity_tells_the_cost_of_checksums_and_finds_every_corruption(tmp_path):
    found = told(tmp_path, "integrity")
    assert {"disk.checksum_cost", "disk.cold_checksum_cost", "tmpfs.warm_checksum_cost"} <= found.keys()
    assert found["corruptions_found"] == 1


def test_object_tells_throughput_requests_latency_and_tiers(tmp_path):
    pytest.importorskip("obstore")
    found = told(tmp_path, "object", "--server", "moto")
    assert {"s3.save_vs_raw", "s3.load_vs_raw", "s3.writer_memory_mib", "s3.latency_small_over_large"} <= found.keys()
    assert {"tier.stall_ratio", "tier.commit_ratio"} <= found.keys()
    assert (
        found["s3.blocking_requests"] == 3
    )  # at once: are there later launches, which generations are taken, and which are being removed
    assert found["s3.save_requests"] <= 26
    assert found["s3.load_requests"] <= 22


def test_plan_tells_milliseconds_and_bytes(tmp_path):
    found = told(tmp_path, "plan", size=1)
    assert {"plan_ms", "load_plan_ms", "manifest_bytes", "open_ms", "sent_bytes", "commit_s"} <= found.keys()
    assert found["manifest_bytes"] < 1_000_000


@pytest.mark.parametrize("kind", PARALLELISMS)
def test_each_simulated_layout_is_written_once_and_serves_every_reader(kind):
    model = {name: w for name, w in MODELS["Llama-3 8B"]().items() if w.layer in {-1, 0, 31, 32}}
    partitions = divide(
        {f: Agreed(w.shape, w.dtype, PARALLELISMS[kind](model, 48).layouts[f]) for f, w in model.items()}
    )
    assert written_once(partitions, 48) >= len(model)
    for reader, layouts in PARALLELISMS.items():
        assert served(partitions, layouts(model, 16).layouts, 16, every=True), reader


@pytest.mark.parametrize("kind", PARALLELISMS)
def test_simulated_ranks_agree_on_the_layouts_that_they_describe(kind):
    model = {name: w for name, w in MODELS["Llama-3 8B"]().items() if w.layer in {-1, 0, 9, 31, 32}}
    sharding = PARALLELISMS[kind](model, 48)
    agreement, _, _ = agreement_of(model, sharding, 1)
    assert {fqn: tensor.layout for fqn, tensor in agreement.tensors.items()} == sharding.layouts


def test_a_division_with_a_hole_or_an_overlap_is_found_out():
    hole = Pieces((8, 4), ((0, Box((0, 0), (3, 4))), (1, Box((4, 0), (4, 4)))))
    twice = Pieces((8, 4), ((0, Box((0, 0), (5, 4))), (1, Box((4, 0), (4, 4)))))
    for wrong in (hole, twice):
        with pytest.raises(Uncovered):
            written_once({"w": wrong}, 2)
    with pytest.raises(Uncovered, match="28 of the 32 elements"):
        served({"w": hole}, {"w": Layout(Grid((8, 4), ((), ()), 0))}, 1, every=True)
    with pytest.raises(Uncovered, match="elements of"):
        any_region({"w": hole}, 20)
    with pytest.raises(Uncovered, match="not what a reader finds"):
        written_once({"w": Grid((8, 4), ((Split(4, 1),), ()), 0)}, 3)


class _Idle(Grid):
    """A division whose first rank writes nothing."""

    def of_file(self, file):
        return iter(()) if file == self.first else super().of_file(file)


class _Twice(FlatEven):
    """A division whose ranks each write one element of the next."""

    def _run(self, k):
        run = super()._run(k)
        return Run(run.start, min(run.stop + 1, self.shape[0]))


def test_a_division_that_is_not_what_its_kind_says_is_found_out():
    honest = {f"w{i}": Grid((8, 4), ((Split(4, 1),), ()), i) for i in range(3)}
    assert written_once(honest, 8) == 12
    with pytest.raises(Uncovered, match="w3: rank 3 writes"):
        written_once(honest | {"w3": _Idle((8, 4), ((Split(4, 1),), ()), 3)}, 8)
    assert written_once({"w": FlatEven((8,), 3, 7, 1)}, 8) == 3
    with pytest.raises(Uncovered, match="w: rank"):
        written_once({"w": _Twice((8,), 3, 7, 1)}, 8)
    with pytest.raises(Uncovered, match="chunks overlap, or leave a hole"):
        _check_tiles(FlatEven((8,), 3, 0, 0), [Run(0, 4), Run(3, 6), Run(6, 8)])


class Forgetful(TorchSave):
    """A peer whose loads leave one tensor as it was."""

    name = "forgetful"

    def load(self, folder):
        super().load(folder)
        if self.world.rank == 1:
            self.tensors.local["w0"].view(-1)[-1] = 7


class Absent(Raw):
    """A peer that is not installed on one rank."""

    name = "absent"

    def start(self):
        if self.world.rank == 1:
            raise ImportError("no module named absent")


class Broken(Distckpt):
    """Ours, loading something else."""

    def load(self, folder):
        super().load(folder)
        self.tensors.local["w1"].view(-1)[0] += 1


def _compare(folder, kinds):
    with _joined(folder).world() as world:
        tensors = Sharded.large(world, 1 << 20)
        found = rounds.run(world, tensors, Path(folder), kinds, once=rounds.save_once, count=2)
    return [(series.program, len(series.rounds), series.why_not) for series in found]


def test_a_peer_that_loads_something_else_or_is_absent_is_a_row_that_says_so(tmp_path):
    for found in ranks.run(2, _compare, str(tmp_path), (Distckpt, Forgetful, Absent)):
        (ours, rounds_of_ours, nothing), (_, none, wrong), (_, _, absent) = found
        assert (ours, rounds_of_ours, nothing, none) == ("distckpt", 2, "", 0)
        assert "rank 1: Wrong: 1 of 4 tensors are not as they were saved: w0" in wrong
        assert "rank 1: ImportError: no module named absent" in absent


def test_ours_loading_something_else_is_an_error(tmp_path):
    with pytest.raises(ranks.RankError, match="Wrong: 1 of 4 tensors are not as they were saved: w1"):
        ranks.run(2, _compare, str(tmp_path), (Broken,))


def test_a_file_that_stays_in_memory_is_found_out(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert resident(path) == 1 << 20
    evict(tmp_path)
    assert resident(path) == 0
    path.read_bytes()
    with path.open("rb") as file, pytest.raises(StillCached, match="1 files"):
        _held_in_memory(file, tmp_path)


def _held_in_memory(file, folder):
    import mmap

    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0  # mapped pages cannot be evicted
        evict(folder)


def _spend(_folder):
    with _joined(_folder).world() as world:
        path = Path(_folder, f"spent-{world.rank}")
        memory = []
        sample = measure(world, lambda: (path.write_bytes(bytes(1 << 20)), memory.append(bytearray(8 << 20))))
        with pytest.raises(Failed, match=r"rank 0: ValueError: no; rank 1: ValueError: no"):
            measure(world, _refuse)
    return sample


def _refuse():
    raise ValueError("no")


def test_a_sample_has_the_bytes_of_all_ranks_and_the_memory_of_one(tmp_path):
    sample = ranks.run(2, _spend, str(tmp_path))[0]
    assert 2 << 20 <= sample.written_called < 3 << 20
    assert 8 << 20 <= sample.memory < 16 << 20
    assert sample.seconds > 0
    assert sample.cpu > 0


def test_the_command_line_refuses_what_it_does_not_know():
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
        command.parse(["everything"])
    assert "invalid choice" in said.getvalue()
    assert isinstance(command.parse(["save"]), argparse.Namespace)
