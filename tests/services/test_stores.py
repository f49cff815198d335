"""Images out of an object store that fails: what can be had again is, what cannot ends the run with one sentence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

from benchmarks.stream import SlowServer
from dist_gan import storage
from dist_gan.data.disk_cache import DiskCache
from dist_gan.data.manifest import check_shards, read_manifest
from dist_gan.types import TrainingFailed
from tests.conftest import ROOT, environment, launch_command
from tests.scenarios.test_runs import assert_same_state, outcome
from tests.services.faulty_store import FAULTS, FaultyStore, s3_with
from tests.services.test_stream import keys_of, stream

URL = "s3://shards/set"
TRAIN = ROOT / "train.py"


@pytest.fixture(scope="module")
def served(small_shards: Path) -> Iterator[tuple[FaultyStore, dict[str, str]]]:
    with s3_with(small_shards) as found:
        yield found


@pytest.fixture
def store(served: tuple[FaultyStore, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """The store, sound again, and this process led to it."""
    found, variables = served
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    found.sound()
    yield found
    found.sound()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.parametrize("fault", FAULTS)
def test_images_are_the_same_whatever_goes_wrong_on_the_way(store: FaultyStore, small_shards: Path, fault: str) -> None:
    store.every, store.faults = 3, (fault,)
    remote, local = stream(URL, cache=0), stream(small_shards, cache=0)
    for _ in range(12):
        one, other = remote.next(), local.next()
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)
    remote.close()
    local.close()
    assert store.failed
    if fault != "slow":
        assert remote.retries > 0
    assert not remote.damaged(), "a store that fails is no damage"


def test_a_read_that_broke_off_goes_on_from_where_it_was(store: FaultyStore, small_shards: Path) -> None:
    shard = next(small_shards.glob("*.tar"))
    store.every, store.faults = 1, ("short", "none")
    patience = storage.Patience(10)
    part = 20_000
    data = storage.read_range(f"{URL}/{shard.name}", 0, part, patience=patience)
    assert data == shard.read_bytes()[:part]
    starts = [int(read.split("bytes=")[1].split("-")[0]) for read in store.reads]
    assert starts == sorted(set(starts)), "no byte was asked for twice"
    assert store.failed[0] == "short"
    assert patience.retries == 1


def test_expired_credentials_end_the_run_at_once_and_replace_no_image(store: FaultyStore) -> None:
    source = stream(URL, cache=0)
    store.expired = True
    began = time.monotonic()
    with pytest.raises(
        TrainingFailed, match=r"cannot read s3://shards/set/shard-\d+\.tar: no write permission|expired"
    ) as e:
        keys_of(source, 1)
    assert time.monotonic() - began < 10, "what another try cannot mend is not tried again"
    assert "canary" not in str(e.value)


def test_a_store_that_is_gone_is_asked_for_as_long_as_was_said(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_with(small_shards) as (store, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        source = stream(URL, cache=0, patience_s=4, block=4)
        source.next()
        store.stop()
        began = time.monotonic()
        with pytest.raises(
            TrainingFailed,
            match=r"cannot read s3://shards/set/.*: the store has not answered for 4 s .*data.patience_s",
        ):
            keys_of(source, 1000)
        assert time.monotonic() - began < 10
    fsspec.filesystem("s3").clear_instance_cache()


def train(url: str, run: Path, variables: dict[str, str], *settings: str) -> subprocess.Popen[str]:
    arguments = [
        "configs/dcgan-cifar10.yaml", f"data.url={url}", f"run.dir={run}", "run.images=1280", "run.batch=32",
        "data.cache=0", "data.block=4", "networks.resolution=16", "networks.g_width=4", "networks.d_width=4",
        "networks.latent_dim=8", "log.samples=4", "log.every=320", "runtime.threads=1", *settings,
    ]  # fmt: skip
    return subprocess.Popen(
        launch_command(TRAIN, arguments, processes=2), cwd=ROOT, env=environment(**variables),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_run_whose_every_third_read_fails_ends_with_the_weights_of_a_run_on_a_disk(
    store: FaultyStore, served: tuple[FaultyStore, dict[str, str]], small_shards: Path, tmp_path: Path
) -> None:
    store.every = 3
    runs = {url: tmp_path / name for url, name in ((URL, "remote"), (str(small_shards), "local"))}
    for url, run in runs.items():
        process = train(url, run, served[1])
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-3000:]
    assert_same_state(*runs.values())
    assert len(store.failed) > 20
    retries = [line for line in (runs[URL] / "metrics.jsonl").read_text().splitlines() if '"data/retries"' in line]
    assert retries
    for file in (p for run in runs.values() for p in run.rglob("*") if p.is_file()):
        assert b"canary" not in file.read_bytes(), f"a secret is in {file}"


def test_when_the_store_goes_away_all_ranks_leave_within_the_budget_and_say_so_once(
    small_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with s3_with(small_shards) as (store, variables):
        process = train(URL, run, variables, "run.images=1M", "data.patience_s=5", "log.every=64")
        until = time.monotonic() + 60
        while time.monotonic() < until and not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        store.stop()
        began = time.monotonic()
        out, errors = process.communicate(timeout=120)
        took = time.monotonic() - began
    assert process.returncode != 0
    assert took < 5 + 30, f"{took:.0f} s"
    said = [line for line in (out + errors).splitlines() if "cannot read s3://" in line]
    assert len(said) == 1, said
    assert outcome(run)["outcome"] == "failed"
    assert outcome(run)["code"] == 3
    assert "canary" not in out + errors


# -- the cache on a disk ----------------------------------------------------------------------------------------------


def test_a_second_pass_touches_the_network_for_nothing(store: FaultyStore, tmp_path: Path) -> None:
    cache = {"cache": 0, "disk_cache": str(tmp_path / "cache")}
    first = keys_of(stream(URL, **cache), 35)
    assert store.reads
    store.reads.clear()
    again = stream(URL, **cache)
    assert keys_of(again, 35) == first
    assert store.reads == []


def test_two_processes_of_a_machine_share_what_was_read(store: FaultyStore, tmp_path: Path) -> None:
    cache = {"cache": 0, "disk_cache": str(tmp_path / "cache"), "lanes": 1}
    sources = [stream(URL, rank=rank, world_size=2, **cache) for rank in range(2)]
    threads = [threading.Thread(target=keys_of, args=(source, 35)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = stream(URL, **cache)
    store.reads.clear()
    keys_of(alone, 35)
    assert store.reads == []


def test_another_data_set_under_the_same_url_is_not_taken_from_the_cache(small_shards: Path, tmp_path: Path) -> None:
    place, cache = tmp_path / "shards", {"cache": 0, "disk_cache": str(tmp_path / "cache")}
    shutil.copytree(small_shards, place)
    before = stream(place, **cache)
    old = before.next()
    before.close()
    shutil.rmtree(place)
    from dist_gan.packing.array_sources import ArraySource
    from dist_gan.packing.pack import pack
    from tests.conftest import random_images

    labels = [k % 5 for k in range(700)]
    pack(
        ArraySource(random_images(700, resolution=16, seed=9), labels, class_names=tuple("abcde")), str(place),
        samples_per_shard=100, workers=1,
    )  # fmt: skip
    after, uncached = stream(place, **cache), stream(place, cache=0)
    assert torch.equal(after.next().images, uncached.next().images)
    assert not torch.equal(old.images, after.next().images)
    after.close()
    uncached.close()


def test_a_cached_piece_that_was_damaged_is_read_from_the_store_again(store: FaultyStore, tmp_path: Path) -> None:
    cache = {"cache": 0, "disk_cache": str(tmp_path / "cache")}
    wanted = keys_of(stream(URL, **cache), 35)
    for file in (p for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.startswith(".")):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(data)
    again = stream(URL, **cache)
    assert keys_of(again, 35) == wanted
    assert again.damaged() == []
    store.reads.clear()
    assert keys_of(stream(URL, **cache), 35) == wanted
    assert store.reads == [], "and kept, sound"


def test_a_damaged_piece_that_cannot_be_removed_from_the_cache_replaces_no_image(
    store: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"cache": 0, "disk_cache": str(tmp_path / "cache")}
    wanted = keys_of(stream(URL, **cache), 35)
    for file in (p for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.startswith(".")):
        file.write_bytes(bytes(file.stat().st_size))
    monkeypatch.setattr(DiskCache, "drop", lambda self, name: None)
    again = stream(URL, **cache)
    assert keys_of(again, 35) == wanted
    assert again.damaged() == []


def test_whoever_stops_does_not_wait_for_a_store_that_is_away(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_with(small_shards) as (store, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        source = stream(URL, cache=0, patience_s=100, block=4)
        source.next()
        store.stop()
        deadline = time.monotonic() + 30
        while source.retries < 2:
            assert time.monotonic() < deadline, "the threads that run ahead should have noticed"
            time.sleep(0.1)
            if source._prefetcher is not None and source._prefetcher.has_next():
                source.next()
        began = time.monotonic()
        source.close()
        assert time.monotonic() - began < 10
    fsspec.filesystem("s3").clear_instance_cache()


# -- over HTTP --------------------------------------------------------------------------------------------------------


def test_shards_behind_a_web_server_are_read_by_ranges(small_shards: Path) -> None:
    class Answers(SlowServer):
        folder = small_shards

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert keys_of(stream(url, cache=0), 35) == keys_of(stream(small_shards, cache=0), 35)
    assert check_shards(url, read_manifest(url)) == []
    server.shutdown()
    server.server_close()


def test_a_shard_that_was_changed_under_its_name_is_not_trained_on(small_shards: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(small_shards, tmp_path / "changed"))
    first, second = (changed / shard.name for shard in read_manifest(str(changed)).shards[:2])
    size = first.stat().st_size
    first.write_bytes(second.read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(TrainingFailed, match=rf"{first.name}: .*and nothing in the shard can take its place"):
        keys_of(stream(changed, cache=0, max_bad=1.0), 35)


def test_a_secret_in_a_url_is_refused_and_repeated_nowhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["configs/dcgan-cifar10.yaml", "data.url=https://host/x?sig=canary-77", f"run.dir={run}"]
    done = subprocess.run(
        [sys.executable, str(TRAIN), *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "data.url: 'https://host/x' came with a user part or a query" in done.stdout
    assert "canary" not in done.stdout + done.stderr
    assert outcome(run)["code"] == 2
    assert not any(b"canary" in path.read_bytes() for path in run.rglob("*") if path.is_file())
