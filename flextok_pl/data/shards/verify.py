"""Is a shard set whole? Everything is read, and all that is wrong is told, not only the first of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from flextok_pl.data.samples import STACKED, Decoder
from flextok_pl.data.shards.index import IMAGE_EXTENSIONS, INDEX_NAME, ShardError, ShardIndex, is_utf8
from flextok_pl.data.shards.jobs import run_jobs
from flextok_pl.data.shards.listing import tar_samples


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Args:
        shard: path of the tar, or of the index.
        key: of the sample; None where it is not about one.
        problem: what is wrong.
    """

    shard: Path
    key: str | None
    problem: str

    def __str__(self) -> str:
        return f"{self.shard}{'' if self.key is None else f', sample {self.key!r}'}: {self.problem}"


@dataclass
class Verification:
    """What was read of one or several sets.

    Args:
        shards: number of tar files.
        samples: number of samples in them.
        bytes: their size.
        findings: what is wrong.
        duplicates: pictures that are, byte for byte, also stored under another key.
    """

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    duplicates: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class _Shard:
    """What was read of one tar: per sample its key and the digest of its picture, and the first sample's shapes."""

    samples: list[tuple[str, bytes | None]]
    bytes: int
    findings: list[Finding]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def verify_sets(folders: Sequence[Path], num_workers: int | None = None) -> Verification:
    """Read shard sets in full: index, sizes, checksums, tars, fields, labels, pictures, keys, and equal pictures.

    Args:
        folders: of the sets; pictures are compared among all of them, keys within each.
        num_workers: processes; default one per core.

    Raises:
        ValueError: an option is out of range.
    """
    result = Verification()
    pictures: dict[bytes, tuple[Path, str]] = {}
    for folder in folders:
        file = folder / INDEX_NAME
        if not file.is_file():
            result.findings.append(Finding(file, None, "it is missing: the set is not finished, or lies deeper"))
            continue
        try:
            index = ShardIndex.parse(file.read_bytes(), folder, str(file))
        except (ShardError, OSError) as error:
            result.findings.append(Finding(file, None, str(error)))
            continue
        known = {shard.name for shard in index.shards}
        result.findings += [
            Finding(path, None, f"it is not in {INDEX_NAME}")
            for path in sorted(folder.glob("*.tar"))
            if path.name not in known
        ]
        keys: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        numbers, counts = range(len(index.shards)), [shard.count for shard in index.shards]
        shards = run_jobs(partial(_verify_shard, index), numbers, num_workers, str(folder), "sample", counts)
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
    return result


def _verify_shard(index: ShardIndex, number: int) -> _Shard:
    expected, path = index.shards[number], index.paths[number]
    problems: list[str] = []
    findings: list[Finding] = []
    samples: list[tuple[str, bytes | None]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    if not path.is_file():
        return _Shard([], 0, [Finding(path, None, "it is missing")])
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if size != expected.bytes:
        problems.append(f"it has {size:,} bytes instead of {expected.bytes:,}")
    elif digest != expected.sha256:
        problems.append(f"it does not match its checksum in {INDEX_NAME}")
    try:
        for key, files in tar_samples(path.parent, path.name):
            raw: dict[str, Any] = {"__key__": key, "__url__": str(path)}
            for extension, span in files:
                if extension in raw:
                    findings.append(Finding(path, key, f"it has two files .{extension}"))
                raw[extension] = span.read(path.parent)
            if not is_utf8(key):
                findings.append(Finding(path, key, "its key is not UTF-8; rename its file and write the set again"))
            findings += [Finding(path, key, problem) for problem in _problems(index, raw, shapes)]
            samples.append((key, _picture_digest(raw)))
    except (ValueError, OSError) as error:
        problems.append(str(error))
    if len(samples) != expected.count:
        problems.append(f"it holds {len(samples)} samples instead of {expected.count}")
    return _Shard(samples, size, [*(Finding(path, None, problem) for problem in problems), *findings], shapes)


def _problems(index: ShardIndex, raw: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with each field of a sample; `shapes` receives those of the first one, which others must have."""
    found, decoder = [], Decoder()
    for name in index.fields:
        try:
            sample = decoder(replace(index, fields=(name,)), raw)
        except ShardError as error:
            found.append(str(error.__cause__))
            continue
        side = index.image_size
        assert sample is not None, "this decoder raises"
        if name == "image" and side is not None and sample["image"].size != (side, side):
            width, height = sample["image"].size
            found.append(f"it has {width} x {height} pixels instead of {side} x {side}")
        vocabulary = (index.maker(name) or {}).get("vocab_size") if name == "tokens" else None
        if vocabulary is not None and ((sample["tokens"] < 0) | (sample["tokens"] >= vocabulary)).any():
            found.append(f"it has tokens outside 0..{vocabulary - 1}, those of its tokenizer")
        if name in STACKED:
            shape = tuple(sample[name].shape)
            if shapes.setdefault(name, shape) != shape:
                found.append(_other_shape(name, shape, shapes[name]))
    return found


def _other_shape(name: str, shape: tuple[int, ...], first: tuple[int, ...]) -> str:
    return f"its {name} have the shape {shape} instead of the {first} of the samples before"


def _picture_digest(raw: dict[str, Any]) -> bytes | None:
    content = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
    return None if content is None else hashlib.blake2b(content, digest_size=16).digest()
