"""The Hugging Face Hub: names of models, their files in this machine's cache, and its errors in plain words."""

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
PREFETCH = "bring it by `flextok prefetch` where there is one"
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class HubId:
    """A model of the Hub, in one of its states: `OWNER/NAME`, or `OWNER/NAME@REVISION`.

    Args:
        repository: `OWNER/NAME`.
        revision: branch, tag or commit; None for the branch `main`.
    """

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubId | None:
        """Read its name; None for a text that can be none, such as a path or the name of a file."""
        match = _ID.fullmatch(name)
        return None if match is None or name.endswith((".safetensors", ".json")) else cls(match[1], match[2])

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


@dataclass
class HubFiles:
    """Files of one commit of a repository: fetched, or from the cache where they are the newest or the Hub is away."""

    source: HubId
    commit: str | None = None  # which the first file has settled
    away: Exception | None = field(default=None, repr=False)  # why the Hub is out of reach

    def fetch(self, name: str) -> Path | None:
        """The place of a file here, or None where the repository, or the cache of a Hub out of reach, lacks it."""
        options: dict[str, Any] = {}
        if revision := self.commit or self.source.revision:
            options["revision"] = revision
        if self.away is not None:  # it was waited for long enough
            options["local_files_only"] = True
        try:
            path = huggingface_hub.hf_hub_download(self.source.repository, name, **options)
        except LocalEntryNotFoundError as error:  # a sort of the next one
            self.away = self.away or error
            return None
        except EntryNotFoundError:
            return None
        self.commit = self.commit or commit_of(path)
        return Path(path)


def commit_of(path: str | Path) -> str | None:
    """The commit that a file of the Hub's cache belongs to; None for any other file."""
    match = _COMMIT.search(Path(path).as_posix())
    return None if match is None else match[1]


def not_in_cache(source: HubId, file: str, away: Exception) -> str:
    """What to do about a file that is not here while the Hub is out of reach."""
    why = reason(away.__cause__ or away, source)
    return f"{file} of {source} is not in the cache {constants.HF_HUB_CACHE}, and {why}; without a network, {PREFETCH}"


def reason(error: BaseException, source: HubId) -> str:
    """What the Hub's answer means, and what to do."""
    name, owner = source.repository, source.repository.partition("/")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: ask for access at {constants.ENDPOINT}/{name}, and {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {source.revision!r}: give a branch, a tag or a whole commit of it"
    if status == 403:
        return f"the token has no right to that: it must be one that may write to repositories of {owner}"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub does not accept the token: {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub shows no {name}; check the name, and {LOG_IN} if it is private"
    if status in (409, 412):
        return f"somebody else has changed {name} meanwhile: look at it, and run the same command again"
    if status is not None:
        return f"the Hub answers {status}: {str(error).strip().splitlines()[0]}"
    kind = type(error).__name__
    return f"the Hub is out of reach: {error}" if "Connect" in kind or "Timeout" in kind else f"{kind}: {error}"
