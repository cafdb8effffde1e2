"""Warns of problems during a training: runs the checks of `flextok doctor` on logged values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from flextok_pl.callbacks.ema import EMA
from flextok_pl.callbacks.throughput import Throughput
from flextok_pl.diagnosis.finding import EARLY, Finding
from flextok_pl.diagnosis.latents import latent_scale
from flextok_pl.diagnosis.logged import Facts, of_logged
from flextok_pl.diagnosis.probe import LatentMoments
from flextok_pl.diagnosis.training import finite, overfitting

PICTURES = 16
"""Of the first validation, whose latents are looked at."""

WITHOUT_END = 1000
"""Steps after which a training without end must have learned something."""


class RunChecks(Callback):
    """Warn of problems, each once in a run, with a link to the explanation in docs/doctor.md.

    At the end of a validation it checks only the results of that validation: unused tokens and condition, a collapsed
    codebook, budgets that add nothing, overfitting, waiting for data, a lagging average, values that are not finite. In
    the first validation it also encodes a few pictures, to check the scale of the latents. Training steps do not
    change. `flextok doctor` checks more.

    Args:
        start_at: share of the training before which it does not warn of what the model has yet to learn.
    """

    def __init__(self, start_at: float = EARLY) -> None:
        if not 0.0 <= start_at <= 1.0:
            raise ValueError(f"start_at={start_at} must be a share of the training in [0, 1]")
        self.start_at = start_at
        self.said: list[str] = []  # names of checks that have warned
        self._losses: list[tuple[int, float]] = []  # of the validations
        self._moments: LatentMoments | None = None
        self._encoded = False

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Encode some pictures, once."""
        latents = getattr(pl_module, "latents", None)
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self._encoded or latents is None or not fitting or not isinstance(batch, Mapping):
            return
        self._encoded = True
        few = {name: batch[name][:PICTURES] for name in ("image", "latent") if name in batch}
        if few and trainer.is_global_zero:
            self._moments = LatentMoments.of([latents(few)])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        for each in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(each, Throughput):
                values |= each.latest
        if "val/loss" in values:
            self._losses.append((trainer.global_step, values["val/loss"]))
        for finding in self._findings(values, self._facts(trainer, pl_module)):
            if finding.verdict != "ok" and finding.check not in self.said:
                self.said.append(finding.check)
                rank_zero_warn(finding.text)

    def _findings(self, values: Mapping[str, float], facts: Facts) -> Iterator[Finding]:
        yield finite(values)
        if self._moments is not None:
            yield latent_scale(self._moments.means, self._moments.stds, self._moments.overall)
        late = facts.steps >= WITHOUT_END if facts.progress is None else facts.progress >= self.start_at
        if late:
            yield from of_logged(values, facts)
            if (found := overfitting(self._losses)) is not None:
                yield found

    def _facts(self, trainer: Trainer, pl_module: LightningModule) -> Facts:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        total, options = trainer.estimated_stepping_batches, dict(pl_module.hparams)
        given = options.get("net")
        net: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        levels = net.get("fsq_levels")
        average = next((each for each in callbacks if isinstance(each, EMA)), None)
        rates = {"model.net.null_dropout": net.get("null_dropout")}
        if getattr(pl_module, "condition_kind", "none") != "none":
            rates["model.condition_dropout"] = options.get("condition_dropout")
        return Facts(
            steps=trainer.global_step,
            total=int(total) if math.isfinite(total) and total > 0 else None,
            vocab_size=math.prod(levels) if levels else net.get("vocab_size"),
            val_samples=data.num_samples("val") if hasattr(data, "num_samples") else None,
            null_rates=tuple((name, float(rate)) for name, rate in rates.items() if rate is not None),
            ema=None if average is None else (average.decay, average.update_every_n_steps),
        )

    def state_dict(self) -> dict[str, Any]:
        """The names of checks that have warned, so that a resumed run does not repeat them."""
        return {"said": self.said, "losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the names."""
        self.said, self._losses = list(state_dict["said"]), [(int(s), float(v)) for s, v in state_dict["losses"]]
