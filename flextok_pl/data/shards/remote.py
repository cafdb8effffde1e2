"""Read shard sets at a URL or behind a command.

A shard is downloaded whole and compared with the size and SHA-256 in the index before it is read. It is kept in a
temporary file, or in a cache folder that other processes and later runs share.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import aiohttp
import fsspec

from flextok_pl.data.shards.index import ShardError, ShardInfo, file_sha256
from flextok_pl.posix import fcntl

PIPE = "pipe:"
NAME = "{name}"
"""Placeholder in a command for the name of a file in the set."""

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts to fetch a file."""

STALLED_AFTER = 60.0
"""Seconds without a byte after which an HTTP request has failed."""

PERMANENT = (FileNotFoundError, PermissionError, ImportError, ValueError)
"""Errors that another attempt would not change; a ValueError is an unknown protocol."""

logger = logging.getLogger(__name__)


def is_remote(source: str) -> bool:
    """Check that a source is a URL or a command, not a local file."""
    return source.startswith(PIPE) or "://" in source


@dataclass(frozen=True)
class Remote:
    """A folder behind a URL or a command.

    The address is `http(s)://...`, a URL of any installed fsspec file system, or `pipe:COMMAND`, where the shell
    command writes the file named by `{name}` to its standard output.
    """

    address: str
    cache_dir: Path | None = None  # folder that keeps shards; None keeps none

    def __post_init__(self) -> None:
        if self.address.startswith(PIPE) and NAME not in self.address:
            raise ShardError(
                f"{self.address!r} does not use the name of a file; write {NAME}, as in "
                f"'pipe:aws s3 cp s3://bucket/set/{NAME} -'"
            )
        if not self.address.startswith(PIPE) and set("*?") & set(self.address):
            raise ShardError(
                f"{self.address!r}: a URL must not contain * or ?; list the sets, for example by {{a,b}}, and for a "
                f"URL with a query write 'pipe:curl -sSfL \"https://.../{NAME}?...\"'"
            )

    def locate(self, name: str) -> str:
        """Name of a file of the set in messages: its URL, or the command."""
        if self.address.startswith(PIPE):
            return self.address.replace(NAME, name)
        return f"{self.address.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """Read a small file."""
        with self._temporary(name) as file:
            return file.read()

    def open(self, shard: ShardInfo, folder: Path) -> BufferedReader:
        """Open a shard as a local file.

        With a cache it stays in the folder: each machine downloads it once, and other processes wait for it.
        """
        if self.cache_dir is None:
            return self._temporary(shard.name, shard)
        path = folder / shard.name
        try:
            if not _is_complete(path, shard):
                folder.mkdir(parents=True, exist_ok=True)
                # The lock's name holds the machine's, as locks may not reach further; the lock ends with its process.
                part = path.with_name(f".{shard.name}.{platform.node()}.part")
                with part.open("ab") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if _is_complete(path, shard):  # another process was first
                        part.unlink(missing_ok=True)
                    else:
                        self._fetch(shard.name, part, shard)
                        os.fsync(lock.fileno())
                        os.replace(part, path)
            return path.open("rb")
        except OSError as error:
            raise ShardError(
                f"cache_dir={self.cache_dir}: {path} cannot be kept ({error}); free some space, choose another folder, "
                "or set cache_dir=null"
            ) from error

    def _temporary(self, name: str, shard: ShardInfo | None = None) -> BufferedReader:
        descriptor, path = tempfile.mkstemp(prefix="flextok-")
        try:
            self._fetch(name, Path(path), shard)
            return open(path, "rb")
        except OSError as error:
            raise ShardError(
                f"{self.locate(name)} cannot be kept in {tempfile.gettempdir()} ({error}); free some space, or set "
                "TMPDIR or cache_dir to a folder with more"
            ) from error
        finally:
            os.unlink(path)
            os.close(descriptor)

    def _fetch(self, name: str, target: Path, shard: ShardInfo | None) -> None:
        """Copy a file to this machine, in several attempts."""
        for pause in (*PAUSES, None):
            try:
                self._copy(name, target)
                problem = None if shard is None else _difference(target, shard)
                if problem is None:
                    return
                cause = None
            except Exception as error:  # file systems raise the errors of their client libraries
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                problem, cause = f"{type(error).__name__}: {error}", error
                if isinstance(error, PERMANENT) or getattr(error, "status", None) in (401, 403, 410):
                    break
            if pause is not None:
                logger.warning("%s: %s; again in %g s", self.locate(name), problem, pause)
                time.sleep(pause)
        raise ShardError(
            f"{self.locate(name)} cannot be fetched ({problem}); check the address, the network and your access to it, "
            "or copy the set to this machine and give its folder"
        ) from cause

    def _copy(self, name: str, target: Path) -> None:
        if self.address.startswith(PIPE):
            with target.open("wb") as file:
                command = self.locate(name).removeprefix(PIPE)
                done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE)
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip()[-500:]
                raise ConnectionError(f"exit code {done.returncode}" + (f", {said}" if said else ""))
            return
        options: dict[str, Any] = {}
        if self.address.startswith(("http://", "https://")):
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED_AFTER, sock_read=STALLED_AFTER)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}  # proxies of the environment
        files, path = fsspec.url_to_fs(self.locate(name), **options)
        files.get_file(path, str(target))


def _is_complete(path: Path, shard: ShardInfo) -> bool:
    return path.is_file() and path.stat().st_size == shard.bytes


def _difference(path: Path, shard: ShardInfo) -> str | None:
    """Describe how a file differs from its entry in the index; None if it does not."""
    size = path.stat().st_size
    if size != shard.bytes:
        return f"{size:,} bytes arrived instead of the {shard.bytes:,} in the index"
    return None if file_sha256(path) == shard.sha256 else "its SHA-256 is not the one in the index"
