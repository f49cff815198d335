"""Checkpoints in an object store that speaks S3, on loopback, and is away when it is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from dist_gan import storage
from dist_gan.checkpoint import reader
from dist_gan.config import RuntimeSection
from dist_gan.runtime import LaunchSettings, Runtime
from dist_gan.types import TrainingFailed
from tests.conftest import free_port
from tests.services.test_checkpoint import Part, checkpointer, saved

AWAY_S = 30.0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[ThreadedMotoServer]]]:
    """A port, and a list for the server that the test starts there."""
    port, servers = free_port(), []
    for name, value in {
        "AWS_ACCESS_KEY_ID": "canary-id", "AWS_SECRET_ACCESS_KEY": "canary-secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    yield port, servers
    for server in servers:
        server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


def serve(port: int, servers: list[ThreadedMotoServer]) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    servers.append(server)


def make_bucket(port: int) -> None:
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="runs")


def test_a_store_that_is_away_for_a_while_delays_a_save_and_loses_nothing(
    store: tuple[int, list[ThreadedMotoServer]],
) -> None:
    port, servers = store
    serve(port, servers)
    make_bucket(port)
    runtime = Runtime(RuntimeSection(threads=1), LaunchSettings())
    found = saved("s3://runs/checkpoints", runtime, 10)
    servers.pop().stop()

    def back() -> None:
        time.sleep(AWAY_S)
        serve(port, servers)  # moto keeps its buckets in the process, as a store does on its disks

    threading.Thread(target=back, daemon=True).start()
    began = time.monotonic()
    found.save(20, {"part": Part(20)})
    assert time.monotonic() - began < 1.0, "training goes on"
    found.drain()
    assert time.monotonic() - began >= AWAY_S - 0.5, "the store was away when it was needed"
    newest = found.newest()
    assert str(newest.url).endswith("000000000020")
    assert newest.damaged == ()
    assert reader.verify(str(newest.url)) == []
    other = Part()
    checkpointer("s3://runs/checkpoints", runtime).load(str(newest.url), {"part": other})
    assert other.counter == 20


def test_a_store_that_stays_away_fails_the_save_within_the_budget_without_a_secret(
    store: tuple[int, list[ThreadedMotoServer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.patience, "PATIENCE_S", 3.0)
    runtime = Runtime(RuntimeSection(threads=1), LaunchSettings())
    found = checkpointer("s3://runs/checkpoints", runtime)
    found._serial = 0
    found.save(20, {"part": Part(20)})
    with pytest.raises(TrainingFailed) as error:
        found.drain()
    assert "s3://runs/checkpoints/checkpoint-0001-000000000020" in str(error.value)
    assert "canary" not in str(error.value)
