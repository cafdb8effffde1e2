"""Check that shard sets are whole: read everything and report all problems, not only the first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from flextok_pl.contracts import height_width
from flextok_pl.data.samples import STACKED, Decoder
from flextok_pl.data.shards.index import IMAGE_EXTENSIONS, INDEX_NAME, ShardError, ShardIndex, file_sha256, is_utf8
from flextok_pl.data.shards.jobs import run_jobs
from flextok_pl.data.shards.sizes import parse_sizes
from flextok_pl.data.shards.tars import tar_samples


@dataclass(frozen=True)
class Finding:
    """A problem of a tar or an index, or of the sample with this key."""

    shard: Path
    key: str | None
    problem: str

    def __str__(self) -> str:
        return f"{self.shard}{'' if self.key is None else f', sample {self.key!r}'}: {self.problem}"


@dataclass
class Verification:
    """Result of reading one or several sets; duplicates are pictures that another key also has, byte for byte."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    duplicates: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class _Shard:
    """Result of reading one tar: the key and picture digest of each sample, and the first sample's shapes."""

    findings: list[Finding]
    samples: list[tuple[str, bytes | None]] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bytes: int = 0


def verify_sets(folders: Sequence[Path], num_workers: int | None = None) -> Verification:
    """Read shard sets in full: index, sizes, checksums, tars, fields, labels, pictures, keys, and equal pictures.

    Pictures are compared across all sets, keys within each.
    """
    result = Verification()
    pictures: dict[bytes, tuple[Path, str]] = {}
    for folder in folders:
        file = folder / INDEX_NAME
        if not file.is_file():
            result.findings.append(Finding(file, None, "it is missing: the set is not finished, or is in a subfolder"))
            continue
        try:
            index = ShardIndex.parse(file.read_bytes(), folder, str(file))
        except (ShardError, OSError) as error:
            result.findings.append(Finding(file, None, str(error)))
            continue
        unknown = sorted(set(folder.glob("*.tar")) - set(index.paths))
        result.findings += [Finding(path, None, f"it is not in {INDEX_NAME}") for path in unknown]
        _verify_set(index, num_workers, result, pictures)
    return result


def _verify_set(
    index: ShardIndex, num_workers: int | None, result: Verification, pictures: dict[bytes, tuple[Path, str]]
) -> None:
    """Add the shards of a set to the result, and their pictures by digest."""
    keys: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    numbers, counts = range(len(index.shards)), [shard.count for shard in index.shards]
    shards = run_jobs(partial(_verify_shard, index), numbers, num_workers, str(index.folder), "sample", counts)
    for path, shard in zip(index.paths, shards, strict=True):
        result.shards += 1
        result.samples += len(shard.samples)
        result.bytes += shard.bytes
        result.findings += shard.findings
        for name, shape in shard.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                result.findings.append(Finding(path, None, _other_shape(name, shape, shapes[name])))
        for key, digest in shard.samples:
            if key in keys:
                result.findings.append(Finding(path, key, f"the same key is in {keys[key]}"))
            keys[key] = path
            if digest is not None and digest in pictures:
                first, other = pictures[digest]
                result.duplicates.append(Finding(path, key, f"the same picture is {other!r} in {first}"))
            elif digest is not None:
                pictures[digest] = (path, key)


def _verify_shard(index: ShardIndex, number: int) -> _Shard:
    expected, path = index.shards[number], index.paths[number]
    if not path.is_file():
        return _Shard([Finding(path, None, "it is missing")])
    found: list[tuple[str | None, str]] = []  # key and problem
    samples: list[tuple[str, bytes | None]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    size = path.stat().st_size
    if size != expected.bytes:
        found.append((None, f"it has {size:,} bytes instead of {expected.bytes:,}"))
    elif file_sha256(path) != expected.sha256:
        found.append((None, f"it does not match its checksum in {INDEX_NAME}"))
    try:
        sizes = parse_sizes(expected.sizes).tolist() if "image" in index.fields else []
        for key, files in tar_samples(path.parent, path.name):
            raw: dict[str, Any] = {"__key__": key, "__url__": str(path)}
            for extension, span in files:
                if extension in raw:
                    found.append((key, f"it has two files .{extension}"))
                raw[extension] = span.read(path.parent)
            if not is_utf8(key):
                found.append((key, "its key is not UTF-8; rename its file and write the set again"))
            stated = sizes[len(samples)] if len(samples) < len(sizes) else None
            found += [(key, problem) for problem in _problems(index, raw, shapes, stated)]
            content = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
            digest = None if content is None else hashlib.blake2b(content, digest_size=16).digest()
            samples.append((key, digest))
    except (ValueError, OSError) as error:
        found.append((None, str(error)))
    if len(samples) != expected.count:
        found.append((None, f"it holds {len(samples)} samples instead of {expected.count}"))
    found.sort(key=lambda entry: entry[0] is not None)  # problems of the shard first
    return _Shard([Finding(path, *entry) for entry in found], samples, shapes, size)


def _problems(
    index: ShardIndex, raw: dict[str, Any], shapes: dict[str, tuple[int, ...]], stated: Sequence[int] | None
) -> list[str]:
    """Problems of each field of a sample; `shapes` receives those of the first sample, which the others must have.

    `stated` is the width and height of its picture in the index, if they are there.
    """
    found, decoder = [], Decoder()
    for name in index.fields:
        try:
            sample = decoder(replace(index, fields=(name,)), raw)
        except ShardError as error:
            found.append(str(error.__cause__))
            continue
        assert sample is not None, "this decoder raises"
        if name == "image":
            one = index.image_size
            wanted = stated if one is None else height_width(one)[::-1]
            if wanted is not None and sample["image"].size != tuple(wanted):
                width, height = sample["image"].size
                found.append(f"it has {width} x {height} pixels instead of {wanted[0]} x {wanted[1]}")
        vocabulary = (index.maker(name) or {}).get("vocab_size") if name == "tokens" else None
        if vocabulary is not None and ((sample["tokens"] < 0) | (sample["tokens"] >= vocabulary)).any():
            found.append(f"it has tokens outside 0..{vocabulary - 1}, those of its tokenizer")
        if name in STACKED and "shapes" not in index.arguments:
            shape = tuple(sample[name].shape)
            if shapes.setdefault(name, shape) != shape:
                found.append(_other_shape(name, shape, shapes[name]))
    return found


def _other_shape(name: str, shape: tuple[int, ...], first: tuple[int, ...]) -> str:
    return f"its {name} have the shape {shape} instead of the {first} of the samples before"
