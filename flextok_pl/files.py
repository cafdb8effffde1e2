"""Writes files that are complete or do not exist. Every file that a later step takes for finished comes from here.

A file is written under a temporary name in the same folder, flushed to the disk, and only then renamed. After a kill, a
crash or a full disk the previous file is unchanged.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_file(
    path: Path, remedy: str = "run the same command again", shared: bool = False, synced: bool = True
) -> Iterator[Path]:
    """A temporary path to write to; it is renamed to `path` if the block ends without an error.

    Args:
        path: the final path; missing parent folders are made.
        remedy: what the user can do after freeing space, for the error message.
        shared: several processes may write this file at once; each gets its own temporary file.
        synced: let the file survive a power cut; False is faster for many images.

    Raises:
        OSError: writing failed; the temporary file is removed.
    """
    with whole_files([path], remedy, shared, synced) as (temporary,):
        yield temporary


@contextmanager
def whole_files(
    paths: Sequence[Path], remedy: str = "run the same command again", shared: bool = False, synced: bool = True
) -> Iterator[list[Path]]:
    """`whole_file` for files that belong together: none is renamed before all are on the disk.

    The last file, such as an index, lists the others. An old one is removed first and the new one is renamed last, so
    that it never lists files of two sets.
    """
    ending = f".{os.getpid()}.partial" if shared else ".partial"
    temporaries = [path.with_name(f".{path.name}{ending}") for path in paths]
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        for temporary in temporaries:
            temporary.touch()
        mode = temporaries[0].stat().st_mode  # from the umask; some libraries let only the owner read
        yield temporaries
        for temporary in temporaries:
            temporary.chmod(mode)
            if synced:
                _to_disk(temporary)
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except BaseException as error:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            text = f"{os.strerror(error.errno)}: the file was not written; the previous one, if any, is unchanged"
            raise OSError(error.errno, f"{text}. Free some space and {remedy}", str(paths[-1])) from error
        raise
    if synced:
        for folder in {path.parent for path in paths}:
            _to_disk(folder)


def write_file(path: Path, content: bytes | str, shared: bool = True) -> None:
    """Write a small file as `whole_file` does; text as UTF-8."""
    with whole_file(path, shared=shared) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_folder(path: Path, folder: Path) -> None:
    """Replace `path`, whatever it is, by a complete folder.

    A folder cannot be replaced in one step. Whenever the process dies, either `path` or `NAME.before`, with the same
    ending, is a complete folder. The old folder is renamed before its files are deleted.
    """
    before = path.with_stem(f"{path.stem}.before")
    if os.path.lexists(path):
        remove(before)
        path.rename(before)
    folder.rename(path)
    if os.path.lexists(before):
        before.rename(folder)
        remove(folder)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that a power cut does not lose them."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
