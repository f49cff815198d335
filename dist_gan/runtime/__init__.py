"""The only importer of accelerate and deepspeed: processes, devices, precision, and the two players wrapped for them."""

from dist_gan.runtime.fingerprint import Comparison
from dist_gan.runtime.heartbeat import Missing
from dist_gan.runtime.launched import Launch, read_launch
from dist_gan.runtime.player import Player, Update
from dist_gan.runtime.runtime import Runtime
from dist_gan.runtime.stop import StopRequest

__all__ = ["Comparison", "Launch", "Missing", "Player", "Runtime", "StopRequest", "Update", "read_launch"]
