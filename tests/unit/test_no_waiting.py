"""A training step does not wait for its device, from the arrival of a batch to the start of the next."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretended_device import DEVICE, PretendedDevice, pretended_device
from torch import Tensor
from torch.utils.data import DataLoader

from flextok_pl import Trainer
from flextok_pl.callbacks import EMA, RunChecks, Throughput, TokenReport
from flextok_pl.callbacks.progress import StepLines
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.modules import PriorModule, TokenizerModule, VAEModule
from flextok_pl.runtime import StepCheckpoint

STEPS, EVERY = 6, 3  # steps, and those between logs
WATCHED = (1, 3, 4)  # steps that are not logged, but for the first, which makes what lasts


class Sequences(pl.LightningDataModule):
    """Batches of two samples with everything that a module may want."""

    batch_size = 2
    tokenizer: ClassVar = {"sha256": "a" * 16, "vocab_size": 50, "num_tokens": 8}
    classes = ()

    def train_dataloader(self) -> DataLoader:
        random = torch.Generator().manual_seed(0)
        batch: Any = {
            "image": (torch.rand(2, 3, 32, 32, generator=random) * 2 - 1).pin_memory(),
            "tokens": torch.randint(50, (2, 8), generator=random).pin_memory(),
            "label": torch.tensor([0, 1]).pin_memory(),
            "key": ["a", "b"],
        }
        return DataLoader([batch] * 2 * STEPS, batch_size=None)


class Accelerator(CPUAccelerator):
    """One that takes the pretended device."""

    def setup_device(self, device: torch.device) -> None:
        """There is nothing to set up."""


class Watch(pl.Callback):
    """Watches from the start of a step to that of the next."""

    def __init__(self, device: PretendedDevice) -> None:
        self.device = device

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.device.watching = trainer.global_step in WATCHED


def waits(module: pl.LightningModule, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """What waits in a training; nothing is exported."""
    monkeypatch.setattr(type(module), "on_train_end", lambda self: None)
    monkeypatch.setattr("flextok_pl.callbacks.throughput._peak_flops", lambda trainer: None)
    with pretended_device(monkeypatch) as device:
        report = [TokenReport()] if isinstance(module, PriorModule) else []
        saving = StepCheckpoint.of_newest(every_n_train_steps=100)
        more = [RunChecks(), StepLines(), saving, *report]
        Trainer(
            strategy=SingleDeviceStrategy(DEVICE, accelerator=Accelerator()),
            max_steps=STEPS,
            log_every_n_steps=EVERY,
            callbacks=[Watch(device), EMA(), Throughput(), LearningRateMonitor("step"), *more],
            enable_model_summary=False,
            default_root_dir=folder,
            **options,
        ).fit(module, Sequences())
    return device.waits


def prior(**options: Any) -> PriorModule:
    net = PriorConfig(num_classes=2, num_tokens=8, vocab_size=50, depth=2, width=32, head_dim=16)
    return PriorModule(net, warmup_steps=0, **options)


def vae(**options: Any) -> VAEModule:
    net = VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    return VAEModule(net, warmup_steps=0, **options)


def tokenizer(**options: Any) -> TokenizerModule:
    return TokenizerModule(FlexTokConfig.preset("tiny"), warmup_steps=0, **options)


def aligned(**options: Any) -> TokenizerModule:
    net = replace(FlexTokConfig.preset("tiny"), repa_layer=0)
    return TokenizerModule(net, warmup_steps=0, teacher="effnet-lite2", **options)


MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "prior": prior,
    "prior, smoothed labels in one chunk": lambda: prior(label_smoothing=0.1, loss_chunk=None),
    "vae": vae,
    "vae with a discriminator": lambda: vae(gan_weight=0.5, discriminator_width=8),
    "vae, perceptual": lambda: vae(perceptual_weight=0.5),
    "tokenizer": tokenizer,
    "tokenizer, pure noise": lambda: tokenizer(pure_noise=0.5, activation_checkpointing=True, mup_base_width=32),
    "tokenizer, aligned for a while": lambda: aligned(repa_until=0.5, repa_projection="conv", repa_spatial_norm=0.6),
    "tokenizer, patches on a route": lambda: tokenizer(route_share=0.5, route_blocks=(0, 0)),
}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_waits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = waits(MODULES[name](), tmp_path, monkeypatch, gradient_clip_val=1.0)
    assert not found, "\n".join(found)


OTHER: dict[str, Callable[[], dict[str, Any]]] = {
    "accumulated": lambda: {"accumulate_grad_batches": 2},
    "clipped by value": lambda: {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
    "scaled": lambda: {
        "plugins": MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu")),  # which has no driver to ask
        "gradient_clip_val": 1.0,
    },
}


@pytest.mark.parametrize("name", OTHER)
def test_nor_in_other_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = waits(prior(), tmp_path, monkeypatch, **OTHER[name]())
    assert not found, "\n".join(found)


SPOILT: dict[str, Callable[[Tensor], object]] = {
    "item": lambda loss: loss.item(),
    "float": lambda loss: float(loss) > 0,
    "if": lambda loss: 1 if loss > 0 else 0,
    "tolist": lambda loss: loss.expand(2).tolist(),
    "to the host": lambda loss: loss.cpu(),
    "mask": lambda loss: loss.expand(2)[loss.expand(2) > 0],
    "nonzero": lambda loss: loss.expand(2).nonzero(),
    "from pageable memory": lambda loss: torch.ones(2).to(loss.device, non_blocking=True),
    "at once": lambda loss: torch.ones(2).pin_memory().to(loss.device),
    "a number of Python's": lambda loss: torch.tensor(1.0, device=loss.device),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_waits_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PriorModule.training_step

    def training_step(self: PriorModule, batch: Any, batch_idx: int) -> Any:
        outputs = real(self, batch, batch_idx)
        SPOILT[name](outputs["loss"].detach())
        return outputs

    monkeypatch.setattr(PriorModule, "training_step", training_step)
    assert len(waits(prior(), tmp_path, monkeypatch)) == len(WATCHED)


def test_it_computes_what_a_cpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = prior()
    waits(module, tmp_path, monkeypatch)
    torch.manual_seed(0)
    same = prior()
    options: dict[str, Any] = {"accelerator": "cpu", "max_steps": STEPS, "enable_progress_bar": False, "logger": False}
    with pretended_device(monkeypatch):  # which pins the batches
        Trainer(callbacks=[EMA()], enable_checkpointing=False, default_root_dir=tmp_path, **options).fit(
            same, Sequences()
        )
    for own, expected in zip(module.prior.parameters(), same.prior.parameters(), strict=True):
        torch.testing.assert_close(own, expected)
