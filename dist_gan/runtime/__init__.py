"""Processes, devices, precision and parallel strategy of a training run, by torch, accelerate and deepspeed.

No other package of the library imports accelerate or deepspeed. Both networks, each with its optimizer (a `Player`),
are wrapped here for DDP or DeepSpeed.
"""

from dist_gan.runtime.fingerprint import Fingerprints
from dist_gan.runtime.launch_settings import LaunchSettings, read_launch_settings
from dist_gan.runtime.launcher import Process, find_launcher
from dist_gan.runtime.lost_ranks import LostRanks, kill_unreachable_ranks
from dist_gan.runtime.meeting import EndNotice, Meeting, MeetingFailed, open_meeting
from dist_gan.runtime.player import Player, Update
from dist_gan.runtime.rank_group import raise_first
from dist_gan.runtime.runtime import Runtime
from dist_gan.runtime.stop import StoppedBeforeTraining, StopRequest

__all__ = [
    "EndNotice",
    "Fingerprints",
    "LaunchSettings",
    "LostRanks",
    "Meeting",
    "MeetingFailed",
    "Player",
    "Process",
    "Runtime",
    "StopRequest",
    "StoppedBeforeTraining",
    "Update",
    "find_launcher",
    "kill_unreachable_ranks",
    "open_meeting",
    "raise_first",
    "read_launch_settings",
]
