"""Find the files that a pattern names, and check whether files have changed."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import braceexpand


def matching_paths(pattern: str) -> list[Path]:
    """Paths that a pattern matches: an existing path itself, or else all matches of `*`, `[ab]` and `{a,b}`, in order.

    Folders before the first wildcard are also taken literally.
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
    """Hash name, size and time of change of files under a folder, to check later whether they changed.

    A broken link counts as the link itself.
    """
    digest = hashlib.sha256()
    for file in files:
        path = root / file
        status = path.stat(follow_symlinks=path.exists())
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
