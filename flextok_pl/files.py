"""Files that are complete or do not exist. Whatever a later step reads as finished is written here.

A file is written under a temporary name beside its place, brought to the disk, and only then given its name, so that a
kill, a crash or a full disk leaves what had the name before.
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
    """A temporary path to write; it gets the file's name when the block ends without an error.

    Args:
        path: the file's place; folders above it are made.
        remedy: what the user can do after freeing space.
        shared: several processes may write this file at once; each then has a temporary file of its own.
        synced: let it outlive a power cut; False is faster for many pictures.

    Raises:
        OSError: writing failed; nothing temporary stays.
    """
    with whole_files([path], remedy, shared, synced) as (temporary,):
        yield temporary


@contextmanager
def whole_files(
    paths: Sequence[Path], remedy: str = "run the same command again", shared: bool = False, synced: bool = True
) -> Iterator[list[Path]]:
    """`whole_file` for files that belong together: none gets its name before all are on the disk.

    The last one says that the others belong together, such as an index: one that is there goes first and the new one
    comes last, so that it never names files of two sets.
    """
    ending = f".{os.getpid()}.partial" if shared else ".partial"
    temporaries = [path.with_name(f".{path.name}{ending}") for path in paths]
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        for temporary in temporaries:
            temporary.touch()
        mode = temporaries[0].stat().st_mode  # as the umask says; some libraries let only the owner read
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
            text = f"{os.strerror(error.errno)}: the file was not written, and one before it is as it was"
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
    """Put a complete folder in the place of `path`, whatever is there.

    A folder cannot be replaced in one step. Whenever the process dies, either `path` or `NAME.before`, with the same
    ending, is a complete folder. The old one gets the temporary name before its files are deleted.
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
