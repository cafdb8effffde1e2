"""Parse tars: members are spans of bytes, so a tar is read in place and in any order. No other file parses tars."""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file: all of it, or a member of an uncompressed tar."""

    file: str  # path relative to the source
    offset: int = 0
    size: int | None = None  # None reads to the end

    def read(self, root: Path) -> bytes:
        """Read the bytes; `ValueError` if the file ends before."""
        with (root / self.file).open("rb") as file:
            file.seek(self.offset)
            content = file.read() if self.size is None else file.read(self.size)
        if self.size not in (None, len(content)):
            raise ValueError(f"it has {len(content)} bytes of {self.size}: {self.file} is truncated")
        return content


Member = tuple[str, Span]
"""Name of a file in a tar, or its extension in a sample, and the place of its content."""


def files_in_tar(stream: IO[bytes], file: str = "", start: int = 0, size: int | None = None) -> Iterator[Member]:
    """List the files in an uncompressed tar, in order; links are followed, and tars may be concatenated.

    The stream must be seekable. The tar begins at `start` and has `size` bytes, or reaches the end. Spans name it
    `file`.

    Raises:
        tarfile.TarError: the file is not a tar, compressed, cut, or damaged.
        ValueError: a link leads to nothing in it, or a file is stored with holes.
    """
    stop = stream.seek(0, os.SEEK_END) if size is None else start + size
    position: int | None = start
    while position is not None:
        stream.seek(position)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            by_name: dict[str, tarfile.TarInfo] = {}
            for member in tar:
                if (member.islnk() or member.issym()) and not by_name:
                    by_name = {posixpath.normpath(each.name): each for each in tar.getmembers()}
                found = _followed(member, by_name)
                if found.issparse():
                    raise ValueError(f"{member.name} is stored with holes; pack the tar again without --sparse")
                if found.isreg():
                    yield member.name.removeprefix("./"), Span(file, found.offset_data, found.size)
            end = tar.offset
        position = _next_tar(stream, end, stop)


def _next_tar(stream: IO[bytes], end: int, stop: int) -> int | None:
    """Start of the next tar after one whose last member ends here; a tar's end mark is a block of zeros."""
    stream.seek(end)
    block = stream.read(min(tarfile.BLOCKSIZE, max(stop - end, 0)))
    if any(block) or end > stop:
        raise tarfile.ReadError(f"byte {end:,} does not begin a header: it is damaged")
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end mark: it was cut, or if it is whole, `truncate -s +1024 FILE` adds one")
    end += tarfile.BLOCKSIZE
    while chunk := stream.read(min(tarfile.RECORDSIZE, stop - end)):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return end + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        end += len(chunk)
    return None


def _followed(member: tarfile.TarInfo, by_name: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The target of a hard or symbolic link; any other member itself."""
    found: tarfile.TarInfo | None = member
    seen = set()
    while found is not None and (found.islnk() or found.issym()):
        seen.add(found)
        folder = posixpath.dirname(found.name) if found.issym() else ""
        found = by_name.get(posixpath.normpath(posixpath.join(folder, found.linkname)))
        found = None if found in seen else found
    if found is None:
        raise ValueError(
            f"{member.name} is a link to {member.linkname}, which is not in the tar; pack it again with --dereference"
        )
    return found


def tar_members(root: Path, file: str, offset: int = 0, size: int | None = None) -> Iterator[Member]:
    """`files_in_tar` for a file given relative to `root`; each error is a `ValueError` that names it."""
    path = root / file
    try:
        with path.open("rb") as stream:
            yield from files_in_tar(stream, file, offset, size)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a complete, uncompressed tar file ({error}); fetch it again, or unpack a compressed one "
            "first"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tar_samples(root: Path, file: str) -> Iterator[tuple[str, list[Member]]]:
    """The samples in a WebDataset tar, as `grouped`; see `tar_members`."""
    return grouped(tar_members(root, file))


def grouped(files: Iterable[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Group the samples of WebDataset: files side by side with the same path up to the first dot of their name.

    Yields the key, and the lower-case extension and place of each file. Hidden and `__meta__` files are skipped.
    """
    for key, entries in groupby(_with_keys(files), key=lambda entry: entry[0]):
        yield key, [(extension, place) for _, extension, place in entries]


def _with_keys(files: Iterable[Member]) -> Iterator[tuple[str, str, Span]]:
    for name, place in files:
        folder, slash, last = name.rpartition("/")
        stem, _, extension = last.partition(".")
        if stem and extension and not re.match(r"__[^/]*__($|/)", name):  # webdataset's own metadata
            yield folder + slash + stem, extension.lower(), place
