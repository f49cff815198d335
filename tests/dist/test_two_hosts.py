"""Two machines with a network between them that can be cut: two network namespaces, each with a host name of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from dist_gan import attempts
from tests.conftest import ROOT, environment, launch
from tests.scenarios.test_runs import assert_same_state, events, outcome

TRAIN = ROOT / "train.py"
INSTRUMENTED = ROOT / "tests" / "dist" / "instrumented.py"
ADDRESS = "10.213.7.1"
"""Of the first host."""
STEP_TIMEOUT_S = 10
LEFT_WITHIN_S = STEP_TIMEOUT_S + 35
"""The page on launching says 20 s more than the patience; the rest is for a machine that is busy."""


class Hosts(NamedTuple):
    """Two hosts `a` and `b` with a cable between them."""

    names: tuple[str, str]

    def run(
        self, commands: Sequence[Sequence[str]], *, logs: Path, mounts: tuple[str, str] = (":", ":"), **variables: str
    ) -> list[subprocess.Popen[bytes]]:
        """A command on each host; what they say is in `logs`/host-N.log."""
        logs.mkdir(exist_ok=True)
        processes = []
        for rank, (name, command, mount) in enumerate(zip(self.names, commands, mounts, strict=True)):
            script = f'set -e; hostname host-{"ab"[rank]}; {mount}; exec "$@"'
            apart = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "bash", "-c", script, "bash"]
            with open(logs / f"host-{rank}.log", "ab") as log:
                processes.append(
                    subprocess.Popen(
                        [*apart, *command], cwd=ROOT, env=environment(GLOO_SOCKET_IFNAME="cable", **variables),
                        stdout=log, stderr=log, start_new_session=True,
                    )
                )  # fmt: skip
        return processes

    def launch(
        self, arguments: Sequence[str], *, port: int, logs: Path, mounts: tuple[str, str] = (":", ":"),
        script: Path = TRAIN, each: int = 1, **variables: str,
    ) -> list[subprocess.Popen[bytes]]:  # fmt: skip
        """`accelerate launch` on each host, as a person would start it."""
        commands = [
            [
                sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu.yaml"),
                "--num_machines", "2", "--num_processes", str(2 * each), "--machine_rank", str(rank), "--main_process_ip", ADDRESS,
                "--main_process_port", str(port), str(script), *arguments,
            ]
            for rank in (0, 1)
        ]  # fmt: skip
        return self.run(commands, logs=logs, mounts=mounts, **variables)

    def plug(self, *, connected: bool) -> None:
        """Puts the cable in, or pulls it out."""
        state = "up" if connected else "down"
        ip("-n", self.names[1], "link", "set", "cable", state)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("iproute2 is not installed here")
    names = (f"gan-a-{os.getpid()}", f"gan-b-{os.getpid()}")
    probe = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"network namespaces are not allowed here: {probe.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"{ADDRESS[:-1]}{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Hosts(names)
    finally:
        for name in names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def small(shards: Path, run: Path, *extra: str) -> list[str]:
    return [
        "configs/dcgan-cifar10.yaml", f"data.url={shards}", f"run.dir={run}", "run.images=6400", "run.batch=32",
        "networks.resolution=16", "networks.g_width=4", "networks.d_width=4", "networks.latent_dim=8", "log.samples=4",
        "log.every=320", "checkpoint.every=640", "runtime.threads=1", f"runtime.step_timeout_s={STEP_TIMEOUT_S}", *extra,
    ]  # fmt: skip


def said(logs: Path) -> list[list[str]]:
    """The project's own messages of each host."""
    texts = [(logs / f"host-{rank}.log").read_text() for rank in (0, 1)]
    return [[line for line in text.splitlines() if line.startswith("dist_gan: ")] for text in texts]


