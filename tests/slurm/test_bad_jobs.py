"""What a mistake gets on a cluster: within seconds an end on all nodes, exit code 2, one sentence, and no requeue."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.test_train import SCRIPT, said

pytestmark = pytest.mark.timeout(120)
POINTS = ("configs/points.yaml", "run.images=2k", "log.samples=4")


def refused(
    cluster: Cluster,
    cwd: Path,
    *arguments: str,
    seconds: float = 30,
    code: int = 2,
    script: str = SCRIPT,
    **variables: str,
) -> str:
    """Submits a job that has to be refused; its last message, after the checks that hold for every refusal."""
    job = cluster.submit(script, *arguments, cwd=cwd, **variables)
    end = cluster.wait(job, seconds=seconds)
    text = said(cwd, job)
    assert end["JobState"] == "FAILED", text
    assert end["ExitCode"] == f"{code}:0", text
    assert end["Restarts"] == "0"
    facts = ("dist_gan: job ", "dist_gan: 2 nodes ")
    messages = [line for line in text.splitlines() if line.startswith("dist_gan: ") and not line.startswith(facts)]
    assert len(messages) == 1, text
    return messages[0]


def test_a_port_in_use_is_named(cluster: Cluster, project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        message = refused(cluster, project, *POINTS, DIST_GAN_PORT=str(port))
    assert (
        f"port {port} on node n0 cannot be used (Address already in use); choose another one (DIST_GAN_PORT)" in message
    )


def test_a_port_that_is_none_is_refused(cluster: Cluster, project: Path) -> None:
    assert "DIST_GAN_PORT: '65536' is no port" in refused(cluster, project, *POINTS, DIST_GAN_PORT="65536")


def test_a_head_node_that_cannot_be_reached_is_named_with_its_address(cluster: Cluster, project: Path) -> None:
    message = refused(cluster, project, *POINTS, DIST_GAN_HEAD="192.0.2.1", DIST_GAN_JOIN_S="3")
    assert "node n1 could not reach the first node n0 at 192.0.2.1:" in message
    assert "within 3 s" in message
    assert "(DIST_GAN_HEAD)" in message


def test_a_node_that_never_joins_is_named(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.sh"
    slow.write_text('[ "$SLURM_NODEID" = 1 ] && sleep 1000\nexec "$@"\n')
    message = refused(cluster, project, *POINTS, DIST_GAN_CONTAINER=f"bash {slow}", DIST_GAN_JOIN_S="3")
    assert "node n1 did not join within 3 s; leave it out (sbatch --exclude=n1)" in message


def test_a_node_with_other_code_is_refused_by_all(cluster: Cluster) -> None:
    if not cluster.separate:
        pytest.skip("a process may not be given mounts of its own here")
    project = cluster.folder / "strange"
    message = refused(cluster, project, *POINTS, seconds=60)
    assert "configuration_wrong, not requeued: the code of dist_gan of rank 1 differ from rank 0's (" in message
    assert not list(project.glob("runs/*/checkpoints"))


def test_a_run_folder_that_only_the_first_node_sees_is_refused(cluster: Cluster, project: Path) -> None:
    if not cluster.separate:
        pytest.skip("a process may not be given mounts of its own here")
    run = cluster.folder / "private" / "run"
    message = refused(cluster, project, *POINTS, f"run.dir={run}")
    assert f"run.dir: node n1 does not see {run}; choose a run.dir on a disk that all nodes share" in message


def test_a_node_without_a_launcher_is_refused(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.sh"
    bare.write_text('[ "$SLURM_NODEID" = 1 ] && PATH=/usr/bin:/bin\nexec "$(command -v python3)" "${@:2}"\n')
    message = refused(cluster, project, *POINTS, DIST_GAN_CONTAINER=f"bash {bare}")
    assert "there is no accelerate on node n1; name a virtual environment (DIST_GAN_VENV)" in message


def test_a_mistake_in_the_recipe_is_told_by_the_job_and_not_requeued(cluster: Cluster, project: Path) -> None:
    message = refused(cluster, project, "configs/points.yaml", "run.imagez=3", seconds=60)
    assert "configuration_wrong, not requeued: " in message
    assert "run.imagez: unknown key" in message


def test_a_job_that_was_not_submitted_from_the_project_is_refused(
    cluster: Cluster, project: Path, tmp_path: Path
) -> None:
    message = refused(cluster, tmp_path, script=str(project / SCRIPT))
    assert f"{tmp_path} is not the project folder; submit from there, or with: sbatch --chdir=PROJECT" in message


@pytest.mark.parametrize(
    ("options", "arguments", "text"),
    [
        (["--array=5"], [], "array index 5 without a config: give a file with a line for each index"),
        (["--array=5"], ["two.txt"], "array index 5 without a config: line 5 of two.txt is empty or missing (it has 2"),
        (["--array=2"], ["two.txt"], "array index 2 without a config: line 2 of two.txt is empty or missing (it has 2"),
        ([], ["two.txt"], "two.txt is a sweep of 2; start it with: sbatch --array=1-2 slurm/train.sh two.txt"),
        (["--array=1"], ["none.txt"], "none.txt: cannot be read in "),
    ],
)
def test_an_array_index_without_a_config_is_refused(
    cluster: Cluster, project: Path, options: list[str], arguments: list[str], text: str
) -> None:
    (project / "two.txt").write_text("configs/points.yaml run.images=2k\n \n")
    job = cluster.submit(*options, SCRIPT, *arguments, cwd=project)
    index = options[0].removeprefix("--array=") if options else ""
    place = f"{job}_{index}" if index else job
    assert cluster.wait(place, seconds=30)["ExitCode"] == "2:0"
    message = said(project, place)
    assert message.count("dist_gan: ") == 1
    assert text in message


@pytest.mark.parametrize("number", ["", "abc", "12; rm -rf x"])
def test_a_job_id_that_is_none_is_refused(project: Path, number: str) -> None:
    done = subprocess.run(
        ["bash", SCRIPT], cwd=project, env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": number},
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == (
        f"dist_gan: SLURM_JOB_ID is '{number}', which is no job of Slurm; start this with: sbatch slurm/train.sh\n"
    )
    assert not done.stderr


def test_a_partition_that_there_is_not_is_refused_by_slurm_at_once(cluster: Cluster, project: Path) -> None:
    said = cluster.call("sbatch", "--partition=nowhere", SCRIPT, cwd=project, check=False, timeout_s=10)
    assert "invalid partition specified: nowhere" in said
    assert not cluster.queue()
