"""Read samples of a shard in any order, and open shards ahead of their use."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flextok_pl.data.shards.index import ShardError, ShardIndex
from flextok_pl.data.shards.tars import Member, Span, files_in_tar, grouped


class Shard:
    """The samples of shard `number` of a set, by their number in it.

    Opening reads the headers, skips the contents, and checks the number of samples. Reading a sample reads only its
    files.
    """

    def __init__(self, index: ShardIndex, number: int) -> None:
        self.index, self.where = index, index.locate(number)
        try:
            self._file = index.open(number)
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self._samples = [self._sample(key, files) for key, files in grouped(files_in_tar(self._file))]
        except (OSError, tarfile.TarError, ValueError) as error:
            self._file.close()
            raise self._unreadable(error) from error
        expected = index.shards[number].count
        if len(self._samples) != expected:
            self._file.close()
            raise ShardError(
                f"shard {self.where} holds {len(self._samples)} samples instead of the {expected} in its index: it is "
                "truncated or was changed; copy it again, or write the set again with overwrite"
            )

    def _sample(self, key: str, files: list[Member]) -> dict[str, Any]:
        places: dict[str, Any] = dict(files)
        if len(places) < len(files):
            raise ValueError(f"sample {key!r} has two files of one kind, of {sorted(name for name, _ in files)}")
        return {"__key__": key, "__url__": self.where, **places}

    def read(self, sample: int) -> dict[str, Any]:
        """A raw sample: `__key__`, `__url__`, and bytes by extension."""
        raw = dict(self._samples[sample])
        try:
            for name, value in raw.items():
                if isinstance(value, Span):
                    raw[name] = os.pread(self._file.fileno(), value.size or 0, value.offset)
                    if len(raw[name]) != value.size:
                        raise EOFError("the file ends early")
        except (OSError, EOFError) as error:
            raise self._unreadable(error) from error
        return raw

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _unreadable(self, error: Exception) -> ShardError:
        reason = error.args[-1] if isinstance(error, OSError) else error.args[0]
        return ShardError(
            f"shard {self.where} cannot be read ({reason}); copy it again, or write the set again with overwrite"
        )


class OpenShards:
    """Holds shards open, each given by set and number, and fetches the next ones in the background.

    The `spare` most recent ones stay open, for a reader that comes back to them.
    """

    def __init__(self, shards: list[tuple[ShardIndex, int]], spare: int = 0) -> None:
        self.shards, self.spare = shards, spare
        self._open: dict[int, Future[Shard]] = {}
        self._thread = ThreadPoolExecutor(1, "flextok-shards")

    def __enter__(self) -> OpenShards:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self.spare = 0
        self.keep(())

    def prepare(self, numbers: Iterable[int]) -> None:
        """Open these shards in the background, in this order."""
        for number in numbers:
            if number not in self._open:
                self._open[number] = self._thread.submit(Shard, *self.shards[number])

    def __getitem__(self, number: int) -> Shard:
        """An open shard; waits until it is open."""
        return self._open[number].result()

    def keep(self, numbers: Iterable[int]) -> None:
        """Close all shards except these and the spare ones."""
        needed = self._open.keys() & set(numbers)
        for number in needed:
            self._open[number] = self._open.pop(number)  # move it behind the older ones
        for number in list(self._open)[: max(0, len(self._open) - len(needed) - self.spare)]:
            future = self._open.pop(number)
            if not future.cancel() and future.exception() is None:
                future.result().close()
