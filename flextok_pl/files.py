"""Files that are there as a whole or not at all.

Everything that must survive a kill, a crash or a full disk is written here: under a temporary name beside its place,
brought to the disk, and only then given its name. What had the name before stays until that moment.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_file(path: Path, remedy: str = "run the same command again", shared: bool = False) -> Iterator[Path]:
    """A temporary path to write; when the block ends without an error, the file gets its name.

    Args:
        path: the file's place; folders above it are made.
        remedy: what the user can do when there is space again.
        shared: several processes may write this file at once; each then has a temporary file of its own.

    Raises:
        OSError: the disk is full, or writing failed otherwise; nothing temporary stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; some libraries let only the owner read
        yield temporary
        temporary.chmod(mode)
        _to_disk(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            text = f"{os.strerror(error.errno)}: the file was not written, and one before it is as it was"
            raise OSError(error.errno, f"{text}. Free some space and {remedy}", str(path)) from error
        raise
    _to_disk(path.parent)


def write_file(path: Path, content: bytes | str, shared: bool = True) -> None:
    """Write a small file as `whole_file` does; text as UTF-8.

    Raises:
        OSError: see `whole_file`.
    """
    with whole_file(path, shared=shared) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_folder(path: Path, folder: Path) -> None:
    """Put a complete folder in the place of `path`, whatever is there.

    A folder cannot be replaced at once. Whenever the process dies, a whole one has a name: the new one its own, or the
    one before `NAME.before` with the same ending. None has while its files are being deleted.
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
    """Delete a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Let what was written to a file, or named in a folder, outlive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
