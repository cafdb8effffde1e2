"""Lines on stderr that tell the user what takes so long."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 5.0
"""Seconds after which a step that is still running is named."""


def is_first_process() -> bool:
    """Whether this process writes for all those that torchrun, srun or a Trainer started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def say(what: str) -> None:
    """Write a line to stderr, from one process of many."""
    if is_first_process():
        print(what, file=sys.stderr, flush=True)


@contextmanager
def announced(what: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Name a step, such as `building the model`, if it is still running after some seconds."""
    timer = threading.Timer(patience_s, say, [f"{what} ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
