"""Find models of the Hugging Face Hub and their files in the local cache, and explain the Hub's errors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-][\w./-]*))?")
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")
PREFETCH = "run `flextok prefetch` where there is one"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class HubId:
    """A model of the Hub, at one revision: `OWNER/NAME`, or `OWNER/NAME@REVISION`.

    Args:
        repository: `OWNER/NAME`.
        revision: branch, tag or commit; None for the branch `main`.
    """

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubId | None:
        """Parse an id; None for other texts, such as a path or a file name."""
        match = _ID.fullmatch(name)
        return None if match is None or name.endswith((".safetensors", ".json")) else cls(match[1], match[2])

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


@dataclass
class HubFiles:
    """Files of one commit of a repository: downloaded, or cached if they are current or the Hub is unreachable."""

    source: HubId
    commit: str | None = None  # set by the first file
    away: Exception | None = field(default=None, repr=False)  # why the Hub is unreachable

    def fetch(self, name: str) -> Path | None:
        """The local place of a file; None if the repository lacks it, or the cache while the Hub is unreachable."""
        options: dict[str, Any] = {}
        if revision := self.commit or self.source.revision:
            options["revision"] = revision
        if self.away is not None:  # do not wait again
            options["local_files_only"] = True
        try:
            path = huggingface_hub.hf_hub_download(self.source.repository, name, **options)
        except LocalEntryNotFoundError as error:  # a subclass of the next one
            self.away = self.away or error
            return None
        except EntryNotFoundError:
            return None
        self.commit = self.commit or commit_of(path)
        return Path(path)


def commit_of(path: str | Path) -> str | None:
    """The commit of a file in the Hub's cache; None for any other file."""
    match = _COMMIT.search(Path(path).as_posix())
    return None if match is None else match[1]


def not_in_cache(source: HubId, file: str, away: Exception) -> str:
    """Explain that a file is not cached while the Hub is unreachable, with a remedy."""
    why = reason(away.__cause__ or away, source)
    return f"{file} of {source} is not in the cache {constants.HF_HUB_CACHE}, and {why}; without a network, {PREFETCH}"


def reason(error: BaseException, source: HubId) -> str:
    """Explain an error of the Hub, with a remedy."""
    name, owner = source.repository, source.repository.partition("/")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: ask for access at {constants.ENDPOINT}/{name}, and {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {source.revision!r}: give a branch, a tag or a whole commit of it"
    if status == 403:
        return f"the token has no right to that: it must be allowed to write to repositories of {owner}"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub does not accept the token: {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no {name} that you can see; check the name, and {LOG_IN} if it is private"
    if status in (409, 412):
        return f"somebody else changed {name} in the meantime: look at it, and run the same command again"
    if status is not None:
        return f"the Hub answers {status}: {str(error).strip().splitlines()[0]}"
    kind = type(error).__name__
    return f"the Hub is unreachable: {error}" if "Connect" in kind or "Timeout" in kind else f"{kind}: {error}"
