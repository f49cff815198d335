"""A Slurm of the tests' own: a controller and two node daemons on this machine's loopback, in a temporary folder.

Each node daemon has a host name and a table of mounts of its own, so that the program sees two machines, and so that a
test can show the second one another disk or other code.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.conftest import ROOT, environment, free_port

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "munged")
NODES = ("n0", "n1")

CONFIGURATION = """\
ClusterName=dist-gan-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=20
InactiveLimit=0
MinJobAge=600
{nodes}
PartitionName=normal Nodes=n0,n1 Default=YES PriorityTier=1 MaxTime=60
PartitionName=urgent Nodes=n0,n1 PriorityTier=9 PreemptMode=OFF MaxTime=60
"""


def missing() -> str | None:
    """Why a Slurm cannot be started here; None if it can."""
    if any(shutil.which(program, path=_path()) is None for program in PROGRAMS):
        return "Slurm is not installed here"
    if os.geteuid() != 0:
        return "a Slurm with two nodes of their own names is started by root only"
    return None


def separate() -> bool:
    """Whether a process may be given its own host name and mounts."""
    probe = ["unshare", "--mount", "--uts", "sh", "-c", "hostname probe && mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Cluster:
    """The daemons, and what a user types at them.

    Args:
        folder: for everything the daemons write; short, because a socket's path may have 107 characters.
        mounts: shell lines that the second node runs before its daemon, among mounts that only it sees.
    """

    def __init__(self, folder: Path, *, mounts: str = ":") -> None:
        self.folder = folder
        self.separate = separate()
        self._own = f"SLURM_CONF={folder / 'slurm.conf'}"
        path = f"{Path(sys.executable).parent}:{_path()}"
        # The nodes' names do not resolve, so gloo has to be told its interface, as on many a real cluster.
        self.environment = environment(PATH=path, SLURM_CONF=str(folder / "slurm.conf"), GLOO_SOCKET_IFNAME="lo")
        del self.environment["PYTHONPATH"]  # a job trains with the code that it was submitted with
        self._mounts = mounts
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "state").mkdir(mode=0o700)
        for node in NODES:
            (folder / f"spool-{node}").mkdir(mode=0o755)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 RealMemory=1000"
            for node in NODES
        )
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=folder, host=os.uname().nodename, user=pwd.getpwuid(os.geteuid()).pw_name,
                controller_port=free_port(), nodes=nodes,
            )
        )  # fmt: skip

    # -- daemons --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts everything; returns when both nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}"]
        files = [f"--{name}={self.folder}/munge.{name}" for name in ("pid-file", "log-file", "seed-file")]
        self._run("munged", [*munge, *files])
        wait_until(lambda: (self.folder / "munge.socket").exists(), seconds=10, what="munged")
        self._run("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.states() == ["idle", "idle"], seconds=30, what="two idle nodes")

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node."""
        command = ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")]
        if self.separate:
            mounts = self._mounts if node == NODES[1] else ":"
            script = f'set -e; hostname {node}; {mounts}; exec "$@"'
            command = ["unshare", "--mount", "--uts", "bash", "-c", script, "bash", *command]
        self._run(node, command)

    def kill_node(self, node: str) -> None:
        """Kills the daemon of a node, as the kernel would; what it has started lives on."""
        self._daemons.pop(node).kill()

    def _run(self, name: str, command: Sequence[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def stop(self) -> None:
        """Ends all jobs and daemons; nothing is left."""
        if "slurmctld" in self._daemons:
            self.call("scancel", "--user=root", check=False)
            wait_until(lambda: not self.queue(), seconds=40, what="the end of all jobs")
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        wait_until(lambda: not self.processes(), seconds=20, what="the end of every process of this cluster")

    def processes(self, job: str | None = None) -> list[int]:
        """Every living process of a job, or of the whole cluster, whoever its parent has become."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if self._own in variables and (job is None or f"SLURM_JOB_ID={job}" in variables):
                found.append(int(folder.name))
        return found

    # -- what a user types ----------------------------------------------------------------------------------------

    def call(self, *command: str, cwd: Path = ROOT, check: bool = True, timeout_s: float = 30, **more: str) -> str:
        """Output of a command."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment | more,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def states(self) -> list[str]:
        """Of the nodes."""
        return self.call("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%t", check=False).split()

    def submit(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """Number of the job that `sbatch` has made."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd, **variables).strip()

    def wait(self, job: str, *, seconds: float) -> dict[str, str]:
        """Waits for a job's end, requeues included; what Slurm knows of it then. No process of it is left."""
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        wait_until(lambda: self.job(job)["JobState"] in ended, seconds=seconds, what=f"the end of job {job}")
        wait_until(lambda: not self.processes(job), seconds=20, what=f"the end of every process of job {job}")
        return self.job(job)

    def queue(self) -> list[str]:
        """Jobs that have not ended."""
        return self.call("squeue", "--noheader", "--format=%i", check=False).split()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        line = self.call("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(part.split("=", 1) for part in line.split() if "=" in part)


def wait_until(condition: Callable[[], object], *, seconds: float, what: str) -> None:
    """Waits for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no sign of {what} within {seconds:.0f} s"
        time.sleep(0.1)


def command_line(pid: int) -> str:
    """Of a process; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
