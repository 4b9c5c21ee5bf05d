"""A real SLURM cluster on this machine: a controller and some nodes, each a host of its own as far as it can tell.

Every host is a set of namespaces: network (own address, own cable to one switch), UTS (own hostname), PID (SIGKILL of
its first process is a power cut) and mount (own /dev/shm, own /local). The file system is the shared one of the
cluster. Nothing outlives the processes, and these end with the process that made them, whatever ends it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

_NET = "10.77.0"
_TIMEOUT = 30
"""Seconds that a command of SLURM, or a host's start, may take."""

_CONF = """\
ClusterName=test
SlurmctldHost=ctl({net}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait={kill_wait}
SlurmdTimeout=6
InactiveLimit=0
MessageTimeout=10
BatchStartTimeout=10
TreeWidth=100
NodeName=DEFAULT CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
"""Delays for tests, not for a cluster: by default a requeued job waits for cred_expire, 120 s."""

_CONTROLLER = """\
hostname ctl
ip link set lo up
ip link add br0 type bridge
ip addr add {net}.254/24 dev br0
ip link set br0 up
mount --bind {dir}/hosts /etc/hosts
munged --force --key-file={dir}/munge/key --socket={dir}/munge/socket --pid-file={dir}/munge/pid \
    --log-file={dir}/munge/log --seed-file={dir}/munge/seed --num-threads=2
exec slurmctld -D -c
"""

_NODE = """\
hostname n{i}
ip link set lo up
mount --bind {dir}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add {net}.{i}/24 dev eth0
ip link set eth0 up
exec slurmd -D -N n{i}
"""


def require() -> None:
    """Skip the test where no cluster can be brought up, saying why; where CI runs, that is a failure."""
    programs = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter", "setpriv")
    missing = [name for name in programs if not shutil.which(name, path=_path())]
    why = f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)" if missing else ""
    if os.geteuid() != 0:
        why = "network namespaces are root's"
    elif not missing:
        tried = subprocess.run(["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True)
        why = tried.stderr.decode()
    if why and os.environ.get("CI") == "true":
        pytest.fail(f"no SLURM here: {why}")
    if why:
        pytest.skip(f"no SLURM here: {why}")


def _path():
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """A cluster of `nodes` nodes with two CPUs each, n1, n2, ..., as a context manager. Its files lie in `folder`."""

    def __init__(self, folder: Path, nodes: int = 2, *, kill_wait: int = 20, grace: int = 20) -> None:
        self.nodes = nodes
        self._dir = folder
        self._hosts: dict[str, subprocess.Popen] = {}
        munge = folder / "munge"
        munge.mkdir(parents=True, mode=0o700)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        (folder / "state").mkdir()
        numbers = range(1, nodes + 1)
        names = ["127.0.0.1 localhost", f"{_NET}.254 ctl", *(f"{_NET}.{i} n{i}" for i in numbers)]
        (folder / "hosts").write_text("\n".join(names) + "\n")
        listed = "\n".join(f"NodeName=n{i} NodeAddr={_NET}.{i}" for i in numbers)
        conf = _CONF.format(net=_NET, dir=folder, nodes=listed, kill_wait=kill_wait, grace=grace)
        (folder / "slurm.conf").write_text(conf)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # 22.05 rejects `disabled`
        self._environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def __enter__(self):
        try:
            self._boot("ctl", _CONTROLLER)
            for i in range(1, self.nodes + 1):
                self.on(i)
            self.until(lambda: self._idle() == self.nodes, f"{self.nodes} idle nodes", AssertionError)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for host in reversed(self._hosts.values()):
            host.kill()  # and with it, by --kill-child, all that runs on it
        for host in self._hosts.values():
            host.wait(_TIMEOUT)

    # -- hosts -------------------------------------------------------------------------------------------------------

    def _boot(self, name, script, **values):
        """Start a host. Each ends with this process, by its death signal."""
        own = self._dir / f"local-{name}"
        own.mkdir(exist_ok=True)
        script = "set -eu\n" + script.format(net=_NET, dir=shlex.quote(str(self._dir)), **values)
        spaces = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        with (self._dir / f"boot-{name}.log").open("ab") as log:
            self._hosts[name] = host = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *spaces, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        ours = os.readlink("/proc/self/ns/net")
        self.until(lambda: os.readlink(f"/proc/{host.pid}/ns/net") != ours, f"namespaces of {name}")

    def _switch(self, *words):
        """Run ip(8) at the switch, which is the controller."""
        command = ["nsenter", f"--net=/proc/{self._hosts['ctl'].pid}/ns/net", "ip", "link", *words]
        subprocess.run(command, check=True, timeout=_TIMEOUT, capture_output=True)

    def on(self, i):
        """Switch a node on."""
        self._boot(f"n{i}", _NODE, i=i)
        self.until(lambda: self._switch("show", "br0") or True, "the switch", OSError, subprocess.CalledProcessError)
        self._switch("add", f"p{i}", "type", "veth", "peer", "name", "eth0", "netns", str(self._hosts[f"n{i}"].pid))
        self._switch("set", f"p{i}", "master", "br0", "up")

    def off(self, i):
        """Cut a node's power."""
        host = self._hosts.pop(f"n{i}")
        host.kill()
        host.wait(_TIMEOUT)
        self._switch("del", f"p{i}")  # else it goes a little later, with the node's end of the cable

    def unplug(self, i):
        """Cut a node off from the network. What runs on it goes on."""
        self._switch("set", f"p{i}", "down")

    def plug(self, i):
        """Undo `unplug`."""
        self._switch("set", f"p{i}", "up")

    # -- SLURM -------------------------------------------------------------------------------------------------------

    def run(self, *command, cwd=None, **variables):
        """Run a command on the controller; returns what it prints."""
        spaces = f"/proc/{self._hosts['ctl'].pid}/ns"
        done = subprocess.run(
            ["nsenter", f"--net={spaces}/net", f"--uts={spaces}/uts", *command],
            cwd=cwd,
            env=self._environment | variables,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def submit(self, *command, cwd, **variables):
        """Number of the job that sbatch makes of the command."""
        return int(self.run("sbatch", "--parsable", *command, cwd=cwd, **variables))

    def job(self, number):
        """What `scontrol show job` says."""
        said = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def state(self, number):
        """State of a job."""
        return self.job(number)["JobState"]

    def mark_down(self, i):
        """Have the controller notice at once that a node is lost (it does within half a minute)."""
        self.run("scontrol", "update", f"nodename=n{i}", "state=down", "reason=test")

    def _idle(self):
        said = self.run("sinfo", "--noheader", "--partition=low", "--format=%T %D").split()
        return sum(int(n) for state, n in zip(said[::2], said[1::2], strict=True) if state == "idle")

    def until(self, holds, what, *passing, seconds=_TIMEOUT):
        """Wait until something holds. Errors of the types `passing` count as no."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if found := holds():
                    return found
            except passing:
                pass
            if time.monotonic() > deadline:
                pytest.fail(f"waited {seconds} s for {what}{self.logs()}")
            time.sleep(0.05)

    def logs(self, lines=12):
        """Ends of the daemons' logs."""
        text = ""
        for path in sorted([*self._dir.glob("*.log")]):
            text += f"\n--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
        return text
