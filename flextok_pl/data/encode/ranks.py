"""Let several processes write one shard set together: each writes some shards, the first also the index.

torchrun or srun starts them. They communicate only through the set's folder, which all of them must see.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flextok_pl.data.shards.index import INDEX_NAME, ShardError, ShardIndex, ShardInfo
from flextok_pl.data.shards.writer import PARTIAL_NAME, complete_shard, shard_name, start_set

LOOK_EVERY = 0.5
"""Seconds between looks into the folder."""

_LOG = logging.getLogger(__name__)
FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class WriterRank:
    """One of the processes that write a set."""

    rank: int = 0
    world_size: int = 1

    def share(self, number: int) -> range:
        """The shards that this process writes, of `number`: neighbours, so that few pictures are encoded twice."""
        return range(number * self.rank // self.world_size, number * (self.rank + 1) // self.world_size)

    def start_set(self, folder: Path, arguments: Mapping[str, Any], overwrite: bool) -> ShardIndex | None:
        """`writer.start_set` by the first process; the others wait for it."""
        finished = folder / INDEX_NAME
        if self.world_size > 1 and overwrite and finished.exists():  # others could take it for the new one
            raise ShardError(f"overwrite=true and {self.world_size} processes: remove {folder} first")
        if self.rank > 0:
            partial_file, text = folder / PARTIAL_NAME, json.dumps(dict(arguments), sort_keys=True)
            _wait(
                lambda: (
                    finished.exists() or (partial_file.exists() and partial_file.read_text(encoding="utf-8") == text)
                ),
                f"the first process to make {folder} ready",
            )
            if not finished.exists():
                return None
        return start_set(folder, arguments, overwrite)

    def gather(self, folder: Path, counts: Sequence[int], own: Sequence[ShardInfo]) -> list[ShardInfo] | None:
        """For the first process: all shards, with these counts, `own` ones first; None for the others."""
        if self.rank > 0:
            return None
        paths = [folder / shard_name(number) for number in range(len(counts))]
        others = zip(paths[len(own) :], counts[len(own) :], strict=True)
        return [*own, *(_wait(partial(complete_shard, *one), f"another process to write {one[0]}") for one in others)]

    def finished_set(self, folder: Path) -> ShardIndex:
        """The set, as soon as the first process has finished it."""
        _wait((folder / INDEX_NAME).exists, f"the first process to finish {folder}")
        return ShardIndex.load(folder)


def _wait(look: Callable[[], FoundT | None], what: str) -> FoundT:
    """Wait until something exists. The launcher ends the other processes when one dies."""
    started = told = time.monotonic()
    while not (found := look()):
        if time.monotonic() - told > 60:
            told = time.monotonic()
            _LOG.warning("waiting for %s since %d s", what, told - started)
        time.sleep(LOOK_EVERY)
    return found
