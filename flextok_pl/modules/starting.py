"""Starts trainings from the weights of a finished model, and trains only some parts of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flextok_pl.models.starting import Network, Start, check_frozen, check_parts, start_from, train_only
from flextok_pl.modules.resume import ResumableModule
from flextok_pl.runtime.lightning_internals import goes_on

NOTES = ("started_from", "same_tokens_as")
"""Notes of a start in the hyper-parameters and, if it has such fields, in the configuration."""


class StartedModule(ResumableModule):
    """A module whose network can start from the weights of a finished one, and can be trained in part.

    Hyper-parameters control this: `init_from` is the finished model, `init_parts` names the parts to take from it, and
    `train` the parts of the network to train. The first `setup` of a run that loads no checkpoint takes the weights, on
    the CPU and before anything is sharded, copied to other processes or averaged. Their source is recorded as
    `started_from` in the hyper-parameters, and so in checkpoints, and in the configuration of the network, and so in
    exports.
    """

    _to_start = True  # whether to take the weights of another model, if any are given

    @property
    def network(self) -> Network:
        """The network that is trained and exported."""
        raise NotImplementedError

    @property
    def trained_parts(self) -> tuple[str, ...] | None:
        """Beginnings of the names of the trained weights; None for all."""
        return None if self.hparams["train"] is None else tuple(self.hparams["train"])

    def check_start(self) -> None:
        """Refuse parts that the network does not have, and freeze those not to train; for the end of a constructor."""
        source, parts = self.hparams["init_from"], self.hparams["init_parts"]
        if parts is not None and source is None:
            raise ValueError(f"init_parts={parts} needs model.init_from")
        check_parts(self.network, "init_parts", parts)
        check_parts(self.network, "train", self.trained_parts)
        train_only(self.network, self.trained_parts)

    def setup(self, stage: str) -> None:
        """Take the initial weights."""
        source = self.hparams["init_from"]
        if self._to_start and not goes_on(self.trainer):
            start = None if source is None else start_from(self.network, source, self.hparams["init_parts"])
            if stage == "fit":
                check_frozen(self.network, self.trained_parts, start)
            if start is not None:
                self.on_start(start)
                self._note(start.notes)
                if self.trainer.is_global_zero:
                    print(f"starting from the weights of {start.notes['started_from']}", flush=True)
        self._to_start = False
        super().setup(stage)

    def on_start(self, start: Start) -> None:
        """Check where the weights came from."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the weights and the notes of the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        self._to_start = False
        self._note(checkpoint.get("hyper_parameters", {}))

    def _note(self, notes: Mapping[str, Any]) -> None:
        config = self.network.config
        for name in NOTES:
            self.hparams.pop(name, None)
            if notes.get(name):
                self.hparams[name] = notes[name]
            if hasattr(config, name):
                config = dataclasses.replace(config, **{name: notes.get(name) or getattr(type(config), name)})
        self.network.config = config
