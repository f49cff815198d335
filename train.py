"""Trains a GAN; `python train.py --help` prints usage and settings. The program is `dist_gan/__main__.py`."""

from __future__ import annotations

import sys

from dist_gan.__main__ import start

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
