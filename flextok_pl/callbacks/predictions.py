"""Writes the results of `flextok predict`."""

from __future__ import annotations

import json
from typing import Any, TextIO

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from flextok_pl.contracts import run_folder


class Predictions(Callback):
    """Write each sample's key and tokens as a line of `predictions/<rank>.jsonl` in the run's folder."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this process's file; refuse a module that does not predict."""
        if not is_overridden("predict_step", pl_module):
            raise MisconfigurationException(
                f"`predict` writes tokens, and {type(pl_module).__name__} has none: use it with a TokenizerModule or a "
                "PriorModule"
            )
        path = run_folder(trainer) / "predictions" / f"{trainer.global_rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Write a batch."""
        assert self._file is not None
        for key, tokens in zip(outputs["key"], outputs["tokens"].tolist(), strict=True):
            self._file.write(json.dumps({"key": key, "tokens": tokens}) + "\n")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
