"""Several processes that write one shard set together: each a part of the shards, the first one the index.

They are started by torchrun or srun and meet in the set's folder only, which all of them must see.
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
        """Those of `number` shards that this process writes: neighbours, so that few pictures are encoded twice."""
        return range(number * self.rank // self.world_size, number * (self.rank + 1) // self.world_size)

    def start_set(self, folder: Path, arguments: Mapping[str, Any], overwrite: bool) -> ShardIndex | None:
        """`writer.start_set` by the first process; the others wait for it."""
        finished = folder / INDEX_NAME
        if self.world_size > 1 and overwrite and finished.exists():  # others could mistake it for the new one
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
        """All shards, with so many samples, for the first process, which wrote the first ones; None for the others."""
        if self.rank > 0:
            return None
        paths = [folder / shard_name(number) for number in range(len(counts))]
        others = zip(paths[len(own) :], counts[len(own) :], strict=True)
        return [*own, *(_wait(partial(complete_shard, *one), f"another process to write {one[0]}") for one in others)]

    def finished_set(self, folder: Path) -> ShardIndex:
        """The set, once the first process has finished it."""
        _wait((folder / INDEX_NAME).exists, f"the first process to finish {folder}")
        return ShardIndex.load(folder)


def _wait(look: Callable[[], FoundT | None], what: str) -> FoundT:
    """Look until something is there. Whoever started the processes ends the others when one dies."""
    started = told = time.monotonic()
    while not (found := look()):
        if time.monotonic() - told > 60:
            told = time.monotonic()
            _LOG.warning("waiting for %s since %d s", what, told - started)
        time.sleep(LOOK_EVERY)
    return found
