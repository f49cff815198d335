"""Plants small faults one at a time in a copy of the tree, and says which ones the tests notice.

    python benchmarks/planted.py [--json] [--only NAME ...] [--list FILE ...] [--jobs 2]

A fault is a tuple (name, file, old text, new text, tests): `old text` occurs exactly once in the file, and at least one of
the tests fails once `new text` stands in its place. The tests are node ids of pytest, the fewest that should notice. The
lists are planted_training.py and planted_data.py beside this file, each a plain `FAULTS`.

The tests run without a fault first, and have to pass. What then becomes of each fault:

    caught      a named test failed
    survived    every named test passed
    broken      a test could not be run at all (import, collection, fixture): noticed, but by nothing that was meant to
    timeout     the tests took longer than --timeout-s
    stale       the old text does not occur exactly once, or a named test is gone: the list has to follow the code

Only the first counts as caught. Exit code 1 unless all of them are.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LISTS = ("benchmarks/planted_training.py", "benchmarks/planted_data.py")
FORKED = multiprocessing.get_context("forkserver")
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "accelerate",
    "webdataset",
    "pydantic",
    "PIL.Image",
    "pytest",
]
"""What every process of tests would import anew, in seconds each time; nothing of this project."""
LEFT_OUT = (".git", "runs", ".mypy_cache", ".ruff_cache", ".pytest_cache")


class Fault(NamedTuple):
    """One planted fault."""

    name: str
    file: str
    """Path below the root of the tree."""
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Node ids of the fewest tests that should notice."""


def faults_of(file: Path) -> list[Fault]:
    """The faults of a list, which is a Python file with `FAULTS`."""
    return [Fault(*fault) for fault in runpy.run_path(str(file))["FAULTS"]]


def outdated(fault: Fault, root: Path = ROOT) -> str | None:
    """Why a fault can no longer be planted, as a sentence with the remedy; None if it can."""
    path = root / fault.file
    if not path.exists():
        return f"{fault.name}: {fault.file} is gone; name the file that its code has moved to"
    source = path.read_text()
    times = source.count(fault.old)
    if times != 1:
        return (
            f"{fault.name}: the old text occurs {times} times in {fault.file}, not once; give the text as the code has it now "
            f"(longer, if it is there more than once):\n{fault.old}"
        )
    if fault.old == fault.new:
        return f"{fault.name}: the old text and the new text are the same; plant a fault"
    try:
        if path.suffix == ".py":
            ast.parse(source.replace(fault.old, fault.new))
    except SyntaxError as error:
        return f"{fault.name}: with the new text {fault.file} is no Python ({error}); plant a fault that runs"
    if not fault.tests:
        return f"{fault.name}: names no test; name the fewest that should notice"
    for test in fault.tests:
        if not _exists(test, root):
            return f"{fault.name}: there is no test {test}; name the one that notices this fault now"
    return None


def _exists(test: str, root: Path) -> bool:
    """Whether a node id names a file, or a function in it, that is there."""
    file, _, function = test.partition("::")
    path = root / file
    if not path.exists():
        return False
    return not function or re.search(rf"^def {re.escape(function.split('[')[0])}\(", path.read_text(), re.M) is not None


class Result(NamedTuple):
    """What became of one fault."""

    outcome: str
    detail: str
    """The test that failed, or why none could."""
    seconds: float


def copy_of_the_tree(place: Path) -> Path:
    """A copy that a fault may be planted in; bytecode comes along, and stays as it is."""
    target = place / "tree"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    shared = ROOT.parent / "shared"
    if shared.exists():  # the real images, which some tests read from beside the checkout
        (place / "shared").symlink_to(shared)
    return target


def run_tests(tree: Path, tests: tuple[str, ...], *, timeout_s: float, bytecode: bool = False) -> Result:
    """Runs tests in a copy of the tree, in a process of their own that has the outside libraries imported already."""
    began = time.monotonic()
    report = tree.parent / "report.txt"
    process = FORKED.Process(target=_pytest, args=(tree, tests, report, bytecode))
    process.start()
    process.join(timeout_s)
    seconds = time.monotonic() - began
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return Result("timeout", f"longer than {timeout_s:g} s", seconds)
    if process.exitcode == 0:
        return Result("survived", "", seconds)
    output = report.read_text(errors="replace")
    failed = re.search(r"^FAILED (\S+)", output, re.M)
    if process.exitcode == 1 and failed:
        return Result("caught", failed[1], seconds)
    return Result("broken", output[-2000:], seconds)


