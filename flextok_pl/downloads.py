"""Files that are fetched from the network at first use, and the folders that cache them.

Each loader of pretrained weights lists its files as `Download`s. It fetches through them, or through a library that
caches the same files under the same names. `flextok prefetch` fetches them beforehand.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import huggingface_hub
import torch
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

STALLED_AFTER = 60.0
"""Seconds without a byte after which a request fails."""

ASKED_FOR = 10.0
"""Timeout in seconds of a request for names and sizes."""

RANGE_NOT_SATISFIABLE = 416


class Places(NamedTuple):
    """The folders that cache downloads."""

    hub: Path  # the cache of huggingface_hub
    torch_hub: Path  # torch.hub's folder
    data: Path | None = None  # copies of shard sets

    @classmethod
    def usual(cls) -> Places:
        """The folders of this process, from `HF_HOME` and `TORCH_HOME`."""
        return cls(Path(constants.HF_HUB_CACHE), Path(torch.hub.get_dir()))

    @classmethod
    def below(cls, folder: Path) -> Places:
        """The folders of a process with the variables of `environment`."""
        return cls(folder / "huggingface" / "hub", folder / "torch" / "hub", folder / "data")


def environment(folder: Path) -> dict[str, str]:
    """The variables that make a process read `Places.below(folder)` and stay offline."""
    return {"HF_HOME": str(folder / "huggingface"), "TORCH_HOME": str(folder / "torch"), "HF_HUB_OFFLINE": "1"}


class Part(NamedTuple):
    """A file of a download."""

    name: str
    size: int | None  # bytes; None if unknown
    here: bool


class Download(ABC):
    """Files that one loader fetches."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Name of the download in messages."""

    @abstractmethod
    def parts(self, places: Places) -> list[Part]:
        """Its files; offline, those that are known to be cached or missing, maybe none."""

    @abstractmethod
    def fetch(self, places: Places) -> object:
        """Fetch missing files, and continue those that are there in part.

        Network errors are those of the library in use.
        """


@dataclass(frozen=True)
class UrlFile(Download):
    """A file in torch.hub's folder, named after the last part of its URL unless `file_name` is given.

    If the name ends in hexadecimal digits, as in `alexnet-owt-7be5be79.pth`, its SHA-256 must begin with them.
    """

    url: str
    file_name: str | None = None

    @property
    def title(self) -> str:
        """The URL."""
        return self.url

    @property
    def name(self) -> str:
        """The file's name."""
        return self.file_name or Path(urlparse(self.url).path).name

    def parts(self, places: Places) -> list[Part]:
        """The file."""
        path = self._path(places)
        if path.is_file():
            return [Part(self.name, path.stat().st_size, True)]
        size = None
        if not constants.is_offline_mode():
            with (
                suppress(OSError),
                urlopen(Request(self.url, method="HEAD", headers=_AGENT), timeout=ASKED_FOR) as answer,
            ):
                size = int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
        return [Part(self.name, size, False)]

    def fetch(self, places: Places | None = None) -> Path:
        """See `Download.fetch`; returns the file, by default in the usual folder."""
        path = self._path(Places.usual() if places is None else places)
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with FileLock(part.with_suffix(".lock")):  # several processes of a training may fetch it at once
            if not path.is_file():
                _go_on(self.url, part)
                self._check(part)
                os.replace(part, path)
        return path

    def _path(self, places: Places) -> Path:
        return places.torch_hub / "checkpoints" / self.name

    def _check(self, file: Path) -> None:
        beginning = re.search(r"-([a-f0-9]{8,})\.[^.]*$", self.name)
        if beginning is None:
            return
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if not found.startswith(beginning[1]):
            file.unlink()
            raise OSError(f"{self.url}: the file has SHA-256 {found[:16]}..., expected {beginning[1][:16]}...")


_AGENT = {"User-Agent": "flextok_pl"}  # some servers refuse Python's own


