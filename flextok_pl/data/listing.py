"""What lies in a source: files by pattern, and members of tars as spans of bytes, so that tars are read in place."""

from __future__ import annotations

import glob
import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import braceexpand


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file: all of it, or a member of an uncompressed tar.

    Args:
        file: path relative to the source.
        offset: first byte.
        size: number of bytes; None is up to the end.
    """

    file: str
    offset: int = 0
    size: int | None = None

    def read(self, root: Path) -> bytes:
        """The bytes.

        Raises:
            ValueError: the file ends before.
            OSError: it cannot be read.
        """
        with (root / self.file).open("rb") as file:
            file.seek(self.offset)
            content = file.read() if self.size is None else file.read(self.size)
        if self.size not in (None, len(content)):
            raise ValueError(f"it has {len(content)} bytes of {self.size}: {self.file} is truncated")
        return content


def tar_members(root: Path, file: str, offset: int = 0) -> Iterator[tuple[str, Span]]:
    """The files in a tar, in order.

    Args:
        root: what `file` is relative to.
        file: an uncompressed tar, or a file with one inside.
        offset: where the tar begins in it.

    Yields:
        Name and place of each.

    Raises:
        ValueError: it is no tar, compressed, or damaged.
    """
    path = root / file
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        yield member.name.removeprefix("./"), Span(file, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is no complete, uncompressed tar file ({error}); fetch it again, or unpack a compressed one first"
        ) from error


def tar_samples(root: Path, file: str) -> Iterator[tuple[str, list[tuple[str, Span]]]]:
    """The samples in a WebDataset tar: files side by side whose names are alike up to the first dot of their last part.

    Args:
        root: what `file` is relative to.
        file: an uncompressed tar.

    Yields:
        Key, and extension in lower case and place of each file. Hidden files and `__meta__` ones are no samples.

    Raises:
        ValueError: it is no tar, compressed, or damaged.
    """
    for key, files in groupby(_with_keys(tar_members(root, file)), key=lambda entry: entry[0]):
        yield key, [(extension, span) for _, extension, span in files]


def _with_keys(members: Iterable[tuple[str, Span]]) -> Iterator[tuple[str, str, Span]]:
    for name, span in members:
        folder, slash, last = name.rpartition("/")
        stem, _, extension = last.partition(".")
        if stem and extension and not re.match(r"__[^/]*__($|/)", name):  # webdataset's own metadata
            yield folder + slash + stem, extension.lower(), span


def matching_paths(pattern: str) -> list[Path]:
    """What a path with `*` or `{a,b}` stands for, in order.

    Raises:
        ValueError: something it names is not there.
    """
    paths = []
    for one in braceexpand.braceexpand(str(Path(pattern).expanduser())):
        found = (
            [Path(match) for match in sorted(glob.glob(one, recursive=True))] if glob.has_magic(one) else [Path(one)]
        )
        if not found or not found[0].exists():
            raise ValueError(f"{pattern}: there is no {one}")
        paths += found
    return paths


def listing_digest(root: Path, files: Iterable[str]) -> str:
    """Tells whether files under a folder are those that they were: by name, size and time of change.

    Of a link that leads nowhere it takes the link itself.
    """
    digest = hashlib.sha256()
    for file in files:
        path = root / file
        status = path.stat(follow_symlinks=path.exists())
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
