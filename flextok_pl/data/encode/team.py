"""Several processes that write one shard set together: each a part of the shards, the first one the index.

They are started by torchrun or srun and meet in the set's folder only, which all of them must see.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flextok_pl.data.shards.index import INDEX_NAME, ShardError, ShardIndex, ShardInfo
from flextok_pl.data.shards.writer import PARTIAL_NAME, complete_shard, shard_name, start_set

VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""What torchrun, and srun, call a process's number and their count."""

LOOK_EVERY = 0.5
"""Seconds between looks into the folder."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Team:
    """One of the processes.

    Args:
        rank: its number.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of_environment(cls) -> Team:
        """What torchrun or srun says, else one process alone."""
        for rank, world_size in VARIABLES:
            if rank in os.environ and world_size in os.environ:
                return cls(int(os.environ[rank]), int(os.environ[world_size]))
        return cls()

    def share(self, number: int) -> range:
        """Those of `number` shards that this process writes: neighbours, so that few pictures are encoded twice."""
        return range(number * self.rank // self.world_size, number * (self.rank + 1) // self.world_size)

    def start_set(self, folder: Path, arguments: Mapping[str, Any], overwrite: bool) -> ShardIndex | None:
        """`shards.start_set` by the first process; the others wait for it.

        Raises:
            ShardError: as there; or a finished set is to be replaced by several processes, which could mistake it for
                the new one.
        """
        finished = folder / INDEX_NAME
        if self.world_size > 1 and overwrite and finished.exists():
            raise ShardError(f"overwrite=true and {self.world_size} processes: remove {folder} first")
        if self.rank > 0:
            partial, text = folder / PARTIAL_NAME, json.dumps(dict(arguments), sort_keys=True)
            _wait(
                lambda: finished.exists() or (partial.exists() and partial.read_text(encoding="utf-8") == text),
                f"the first process to make {folder} ready",
            )
            if not finished.exists():
                return None
        return start_set(folder, arguments, overwrite)

    def gather(self, folder: Path, counts: Sequence[int], own: Sequence[ShardInfo]) -> list[ShardInfo] | None:
        """All shards, for the first process; None for the others.

        Args:
            folder: of the set.
            counts: samples of each shard.
            own: the shards of this process.
        """
        if self.rank > 0:
            return None
        shards = dict(enumerate(own))
        for number, count in enumerate(counts[len(own) :], len(own)):
            path = folder / shard_name(number)

            def is_there(number: int = number, path: Path = path, count: int = count) -> bool:
                shard = complete_shard(path)
                if shard is not None and shard.count == count:
                    shards[number] = shard
                return number in shards

            _wait(is_there, f"another process to write {path}")
        return [shards[number] for number in range(len(counts))]

    def finished_set(self, folder: Path) -> ShardIndex:
        """The set, once the first process has finished it."""
        _wait((folder / INDEX_NAME).exists, f"the first process to finish {folder}")
        return ShardIndex.load(folder)


def _wait(condition: Callable[[], bool], what: str) -> None:
    """Until a condition holds. Whoever started the processes ends the others when one dies."""
    started = told = time.monotonic()
    while not condition():
        if time.monotonic() - told > 60:
            told = time.monotonic()
            _LOG.warning("waiting for %s since %d s", what, told - started)
        time.sleep(LOOK_EVERY)
