"""Count samples, classes, sizes, formats and captions of a shard set, and measure its pixels' mean and deviation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flextok_pl.data.shards.index import IMAGE_EXTENSIONS, ShardIndex
from flextok_pl.data.shards.jobs import run_jobs
from flextok_pl.data.shards.tars import Span, tar_samples
from flextok_pl.data.transforms import decode_image, inspect_image


@dataclass
class _Counts:
    """Counts of one shard, or of all."""

    labels: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # width and height, after orientation
    formats: Counter[str] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)  # of captions
    words: Counter[int] = field(default_factory=Counter)  # of captions
    moments: list[np.ndarray[Any, Any]] = field(default_factory=list)  # per picture, mean and mean square of RGB

    def add(self, other: _Counts) -> None:
        for name in ("labels", "sizes", "formats", "characters", "words"):
            getattr(self, name).update(getattr(other, name))
        self.moments += other.moments


def shard_statistics(
    indices: Sequence[ShardIndex], pixel_samples: int = 1000, num_workers: int | None = None
) -> dict[str, Any]:
    """Count the contents of shard sets that are read together.

    `pixel_samples` pictures, spread evenly, are decoded for the mean and deviation of their pixels; of the others only
    the header is read. Returns JSON types: `samples`, `shards`, `bytes`, `fields`, and if the sets have them `classes`,
    `pictures`, `captions` and `pixels`. A broken sample raises `ValueError`, which names it.
    """
    if pixel_samples < 0:
        raise ValueError(f"pixel_samples={pixel_samples} must be 0 or more")
    fields, total = indices[0].fields, sum(index.num_samples for index in indices)
    number = min(pixel_samples, total)
    chosen = {i * total // number for i in range(number)}
    jobs, first = [], 0
    for index in indices:
        for path, shard in zip(index.paths, index.shards, strict=True):
            jobs.append((path, {i for i in range(shard.count) if first + i in chosen}))
            first += shard.count
    counts = _Counts()
    for part in run_jobs(partial(_count_shard, fields), jobs, num_workers, "stats", "shard"):
        counts.add(part)
    size = sum(shard.bytes for index in indices for shard in index.shards)
    record: dict[str, Any] = {"samples": total, "shards": len(jobs), "bytes": size, "fields": list(fields)}
    if "label" in fields:
        record["classes"] = _classes(counts.labels, indices[0].classes)
    if "image" in fields:
        record["pictures"] = _pictures(counts)
    if "text" in fields:
        record["captions"] = {
            "empty": counts.characters[0],
            "characters": spread(counts.characters),
            "words": spread(counts.words),
        }
    if counts.moments:
        record["pixels"] = _pixels(counts.moments)
    return record


def spread(counts: Mapping[Any, int]) -> dict[str, Any]:
    """Smallest, (lower) median and largest of values with these counts."""
    values = sorted(value for value in counts if counts[value])
    stops = np.cumsum([counts[value] for value in values])
    return {"min": values[0], "median": values[int(np.searchsorted(stops, (stops[-1] + 1) // 2))], "max": values[-1]}


def _count_shard(fields: Sequence[str], job: tuple[Path, Collection[int]]) -> _Counts:
    path, decoded = job
    counts = _Counts()
    for number, (key, found) in enumerate(tar_samples(path.parent, path.name)):
        try:
            _count_sample(counts, fields, dict(found), path.parent, number in decoded)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}, sample {key!r}: {error}; see `flextok data verify`") from error
    return counts


def _count_sample(counts: _Counts, fields: Sequence[str], files: Mapping[str, Span], root: Path, decode: bool) -> None:
    if "label" in fields:
        counts.labels[int(_place(files, "cls").read(root))] += 1
    if "text" in fields:
        text = _place(files, "txt").read(root).decode()
        counts.characters[len(text)] += 1
        counts.words[len(text.split())] += 1
    if "image" in fields:
        content = _place(files, *IMAGE_EXTENSIONS).read(root)
        name, size = inspect_image(content)
        counts.sizes[size] += 1
        counts.formats[name] += 1
        if decode:
            pixels = np.asarray(decode_image(content)) / 255.0  # (H, W, 3)
            counts.moments.append(np.stack([pixels.mean((0, 1)), (pixels**2).mean((0, 1))]))  # (2, 3)


def _place(files: Mapping[str, Span], *extensions: str) -> Span:
    for extension in extensions:
        if extension in files:
            return files[extension]
    raise ValueError(f"it has no file .{' or .'.join(extensions)}")


def _classes(labels: Counter[int], names: Sequence[str]) -> dict[str, Any]:
    counts = {i: labels[i] for i in range(len(names))}
    least, most = min(filter(None, counts.values()), default=0), max(counts.values(), default=0)
    return {
        "number": len(names),
        "without_samples": sum(not count for count in counts.values()),
        "samples_without_class": labels[-1],
        "samples_per_class": spread(Counter(counts.values())),
        "imbalance": most / least if least else None,  # among the classes that have samples
        "counts": [{"class": i, "name": name, "samples": counts[i]} for i, name in enumerate(names)],
    }


def _pictures(counts: _Counts) -> dict[str, Any]:
    measures: dict[str, Callable[[int, int], float]] = {
        "width": lambda width, height: width,
        "height": lambda width, height: height,
        "shorter_side": min,
        "aspect_ratio": lambda width, height: round(width / height, 3),
    }
    record: dict[str, Any] = {"formats": dict(counts.formats.most_common())}
    for name, measure in measures.items():
        values: Counter[float] = Counter()
        for size, count in counts.sizes.items():
            values[measure(*size)] += count
        record[name] = spread(values)
    return record


def _pixels(moments: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Mean and deviation over pictures of equal weight, whatever their size."""
    mean, square = np.mean(moments, axis=0)  # (3,), (3,)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return {"pictures": len(moments), "mean": mean.round(4).tolist(), "std": deviation.round(4).tolist()}
