"""Uploads a folder to a repository of the Hugging Face Hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from flextok_pl.interop.hub import LOG_IN, HubId, reason
from flextok_pl.sharing.publication import Publication


def upload(folder: Path, given: Publication, weights: str, names: Sequence[str]) -> str:
    """Send the files of a folder, delete the rest of an earlier model there, and return the commit's address.

    The repository is as private and as gated as requested before anybody can see the files. Either all files arrive or
    none. The token is that of huggingface_hub: HF_TOKEN, or that of `hf auth login`.

    Args:
        folder: folder to send, README.md included.
        given: where to send it.
        weights: the file in the folder that is loaded, or the index.
        names: files that `from_pretrained` looks for, in its order.

    Raises:
        ValueError: there is no token, or the Hub refuses; the message says what to do.
    """
    if huggingface_hub.get_token() is None:
        raise ValueError(f"there is no token for the Hub: {LOG_IN}")
    try:
        return _upload(HfApi(), folder, given, weights, names)
    except Exception as error:  # several network libraries, each with its own errors
        said = str(error) if type(error) is ValueError else reason(error, HubId(given.repository, given.revision))
        raise ValueError(f"nothing was committed: {said}") from error


def _upload(api: HfApi, folder: Path, given: Publication, weights: str, names: Sequence[str]) -> str:
    name = given.repository
    api.create_repo(name, private=given.private or None, exist_ok=True)
    there = api.model_info(name)
    private = True if given.private and not there.private else None
    gated = given.gated if given.gated and there.gated != given.gated else None
    if private or gated:
        api.update_repo_settings(name, private=private, gated=gated)
    if given.revision is not None:
        api.create_branch(name, branch=given.revision, exist_ok=True)
        there = api.model_info(name, revision=given.revision)
    new = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    old = {each.rfilename for each in there.siblings or ()} - set(new)
    stem = re.escape(weights.partition(".")[0])
    family = re.compile(rf"{stem}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    stale = [each for each in sorted(old) if family.fullmatch(each)]
    before = [each for each in names[: names.index(weights)] if each in old and each not in stale]
    if before:
        raise ValueError(
            f"{name} has {before[0]}, which would be loaded in place of {weights}: delete it there, or use another "
            "repository"
        )
    commit = api.create_commit(
        name,
        [
            *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file)) for path, file in new.items()),
            *(CommitOperationDelete(path_in_repo=path) for path in stale),
        ],
        commit_message=given.message or f"Add {given.title}",
        revision=given.revision,
        parent_commit=there.sha,
    )
    return commit.commit_url
