"""A training stops at a gradient that is not finite, one step later, and nothing that came of it is kept."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flextok_pl.modules.resume import ResumableModule

Loss = Any
"""(loss of the module, number of the batch) -> loss to train on."""


class Line(ResumableModule):
    """Learns to map ones to ones."""

    def __init__(self, change: Loss = None) -> None:
        super().__init__()
        self.hparams.update(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=0, min_lr_ratio=0.0)
        self.linear = nn.Linear(3, 1)
        self.change = change

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = (self.linear(batch["x"]) - 1.0).square().mean()
        return loss if self.change is None else self.change(loss, batch_idx)


def fit(folder: Path, module: Line, *callbacks: pl.Callback, steps: int = 6, **options: Any) -> list[str]:
    """Train with a checkpoint of each step; returns their names."""
    batches: Any = [{"x": torch.ones(2, 3), "key": [f"b{number}"]} for number in range(12)]
    pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        default_root_dir=folder,
        callbacks=[*callbacks, ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, DataLoader(batches, batch_size=None))
    return sorted(file.name for file in folder.glob("*.ckpt"))


def saved(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.ckpt"))


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"gradient_clip_val": 1.0},
    "value": {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
    "bfloat16": {"precision": "bf16-mixed", "gradient_clip_val": 1.0},
}


@pytest.mark.parametrize("how", HOW)
def test_a_loss(how: str, tmp_path: Path) -> None:
    spoilt = Line(lambda loss, number: loss * float("nan") if number == 2 else loss)
    with pytest.raises(RuntimeError, match=r"loss is nan at step 2 \(epoch 0, rank 0\); samples .*: b2; .*=2\.ckpt"):
        fit(tmp_path, spoilt, **HOW[how])
    assert saved(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]


@pytest.mark.parametrize("how", HOW)
def test_a_gradient_that_overflows_though_the_loss_does_not(how: str, tmp_path: Path) -> None:
    class Overflow(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                pl_module.linear.weight.grad.fill_(float("inf"))

    message = r"gradient is not finite at step 2 \(epoch 0\), though .* rank 0; samples of the batch: b2; .*=2\.ckpt"
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, Line(), Overflow(), **HOW[how])
    assert saved(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]


def test_any_batch_of_an_accumulation(tmp_path: Path) -> None:
    spoilt = Line(lambda loss, number: loss * float("inf") if number == 4 else loss)
    with pytest.raises(RuntimeError, match=r"the loss is inf at step 2 .*samples of the batch: b4, b5; .*=2\.ckpt"):
        fit(tmp_path, spoilt, accumulate_grad_batches=2)
    assert saved(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]


def test_the_last_step_and_one_before_a_validation(tmp_path: Path) -> None:
    """There is no later step that would look."""
    batches: Any = [{"x": torch.ones(2, 3)}] * 2
    for options in ({}, {"limit_val_batches": 0}):
        spoilt = Line(lambda loss, number: loss * float("nan") if number == 1 else loss)
        spoilt.validation_step = lambda *args: pytest.fail("it is validated")  # type: ignore[method-assign]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=2,
            logger=False,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        with pytest.raises(RuntimeError, match="the loss is nan at step 1 .*: without keys; last .*: none was written"):
            trainer.fit(spoilt, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))


def test_weights(tmp_path: Path) -> None:
    class Spoil(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                pl_module.change = lambda loss, number: loss.detach() + 0 * pl_module.linear.bias.sum()
                pl_module.linear.weight.data.fill_(float("nan"))

    with pytest.raises(RuntimeError, match=r"weights are not finite after step 3, though the gradients are.*=2\.ckpt"):
        fit(tmp_path, Line(), Spoil())
    assert saved(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]


def test_a_scaled_loss_may_overflow_its_gradients(tmp_path: Path) -> None:
    """Such a step is left out, also of the optimizer that is one kernel; clipping sees the gradients unscaled."""
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    norms: list[float] = []
    weights: list[Tensor] = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            weights.append(pl_module.linear.weight.detach().clone())
            if trainer.global_step == 2:
                pl_module.linear.weight.grad.fill_(float("inf"))

        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step:
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    torch.manual_seed(0)
    module = Line()
    assert len(fit(tmp_path / "a", module, Watch(), plugins=scaled, gradient_clip_val=0.25)) == 6
    assert torch.equal(weights[2], weights[3]) and not torch.equal(weights[1], weights[2])
    assert [norms[0], norms[1], norms[3]] == pytest.approx([0.25] * 3, rel=1e-3), "as they were when they were used"
    assert scaled.scaler.get_scale() == 2.0**9 and {int(s["step"]) for s in module.optimizers().state.values()} == {5}

    spoilt = Line(lambda loss, number: loss * float("nan") if number == 2 else loss)
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match=r"the loss is nan at step 2 .*: b2; .*=2\.ckpt"):
        fit(tmp_path / "b", spoilt, plugins=scaled)
    assert saved(tmp_path / "b") == ["step=1.ckpt", "step=2.ckpt"]
