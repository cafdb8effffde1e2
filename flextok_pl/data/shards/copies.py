"""Copy remote shard sets to this machine, for machines that cannot reach them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from flextok_pl.data.shards.index import INDEX_NAME, ShardIndex
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
        """The shards, by the indices here or else by the remote ones; none without a place or a network."""
        if places.data is None:
            return []
        folder = self.folder(places)
        complete = sorted(folder.glob(f"*/{INDEX_NAME}")) if not any(folder.glob(f"*/{PENDING}")) else []
        if not complete and constants.is_offline_mode():
            return []
        indices = [ShardIndex.load(file) for file in complete] or load_indices(self.source)
        found = []
        for number, index in enumerate(indices):
            for shard in index.shards:
                path = self._place(places, number) / shard.name
                found.append(Part(shard.name, shard.bytes, path.is_file() and path.stat().st_size == shard.bytes))
        return found

    def fetch(self, places: Places) -> None:
        """See `Download.fetch`; each shard is compared with its SHA-256 as it arrives."""
        indices = load_indices(self.source, places.data)
        sets = [(self._place(places, number), index, index.to_json()) for number, index in enumerate(indices)]
        for place, _, text in sets:
            if not any(_holds(place / name, text) for name in (INDEX_NAME, PENDING)):
                remove(place)  # the set was written again
                write_file(place / PENDING, text)
        for place, index, _ in sets:
            for shard in index.shards:
                assert index.remote is not None
                index.remote.open(shard, place).close()
            if (place / PENDING).exists():
                (place / PENDING).replace(place / INDEX_NAME)

    def _place(self, places: Places, number: int) -> Path:
        return self.folder(places) / f"{number:03d}"


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


def copies_of(source: object) -> list[SetCopy]:
    """The copies of all URLs and commands in a source, such as `data.train`."""
    entries = source if isinstance(source, list) else [source]
    return [SetCopy(str(entry)) for entry in entries if entry is not None and is_remote(str(entry))]
