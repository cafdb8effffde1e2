"""Store the sizes of a shard's pictures in its index, so that no picture is read to know them.

They are text, such as `500x375*3 375x500`: width and height of consecutive pictures after orientation, and the number
of repetitions if it is more than 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import IO, Any

import numpy as np

from flextok_pl.data.shards.index import IMAGE_EXTENSIONS
from flextok_pl.data.shards.tars import Member
from flextok_pl.data.transforms import PictureError, inspect_image


def size_text(sizes: Iterable[tuple[int, int]]) -> str:
    """Write (width, height) of pictures, in order, as text."""
    runs = ((size, sum(1 for _ in group)) for size, group in groupby(sizes))
    return " ".join(f"{width}x{height}" + (f"*{number}" if number > 1 else "") for (width, height), number in runs)


def parse_sizes(text: str) -> np.ndarray[Any, Any]:
    """Parse a text to (N, 2), width and height of each picture; `ValueError` if it is malformed."""
    runs = text.split()
    known = {run: re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:\*([1-9]\d*))?", run) for run in set(runs)}
    if None in known.values():
        raise ValueError(f"sizes of pictures must be written as 500x375 or 500x375*3, not {text[:40]!r}")
    numbers = {run: [int(part or 1) for part in found.groups()] for run, found in known.items() if found is not None}
    table = np.array([numbers[run] for run in runs], np.int64).reshape(-1, 3)  # width, height, repetitions
    return np.repeat(table[:, :2], table[:, 2], axis=0)


def picture_sizes(file: IO[bytes], samples: Iterable[Sequence[Member]]) -> str:
    """The text for the samples of an open tar, from their headers; empty if one has no readable picture."""
    sizes = []
    for members in samples:
        picture = next((place for extension, place in members if extension in IMAGE_EXTENSIONS), None)
        size = None if picture is None else _size(os.pread(file.fileno(), picture.size or 0, picture.offset))
        if size is None:
            return ""
        sizes.append(size)
    return size_text(sizes)


def _size(content: bytes) -> tuple[int, int] | None:
    try:
        return inspect_image(content)[1]
    except PictureError:
        return None
