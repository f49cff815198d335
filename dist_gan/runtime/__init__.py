"""The only importer of accelerate and deepspeed: processes, devices, precision, and the two players wrapped for them."""

from dist_gan.runtime.fingerprint import Comparison
from dist_gan.runtime.heartbeat import Missing, end_the_silent
from dist_gan.runtime.launched import Launch, read_launch
from dist_gan.runtime.launcher import Process, find_launcher
from dist_gan.runtime.meeting import Meeting, NotMet, Word, open_meeting
from dist_gan.runtime.player import Player, Update
from dist_gan.runtime.runtime import Runtime
from dist_gan.runtime.stop import Stopped, StopRequest

__all__ = [
    "Comparison",
    "Launch",
    "Meeting",
    "Missing",
    "NotMet",
    "Player",
    "Process",
    "Runtime",
    "StopRequest",
    "Stopped",
    "Update",
    "Word",
    "end_the_silent",
    "find_launcher",
    "open_meeting",
    "read_launch",
]
