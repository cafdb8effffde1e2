"""Writes a run's measurements as lines, which any program can read during the run."""

from __future__ import annotations

import json

from lightning.pytorch import Callback, LightningModule, Trainer

from flextok_pl.contracts import run_folder


class MetricsLog(Callback):
    """Append the latest values of all logged metrics to `metrics.jsonl` in the run's folder.

    A line is written after each validation, at the end of a fit and after a test: `stage` (`fit`, `validate` or
    `test`), `epoch`, `step`, and `metrics`, name -> value. A resumed run writes again what it measures again; the later
    line counts.

    In a fit, modules that state `flops_per_sample` also log `train/flops`: the operations of the training so far.
    """

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        file = run_folder(trainer) / "metrics.jsonl"
        if not trainer.is_global_zero:
            return
        stage = trainer.state.fn.value if trainer.state.fn is not None else "fit"
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        flops = getattr(pl_module, "flops_per_sample", None)
        batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        if stage == "fit" and flops is not None and batch_size is not None:
            batch = batch_size * trainer.world_size * trainer.accumulate_grad_batches
            metrics["train/flops"] = flops * batch * trainer.global_step
        entry = {"stage": stage, "epoch": trainer.current_epoch, "step": trainer.global_step, "metrics": metrics}
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as lines:
            if lines.tell():  # a process that was killed may have left half a line
                lines.seek(-1, 2)
                if lines.read(1) != b"\n":
                    lines.write(b"\n")
            lines.write(json.dumps(entry).encode() + b"\n")

    on_validation_end = on_train_end = on_test_end = _write
