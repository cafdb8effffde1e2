"""Keep files of evaluations between runs, each named by a hash of everything that its content depends on."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from flextok_pl.files import write_file

T = TypeVar("T")


def kept_file(folder: Path, prefix: str, identity: object) -> Path:
    """Name the file of content that depends on `identity`, which consists of JSON types."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return folder / f"{prefix}{digest[:32]}.pt"


def keep(file: Path, state: dict[str, Any]) -> None:
    """Write tensors; the file gets its name only when it is complete."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(file, buffer.getvalue())


def load_kept(file: Path, restore: Callable[[dict[str, Any]], T]) -> T:
    """Apply `restore` to the tensors of a file that `keep` wrote."""
    try:
        return restore(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # the unpickler has no error of its own: damaged bytes can raise anything
        raise ValueError(f"the cached {file} is damaged ({error!r}); delete the file") from error
