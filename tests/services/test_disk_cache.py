"""The cache on a disk holds what it was given, within its limit, whoever dies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_gan.data.disk_cache import DiskCache
from dist_gan.types import UserError
from tests.conftest import ROOT

HAMMER = """
import sys
from dist_gan.data.disk_cache import DiskCache
cache, me = DiskCache(sys.argv[1], limit=200_000), int(sys.argv[2])
for turn in range(400):
    name = f"piece-{(turn * 7 + me) % 50}"
    data = name.encode() * 1000
    found = cache.get(name, size=len(data))
    assert found is None or found == data, "half a file was seen"
    if found is None:
        cache.put(name, data)
    if turn == 200 and me == 3:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
"""


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".bytes"]


def test_what_was_put_is_got_and_nothing_else(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), limit=1000)
    cache.put("a", b"12345")
    assert cache.get("a", size=5) == b"12345"
    assert cache.get("a", size=6) is None, "another size is another thing"
    assert cache.get("b", size=5) is None
    cache.drop("a")
    cache.drop("a")
    assert cache.get("a", size=5) is None


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), limit=1000)
    for number in range(10):
        cache.put(str(number), bytes(100))
        os.utime(cache._path(str(number)), (number, number))
    assert cache.get("0", size=100) is not None
    cache.put("new", bytes(100))
    left = {name for name in [*map(str, range(10)), "new"] if cache.get(name, size=100) is not None}
    assert left == {"0", *map(str, range(3, 10)), "new"}


def test_the_limit_holds_and_survives_a_restart_and_a_lost_count(tmp_path: Path) -> None:
    for start in range(3):
        cache = DiskCache(str(tmp_path), limit=1000)
        for number in range(40):
            cache.put(f"{start}-{number}", bytes(90))
            assert sum(path.stat().st_size for path in files(tmp_path)) <= 1000
        (tmp_path / ".bytes").write_bytes(b"garbage")
    assert sum(path.stat().st_size for path in files(tmp_path)) > 700


def test_a_smaller_limit_is_kept_from_the_start(tmp_path: Path) -> None:
    big = DiskCache(str(tmp_path), limit=10_000)
    for number in range(50):
        big.put(str(number), bytes(100))
    DiskCache(str(tmp_path), limit=1000)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 1000


def test_what_a_dead_process_left_is_cleared_and_never_read(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), limit=1000)
    cache.put("a", bytes(10))
    left = cache._path("a").with_name("0123.tmp")
    left.write_bytes(bytes(500))
    old = time.time() - 3600
    os.utime(left, (old, old))
    DiskCache(str(tmp_path), limit=1000)
    assert not left.exists()
    assert cache.get("a", size=10) is not None


def test_processes_share_a_folder_and_one_of_them_may_be_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HAMMER, str(tmp_path)]
    running = [
        subprocess.Popen(
            [*command, str(me)], cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        for me in range(4)
    ]
    ended = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0, -9], ended
    kept = files(tmp_path)
    total = sum(path.stat().st_size for path in kept)
    assert 0 < total <= 200_000
    assert int((tmp_path / ".bytes").read_bytes()) == sum(p.stat().st_size for p in kept if p.suffix != ".tmp")


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.disk_cache: .*/file/inside' cannot be used"):
        DiskCache(str(tmp_path / "file" / "inside"), limit=1000)


def test_a_folder_that_somebody_removes_costs_speed_and_nothing_else(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path / "cache"), limit=1000)
    cache.put("a", b"12345")
    shutil.rmtree(tmp_path / "cache")
    cache.put("b", b"12345")
    cache.drop("a")
    assert cache.get("a", size=5) is None
    assert cache.get("b", size=5) is None