def _go_on(url: str, part: Path) -> None:
    """Append the missing part of a file, or write all of it if the server sends it from the start."""
    done = part.stat().st_size if part.exists() else 0
    headers = _AGENT | ({"Range": f"bytes={done}-"} if done else {})
    try:
        with urlopen(Request(url, headers=headers), timeout=STALLED_AFTER) as answer:
            done = done if answer.status == 206 else 0
            whole = done + int(answer.headers.get("Content-Length", -1 - done))  # -1 if the server does not say
            with part.open("ab" if done else "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
    except HTTPError as error:
        if error.code == RANGE_NOT_SATISFIABLE:  # it was whole already
            return
        raise
    size = part.stat().st_size
    if whole >= 0 and size != whole:
        raise OSError(f"{url}: the connection ended after {size:,} of {whole:,} bytes; run it again to continue there")


@dataclass(frozen=True)
class HubRepository(Download):
    """Files of a model repository on the Hugging Face Hub.

    `patterns` has alternatives for each kind of file; the first alternative that any file matches applies. The
    repository must have files of the first kind.
    """

    repository: str
    patterns: tuple[tuple[str, ...], ...]
    revision: str | None = None

    @property
    def title(self) -> str:
        """Repository and revision."""
        return self.repository + (f"@{self.revision}" if self.revision else "")

    def parts(self, places: Places) -> list[Part]:
        """The files that match the patterns."""
        sizes: Mapping[str, int | None] = {}
        if not constants.is_offline_mode():
            with suppress(Exception):  # several network libraries, each with its own errors
                sizes = self._sizes()
        if not sizes:
            sizes = self._known(places)
        found = [(name, self._cached(name, places)) for name in self.chosen(sizes)]
        return [
            Part(name, sizes[name] if file is None else file.stat().st_size, file is not None) for name, file in found
        ]

    def fetch(self, places: Places) -> None:
        """See `Download.fetch`."""
        names = self.chosen(self._sizes())
        if not any(_matches(name, pattern) for name in names for pattern in self.patterns[0]):
            raise ValueError(f"{self.title} on the Hub has no {' or '.join(self.patterns[0])}")
        for name in names:
            if self._cached(name, places) is None:
                huggingface_hub.hf_hub_download(self.repository, name, revision=self.revision, cache_dir=places.hub)

    def chosen(self, names: Collection[str]) -> list[str]:
        """Choose the files to fetch from the names of all files."""
        found: dict[str, None] = {}
        for alternatives in self.patterns:
            fitting = ([name for name in names if _matches(name, pattern)] for pattern in alternatives)
            found |= dict.fromkeys(next((each for each in fitting if each), []))
        return list(found)

    def _sizes(self) -> dict[str, int | None]:
        api = huggingface_hub.HfApi()
        info = api.model_info(self.repository, revision=self.revision, files_metadata=True, timeout=ASKED_FOR)
        return {each.rfilename: each.size for each in info.siblings or []}

    def _known(self, places: Places) -> dict[str, int | None]:
        """Files that are cached, and those that a cached index names."""
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    self.repository, revision=self.revision, cache_dir=places.hub, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            return {}
        names = [file.name for file in folder.iterdir()]
        for index in folder.glob("*.index.json"):
            names += json.loads(index.read_text()).get("weight_map", {}).values()
        return dict.fromkeys(names)

    def _cached(self, name: str, places: Places) -> Path | None:
        file = huggingface_hub.try_to_load_from_cache(
            self.repository, name, cache_dir=places.hub, revision=self.revision
        )
        return Path(file) if isinstance(file, str) else None


def _matches(name: str, pattern: str) -> bool:
    return "/" not in name and fnmatchcase(name, pattern)


@dataclass(frozen=True)
class TorchHubCode(Download):
    """A GitHub repository whose code `torch.hub.load` runs."""

    repository: str
    branch: str = "main"

    @property
    def title(self) -> str:
        """The repository."""
        return f"https://github.com/{self.repository}"

    def parts(self, places: Places) -> list[Part]:
        """Its folder."""
        name = f"{self.repository.replace('/', '_')}_{self.branch}"
        return [Part(name, None, (places.torch_hub / name).is_dir())]

    def fetch(self, places: Places) -> None:
        """See `Download.fetch`."""
        if not self.parts(places)[0].here:
            with torch_hub_at(places):
                torch.hub.list(f"{self.repository}:{self.branch}", trust_repo=True, verbose=False)  # type: ignore[no-untyped-call]


@contextmanager
def torch_hub_at(places: Places) -> Iterator[None]:
    """Let torch.hub keep its files in another folder for a while."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(places.torch_hub))
    try:
        yield
    finally:
        torch.hub.set_dir(before)
