"""Write pictures from any source as a shard set: the part that all converters share.

A converter lists its source, always in the same order, and defines how to read a sample. This file reads, checks,
shrinks, leaves out and writes samples, several shards at a time. `Conversion` has the options of all converters.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from flextok_pl.contracts import ImageSize, checked_size
from flextok_pl.data.shards.index import IMAGE_EXTENSIONS, ShardError, ShardIndex, is_utf8
from flextok_pl.data.shards.tars import Span
from flextok_pl.data.shards.writer import Sample, start_set, write_index, write_shards
from flextok_pl.data.transforms import covering, decode_image
from flextok_pl.keys import text_hash

_LOG = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Conversion:
    """How to store pictures and write their set.

    Args:
        size: shrink pictures whose shorter side is longer than this many pixels to it, antialiased and without changing
            the aspect ratio. With [height, width], shrink them as far as they still cover it. Default: keep the files'
            bytes.
        image_format: format of shrunk pictures; `png` is lossless.
        quality: of `jpg` and `webp`, 1..100.
        on_error: `raise` stops at a broken picture; `skip` leaves it out, logs it and counts it in the index.
        num_workers: processes; default one per core.
        samples_per_shard: most samples of a tar file.
        overwrite: replace a set that was made with other arguments.
    """

    size: int | tuple[int, int] | None = None
    image_format: Literal["png", "jpg", "webp"] = "jpg"
    quality: int = 95
    on_error: Literal["raise", "skip"] = "raise"
    num_workers: int | None = None
    samples_per_shard: int = 1000
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", checked_size(self.size, "size"))
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be in 1..100")
        check_choice("image_format", self.image_format, ("png", "jpg", "webp"))
        check_choice("on_error", self.on_error, ("raise", "skip"))

    def arguments(self) -> dict[str, Any]:
        """The options that decide the content of the set, as JSON types.

        They exclude `on_error`, so that a run that stopped at a broken picture can resume without it.
        """
        shrinks = self.size is not None
        return {
            "size": self.size,
            "image_format": self.image_format if shrinks else None,
            "quality": self.quality if shrinks else None,
            "samples_per_shard": self.samples_per_shard,
        }

    def stored(self, content: bytes, extension: str) -> tuple[str, bytes]:
        """Check an encoded picture and shrink it if asked; returns the extension and the bytes to store."""
        image = decode_image(content)
        size = image.size if self.size is None else covering(image.size, self.size)
        if size == image.size:
            return extension, content
        buffer = io.BytesIO()
        how: dict[str, dict[str, Any]] = {
            "jpg": {"format": "JPEG", "quality": self.quality, "subsampling": 0},
            "webp": {"format": "WEBP", "quality": self.quality},
            "png": {"format": "PNG"},
        }
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, **how[self.image_format])
        return self.image_format, buffer.getvalue()

    def samples(self, readers: Iterable[tuple[str, Callable[[], Sample]]]) -> Iterator[Sample]:
        """Read samples by name; leaves out broken ones if `on_error` is `skip`."""
        for name, read in readers:
            try:
                sample = read()
                if not is_utf8(sample.key):
                    raise ValueError(f"its name is not UTF-8; rename it: {sample.key!r}")
            except (ValueError, OSError) as error:
                name = name.encode("utf-8", "backslashreplace").decode("utf-8")
                if self.on_error == "raise":
                    raise ValueError(f"{name}: {error}; repair or remove it, or pass on_error=skip") from error
                _LOG.warning("left out %s: %s", name, error)
                continue
            yield sample

    def write(
        self,
        folder: Path,
        items: Sequence[ItemT],
        make: Callable[[Sequence[ItemT]], Iterable[Sample]],
        description: str,
        *,
        fields: Sequence[str],
        arguments: Mapping[str, Any],
        provenance: Mapping[str, Any],
        classes: Sequence[str] = (),
        image_size: ImageSize | None = None,
    ) -> ShardIndex:
        """Write a set, resume an interrupted run, or find the finished set.

        `make` turns items into samples, by `samples` or `reader`. The options after it are those of `ShardIndex`. The
        index's arguments also get the options of this object, its provenance the number of pictures left out.
        """
        for name in classes:
            if not is_utf8(name):
                raise ValueError(f"the name of class {name!r} is not UTF-8; rename its folder or the class")
        arguments = {**arguments, **self.arguments()}
        ready = start_set(folder, arguments, self.overwrite)
        if ready is not None:
            left_out = ready.provenance["skipped"]
            if left_out and self.on_error == "raise":
                raise ShardError(f"{folder} is finished, but {left_out} pictures were left out; pass on_error=skip")
            return ready
        skips = self.on_error == "skip"
        shards = write_shards(folder, items, make, description, self.num_workers, self.samples_per_shard, skips)
        skipped = len(items) - sum(shard.count for shard in shards)
        if not shards:
            raise ShardError(f"none of the {len(items)} pictures for {folder} could be decoded")
        if skipped:
            _LOG.warning("%s: %d of %d pictures were left out", folder, skipped, len(items))
        contents = tuple(fields), tuple(shards), tuple(classes), image_size
        return write_index(ShardIndex(folder, *contents, arguments, {**provenance, "skipped": skipped}))

    def reader(self, root: Path, needs_picture: bool = True) -> Callable[[Sequence[Item]], Iterator[Sample]]:
        """Make the function that turns items into samples, for `write`; item files are relative to `root`."""
        return partial(self._samples_of_items, root, needs_picture)

    def _samples_of_items(self, root: Path, needs_picture: bool, items: Sequence[Item]) -> Iterator[Sample]:
        return self.samples((item.name, partial(self._read_item, root, needs_picture, item)) for item in items)

    def _read_item(self, root: Path, needs_picture: bool, item: Item) -> Sample:
        if needs_picture and not any(extension in IMAGE_EXTENSIONS for extension, _ in item.files):
            raise ValueError("it has no picture")
        files = {}
        for extension, span in item.files:
            content = span.read(root)
            if extension in IMAGE_EXTENSIONS:
                extension, content = self.stored(content, extension)
            files[extension] = content
        return Sample(item.key, {**files, **condition_files(item.label, item.caption)})


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to write, without the label or caption that is None."""

    key: str
    files: tuple[tuple[str, Span], ...]  # by extension; the conversion stores pictures, and copies other files
    label: int | None = None
    caption: str | None = None

    @property
    def name(self) -> str:
        """The file, and the key if the file holds several samples."""
        _, span = self.files[0]
        return span.file if span.size is None else f"{span.file}, {self.key}"


def condition_files(label: int | None, caption: str | None) -> dict[str, bytes]:
    """The files of a sample's label and caption, if it has them."""
    files = {"cls": None if label is None else str(label), "txt": caption}
    return {extension: text.encode() for extension, text in files.items() if text is not None}


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """Check an option against its choices."""
    if value not in known:
        raise ValueError(f"{option}={value!r} must be one of {tuple(known)}")


def mixed(items: Iterable[Item]) -> list[Item]:
    """Sort items by the hashes of their keys, which must be unique."""
    ordered = sorted(items, key=lambda item: text_hash(item.key))
    for one, other in pairwise(ordered):
        if one.key == other.key:
            files = " and ".join(item.files[0][1].file for item in (one, other))
            raise ValueError(f"two samples have the key {one.key!r}, in {files}; rename one of them")
    return ordered
