"""`flextok data verify`, `stats` and `measure`: check and describe shard sets, and add picture sizes to their index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal

from flextok_pl.data.convert.conversion import check_choice
from flextok_pl.data.shards.index import INDEX_NAME, ShardError, ShardIndex, ShardInfo
from flextok_pl.data.shards.jobs import run_jobs
from flextok_pl.data.shards.listing import matching_paths
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.data.shards.stats import shard_statistics
from flextok_pl.data.shards.verify import verify_sets
from flextok_pl.data.shards.writer import shard_info, write_index
from flextok_pl.files import write_file


def verify_shards(shards: str, duplicates: Literal["note", "fail"] = "note", num_workers: int | None = None) -> None:
    """Check shard sets in full, and list all errors by shard and key.

    Checks index, sizes, checksums, tars, the samples' fields, labels, pictures and keys, and compares pictures with one
    another, byte for byte.

    Args:
        shards: folder of a shard set, or a pattern with `*` or `{train,val}`; pictures are compared across all its
            sets.
        duplicates: `note` lists equal pictures, `fail` counts them as errors.
        num_workers: processes; default one per core.

    Raises:
        ShardError: there are errors.
    """
    check_choice("duplicates", duplicates, ("note", "fail"))
    folders = [path.parent if path.name == INDEX_NAME else path for path in matching_paths(shards)]
    found = verify_sets(folders, num_workers)
    for finding in found.findings:
        print(f"wrong: {finding}")
    for finding in found.duplicates:
        print(f"duplicate: {finding}")
    print(
        f"{found.samples:,} samples in {found.shards:,} shards, {found.bytes / 2**20:,.1f} MiB: "
        f"{len(found.findings)} errors, {len(found.duplicates)} duplicate pictures"
    )
    wrong = len(found.findings) + (len(found.duplicates) if duplicates == "fail" else 0)
    if wrong:
        raise ShardError(f"{wrong} errors in {shards}, listed above")


def measure_shards(shards: str, num_workers: int | None = None) -> None:
    """Add the sizes of all pictures to the index of shard sets that earlier releases wrote, for `data.shapes`.

    Does not change the tars, and skips sets that already have the sizes.

    Args:
        shards: folder of a shard set of pictures, or a pattern with `*` or `{train,val}`.
        num_workers: processes; default one per core.

    Raises:
        ShardError: a picture cannot be read, or the set was changed; its index stays as it is.
    """
    for index in load_indices(shards):
        if all(shard.sizes for shard in index.shards):
            print(f"{index.where} already has the sizes of its {index.num_samples:,} pictures")
            continue
        whole = ShardIndex.load(index.paths[0].parent)  # even if a pattern names only some of its tars
        found = run_jobs(partial(_measured, whole), whole.shards, num_workers, str(index.folder), "shard")
        write_index(replace(whole, shards=tuple(found)))
        print(f"{index.where}: measured {whole.num_samples:,} pictures")


def _measured(index: ShardIndex, shard: ShardInfo) -> ShardInfo:
    found = shard_info(index.folder / shard.name, shard.name)
    if not found.sizes or replace(found, sizes="") != replace(shard, sizes=""):
        raise ShardError(
            f"shard {index.folder / shard.name} {'differs from its index' if found.sizes else 'has no picture to read'}"
            " in some sample; see `flextok data verify`"
        )
    return found


def show_statistics(
    shards: str, json: str | None = None, pixel_samples: int = 1000, num_workers: int | None = None
) -> None:
    """Show statistics of shard sets: samples, classes, picture sizes, formats, captions, mean and deviation of pixels.

    Args:
        shards: shard set, or a pattern of sets, which are read together.
        json: file to write all numbers to.
        pixel_samples: number of pictures, spread evenly, to decode for the mean and deviation of pixels in [0, 1]; each
            picture counts equally, whatever its size.
        num_workers: processes; default one per core.
    """
    record = shard_statistics(load_indices(shards), pixel_samples, num_workers)
    print("\n".join(_lines(record)))
    if json is not None:
        write_file(Path(json), dumps(record, indent=1, ensure_ascii=False) + "\n")


def _lines(record: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Format one line per number, or per spread of numbers."""
    lines = []
    for name, value in record.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping) and set(value) == {"min", "median", "max"}:
            lines.append(f"{label:<34} {value['min']:,} .. {value['median']:,} .. {value['max']:,}")
        elif isinstance(value, Mapping):
            lines += _lines(value, f"{label}: ")
        elif name == "counts":
            most = sorted(value, key=lambda entry: (-entry["samples"], entry["class"]))
            ends = most if len(most) <= 20 else [*most[:10], *most[-10:]]
            lines += [f"  {entry['class']:>6} {entry['name'][:40]:<40} {entry['samples']:>10,}" for entry in ends]
        elif isinstance(value, list):
            lines.append(f"{label:<34} {', '.join(map(str, value))}")
        else:
            lines.append(f"{label:<34} {value:,}" if isinstance(value, int) else f"{label:<34} {value}")
    return lines
