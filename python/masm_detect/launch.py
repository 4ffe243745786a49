"""What `torchrun` and `accelerate launch` set in the environment of each process. Imports no torch."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Whether this process is one of several of a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_restarted() -> bool:
    """Whether the launcher (`torchrun --max-restarts`) has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_first() -> bool:
    """Whether this is the only process, or the first one of a launcher, which prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def local_size() -> int:
    """Number of processes of the launcher on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
