"""Trainings that start from the weights of a finished model."""

from __future__ import annotations

import dataclasses
from typing import Any

from flextok_pl.models.prior import Prior
from flextok_pl.models.starting import Start, check_parts, start_from
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules.resume import ResumableModule
from flextok_pl.runtime.lightning_internals import goes_on


class StartedModule(ResumableModule):
    """A module whose network may start from the weights of a finished one, `init_from`, or of its parts, `init_parts`.

    Both are hyper-parameters. The weights are taken in the first `setup` of a run that loads no checkpoint, on the CPU
    and before anything is sharded, copied to other processes or averaged. Where they came from goes, as `started_from`,
    into the hyper-parameters, and so into checkpoints, and into the configuration of the network, and so into exports.
    """

    _to_start = True  # with the weights of another model, if any are given

    @property
    def network(self) -> Prior | FlexTok:
        """What is trained and exported."""
        raise NotImplementedError

    def check_start(self) -> None:
        """Refuse parts that the network does not have, once it is built."""
        check_parts(self.network, self.hparams["init_from"], self.hparams["init_parts"])

    def setup(self, stage: str) -> None:
        """Take the weights."""
        source = self.hparams["init_from"]
        if self._to_start and source is not None and not goes_on(self.trainer):
            start = start_from(self.network, source, self.hparams["init_parts"])
            self.on_start(start)
            self._note(start.note)
            if self.trainer.is_global_zero:
                print(f"starting from the weights of {start.note}", flush=True)
        self._to_start = False
        super().setup(stage)

    def on_start(self, start: Start) -> None:
        """Look at what the weights came from."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the weights that the checkpoint has, and its note."""
        super().on_load_checkpoint(checkpoint)
        self._to_start = False
        self._note(checkpoint.get("hyper_parameters", {}).get("started_from", ""))

    def _note(self, note: str) -> None:
        self.hparams.pop("started_from", None)
        if note:
            self.hparams["started_from"] = note
        self.network.config = dataclasses.replace(self.network.config, started_from=note)
