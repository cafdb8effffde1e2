"""From pictures of any source to a shard set: what all converters share.

A converter lists its source, in the same order every time, and says how a sample is read; reading, checking, shrinking,
leaving out and writing happen here, several shards at a time.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from PIL import Image

from flextok_pl.data.shards.index import IMAGE_EXTENSIONS, ShardError, ShardIndex, is_utf8
from flextok_pl.data.shards.listing import Span
from flextok_pl.data.shards.writer import Sample, start_set, worker_processes, write_index, write_shards
from flextok_pl.data.transforms import decode_image

_LOG = logging.getLogger(__name__)

ImageFormat = Literal["png", "jpg", "webp"]
OnError = Literal["raise", "skip"]

ItemT = TypeVar("ItemT")
MOST_CLASSES = 1_000_000
"""A number above this is no class index but something else."""


class Named(Protocol):
    """Something that an error can name."""

    @property
    def name(self) -> str:
        """Where it comes from, for people."""


NamedT = TypeVar("NamedT", bound=Named)


@dataclass(frozen=True)
class Conversion:
    """How pictures are stored, and how their set is written.

    Args:
        size: shrink pictures whose shorter side is longer than this to it; None keeps the files' bytes.
        image_format: format of the pictures that were shrunk.
        quality: of `jpg` and `webp`, 1..100.
        on_error: `raise` stops at a broken picture, `skip` leaves it out.
        num_workers: processes; None is one per core.
        samples_per_shard: most samples of a tar file.
        overwrite: replace a set that was made with other arguments.

    Raises:
        ValueError: an option is out of range.
    """

    size: int | None = None
    image_format: ImageFormat = "jpg"
    quality: int = 95
    on_error: OnError = "raise"
    num_workers: int | None = None
    samples_per_shard: int = 1000
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1 pixel, or null to keep the pictures as they are")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be in 1..100")
        check_choice("image_format", self.image_format, ("png", "jpg", "webp"))
        check_choice("on_error", self.on_error, ("raise", "skip"))

    def arguments(self) -> dict[str, Any]:
        """What of these decides the content of the set, as JSON types.

        `on_error` is not among them, so that a run that stopped at a broken picture can go on without it.
        """
        return {
            "size": self.size,
            "image_format": self.image_format if self.size is not None else None,
            "quality": self.quality if self.size is not None else None,
            "samples_per_shard": self.samples_per_shard,
        }

    def stored(self, content: bytes, extension: str) -> tuple[str, bytes]:
        """Check a picture, and shrink it where asked.

        Args:
            content: the encoded picture.
            extension: of its file.

        Returns:
            Extension and bytes to store.

        Raises:
            ValueError: it is no complete picture.
        """
        image = decode_image(content)
        shorter = min(image.size)
        if self.size is None or shorter <= self.size:
            return extension, content
        width, height = (round(side * self.size / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        if self.image_format == "jpg":
            image.save(buffer, "JPEG", quality=self.quality, subsampling=0)
        elif self.image_format == "webp":
            image.save(buffer, "WEBP", quality=self.quality)
        else:
            image.save(buffer, "PNG")
        return self.image_format, buffer.getvalue()

    def samples(self, read: Callable[[NamedT], Sample], items: Iterable[NamedT]) -> Iterator[Sample]:
        """The samples of items, without those that cannot be read where `on_error` says so.

        Raises:
            ValueError: an item cannot be read; names it.
        """
        for item in items:
            try:
                sample = read(item)
                if not is_utf8(sample.key):
                    raise ValueError(f"its name is not UTF-8, rename it: {sample.key!r}")
            except (ValueError, OSError) as error:
                name = item.name.encode("utf-8", "backslashreplace").decode("utf-8")
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
        plan: ShardIndex,
        description: str,
    ) -> ShardIndex:
        """Write a set, or what an interrupted run left of it, or find that it is there.

        Args:
            folder: of the set.
            items: what to write, in order.
            make: items -> samples, by `samples`.
            plan: fields, classes, arguments (without these here) and provenance of the set.
            description: text of the progress bar.

        Returns:
            The index of the finished set.

        Raises:
            ShardError: the folder holds something else, such as a set that pictures were left out of where `on_error`
                forbids it; or no item could be read.
            ValueError: the name of a class is not UTF-8.
        """
        for name in plan.classes:
            if not is_utf8(name):
                raise ValueError(f"the name of class {name!r} is not UTF-8; rename its folder, or the class")
        arguments = {**plan.arguments, **self.arguments()}
        ready = start_set(folder, arguments, self.overwrite)
        if ready is not None:
            left_out = ready.provenance["skipped"]
            if left_out and self.on_error == "raise":
                raise ShardError(f"{folder} is finished, but {left_out} pictures were left out; pass on_error=skip")
            return ready
        shards = write_shards(
            folder,
            items,
            make,
            leaves_out=self.on_error == "skip",
            samples_per_shard=self.samples_per_shard,
            num_workers=worker_processes(self.num_workers),
            description=description,
        )
        skipped = len(items) - sum(shard.count for shard in shards)
        changed = {"arguments": arguments, "provenance": {**plan.provenance, "skipped": skipped}}
        index = ShardIndex(**{**vars(plan), **changed, "folder": folder, "shards": tuple(shards)})
        if not index.num_samples:
            raise ShardError(f"none of the {len(items)} pictures for {folder} could be decoded")
        if skipped:
            _LOG.warning("%s: %d of %d pictures were left out", folder, skipped, len(items))
        write_index(index)
        return index


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to write.

    Args:
        key: sample key.
        files: by extension, at least one; a picture is checked and stored as the conversion says, others are copied.
        label: class index, or None where there is none to write.
        caption: or None where there is none to write.
    """

    key: str
    files: tuple[tuple[str, Span], ...]
    label: int | None = None
    caption: str | None = None

    @property
    def name(self) -> str:
        """The file, and the key where it holds more than this sample."""
        _, span = self.files[0]
        return span.file if span.size is None else f"{span.file}, {self.key}"


