"""An evaluation that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flextok_pl.evaluation.statistics_cache import keep, load_kept


class Unfinished:
    """The state of an evaluation on disk, until it has finished.

    Args:
        folder: where the file is.
        identity: JSON types on which the state depends; another evaluation has another file.
        every_minutes: how often the state is written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], every_minutes: float) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self.file = folder / f"unfinished_{digest[:32]}.pt"
        self._every = 60 * every_minutes
        self._written = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state of a run that did not finish, or None.

        Raises:
            ValueError: the file is damaged.
        """
        return load_kept(self.file, dict) if self.file.is_file() else None

    def save_if_due(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state if the last time is long ago."""
        if time.monotonic() - self._written >= self._every:
            keep(self.file, state())
            self._written = time.monotonic()

    def remove(self) -> None:
        """The evaluation has finished."""
        self.file.unlink(missing_ok=True)
