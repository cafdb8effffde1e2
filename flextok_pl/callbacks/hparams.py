"""Shows a run's main options and final numbers in TensorBoard's HParams tab.

The tab combines the columns of all runs only if none of them declares an experiment. The loggers of Lightning and torch
declare one, and then the tab shows only the columns of the first run. It also takes every scalar of a run for a result.
So options and results have a folder of their own in the run's folder, with nothing else in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # of `api`, which wants TensorFlow

from flextok_pl.callbacks.charts import add_scalar, rewritten_events
from flextok_pl.callbacks.loggers import tensorboard_folders

FOLDER = "hparams"

METRICS = ("*/loss", "*/mse", "*/psnr", "*/kd_*/k=*", "*/frechet_inception_distance/k=*", "*/class_agreement/k=*")

TRAINER_OPTIONS = ("max_steps", "max_epochs", "precision", "accumulate_grad_batches", "gradient_clip_val", "world_size")


def write_hparams(folder: Path, params: Mapping[str, Any], metrics: Mapping[str, float], step: int = 0) -> None:
    """Write a row of TensorBoard's HParams tab, in place of the earlier row of this folder, which gives its name.

    Mappings in `params` are flattened with dots, and lists become text. Options that are None and metrics that are not
    finite are left out.
    """
    with rewritten_events(folder / FOLDER) as writer:
        writer.add_summary(hparams_pb(_flat(params), trial_id=str(folder)))
        for name, value in metrics.items():
            add_scalar(writer, name, value, step)


class HParams(Callback):
    """Show a training in TensorBoard's HParams tab, after each validation and at its end.

    Args:
        metrics: patterns of the logged values to show. A metric with more than three token budgets is shown at the
            smallest, the middle and the largest.
    """

    def __init__(self, metrics: Sequence[str] = METRICS) -> None:
        self.metrics = list(metrics)
        self._values: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results of this validation."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last values, also of a training without validation."""
        self._write(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The values shown, so that a resumed training still shows them after its last validation."""
        return {"values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values shown."""
        self._values = dict(state_dict["values"])

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found = [name for name in logged if any(fnmatchcase(name, pattern) for pattern in self.metrics)]
        self._values |= {name: logged[name] for name in _few_budgets(found)}
        if not trainer.is_global_zero:
            return
        for folder in tensorboard_folders(trainer):
            write_hparams(folder, main_options(trainer, pl_module), self._values, trainer.global_step)


def main_options(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The module's hyper-parameters, and the other options that decide about a training."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    params = dict(pl_module.hparams)
    # A tokenizer's autoencoder is frozen, and `vae` states where it comes from.
    net = {name: value for name, value in params.pop("net", {}).items() if name != "vae"}
    return {
        "module": type(pl_module).__name__,
        **params,
        "net": net,
        **{name: getattr(trainer, name) for name in TRAINER_OPTIONS},
        "batch_size": getattr(data, "batch_size", None),
        "train": getattr(data, "sources", {}).get("train"),
    }


def _few_budgets(names: Sequence[str]) -> list[str]:
    """From names that end in `/k=<budget>`, take the smallest, the middle and the largest budget of each metric."""
    metrics: dict[str, list[str]] = {}
    for name in sorted(names):
        metrics.setdefault(name.split("/k=")[0], []).append(name)
    return [each[index] for each in metrics.values() for index in sorted({0, len(each) // 2, len(each) - 1})]


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for name, value in params.items():
        if name.startswith("_") or value is None:  # Lightning's own notes
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