class ItemReader:
    """Makes samples of items; a plain class so that it can go to a worker process.

    Args:
        root: what the items' files are relative to.
        conversion: how they are stored.
        pictures: whether each item must have one.
    """

    def __init__(self, root: Path, conversion: Conversion, pictures: bool = True) -> None:
        self.root, self.conversion, self.pictures = root, conversion, pictures

    def __call__(self, items: Sequence[Item]) -> Iterator[Sample]:
        """The samples of these items."""
        return self.conversion.samples(self.read, items)

    def read(self, item: Item) -> Sample:
        """One sample.

        Raises:
            ValueError: its picture is missing or broken.
        """
        if self.pictures and not any(extension in IMAGE_EXTENSIONS for extension, _ in item.files):
            raise ValueError("it has no picture")
        files = {}
        for extension, span in item.files:
            content = span.read(self.root)
            if extension in IMAGE_EXTENSIONS:
                extension, content = self.conversion.stored(content, extension)
            files[extension] = content
        return Sample(item.key, {**files, **condition_files(item.label, item.caption)})


def condition_files(label: int | None, caption: str | None) -> dict[str, bytes]:
    """The files of a sample's label and caption."""
    files = {}
    if label is not None:
        files["cls"] = str(label).encode()
    if caption is not None:
        files["txt"] = caption.encode()
    return files


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """Check an option that is one of several words.

    Raises:
        ValueError: it is none of them.
    """
    if value not in known:
        raise ValueError(f"{option}={value!r} must be one of {tuple(known)}")


def name_hash(name: str) -> int:
    """64 bits that depend on the name only; to sort by them mixes all kinds, the same way on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def mixed(items: Iterable[Item]) -> list[Item]:
    """Items in the order of their keys' hashes.

    Raises:
        ValueError: two have the same key.
    """
    ordered = sorted(items, key=lambda item: name_hash(item.key))
    for one, other in pairwise(ordered):
        if one.key == other.key:
            files = " and ".join(item.files[0][1].file for item in (one, other))
            raise ValueError(f"two samples have the key {one.key!r}, in {files}; rename one of them")
    return ordered


def classes_of(labels: Iterable[int | str], where: str) -> tuple[str, ...]:
    """Class names of a source that has none: the numbers up to the largest, or the words in alphabetical order.

    Args:
        labels: that occur; -1 is no class.
        where: they come from, for errors.

    Raises:
        ValueError: they are no class indices, or numbers and words.
    """
    distinct = set(labels)
    numbers = {label for label in distinct if isinstance(label, int)}
    if numbers and numbers != distinct:
        words = sorted(label for label in distinct if isinstance(label, str))
        raise ValueError(f"{where} has numbers and words as labels, such as {min(numbers)} and {words[0]!r}")
    if not numbers:
        return tuple(sorted(map(str, distinct)))
    if min(numbers) < -1 or max(numbers) > MOST_CLASSES:
        raise ValueError(
            f"{where} has labels {min(numbers)}..{max(numbers)}; class indices are 0, 1, 2, ... (or -1, no class)"
        )
    return tuple(str(number) for number in range(max(numbers) + 1))


class Labels:
    """Class indices of the labels of a source.

    Args:
        classes: names by index; where labels are indices, several classes may have the same name.
        source: names by the source's own indices, where these are others.
    """

    def __init__(self, classes: Sequence[str], source: Sequence[str] | None = None) -> None:
        self.count, self.numbers = len(classes), {name: i for i, name in enumerate(classes)}
        self.source = source

    def index(self, label: int | str | None) -> int:
        """The class index of a label, which is an index, a name, or None.

        Raises:
            ValueError: there is no such class.
        """
        if self.source is not None and isinstance(label, int) and 0 <= label < len(self.source):
            label = self.source[label]
        number = -1 if label is None else self.numbers.get(label) if isinstance(label, str) else label
        if number is None or not -1 <= number < self.count:
            raise ValueError(f"its label {label!r} is none of the {self.count} classes")
        return number
