"""Stage 0: train the image autoencoder and its discriminator, by one optimizer.

Shapes in this file: B batch, H x W image, C x h x w latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from flextok_pl.config import VAEConfig, config_from_dict
from flextok_pl.contracts import Batch, run_folder
from flextok_pl.layers.frozen import Frozen, is_frozen
from flextok_pl.models.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from flextok_pl.models.perceptual import PerceptualDistance
from flextok_pl.models.starting import Start
from flextok_pl.models.vae import VAE
from flextok_pl.modules.optim import parameter_groups
from flextok_pl.modules.starting import StartedModule
from flextok_pl.modules.steps import logging_now, step_generator
from flextok_pl.precision import accumulation_dtype, check_training_precision, full_precision


class VAEModule(StartedModule):
    """Trains a VAE by reconstruction, with KL, perceptual and adversarial terms; a weight of 0 leaves a term out.

    loss = reconstruction + perceptual_weight * perceptual + kl_weight * KL / (3 H W) + gan_weight * adaptive * GAN.
    This is the loss of latent diffusion (https://arxiv.org/abs/2112.10752, appendix G) divided by the number of pixel
    values, so that its published weights apply here. Unlike there, autoencoder and discriminator take their steps at
    once, from the same images, by one optimizer; accumulation, clipping and schedules are then the Trainer's. The
    gradient norm of each network is clipped separately.

    At the end of a fit the latents are measured on training batches, and the autoencoder is exported to
    `<log_dir>/vae`, a folder that diffusers reads. Its scaling_factor is 1 / (standard deviation of the posterior
    means). With `EMA` the averaged weights are measured and exported.

    Args:
        net: configuration of the autoencoder, of kind `kl`.
        init_from: finished autoencoder whose weights to start from: a folder or a Hub id, or the `.safetensors` file of
            a tokenizer that has it. It must fit `net`, except for the scale of the latents, which is measured again.
        init_parts: parts to take from it: `encoder`, `decoder`, or what is below; None for all. The others are new.
        train: parts of the autoencoder to train, by names as for `init_parts`; None for all. The others are frozen, and
            must come from `init_from`. Without `encoder` and `quant_conv` the latents and their scale, which `net` must
            then have, do not change: latent shards and tokenizers stay valid.
        reconstruction: mean absolute (`l1`) or squared (`l2`) error.
        kl_weight: weight of the posterior's divergence from a unit normal.
        perceptual_weight: weight of the distance in a pretrained network's features.
        perceptual_network: `effnet-lite0` (offline), `lpips`, or a timm model such as `vgg16`.
        perceptual_weights_path: local weights file of that network.
        gan_weight: weight of the adversarial loss, on top of its adaptive weight.
        gan_start_step: first step of the discriminator and its loss. Before it the discriminator has no gradients:
            train on several devices with `trainer.strategy=ddp_find_unused_parameters_true`.
        discriminator_width: channels of the discriminator's first layer.
        lr: peak learning rate of both networks.
        betas: betas of AdamW.
        weight_decay: weight decay of matrices and kernels only.
        warmup_steps: optimizer steps of linear warm-up.
        min_lr_ratio: final learning rate, as a share of `lr`, reached by a cosine at the end of the fit.
        scale_batches: training batches to measure the scale of the latents on.
        seed: seed of the posterior's noise.
    """

    def __init__(
        self,
        net: VAEConfig,
        init_from: str | None = None,
        init_parts: list[str] | None = None,
        train: list[str] | None = None,
        reconstruction: Literal["l1", "l2"] = "l1",
        kl_weight: float = 1e-6,
        perceptual_weight: float = 0.0,
        perceptual_network: str = "effnet-lite0",
        perceptual_weights_path: str | None = None,
        gan_weight: float = 0.0,
        gan_start_step: int = 0,
        discriminator_width: int = 64,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.0,
        scale_batches: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        net = config_from_dict(VAEConfig, net) if isinstance(net, Mapping) else net  # from a checkpoint
        self.save_hyperparameters(ignore="net")
        self.hparams["net"] = dataclasses.asdict(net)  # plain types: a checkpoint must load with weights_only
        if net.kind != "kl":
            raise ValueError(f"net.kind={net.kind!r} has nothing to train; use 'kl'")
        if reconstruction not in ("l1", "l2"):
            raise ValueError(f"reconstruction={reconstruction!r} is unknown; use 'l1' or 'l2'")
        for name, value in (("kl", kl_weight), ("perceptual", perceptual_weight), ("gan", gan_weight)):
            if value < 0:
                raise ValueError(f"{name}_weight={value} must be 0 (off) or more")
        if scale_batches < 1:
            raise ValueError(f"scale_batches={scale_batches} must be at least 1")
        self.distance = F.l1_loss if reconstruction == "l1" else F.mse_loss

        # Channels last is about 1.5 times faster for convolutions on CPU, and faster with tensor cores.
        self.vae = VAE(net).to(memory_format=torch.channels_last)
        if perceptual_weight and net.image_channels not in (1, 3):
            raise ValueError(
                f"perceptual_weight={perceptual_weight} needs pictures of 1 or 3 channels, but "
                f"net.image_channels={net.image_channels}: set perceptual_weight to 0"
            )
        self.perceptual = (
            Frozen(PerceptualDistance(perceptual_network, perceptual_weights_path)) if perceptual_weight else None
        )
        self.discriminator = (
            PatchDiscriminator(discriminator_width, image_channels=net.image_channels) if gan_weight else None
        )
        self.check_start()
        if self.discriminator is not None and not self.vae.network.decoder.conv_out.weight.requires_grad:
            raise ValueError(
                f"gan_weight={gan_weight} with train={train}: the weight of the adversarial loss is measured at the "
                "decoder's last layer; train decoder.conv_out, too, or set gan_weight to 0"
            )

    @property
    def network(self) -> VAE:
        """The autoencoder."""
        return self.vae

    @property
    def keeps_latents(self) -> bool:
        """Whether all that determines the latents is frozen."""
        return all(
            is_frozen(part) for name, part in self.vae.network.named_children() if name in ("encoder", "quant_conv")
        )

    def on_start(self, start: Start) -> None:
        """Refuse another scale of latents that stay the same."""
        assert isinstance(start.source, VAE)
        for name in ("scaling_factor", "shift_factor"):
            own, its = getattr(self.vae.config, name), getattr(start.source.config, name)
            if self.keeps_latents and own != its:
                raise ValueError(
                    f"{name}={own} of model.net, but {its} of init_from={self.hparams['init_from']!r}, whose latents "
                    f"this training keeps: set model.net.{name}={its}"
                )

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct (B, 3, H, W) images from the posterior's mean, not clamped."""
        return self.vae.decode(self.vae.encode(images))

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one batch with key `image`."""
        images, options = _images(batch), self.hparams
        generator = step_generator(self, options["seed"], batch_idx, self.global_rank)
        moments, outputs = self.vae(images, generator)  # (B, 2C, h, w), (B, 3, H, W)
        losses = {"reconstruction": self.distance(outputs, images), "kl": kl_divergence(moments) / images[0].numel()}
        compared = losses["reconstruction"]
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(outputs, images)
            compared = compared + options["perceptual_weight"] * losses["perceptual"]
        loss = compared + options["kl_weight"] * losses["kl"] if options["kl_weight"] else compared
        if self.discriminator is not None and self.global_step >= options["gan_start_step"]:
            losses |= self._adversarial(images, outputs, compared)
            weight = options["gan_weight"] * losses["adaptive_weight"]
            loss = loss + weight * losses["generator"] + losses["discriminator"]
        shown = {f"train/{name}": value.detach() for name, value in losses.items()}
        shown |= {"train/loss": loss.detach(), "train/psnr": psnr(outputs.detach(), images).mean()}
        self.log_dict(shown, batch_size=len(images))
        return loss

    def _adversarial(self, images: Tensor, outputs: Tensor, compared: Tensor) -> dict[str, Tensor]:
        """The losses of both networks; the gradients of each reach only its own network."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        generator_loss = -self.discriminator(outputs).mean()
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(torch.cat([images, outputs.detach()])).chunk(2)
        weight = adaptive_weight(compared, generator_loss, self.vae.network.decoder.conv_out.weight)
        return {"generator": generator_loss, "adaptive_weight": weight, "discriminator": hinge_loss(real, fake)}

    def configure_callbacks(self) -> list[Callback]:
        """Add the callbacks of every training, at a precision that suits a discriminator."""
        check_training_precision(self.trainer.precision, adversarial=self.discriminator is not None)
        return super().configure_callbacks()

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Make the parameter groups of each network."""
        decay = self.hparams["weight_decay"]
        return [group for network in self.trained_networks() for group in parameter_groups(network, decay)]

    def trained_networks(self) -> list[nn.Module]:
        """Autoencoder and discriminator, separately: one must not damp the other."""
        return [self.vae] if self.discriminator is None else [self.vae, self.discriminator]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the learning rate."""
        if logging_now(self):
            self.log("train/lr", optimizer.param_groups[0]["lr"])

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        """Start the sums of the epoch."""
        self._sums: dict[str, Tensor] = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the epoch's sums."""
        images = _images(batch)
        with full_precision(self.device):
            outputs = self(images).clamp(-1.0, 1.0)
        wide = accumulation_dtype(self.device)
        pixels = images.to(wide)
        batch_sums = {
            "count": pixels.new_tensor(float(len(images))),
            "image": pixels.sum(dim=0),  # (3, H, W)
            "square": pixels.square().sum(),
            "error": (outputs.to(wide) - pixels).square().sum(),
            "psnr": psnr(outputs, images).to(wide).sum(),
        }
        self._sums = {name: value + self._sums.get(name, 0.0) for name, value in batch_sums.items()}

    def on_validation_epoch_end(self) -> None:
        """Log MSE, PSNR and the lost share of the images' variance around their mean image."""
        sums = {name: self.trainer.strategy.reduce(value, reduce_op="sum") for name, value in self._sums.items()}
        count, values = sums["count"], sums["count"] * sums["image"].numel()
        variance = (sums["square"] - sums["image"].square().sum() / count) / values
        mse = sums["error"] / values
        self.log("val/mse", mse.float(), prog_bar=True)
        self.log("val/psnr", (sums["psnr"] / count).float())
        self.log("val/mse_over_variance", (mse / variance).float(), prog_bar=True)

    # Export

    def on_train_end(self) -> None:
        """Measure the latents and export the autoencoder.

        Lightning calls callbacks first here: with weight averaging, the averaged weights are in place by now.
        """
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self.keeps_latents:
            self.vae = self.vae.rescaled(1.0 / self.latent_std())
        folder = run_folder(self.trainer)
        if self.trainer.is_global_zero:
            self.vae.save_pretrained(folder / "vae")

    @torch.no_grad()
    def latent_std(self) -> float:
        """Standard deviation of the posterior means over `scale_batches` training batches of each rank."""
        wide = accumulation_dtype(self.device)
        sums = torch.zeros(3, dtype=wide, device=self.device)  # count, sum, sum of squares
        loader: Any = self.trainer.train_dataloader
        for number, batch in enumerate(loader):
            if number == self.hparams["scale_batches"]:
                break
            images = _images(self.trainer.strategy.batch_to_device(batch, self.device))
            with full_precision(self.device):
                mean = self.vae.moments(images).chunk(2, dim=1)[0].to(wide)
            sums += torch.stack([mean.new_tensor(float(mean.numel())), mean.sum(), mean.square().sum()])
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        mean, square = sums[1] / sums[0], sums[2] / sums[0]
        return float((square - mean**2).sqrt())


def kl_divergence(moments: Tensor) -> Tensor:
    """(B, 2C, h, w) means and log-variances -> divergence from the unit normal, summed over an image, mean over B."""
    mean, log_variance = moments.chunk(2, dim=1)
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(dim=1).mean()


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """(B, 3, H, W) twice, in [-1, 1] -> (B,) peak signal-to-noise ratio in decibels; the peak is 2."""
    mse = (images - targets).square().flatten(1).mean(dim=1).clamp_min(1e-10)
    return 10.0 * torch.log10(4.0 / mse)


def _images(batch: Batch) -> Tensor:
    if "image" not in batch:
        raise ValueError(f"the autoencoder trains on images, but the batches hold {sorted(batch)}; use image shards")
    return batch["image"].contiguous(memory_format=torch.channels_last)
