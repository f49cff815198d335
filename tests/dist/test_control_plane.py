"""The simulation of many ranks at its smallest: it measures what the page on scaling says, and the store is not asked for more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment


@pytest.mark.timeout(120)
def test_a_few_ranks_meet_commit_and_name_the_one_that_is_killed_with_few_requests_to_the_store() -> None:
    if shutil.which("ss") is None:
        pytest.skip("iproute2 is not installed here")
    command = [sys.executable, str(ROOT / "benchmarks" / "control_plane.py"), "--json", "--ranks", "4", "8", "--megabytes", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    four, eight = (json.loads(line) for line in done.stdout.splitlines())
    assert (four["ranks"], eight["ranks"]) == (4, 8)
    assert eight["store_connections"] == 2 * 8 + 1, "one for the groups, one for the heartbeat, and the owner's"
    assert eight["store_requests_a_rank"] < four["store_requests_a_rank"] + 4, "nobody reads everybody's address"
    assert eight["sockets_a_rank"] < 14, "nobody connects to everybody, thrice"
    assert eight["store_requests_idle_a_second"] == pytest.approx(8, abs=4), "a beat a second"
    assert eight["commit_files"] == 8 + 2, "a share for each rank, manifest and COMMIT"
    assert eight["loss_store_requests_a_rank"] < 60, "asking after a loss does not grow with the ranks"
