"""`sbatch slurm/train.sh` on a real Slurm of two nodes: it trains, is interrupted, and goes on as if nothing had been.

A mistake gets within seconds an end on all nodes, exit code 2, one sentence, and no requeue. One file, so that one
worker of the tests starts one cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from dist_gan import storage
from dist_gan.attempts import read as read_attempts
from dist_gan.checkpoint import reader
from tests.conftest import free_port
from tests.scenarios.test_runs import assert_same_state, events, outcome
from tests.slurm.cluster import Cluster, command_line, wait_until
from tests.slurm.conftest import outside_slurm

SCRIPT = "slurm/train.sh"
pytestmark = pytest.mark.timeout(300)


def said(project: Path, job: str) -> str:
    return (project / f"slurm-{job}.out").read_text()


def workers(cluster: Cluster, job: str) -> list[int]:
    """The two training processes of a job, rank 0 first."""
    found = {}
    for pid in cluster.processes(job):
        words = command_line(pid).split()
        if len(words) > 2 and "python" in words[0] and words[1:3] == ["-u", "train.py"]:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found[variables.index(b"RANK=0") if b"RANK=0" in variables else 10**9] = pid
    return [found[key] for key in sorted(found)]


@contextmanager
def frozen(
    cluster: Cluster, job: str, run: Path | None = None, *, committed: Callable[[], object] | None = None
) -> Iterator[list[int]]:
    """Holds both workers still in mid-run, as soon as there is a checkpoint: what comes next meets a run that is not done."""
    is_there = committed or (lambda: list(run.glob("checkpoints/*/COMMIT")) if run is not None else None)
    wait_until(is_there, seconds=60, what="a checkpoint")
    pids = workers(cluster, job)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            if command_line(pid):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An S3 server with the bucket `runs`; the variables by which a program finds it."""
    port = free_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"]).create_bucket(Bucket="runs")
    try:
        yield variables
    finally:
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()


def start_again(cluster: Cluster, job: str, *, restarts: int) -> None:
    """Waits for a requeue, and spares the test the two minutes for which Slurm holds a requeued job back."""
    wait_until(lambda: cluster.job(job)["Restarts"] == str(restarts), seconds=60, what=f"a requeue of job {job}")
    deadline = time.monotonic() + 60
    while cluster.job(job)["JobState"] != "RUNNING":
        assert time.monotonic() < deadline, cluster.job(job)
        # At once, the credential of this start would still be taken for the revoked one of the start before.
        cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+3", check=False)
        time.sleep(6)


def attempts(run: Path) -> list[tuple[str, int]]:
    return [(e["event"], e["attempt"]) for e in events(run) if e["event"] in ("start", "resume", "preempted", "end")]


@pytest.mark.timeout(120)
def test_without_arguments_two_nodes_train_the_embedded_recipe_to_the_weights_of_two_processes(
    cluster: Cluster, project: Path, tmp_path: Path
) -> None:
    job = cluster.submit(SCRIPT, cwd=project, DIST_GAN_VENV=sys.prefix)
    reference = outside_slurm([], tmp_path / "run", project)
    end = cluster.wait(job, seconds=90)
    assert end["JobState"] == "COMPLETED", said(project, job)
    assert end["Restarts"] == "0"
    run = project / "runs" / f"slurm-{job}"
    assert "finished" in said(project, job)
    owner = read_attempts(run).owner
    assert owner.by.endswith("on n0" if cluster.separate else ""), "rank 0 is on the first node"
    assert events(run)[0]["world_size"] == 2
    assert_same_state(reference, run)
    assert "finished: 640 images" in (run / "slurm" / "node-0.log").read_text()
    assert (run / "slurm" / "node-1.log").exists(), "a log for each node"