@pytest.mark.timeout(300)
def test_two_hosts_train_to_the_weights_of_one_survive_a_cut_cable_and_resume(
    hosts: Hosts, small_shards: Path, tmp_path: Path
) -> None:
    one, two, logs = tmp_path / "one", tmp_path / "two", tmp_path / "logs"
    assert launch(TRAIN, small(small_shards, one), processes=2).returncode == 0

    processes = hosts.launch(small(small_shards, two), port=29_501, logs=logs)
    deadline = time.monotonic() + 90
    while not list(two.glob("checkpoints/*/COMMIT")):
        assert all(process.poll() is None for process in processes), said(logs)
        assert time.monotonic() < deadline
        time.sleep(0.005)
    hosts.plug(connected=False)
    cut = time.monotonic()
    for process in processes:
        assert process.wait(timeout=LEFT_WITHIN_S - (time.monotonic() - cut)) != 0
    left = outcome(two)
    assert left["outcome"] == "crashed", left
    first, second = said(logs)
    assert len(first) == 1, first
    assert len(second) == 1, second
    assert "rank 1 has fallen silent in: " in first[0]
    assert "on host-b); start the same command again to resume" in first[0]
    assert "rank 0's launcher does not answer host-b" in second[0]

    hosts.plug(connected=True)
    for process in hosts.launch(small(small_shards, two), port=29_502, logs=logs):
        assert process.wait(timeout=120) == 0
    assert outcome(two)["outcome"] == "finished"
    assert [e["event"] for e in events(two) if e["event"] in ("start", "resume", "end")] == ["start", "resume", "end"]
    assert attempts.read(two).owner.by.endswith("on host-a")
    assert_same_state(one, two)


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("fault", "each", "words"), [("stop", 2, "has fallen silent"), ("kill", 1, "has fallen silent")])
def test_a_rank_that_is_gone_from_the_second_host_is_named_on_the_first_though_no_collective_ever_fails(
    hosts: Hosts, small_shards: Path, tmp_path: Path, fault: str, each: int, words: str
) -> None:
    run, out, logs, last = tmp_path / "run", tmp_path / "out", tmp_path / "logs", 2 * each - 1
    arguments = [str(out), f"{fault}:20", *small(small_shards, run, "run.images=64k", "runtime.step_timeout_s=300")]
    processes = hosts.launch(
        arguments, port=29_504, logs=logs, script=INSTRUMENTED, each=each, DEAF="1", FAULTY_RANK=str(last)
    )  # fmt: skip
    for process in processes:
        assert process.wait(timeout=120) != 0
    fired = os.path.getmtime(out / "fault-fired")
    assert time.time() - fired < 30
    left = outcome(run)
    assert left["outcome"] == "crashed", left
    assert f"rank {last} {words} in: " in left["reason"]
    assert "on host-b); start the same command again to resume" in left["reason"]
    assert left["unix_time"] - fired < 20
    messages = [line for host in said(logs) for line in host]
    assert len(messages) == 1, messages
    for rank in (0, 1):
        text = (logs / f"host-{rank}.log").read_text()
        assert not text.rstrip().endswith("Error"), "no traceback last"


@pytest.mark.timeout(180)
def test_the_kubernetes_manifest_holds_a_torchrun_that_trains_two_hosts_to_the_weights_of_one(
    hosts: Hosts, small_shards: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(TRAIN, small(small_shards, one, "run.images=640"), processes=2).returncode == 0
    job = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    commands = []
    for number, role in enumerate(("Master", "Worker")):
        (container,) = job["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["command"] == ["torchrun"]
        given = {"RANK": str(number), "MASTER_ADDR": ADDRESS, "MASTER_PORT": str(container["ports"][0]["containerPort"])}
        arguments = [re.sub(r"\$\((\w+)\)", lambda match, given=given: given[match[1]], a) for a in container["args"]]
        arguments[arguments.index("--nproc_per_node=8")] = "--nproc_per_node=1"
        place = arguments.index("train.py")
        commands.append(
            [sys.executable, "-m", "torch.distributed.run", *arguments[: place + 1]]
            + small(small_shards, two, "run.images=640")
        )
    # As the operator sets it: the number of pods, which is not that of ranks once a pod has several.
    for process in hosts.run(commands, logs=tmp_path / "logs", WORLD_SIZE="2"):
        assert process.wait(timeout=90) == 0, (tmp_path / "logs" / "host-0.log").read_text()[-3000:]
    assert events(two)[0]["world_size"] == 2
    assert_same_state(one, two)


@pytest.mark.timeout(120)
def test_a_run_folder_that_only_the_first_host_sees_is_refused_with_the_name_of_the_other(
    hosts: Hosts, small_shards: Path, tmp_path: Path
) -> None:
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir()
    began = time.monotonic()
    mounts = (":", f"mount -t tmpfs tmpfs {disk}")
    for process in hosts.launch(small(small_shards, disk / "run"), port=29_503, logs=logs, mounts=mounts):
        assert process.wait(timeout=60) != 0
    assert time.monotonic() - began < 60
    left = json.loads((disk / "run" / "outcome.json").read_text())
    assert left["outcome"] == "configuration_wrong"
    assert f"run.dir: rank 1 on host-b does not see {disk / 'run'}" in left["reason"]
    messages = [line for host in said(logs) for line in host]
    assert len(messages) == 1, messages
    assert not (disk / "run" / "checkpoints").exists()
