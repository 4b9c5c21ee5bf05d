"""A job that is killed at a point of what it does, and what a job that comes after it finds: the processes of `kills`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist

from distckpt import Checkpointer, Keep, Local
from distckpt.comm import TorchComm
from distckpt.errors import DistckptError
from distckpt.run.line import Line
from tests.faults import syscalls
from tests.faults.failpoints import FaultyComm, Fuse, kill, writers
from tests.run import lives

PATIENCE = 30.0
"""Seconds that a rank waits for the others at most: the machine may be busy."""
LITTLE = 4.0
"""The same, of a job in which one is killed."""


@dataclass(frozen=True)
class Job:
    """How a job saves. saves: of one life. tiers: in a near directory, copied to a far one."""

    name: str
    wait: bool = False
    tiers: bool = False
    saves: int = 1
    ranks: int = 1

    def checkpointer(self, place, timeout, fuse=None):
        keep = Keep(last=2, best=("loss", "min", 1))
        local = Local(place / "near", keep=Keep(last=2)) if self.tiers else None
        comm = FaultyComm(TorchComm(timeout), fuse) if fuse and self.ranks > 1 else None
        return Checkpointer(self.root(place), wait=self.wait, keep=keep, local=local, timeout=timeout, comm=comm)

    def root(self, place):
        return place / ("far" if self.tiers else "run")


@dataclass(frozen=True)
class Kill:
    """Who dies, and where. at: number or name of the point that this process of this rank passes; None: nobody dies.

    all_: every rank dies with it, and every writer; else this process alone.
    """

    process: str = "trainer"
    rank: int = 0
    at: int | str | None = None
    all_: bool = False


@dataclass
class Told:
    """What processes of a life said before they ended, by its log."""

    staged: dict = field(default_factory=dict)
    """Step -> ranks that had staged it wholly."""
    acknowledged: int = 0
    pids: list = field(default_factory=list)
    failed: list = field(default_factory=list)

    def staged_by(self, ranks):
        """Newest step that so many ranks have staged; 0 if none."""
        return max((step for step, by in self.staged.items() if len(by) == ranks), default=0)

    @staticmethod
    def of(log):
        told = Told()
        for path in sorted(log.parent.glob(f"{log.name}.*")):
            for line in path.read_text().splitlines():
                said = json.loads(line)
                match said["what"]:
                    case "staged":
                        told.staged.setdefault(said["step"], set()).add(said["rank"])
                    case "committed":
                        told.acknowledged = max(told.acknowledged, said["step"])
                    case "began":
                        told.pids.append(said["pid"])
                    case "failed":
                        told.failed.append(said["error"])
        return told


class _Life:
    def __init__(self, job, place, log, plan):
        self.job, self.place, self.plan = job, Path(place), plan
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._log = os.open(f"{log}.{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.told = f"{log}-points-{self.rank}"
        self.step = 0
        self.pids = [os.getpid()]
        if self.job.ranks > 1:
            said = TorchComm(PATIENCE).all_gather("pids", os.getpid().to_bytes(8, "little"))
            self.pids = [int.from_bytes(pid, "little") for pid in said]
        self.say("began", pid=os.getpid())

    def say(self, what, **more):
        os.write(self._log, (json.dumps({"what": what, "rank": self.rank, "step": self.step} | more) + "\n").encode())

    def at(self, process):
        mine = (self.plan.process, self.plan.rank) == (process, self.rank)
        return self.plan.at if mine else None

    def act(self, point):
        Path(f"{self.told}-killed").write_text(point)
        others = set(self.pids) - {os.getpid()} if self.plan.all_ else set()
        kill(*others, *(writers(self.pids) if self.plan.all_ else ()), os.getpid())

    @contextlib.contextmanager
    def lived(self):
        """Points of this process and its writer; returns their fuse."""
        fuse = Fuse(self.act)
        fuse.arm(self.at("trainer"))
        usual = Line.send

        def send(line, message, descriptors=()):
            fuse.touch(f"send {message['do']}")
            sent = usual(line, message, descriptors)
            if sent and message["do"] == "staged":
                self.say("staged")
            fuse.touch(f"send {message['do']} done")
            return sent

        Line.send = send
        also = tuple(self.pids) if self.plan.all_ else ()
        planted = (syscalls.plant, str(self.place), f"{self.told}-writer", self.at("writer"), None, False, also)
        with syscalls.in_writer(*planted), syscalls.points(self.place, fuse):
            try:
                yield fuse
            finally:
                Line.send = usual


def live(job, place, log, plan):
    """Resume, and make the saves of a life, unless it is killed. Returns (points, those of the writer)."""
    life = _Life(job, place, log, plan)
    training = lives.Training()
    with life.lived() as fuse, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fault in a pointer is a warning: the checkpoint is committed
        try:
            with job.checkpointer(life.place, PATIENCE if plan.at is None else LITTLE, fuse) as c:
                c.resume(training.state)
                for _ in range(job.saves):
                    _save(life, c, training)
            if not job.wait:
                life.say("committed")  # for it is closed
        except DistckptError as e:
            life.say("failed", error=str(e))
        except RuntimeError:  # of the model's own collectives: a rank it trains with is dead
            if job.ranks == 1:
                raise
        fuse.disarm()
    return fuse.trace, _lines(f"{life.told}-writer")


def _lines(path):
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def _save(life, checkpointer, training):
    """Train a step and save it; once more if a save was lost with its writer."""
    training.step()
    life.step = training.progress.global_step
    for _ in range(3):
        try:
            checkpointer.save(life.step, training.state, {"loss": (life.step * 7) % 5 + 1})
        except DistckptError as e:
            if life.plan.process != "writer" or life.job.ranks > 1:
                raise
            life.say("failed", error=str(e))
        else:
            break
    if life.job.wait:
        life.say("committed")


@dataclass(frozen=True)
class Resumed:
    """What a job found. step: 0 for a fresh start. wrong: names that hold other bits than they should."""

    step: int
    wrong: list


def resume(job, place, reference):
    """Resume, train and save a step; compare with a training that nothing has interrupted, nor saved."""
    place, training = Path(place), lives.Training()
    job = job if job.tiers else replace(job, wait=True)  # no writer process, which takes a while to start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with job.checkpointer(place, PATIENCE) as c:
            report = c.resume(training.state)
            step = report.step if report else 0
            found = [(step, _digests(training))]
            training.step()
            found.append((step + 1, _digests(training)))
            c.save(step + 1, training.state, {"loss": 1.0}, wait=True)
        if job.tiers:
            training = lives.Training()
            with Checkpointer(job.root(place), wait=True, timeout=PATIENCE) as c:
                c.load(training.state, step=step + 1)
            found.append((step + 1, _digests(training)))
    expected = reference[dist.get_rank() if dist.is_initialized() else 0]
    wrong = [f"step {at}: {n}" for at, held in found for n in held | expected[at] if held.get(n) != expected[at].get(n)]
    return Resumed(step, wrong)


def trained(steps):
    """What a training that nothing interrupts holds after each step, and before the first."""
    training = lives.Training()
    held = [_digests(training)]
    for _ in range(steps):
        training.step()
        held.append(_digests(training))
    return held


def _digests(training):
    return {name: hashlib.sha256(repr(held).encode()).hexdigest() for name, held in training.held().items()}