@pytest.mark.timeout(180)
def test_an_array_trains_a_line_of_the_sweep_for_each_index_and_refuses_an_index_without_one(
    cluster: Cluster, project: Path, recipe: list[str], undisturbed: Path
) -> None:
    points = [
        "configs/points.yaml",
        "run.images=2k",
        """'run.dir="runs/two $(words)"'""",
    ]  # for the shell, and for YAML
    (project / "sweep.txt").write_text("\n".join(map(" ".join, (recipe, points))) + "\n")
    array = cluster.submit("--array=1-3", SCRIPT, "sweep.txt", "log.samples=4", cwd=project)
    ends = [cluster.wait(f"{array}_{index}", seconds=120) for index in (1, 2, 3)]
    assert [end["JobState"] for end in ends] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert_same_state(undisturbed, project / "runs" / f"slurm-{array}_1")
    assert outcome(project / "runs" / "two $(words)")["images"] >= 2000
    assert "finished: runs/two $(words)" in said(project, f"{array}_2")
    assert not (project / "runs" / f"slurm-{array}_2").exists()
    message = said(project, f"{array}_3")
    assert message.count("dist_gan:") == 1
    assert "array index 3 without a config: line 3 of sweep.txt is empty or missing (it has 2 lines)" in message


@pytest.mark.timeout(240)
def test_a_job_at_its_time_limit_saves_is_requeued_once_and_ends_with_the_weights_of_an_undisturbed_run(
    cluster: Cluster, project: Path, recipe: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # One minute is the shortest limit there is; Slurm looks every 30 s, and signals up to 30 s too early.
    job = cluster.submit("--time=1", "--signal=B:USR2@15", SCRIPT, *recipe, f"run.dir={run}", cwd=project)
    with frozen(cluster, job, run):
        wait_until(lambda: "the time limit is near (USR2)" in said(project, job), seconds=70, what="Slurm's signal")
    start_again(cluster, job, restarts=1)
    end = cluster.wait(job, seconds=90)
    assert end["JobState"] == "COMPLETED", said(project, job)
    assert end["Restarts"] == "1"
    assert attempts(run) == [("start", 1), ("preempted", 1), ("resume", 2), ("end", 2)]
    assert said(project, job).count("requeued, to go on from checkpoint-") == 1
    assert "asked to stop by SIGUSR2" in said(project, job)
    assert_same_state(undisturbed, run)


@pytest.mark.timeout(240)
def test_a_preempted_job_saves_is_requeued_by_slurm_alone_and_ends_with_the_same_weights(
    cluster: Cluster, project: Path, recipe: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.submit(SCRIPT, *recipe, f"run.dir={run}", cwd=project)
    with frozen(cluster, job, run):
        urgent = cluster.submit(
            "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1", "--output=urgent.out", cwd=project
        )
        wait_until(lambda: cluster.job(job)["JobState"] != "RUNNING", seconds=30, what="a preemption")
    assert cluster.wait(urgent, seconds=60)["JobState"] == "COMPLETED"
    start_again(cluster, job, restarts=1)
    end = cluster.wait(job, seconds=90)
    assert end["JobState"] == "COMPLETED", said(project, job)
    assert end["Restarts"] == "1", "not requeued a second time by the script"
    assert attempts(run) == [("start", 1), ("preempted", 1), ("resume", 2), ("end", 2)]
    assert "requeued, to go on from" not in said(project, job)
    assert_same_state(undisturbed, run)


@pytest.mark.timeout(180)
def test_a_job_whose_worker_is_killed_names_it_is_requeued_and_ends_with_the_same_weights(
    cluster: Cluster, project: Path, recipe: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.submit(SCRIPT, *recipe, f"run.dir={run}", cwd=project)
    with frozen(cluster, job, run) as pids:
        os.kill(pids[1], signal.SIGKILL)
    start_again(cluster, job, restarts=1)
    end = cluster.wait(job, seconds=90)
    assert end["JobState"] == "COMPLETED", said(project, job)
    assert end["Restarts"] == "1"
    assert "dist_gan: crashed: rank 1 " in said(project, job)
    assert f"process {pids[1]} on n1" in said(project, job) or not cluster.separate
    assert attempts(run) == [("start", 1), ("resume", 2), ("end", 2)]
    assert_same_state(undisturbed, run)


@pytest.mark.timeout(180)
def test_a_job_that_crashes_again_and_again_is_requeued_no_more_than_it_may_be(
    cluster: Cluster, project: Path, recipe: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.submit(SCRIPT, *recipe, f"run.dir={run}", cwd=project, DIST_GAN_MAX_CRASHES="0")
    with frozen(cluster, job, run) as pids:
        os.kill(pids[0], signal.SIGKILL)
    end = cluster.wait(job, seconds=60)
    assert end["JobState"] == "FAILED", said(project, job)
    assert end["Restarts"] == "0"
    assert "not requeued: this job has crashed 1 times (DIST_GAN_MAX_CRASHES)" in said(project, job)
    assert "dist_gan: crashed: rank 0's launcher does not answer n1" in said(project, job) or not cluster.separate


@pytest.mark.timeout(240)
def test_a_job_that_loses_the_daemon_of_a_node_is_requeued_by_slurm_and_ends_with_the_same_weights(
    cluster: Cluster, project: Path, recipe: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.submit(SCRIPT, *recipe, f"run.dir={run}", cwd=project)
    with frozen(cluster, job, run):
        cluster.kill_node("n1")
        try:
            wait_until(lambda: cluster.job(job)["JobState"] != "RUNNING", seconds=90, what="a node that is down")
            assert cluster.states()[1].startswith("down"), cluster.states()
        finally:
            cluster.start_node("n1")
    start_again(cluster, job, restarts=1)
    end = cluster.wait(job, seconds=120)
    assert end["JobState"] == "COMPLETED", said(project, job)
    assert end["Restarts"] == "1", "not requeued a second time by the script"
    assert attempts(run)[-2:] == [("resume", 2), ("end", 2)]
    assert_same_state(undisturbed, run)


@pytest.mark.timeout(180)
def test_a_second_job_on_a_run_folder_is_refused_and_one_that_is_cancelled_saves_and_stays_away(
    cluster: Cluster, project: Path, recipe: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    one = ["--nodes=1", SCRIPT, *recipe, f"run.dir={run}"]
    first = cluster.submit(*one, cwd=project, DIST_GAN_PROCESSES="2")
    with frozen(cluster, first, run):
        second = cluster.submit(*one, cwd=project, DIST_GAN_PROCESSES="2")
        assert cluster.wait(second, seconds=30)["ExitCode"] == "2:0"
        message = said(project, second).splitlines()[-1]
        assert message == (
            f"dist_gan: run.dir: {run} is in use by job {first}; wait for it to end, or choose another run.dir"
        )
        assert cluster.job(first)["JobState"] == "RUNNING"
        cluster.call("scancel", first)
    end = cluster.wait(first, seconds=60)
    assert end["JobState"] == "CANCELLED"
    assert end["Restarts"] == "0"
    assert attempts(run) == [("start", 1), ("preempted", 1)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lost", ["a worker", "the first node's disk"])
def test_a_job_on_node_local_disks_keeps_its_run_in_a_store_and_goes_on_from_there(
    cluster: Cluster,
    project: Path,
    recipe: list[str],
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    if not cluster.separate:
        pytest.skip("a process may not be given mounts of its own here")
    name = lost.replace(" ", "-").replace("'", "")
    run, url = cluster.folder / "private" / name, f"s3://runs/{name}"
    shutil.rmtree(run, ignore_errors=True)
    with s3_server(monkeypatch) as variables:
        job = cluster.submit(SCRIPT, *recipe, f"run.dir={run}", f"checkpoint.url={url}", cwd=project, **variables)
        with frozen(cluster, job, committed=lambda: reader.newest_commit(f"{url}/checkpoints")) as pids:
            os.kill(pids[1], signal.SIGKILL)
        wait_until(lambda: cluster.job(job)["Restarts"] == "1", seconds=60, what=f"a requeue of job {job}")
        assert "dist_gan: crashed: rank 1 " in said(project, job)
        assert "requeued, to go on from checkpoint-" in said(project, job)
        if lost != "a worker":
            shutil.rmtree(run)  # as if the job had got another first node
        start_again(cluster, job, restarts=1)
        end = cluster.wait(job, seconds=120)
        assert end["JobState"] == "COMPLETED", said(project, job)
        assert end["Restarts"] == "1"
        assert attempts(run) == [("start", 1), ("resume", 2), ("end", 2)]
        whole, found = reader.newest(str(undisturbed / "checkpoints")), reader.newest(f"{url}/checkpoints")
        assert reader.read_manifest(str(found.url))["files"] == reader.read_manifest(str(whole.url))["files"]
        assert json.loads(storage.read(f"{url}/outcome.json"))["outcome"] == "finished"
    assert not (run / "checkpoints").exists()


# -- mistakes -------------------------------------------------------------------------------------------------------


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
    assert (
        f"run.dir: node n1 does not see {run}; choose a run.dir on a disk that all nodes share, or keep the run in a store"
        in message
    )


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
