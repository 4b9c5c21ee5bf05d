"""Real ranks for tests: processes forked from a server that has imported torch once, joined by gloo over a file.

A group starts in a few tenths of a second. A hang is a failure: the group is killed, and the test told who hung.
`preload`: modules that a server imports besides; each set of them has a server of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

_PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",  # an optimizer's constructor imports it
    "distckpt.run.checkpointer",
    "distckpt.run.trainstate",
]


class RankError(AssertionError):
    """What a rank raised, with its traceback."""


def _main(rank, size, rendezvous, fn, args, answer):
    faulthandler.enable()
    multiprocessing.set_start_method("fork", force=True)  # for what a test starts: else each would be a server anew
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    code = 1
    try:
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
            dist.barrier()  # a rank that is done at once must not be gone while others still connect to it
        result = ("ok", fn(*args))
        code = 0
    except BaseException as e:
        result = ("error", f"rank {rank}: {type(e).__name__}: {e}\n{traceback.format_exc()}")
    try:
        data = pickle.dumps(result)
    except Exception as e:
        data, code = pickle.dumps(("error", f"rank {rank}: its result cannot be pickled: {e}")), 1
    Path(f"{answer}.tmp").write_bytes(data)
    os.replace(f"{answer}.tmp", answer)
    for child in multiprocessing.active_children():
        child.kill()  # a DataLoader's workers look for their parent only every few seconds
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a group with a dead member must not be waited for


_servers = {}


@contextlib.contextmanager
def _served(preload):
    """Start processes from the server with these modules: multiprocessing knows of one server only."""
    if preload not in _servers:
        _servers[preload] = multiprocessing.forkserver.ForkServer()
        _servers[preload].set_forkserver_preload([*_PRELOAD, *preload])
    usual = multiprocessing.forkserver.connect_to_new_process
    multiprocessing.forkserver.connect_to_new_process = _servers[preload].connect_to_new_process
    try:
        yield multiprocessing.get_context("forkserver")
    finally:
        multiprocessing.forkserver.connect_to_new_process = usual


def run(size, fn, *args, timeout=60.0, may_die=(), preload=()):
    """Run fn(*args) on `size` ranks; return their results by rank (None for those in `may_die` that died)."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        group = start(size, fn, *args, folder=folder, preload=preload)
        deadline = time.monotonic() + timeout
        for process in group:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [r for r, process in enumerate(group) if process.is_alive()]
        kill(group)
        if hung:
            raise RankError(f"ranks {hung} did not finish within {timeout} s")
        return answers(group, folder, may_die=may_die)


def answers(group, folder, *, may_die=()):
    """What ranks that have ended returned, by rank; see `run`."""
    results, errors = [], []
    for rank, process in enumerate(group):
        path = Path(folder, f"answer-{rank}")
        if not path.exists():
            if rank not in may_die:
                errors.append(f"rank {rank} died with exit code {process.exitcode}")
            results.append(None)
            continue
        kind, value = pickle.loads(path.read_bytes())
        if kind == "error":
            errors.append(value)
        results.append(value)
    if errors:
        raise RankError("\n".join(errors))
    return results


def start(size, fn, *args, folder, preload=()):
    """Start the ranks and return their processes, without waiting."""
    rendezvous = Path(folder, "rendezvous")
    group = []
    with _served(preload) as context:
        for rank in range(size):
            answer = Path(folder, f"answer-{rank}")
            process = context.Process(target=_main, args=(rank, size, str(rendezvous), fn, args, str(answer)))
            process.start()
            group.append(process)
    return group


def kill(group):
    """SIGKILL every rank that still lives."""
    for process in group:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join(10)


def expect_error(fn, kind):
    """Call fn and return the text of the error of this kind that it must raise."""
    try:
        fn()
    except kind as e:
        return str(e)
    raise AssertionError(f"no {kind} was raised")
