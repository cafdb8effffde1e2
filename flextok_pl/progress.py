"""What the user hears while nothing else is to be seen."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 5.0
"""After so many seconds without a word, it is said what is being done."""


def is_first_process() -> bool:
    """Whether this is the process that speaks for all those that torchrun, srun or a Trainer started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def say(what: str) -> None:
    """Write a line to stderr, from one process of many."""
    if is_first_process():
        print(what, file=sys.stderr, flush=True)


@contextmanager
def announced(what: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Say what is being done if it takes longer than some seconds.

    Args:
        what: such as `building the model`.
        patience_s: how many.
    """
    timer = threading.Timer(patience_s, say, [f"{what} ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
