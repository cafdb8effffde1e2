"""Copy remote shard sets to this machine, for machines that cannot reach them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from flextok_pl.data.shards.index import INDEX_NAME, ShardError, ShardIndex
from flextok_pl.data.shards.remote import is_remote
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.downloads import Download, Part, Places
from flextok_pl.files import remove, write_file

PENDING = f".{INDEX_NAME}"
"""The index of a set whose shards have not all arrived."""


@dataclass(frozen=True)
class SetCopy(Download):
    """Local copies of the sets that one source of data names by a URL or a command, one folder each."""

    source: str

    @property
    def title(self) -> str:
        """The source."""
        return self.source

    def folder(self, places: Places) -> Path:
        """The folder of the copies."""
        assert places.data is not None
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", self.source.rstrip("/").rpartition("/")[2])[-40:]
        return places.data / f"{name}-{hashlib.sha256(self.source.encode()).hexdigest()[:8]}"

    def parts(self, places: Places) -> list[Part]:
        """The shards, by the remote indices or else by those here; none without a place, or without either."""
        if places.data is None:
            return []
        found = []
        for number, index in enumerate(self._indices(places)):
            place = self._place(places, number)
            files = {} if not _is_of(place, index) else {file.name: file.stat().st_size for file in place.iterdir()}
            found += [Part(shard.name, shard.bytes, files.get(shard.name) == shard.bytes) for shard in index.shards]
        return found

    def fetch(self, places: Places) -> None:
        """See `Download.fetch`; each shard is compared with its SHA-256 as it arrives."""
        indices = load_indices(self.source, places.data)
        sets = [(self._place(places, number), index) for number, index in enumerate(indices)]
        for place, index in sets:
            if not _is_of(place, index):
                remove(place)  # the set was written again
                write_file(place / PENDING, index.to_json())
        for place, index in sets:
            for shard in index.shards:
                assert index.remote is not None
                index.remote.open(shard, place).close()
            if (place / PENDING).exists():
                (place / PENDING).replace(place / INDEX_NAME)

    def _indices(self, places: Places) -> list[ShardIndex]:
        """The remote indices; without a network those of the copies, none if one of these never was complete."""
        folder = self.folder(places)
        files = [] if any(folder.glob(f"*/{PENDING}")) else sorted(folder.glob(f"*/{INDEX_NAME}"))
        try:
            if not constants.is_offline_mode():
                return load_indices(self.source)
        except ShardError:
            if not files:
                raise
        return [ShardIndex.parse(file.read_bytes(), file.parent, str(file)) for file in files]

    def _place(self, places: Places, number: int) -> Path:
        return self.folder(places) / f"{number:03d}"


def _is_of(place: Path, index: ShardIndex) -> bool:
    """Whether a folder holds a copy of the set, complete or not."""
    files = [place / name for name in (INDEX_NAME, PENDING)]
    return any(file.is_file() and file.read_bytes() == index.to_json().encode() for file in files)


def copies_of(source: object) -> list[SetCopy]:
    """The copies of all URLs and commands in a source, such as `data.train`."""
    entries = source if isinstance(source, list) else [source]
    return [SetCopy(str(entry)) for entry in entries if entry is not None and is_remote(str(entry))]
