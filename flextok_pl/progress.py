"""Messages on stderr about steps that take long."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def say(what: str) -> None:
    """Write a line to stderr, only from rank 0 of torchrun, srun or a Trainer."""
    if all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")):
        print(what, file=sys.stderr, flush=True)


@contextmanager
def announced(what: str, patience_s: float = 5.0) -> Iterator[None]:
    """Name a step, such as `building the model`, if it still runs after `patience_s` seconds."""
    timer = threading.Timer(patience_s, say, [f"{what} ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
