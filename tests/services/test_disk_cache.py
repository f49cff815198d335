"""The cache on a disk holds what it was given, within its limit, whoever dies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
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


# -- a folder that others can change ----------------------------------------------------------------------------------


def odd_things(kind: str, place: Path, victim: Path) -> None:
    """Puts something where the cache expects a file or folder of its own."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    if kind == "link":
        place.symlink_to(victim)
    elif kind == "folder":
        place.mkdir()
        (place / "mine").write_bytes(b"precious")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "digits":
        place.write_bytes(b"9" * 5000)
    elif kind == "minus":
        place.write_bytes(b"-5")


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "digits", "minus"])
@pytest.mark.parametrize("place", [".bytes", "folder", "file"])
def test_whatever_stands_in_the_folder_nothing_is_raised_and_no_link_is_followed(
    kind: str, place: str, tmp_path: Path
) -> None:
    (victims := tmp_path / "victims").mkdir()
    victim = victims / "thesis"
    victim.write_bytes(b"precious")
    cache = DiskCache(str(tmp_path / "cache"), limit=1000)
    cache.put("a", b"12345")
    path = cache._path("a")
    odd = {".bytes": cache._folder / ".bytes", "folder": path.parent, "file": path}[place]
    odd_things(kind, odd, victims if place == "folder" and kind == "link" else victim)
    for _ in range(2):
        cache.put("a", b"12345")
        assert cache.get("a", size=5) in (None, b"12345")
        assert cache.get("a", size=8) is None
        cache.drop("a")
        for number in range(12):
            cache.put(str(number), bytes(90))
        with suppress(UserError):  # a folder with something in it cannot be made way for
            cache = DiskCache(str(tmp_path / "cache"), limit=1000)
    assert victim.read_bytes() == b"precious"
    assert list(victims.iterdir()) == [victim], "something was put or deleted behind the link"
    assert sum(p.stat().st_size for p in files(cache._folder) if len(p.name) == 64) <= 1000


def test_in_a_folder_that_others_may_write_to_a_folder_of_ones_own_is_used(tmp_path: Path) -> None:
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(0o1777)
    (victim := tmp_path / "victim").write_bytes(b"precious")
    (shared / ".bytes").symlink_to(victim)
    (shared / "ab").mkdir()
    (shared / "ab" / ("ab" * 32)).write_bytes(bytes(10**6))
    cache = DiskCache(str(shared), limit=1000)
    cache.put("a", b"12345")
    assert cache.get("a", size=5) == b"12345"
    assert victim.read_bytes() == b"precious"
    assert (shared / "ab" / ("ab" * 32)).exists(), "what the cache has not made is not its to delete"
    own = shared / f"dist_gan-{os.geteuid()}"
    assert own.stat().st_mode & 0o777 == 0o700
    assert DiskCache(str(shared), limit=1000).get("a", size=5) == b"12345"
    shutil.rmtree(own)
    own.symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"data.disk_cache: .*cannot be used"):
        DiskCache(str(shared), limit=1000)


def test_files_of_others_in_the_folder_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    for name in ("notes.txt", "ab/notes.txt", "photos/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(5000))
    cache = DiskCache(str(tmp_path), limit=1000)
    for number in range(30):
        cache.put(str(number), bytes(90))
    assert all((tmp_path / name).exists() for name in ("notes.txt", "ab/notes.txt", "photos/1.jpg"))
    assert cache.get("29", size=90) is not None
