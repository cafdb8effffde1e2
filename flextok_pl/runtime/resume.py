"""Going on from a checkpoint that one process has looked at for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from flextok_pl.runtime.checkpoint_files import damage_of, newest_intact


class Resume(_CheckpointConnector):
    """Lightning's, which finds out whether a checkpoint is whole before all processes load it.

    That takes reading all of it. The first process does, and tells the others, which are connected by then.

    Args:
        trainer: whose connector to replace, before it has run.
        or_older: go back to the newest whole checkpoint of the folder where this one is not.
    """

    def __init__(self, trainer: pl.Trainer, or_older: bool) -> None:
        super().__init__(trainer)
        self.or_older = or_older

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """Load a checkpoint, if there is one to load.

        Raises:
            ValueError: it is damaged, and so are those to go back to.
        """
        if checkpoint_path is not None and "://" not in str(checkpoint_path):
            found: Any = self._find(Path(checkpoint_path)) if self.trainer.is_global_zero else None
            checkpoint_path, problem = self.trainer.strategy.broadcast(found)
            if problem is not None:
                raise ValueError(problem)
        super().resume_start(checkpoint_path, weights_only)

    def _find(self, path: Path) -> tuple[str, str | None]:
        """The checkpoint to load, and what keeps from it."""
        if self.or_older:
            try:
                path = newest_intact(path.parent) or path
            except ValueError as error:
                return str(path), str(error)
            print(f"going on with {path}", flush=True)
            return str(path), None
        damage = damage_of(path) if path.exists() else None
        if damage is None:
            return str(path), None
        remedy = "give another file of its folder, or `last` for the newest whole one"
        return str(path), f"ckpt_path={path} is damaged ({damage}); {remedy}"
