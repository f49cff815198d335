"""What ranks say to each other without a process group, and what a rank knows of its neighbours and its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore

from dist_gan.runtime import Meeting, MeetingFailed, Process, StoppedBeforeTraining, StopRequest, EndNotice, open_meeting
from dist_gan.runtime.lost_ranks import SILENT_AFTER_S, Beat, Neighbour
from tests.conftest import ROOT, environment, free_port


@pytest.fixture
def ranks() -> list[Meeting]:
    """Three ranks, each with a connection of its own."""
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [TCPStore("127.0.0.1", host.port, timeout=timedelta(seconds=20)) for _ in range(3)]
    return [
        Meeting(PrefixStore("a start", store), rank=rank, world_size=3)
        for rank, store in enumerate([host, *stores[1:]])
    ]


def test_all_ranks_begin_with_rank_zeros_attempt_once_all_are_there(ranks: list[Meeting]) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(rank.join, patience_s=20) for rank in ranks[1:]]
        assert ranks[0].admit_ranks(7, patience_s=20) is None
        assert [answer.result() for answer in waiting] == [7, 7]
    assert ranks[1].notice() is None


def test_an_objection_of_one_rank_is_heard_by_rank_zero_and_its_word_by_all(ranks: list[Meeting]) -> None:
    objection, verdict = EndNotice(2, "configuration_wrong", 2, "no GPU"), EndNotice(0, "configuration_wrong", 2, "rank 2: no GPU")
    with ThreadPoolExecutor() as pool:
        first, second = pool.submit(ranks[1].join, patience_s=20), pool.submit(ranks[2].raise_objection, objection, patience_s=20)
        assert ranks[0].admit_ranks(1, patience_s=20) == objection
        assert ranks[0].publish_notice(verdict) == verdict
        assert first.result() == second.result() == verdict
    assert ranks[1].publish_notice(EndNotice(1, "crashed", 1, "later")) == verdict, "the first word holds"


def test_who_does_not_come_is_named_and_a_store_that_is_not_there_is_told_in_one_sentence(ranks: list[Meeting]) -> None:
    with ThreadPoolExecutor() as pool:
        present = pool.submit(ranks[1].join, patience_s=3)
        with pytest.raises(MeetingFailed, match="^rank 2 did not join within 1 s"):
            ranks[0].admit_ranks(1, patience_s=1)
        with pytest.raises(MeetingFailed, match="^rank 0 was not ready within 3 s"):
            present.result()
    address = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(MeetingFailed, match=r"could not reach the launch's store at 127.0.0.1:\d+ within 1 s \(Connection refused\)"):
        open_meeting(address, patience_s=1)
    with pytest.raises(MeetingFailed, match="MASTER_ADDR='' MASTER_PORT='': 2 processes need an address"):
        open_meeting({"WORLD_SIZE": "2"}, patience_s=1)
    assert open_meeting({}, patience_s=1) is None


def test_a_neighbour_that_works_or_is_debugged_is_not_missed_and_one_that_is_stopped_or_dead_is() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        neighbour = Neighbour(1)
        neighbour.record(Beat(1, 5, "a step", os.uname().nodename, busy.pid))
        late = SILENT_AFTER_S + 1

        def missed() -> bool:
            time.sleep(0.3)
            neighbour.since = time.monotonic() - late
            neighbour.check_process()
            return neighbour.is_silent()

        assert not missed(), "it has used CPU time since the last look"
        os.kill(busy.pid, signal.SIGSTOP)
        missed()
        assert missed()
        assert not neighbour.has_died()
        neighbour.record(Beat(2, 5, "a step", os.uname().nodename, busy.pid))
        assert not neighbour.is_silent(), "a new beat"
        busy.kill()
        busy.wait()
        assert neighbour.has_died()
        neighbour.record(Beat(3, 5, "a step", os.uname().nodename, busy.pid, left=True))
        assert not neighbour.has_died(), "it had said that it leaves"
    finally:
        busy.kill()


def test_the_launcher_is_found_behind_a_script_and_a_shell_is_none() -> None:
    program = "import os; from dist_gan.runtime import find_launcher as f; print(f(os.environ), f({}), f({'ACCELERATE_MIXED_PRECISION': 'no'}))"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{program}"; true'], cwd=ROOT, env=environment(TORCHELASTIC_RUN_ID="mine"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    mine = Process.find(os.getpid())
    assert mine is not None
    assert mine.state() != "X"
    assert done.stdout.strip() == f"{mine} None None"


def test_a_signal_before_training_raises_one_later_is_a_flag_and_an_ignored_hangup_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
        with pytest.raises(StoppedBeforeTraining, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        stop.close()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = StopRequest()
        stop.training_begins()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert stop.signal == "SIGHUP"
        stop.close()
    finally:
        signal.signal(signal.SIGHUP, before)
