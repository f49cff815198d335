"""Two hosts that share no folder: checkpoints and copies of the logs are in an S3 server between them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from dist_gan import attempts, cli, storage
from dist_gan.checkpoint import reader
from tests.conftest import free_port, launch
from tests.dist.test_two_hosts import TRAIN, Hosts, hosts, ip, small
from tests.scenarios.test_runs import events, outcome

assert hosts  # the fixture

STORE = "10.213.10.1"
"""Address of the S3 server, on no cable between the two hosts."""
URL = "s3://runs/two"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_DEFAULT_REGION": "us-east-1"}


class Site(NamedTuple):
    """Two hosts, each with a disk of its own, and the store that both reach."""

    hosts: Hosts
    disks: tuple[Path, Path]
    place: Path
    """Folder under which each host sees its own disk."""
    variables: dict[str, str]

    def start(self, arguments: list[str], *, port: int, logs: Path) -> list[subprocess.Popen[bytes]]:
        """The same command on both hosts."""
        for disk in self.disks:
            disk.mkdir(exist_ok=True)
        first, second = (f"mount --bind {disk} {self.place}" for disk in self.disks)
        return self.hosts.launch(arguments, port=port, logs=logs, mounts=(first, second), **self.variables)


@pytest.fixture
def site(hosts: Hosts, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Cables from each host to the store; the shards are in the store, too."""
    for number, name in enumerate(hosts.names, start=1):
        cable = f"store{number}-{os.getpid()}"[:15]
        ip("link", "add", cable, "type", "veth", "peer", "name", "store", "netns", name)
        ip("address", "add", f"10.213.1{number}.1/24", "dev", cable)
        ip("link", "set", cable, "up")
        ip("-n", name, "address", "add", f"10.213.1{number}.2/24", "dev", "store")
        ip("-n", name, "link", "set", "store", "up")
        ip("-n", name, "route", "add", STORE, "via", f"10.213.1{number}.1")
        if number == 1:
            ip("address", "add", f"{STORE}/32", "dev", cable)
    port = free_port()
    server = ThreadedMotoServer(ip_address="0.0.0.0", port=port, verbose=False)
    server.start()
    variables = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{STORE}:{port}"}
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    fsspec.filesystem("s3").clear_instance_cache()
    boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"]).create_bucket(Bucket="runs")
    for file in small_shards.iterdir():
        storage.publish(f"s3://runs/shards/{file.name}", file.read_bytes())
    place = tmp_path / "disk"
    place.mkdir()
    yield Site(hosts, (tmp_path / "a", tmp_path / "b"), place, variables)
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


def until_committed(count: int, processes: list[subprocess.Popen[bytes]], logs: Path) -> None:
    """Waits until the store has a checkpoint whose serial is larger than `count`."""
    deadline = time.monotonic() + 90
    while not [entry for entry in reader.entries(f"{URL}/checkpoints") if entry.is_committed and entry.serial > count]:
        said = [(logs / f"host-{rank}.log").read_text()[-2000:] for rank in (0, 1)]
        assert all(process.poll() is None for process in processes), said
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


def newest_serial() -> int:
    found = reader.newest(f"{URL}/checkpoints")
    assert found.damaged == ()
    return reader.serial_of(str(found.url))


def kill(hosts: Hosts, which: Callable[[dict[bytes, bytes]], bool]) -> None:
    """Kills the training processes of both hosts whose environment is as wanted."""
    fired = 0
    for name in hosts.names:
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
        for pid in map(int, found.stdout.split()):
            try:
                lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            values = dict(line.partition(b"=")[::2] for line in lines if b"=" in line)
            if which(values):
                os.kill(pid, signal.SIGKILL)
                fired += 1
    assert fired, "nothing was there to be killed"


@pytest.mark.timeout(400)
def test_two_hosts_without_a_common_folder_are_stopped_killed_and_wiped_and_end_bit_for_bit(
    site: Site, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, run, logs = tmp_path / "one", site.disks[0] / "run", tmp_path / "logs"
    assert launch(TRAIN, small(small_shards, one), processes=2).returncode == 0
    command = [*small(Path("unused"), site.place / "run", f"checkpoint.url={URL}"), "data.url=s3://runs/shards", "data.patience_s=9"]
    command.remove("data.url=unused")

    # Asked to stop, on one host only.
    processes = site.start(command, port=29_511, logs=logs)
    until_committed(0, processes, logs)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        process.wait(timeout=60)
    assert outcome(run)["outcome"] == "preempted"
    assert not (site.disks[1] / "run").exists(), "only rank 0 writes a folder"
    assert json.loads(storage.read(f"{URL}/outcome.json")) == outcome(run)

    # Every process is killed; the folder of the first host stays.
    stopped_at = newest_serial()
    processes = site.start(command, port=29_512, logs=logs)
    until_committed(stopped_at, processes, logs)
    kill(site.hosts, lambda values: True)
    for process in processes:
        process.wait(timeout=60)
    assert not (run / "outcome.json").exists()

    # Rank 0 is killed, so the second host says why, in the store; then both disks are lost.
    killed_at = newest_serial()
    processes = site.start(command, port=29_513, logs=logs)
    until_committed(killed_at, processes, logs)
    kill(site.hosts, lambda values: values.get(b"RANK") == b"0")
    for process in processes:
        assert process.wait(timeout=60) != 0
    told = json.loads(storage.read(f"{URL}/outcome.json"))
    assert (told["outcome"], told["attempt"]) == ("crashed", 3), told
    for disk in site.disks:
        shutil.rmtree(disk)

    processes = site.start(command, port=29_514, logs=logs)
    for process in processes:
        assert process.wait(timeout=120) == 0, (logs / "host-0.log").read_text()[-3000:]
    assert outcome(run)["outcome"] == "finished"
    assert outcome(run)["attempt"] == 4

    whole, cut = reader.newest(str(one / "checkpoints")), reader.newest(f"{URL}/checkpoints")
    expected, found = reader.read_manifest(str(whole.url)), reader.read_manifest(str(cut.url))
    assert found["images"] == 6400
    assert found["files"] == expected["files"], "the same bytes, by their hashes"
    assert found["values"]["progress"]["g_updates"] == expected["values"]["progress"]["g_updates"]

    # The logs go on where they were, on the disk and in the store.
    ticks = [json.loads(line)["images"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ticks == [json.loads(line)["images"] for line in (one / "metrics.jsonl").read_text().splitlines()]
    begun = [e["event"] for e in events(run) if e["event"] in ("start", "resume", "preempted", "end")]
    assert begun == ["start", "preempted", "resume", "resume", "resume", "end"]
    assert [claim.attempt for claim in attempts.read(run).claims] == [1, 2, 3, 4]
    for name in ("config.yaml", "attempts.jsonl", "metrics.jsonl", "events.jsonl", "outcome.json"):
        assert storage.read(f"{URL}/{name}") == (run / name).read_bytes(), name
    for folder in ("samples", "tensorboard"):
        assert storage.list_names(f"{URL}/{folder}") == sorted(path.name for path in (run / folder).iterdir())
    assert not (run / "checkpoints").exists()

    # What takes a run takes the store's folder.
    assert cli.main(["verify", URL]) == 0
    assert cli.main(["sample", URL, str(tmp_path / "samples.png"), "--count", "4"]) == 0
    assert cli.main(["export", URL, str(tmp_path / "generator")]) == 0
    assert cli.main(["inspect", URL]) == 0
    assert "outcome: finished" in capsys.readouterr().out