def _pytest(tree: Path, tests: tuple[str, ...], report: Path, bytecode: bool) -> None:
    """The process of one fault; its exit code is pytest's."""
    os.setsid()
    with open(report, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    if not bytecode:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = not bytecode
    sys.path.insert(0, str(tree))
    import pytest

    sys.exit(int(pytest.main(["-x", "-q", "-n", "0", "-rfE", "--tb=line", "-p", "no:cacheprovider", *tests])))


def planted(tree: Path, fault: Fault, *, timeout_s: float) -> Result:
    """Runs a fault's tests with the fault in place, and takes it out again."""
    reason = outdated(fault, tree)
    if reason is not None:
        return Result("stale", reason, 0.0)
    path = tree / fault.file
    honest = path.read_text()
    # Bytecode is trusted by size and second of the source: a fault of the same length would not be read at all.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
    path.write_text(honest.replace(fault.old, fault.new))
    try:
        return run_tests(tree, fault.tests, timeout_s=timeout_s)
    finally:
        path.write_text(honest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="faults whose name contains one of these")
    parser.add_argument(
        "--list", nargs="+", default=[], metavar="FILE", help="lists of faults; both of this folder's by default"
    )
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at the same time")
    parser.add_argument(
        "--timeout-s", type=float, default=180.0, help="longest time that the tests of one fault may take"
    )
    options = parser.parse_args()
    began = time.monotonic()
    FORKED.set_forkserver_preload(PRELOADED)
    files = [Path(f) for f in options.list] or [ROOT / f for f in LISTS if (ROOT / f).exists()]
    faults = [fault for file in files for fault in faults_of(file)]
    if options.only:
        faults = [fault for fault in faults if any(part in fault.name for part in options.only)]
    if not faults:
        parser.error("no fault is named so")
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        trees: SimpleQueue[Path] = SimpleQueue()
        first = copy_of_the_tree(Path(name) / "0")
        tests = tuple(sorted({t for f in faults if outdated(f, first) is None for t in f.tests}))
        if tests:
            clean = run_tests(first, tests, timeout_s=900.0, bytecode=True)
            if clean.outcome != "survived":
                sys.exit(f"the tests fail without any fault, so they can show nothing: {clean.detail}")
        trees.put(first)
        for job in range(1, options.jobs):
            shutil.copytree(first.parent, Path(name) / str(job), symlinks=True)
            trees.put(Path(name) / str(job) / "tree")
        lock = threading.Lock()

        def tried(fault: Fault) -> dict[str, Any]:
            tree = trees.get()
            try:
                result = planted(tree, fault, timeout_s=options.timeout_s)
            finally:
                trees.put(tree)
            if not options.json:
                with lock:
                    detail = result.detail.splitlines()[0] if result.outcome in ("caught", "stale") else ""
                    print(f"{result.outcome:9} {result.seconds:5.1f} s  {fault.name:50} {detail}", flush=True)
            return {
                "fault": fault.name, "file": fault.file, "outcome": result.outcome, "detail": result.detail,
                "tests": fault.tests, "seconds": round(result.seconds, 1),
            }  # fmt: skip

        with ThreadPoolExecutor(options.jobs) as pool:
            try:
                rows = list(pool.map(tried, faults))
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
    counts = Counter(row["outcome"] for row in rows)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    summary: dict[str, Any] = {
        "faults": len(rows),
        "caught": round(counts["caught"] / len(rows), 4),
        "survivors": [row["fault"] for row in rows if row["outcome"] not in ("caught", "stale")],
        "stale": [row["fault"] for row in rows if row["outcome"] == "stale"],
        "broken": counts["broken"],
        "timeouts": counts["timeout"],
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps({
        "benchmark": "planted",
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count()},
        "rows": rows,
        "summary": summary,
    }))  # fmt: skip
    sys.exit(counts["caught"] < len(rows))


if __name__ == "__main__":
    main()
