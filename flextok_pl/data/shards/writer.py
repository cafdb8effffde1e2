"""Write shard sets atomically, in parallel and repeatably.

A shard gets its final name only when it is complete and on disk, and `index.json` comes last. While a set is being
written, its folder holds `index.json.partial` with the writer's arguments. It marks the shards of an interrupted run as
ours: the next run resumes from them if the arguments are the same, and otherwise replaces them.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

from webdataset.writer import TarWriter

from flextok_pl.data.shards.index import INDEX_NAME, ShardError, ShardIndex, ShardInfo, file_sha256, is_utf8
from flextok_pl.data.shards.jobs import run_jobs
from flextok_pl.data.shards.sizes import picture_sizes
from flextok_pl.data.shards.tars import files_in_tar, grouped
from flextok_pl.files import whole_file, write_file

PARTIAL_NAME = f"{INDEX_NAME}.partial"

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Sample:
    """One sample to store in a shard."""

    key: str  # unique in the set, without a dot (WebDataset ends the key at the first one)
    files: Mapping[str, bytes]  # content by extension, such as `png`, `cls`, `txt`, `latent.npy`


def shard_name(number: int) -> str:
    """File name of the shard with this number."""
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardInfo:
    """Write one tar file atomically; equal samples give equal bytes, and an error leaves nothing behind."""
    with whole_file(path) as temporary:
        with temporary.open("wb") as file, TarWriter(file, "", "", 0o644, encoder=False, mtime=0) as tar:
            for sample in samples:
                if not sample.key or "." in sample.key or sample.key.startswith(("__", "/")) or not is_utf8(sample.key):
                    raise ShardError(
                        f"sample key {sample.key!r} must be UTF-8, not empty, without a dot, and not start with '__' "
                        "or '/'"
                    )
                tar.write({"__key__": sample.key, **sample.files})
        shard = shard_info(temporary, path.name)
    return shard


def shard_info(path: Path, name: str) -> ShardInfo:
    """The entry of a tar file for the index, read from the file."""
    with path.open("rb") as file:
        samples = [members for _, members in grouped(files_in_tar(file))]
        sizes = picture_sizes(file, samples)
    return ShardInfo(name, len(samples), path.stat().st_size, file_sha256(path), sizes)


def write_index(index: ShardIndex) -> ShardIndex:
    """Write `index.json` atomically, which makes the folder a finished shard set."""
    write_file(index.folder / INDEX_NAME, index.to_json(), shared=False)
    (index.folder / PARTIAL_NAME).unlink(missing_ok=True)
    return index


def start_set(folder: Path, arguments: Mapping[str, Any], overwrite: bool) -> ShardIndex | None:
    """Prepare a folder for a new shard set (None), or return the finished, intact set of equal arguments.

    The arguments, as JSON types, are those that decide the content. Shards of an interrupted run with equal arguments
    are kept, for `complete_shard`. Another set, finished or not, a damaged one, or foreign files raise `ShardError`.
    """
    finished = (folder / INDEX_NAME).exists()
    if finished and not overwrite:
        index = ShardIndex.load(folder)
        if json.loads(json.dumps(dict(arguments))) != index.arguments:
            raise ShardError(
                f"{folder} holds a shard set made with other arguments: {dict(index.arguments)} instead of "
                f"{dict(arguments)}; choose another folder, or pass overwrite=true to replace it"
            )
        index.verify()
        return index
    folder.mkdir(parents=True, exist_ok=True)
    ours = finished or (folder / PARTIAL_NAME).exists()
    leftovers = list(folder.iterdir())
    foreign = [p for p in leftovers if not (ours and _is_ours(p.name))]
    if foreign:
        raise ShardError(
            f"{folder} holds files that are not part of a shard set, such as {foreign[0].name}; choose an empty folder"
        )
    partial, text = folder / PARTIAL_NAME, json.dumps(dict(arguments), sort_keys=True)
    if not finished and partial.exists() and (begun := partial.read_text(encoding="utf-8")):
        if begun == text:
            return None
        if not overwrite and len(leftovers) > 1:
            changed = _changed(json.loads(begun), json.loads(text))
            raise ShardError(
                f"{folder} holds an unfinished shard set made with other arguments: {changed}; give those again to go "
                "on with it, choose another folder, or pass overwrite=true to replace it"
            )
    partial.write_text("", encoding="utf-8")  # marks the folder as ours; has arguments once no old file is left
    (folder / INDEX_NAME).unlink(missing_ok=True)  # before its shards
    for path in leftovers:
        if path.name not in (PARTIAL_NAME, INDEX_NAME):
            path.unlink()
    partial.write_text(text, encoding="utf-8")
    return None


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name}={before.get(name)!r} instead of {now.get(name)!r}" for name in names)


def shard_sizes(total: int, samples_per_shard: int) -> list[int]:
    """Samples of each shard: as few shards as possible, of sizes that differ by at most 1, the larger ones first."""
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1")
    number = -(-total // samples_per_shard)
    return [(total + number - 1 - i) // number for i in range(number)]


def complete_shard(path: Path, count: int | None = None) -> ShardInfo | None:
    """The entry of a shard that an interrupted run left complete, or None if it must be written.

    A shard with its final name was complete. This checks that it still is a tar file, of `count` samples if given.
    """
    try:
        shard = shard_info(path, path.name)
    except (FileNotFoundError, tarfile.TarError):
        return None
    return shard if count in (None, shard.count) else None


def _is_ours(name: str) -> bool:
    plain = name.removeprefix(".").removesuffix(".tmp").removesuffix(".partial")  # `.tmp` in releases before 0.2
    return plain == INDEX_NAME or (plain.startswith("shard-") and plain.endswith(".tar"))


def write_shards(
    folder: Path,
    items: Sequence[ItemT],
    make: Callable[[Sequence[ItemT]], Iterable[Sample]],
    description: str = "shards",
    num_workers: int | None = 0,
    samples_per_shard: int = 1000,
    leaves_out: bool = False,
) -> list[ShardInfo]:
    """Write items as shards, several shards at a time; complete shards of an interrupted run are kept.

    `start_set` prepares the folder, and `write_index` finishes the set. `make` yields the samples of one shard's items
    and must be picklable with several workers. With `leaves_out` it may leave out some, so a complete shard can hold
    fewer samples than items. Returns the shards in order, without empty ones.
    """
    sizes = shard_sizes(len(items), samples_per_shard)
    chunks = [items[start:stop] for start, stop in pairwise([0, *accumulate(sizes)])]
    job = partial(_complete_or_write, folder, make, leaves_out)
    shards = run_jobs(job, list(enumerate(chunks)), num_workers, description, "sample", sizes)
    for shard in shards:
        if not shard.count:
            (folder / shard.name).unlink()
    return [shard for shard in shards if shard.count]


def _complete_or_write(
    folder: Path,
    make: Callable[[Sequence[ItemT]], Iterable[Sample]],
    leaves_out: bool,
    job: tuple[int, Sequence[ItemT]],
) -> ShardInfo:
    number, items = job
    path = folder / shard_name(number)
    return complete_shard(path, None if leaves_out else len(items)) or write_shard(path, make(items))
