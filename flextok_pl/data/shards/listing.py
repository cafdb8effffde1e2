"""What lies in a source: files by pattern, and members of tars as spans of bytes, so that tars are read in place."""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, TypeVar

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


PlaceT = TypeVar("PlaceT")


def files_in_tar(stream: IO[bytes], start: int = 0, size: int | None = None) -> Iterator[tuple[str, tuple[int, int]]]:
    """The files in an uncompressed tar, in order; a link is what it leads to, and tars may follow one another.

    Args:
        stream: an open file that can seek.
        start: where the tar begins in it.
        size: of the tar, in bytes; None is up to the end.

    Yields:
        Name of each, and the place of its content: first byte and number of bytes.

    Raises:
        tarfile.TarError: it is no tar, compressed, cut, or damaged.
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
                    yield member.name.removeprefix("./"), (found.offset_data, found.size)
            end = tar.offset
        position = _next_tar(stream, end, stop)


def _next_tar(stream: IO[bytes], end: int, stop: int) -> int | None:
    """Where the next tar begins after one whose last member ends here; `tarfile` itself reads on for no tar's sake.

    Raises:
        tarfile.TarError: this one has no end mark, which is a block of zeros.
    """
    stream.seek(end)
    block = stream.read(min(tarfile.BLOCKSIZE, max(stop - end, 0)))
    if any(block) or end > stop:
        raise tarfile.ReadError(f"what stands at byte {end:,} is no header: it is damaged")
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
    """What a hard or symbolic link leads to; anything else is itself.

    Raises:
        ValueError: it leads to nothing in the tar.
    """
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


def tar_members(root: Path, file: str, offset: int = 0, size: int | None = None) -> Iterator[tuple[str, Span]]:
    """The files in a tar, in order, as of `files_in_tar`.

    Args:
        root: what `file` is relative to.
        file: an uncompressed tar, or a file with one inside.
        offset: where the tar begins in it.
        size: of the tar; None is up to the end of the file.

    Yields:
        Name and place of each.

    Raises:
        ValueError: it is no tar, compressed, cut, damaged, or has a file that cannot be read in place.
    """
    path = root / file
    try:
        with path.open("rb") as stream:
            for name, place in files_in_tar(stream, offset, size):
                yield name, Span(file, *place)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is no complete, uncompressed tar file ({error}); fetch it again, or unpack a compressed one first"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tar_samples(root: Path, file: str) -> Iterator[tuple[str, list[tuple[str, Span]]]]:
    """The samples in a WebDataset tar, as `grouped`.

    Args:
        root: what `file` is relative to.
        file: an uncompressed tar.

    Raises:
        ValueError: it is no tar, compressed, or damaged.
    """
    return grouped(tar_members(root, file))


def grouped(files: Iterable[tuple[str, PlaceT]]) -> Iterator[tuple[str, list[tuple[str, PlaceT]]]]:
    """The samples of WebDataset: files side by side whose names are alike up to the first dot of their last part.

    Args:
        files: name and place of each.

    Yields:
        Key, and extension in lower case and place of each file. Hidden files and `__meta__` ones are no samples.
    """
    for key, entries in groupby(_with_keys(files), key=lambda entry: entry[0]):
        yield key, [(extension, place) for _, extension, place in entries]


def _with_keys(files: Iterable[tuple[str, PlaceT]]) -> Iterator[tuple[str, str, PlaceT]]:
    for name, place in files:
        folder, slash, last = name.rpartition("/")
        stem, _, extension = last.partition(".")
        if stem and extension and not re.match(r"__[^/]*__($|/)", name):  # webdataset's own metadata
            yield folder + slash + stem, extension.lower(), place


def matching_paths(pattern: str) -> list[Path]:
    """What a path stands for: itself where it is there, else what its `*`, `[ab]` and `{a,b}` match, in order.

    Folders before the first such part are taken as they are written, too.

    Raises:
        ValueError: something it names is not there.
    """
    return list(_matching(Path(pattern).expanduser()))


def _matching(path: Path) -> Iterator[Path]:
    there = next(part for part in (path, *path.parents) if os.path.exists(part))
    if there == path:
        yield path
        return
    rest = str(path.relative_to(there))
    alternatives = list(braceexpand.braceexpand(rest))
    if alternatives != [rest]:
        for one in alternatives:
            yield from _matching(there / one)
        return
    found = sorted(glob.glob(rest, root_dir=there, recursive=True)) if glob.has_magic(rest) else []
    if not found:
        raise ValueError(f"there is no {path}")
    yield from (there / match for match in found)


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
