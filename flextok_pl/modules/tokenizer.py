"""Stage 1: train a FlexTok tokenizer.

Special points:
- The autoencoder is frozen: it makes the latents, unless the shards hold them. Encoder and decoder train together.
- REPA, if used, aligns an early block of the decoder with a frozen teacher; shards may also hold its features.
- All draws follow from the seed and the step, in validation from the sample's key: a resumed run repeats none.
- Losses are also logged by flow time and budget; validation compares an image's own tokens with random ones.
- Callbacks measure images; this module measures losses only.

Shapes: B batch, C channels, h x w latent, K registers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from flextok_pl.config import FlexTokConfig, config_from_dict
from flextok_pl.contracts import Batch, weights_hash
from flextok_pl.cost.models import tokenizer_flops
from flextok_pl.layers.blocks import compile_for_all_lengths
from flextok_pl.layers.frozen import Frozen
from flextok_pl.models.decoder import FlowDecoder
from flextok_pl.models.encoder import RegisterEncoder
from flextok_pl.models.irepa import Projection, build_projection, spatially_normalized
from flextok_pl.models.objective import FlowLoss, draws_of_each, flow_loss, sample_draws
from flextok_pl.models.routing import build_routing, sample_route
from flextok_pl.models.starting import load_autoencoder
from flextok_pl.models.teacher import Teacher, alignment_loss, resized_map
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.modules.repa_stop import aligned_steps, check_share, without_alignment
from flextok_pl.modules.starting import StartedModule
from flextok_pl.modules.steps import evaluation_generators, log_means, step_generator
from flextok_pl.modules.tokenizer_base import TokenizerTraining
from flextok_pl.modules.width_transfer import (
    WidthPart,
    check_base_width,
    default_std,
    rescale_initial_weights,
    xavier_std,
)
from flextok_pl.precision import full_precision
from flextok_pl.runtime.sharding import shard


class TokenizerModule(TokenizerTraining, StartedModule):
    """Trains the register encoder, the quantiser's codes and the flow decoder on VAE latents.

    Batches carry images, or latents of the same VAE with features of the same teacher. VAE and teacher are frozen:
    neither averaged nor stored in checkpoints. The teacher is loaded only to train on images. The end of a fit exports
    tokenizer and VAE to the run's folder (`modules.export`).

    Args:
        net: configuration of the tokenizer. The option `vae`, if given, replaces its `vae`.
        vae: folder or Hub id of a trained autoencoder, or a FlexTok `.safetensors` file with one. None builds `net.vae`
            with random weights, which only suits the kind `pixel`.
        init_from: finished tokenizer whose weights to start from: a `.safetensors` file, a folder or a Hub id. It must
            fit `net`, and have the autoencoder of `vae`. A training that resumes from a checkpoint does not read it.
        init_parts: parts to take from it: `encoder`, `decoder`, or what is below, such as `decoder.blocks`; None for
            all. The others are new.
        train: parts of the tokenizer to train, by names as for `init_parts`; None for all. The others are frozen: they
            have no gradient, no weight decay and no average, and must come from `init_from`. Without the encoder the
            tokens do not change, so that token shards and priors of the finished tokenizer stay valid.
        lr: peak learning rate.
        betas: betas of AdamW.
        weight_decay: weight decay of matrices; biases, tokens and positions have none.
        warmup_steps: optimizer steps of linear warm-up, followed by a cosine over the rest of the training.
        min_lr_ratio: final learning rate, as a share of `lr`.
        mup_base_width: width, of encoder and decoder alike, at which `lr`, `weight_decay` and initialisation are tuned;
            muP carries them over to this model's widths. None for the standard parametrisation.
        timestep_shift: values above 1 train more on noisy inputs, where tokens matter most. Like `pure_noise` it has no
            effect on a net with `objective="mse"`, which always trains at t = 1.
        pure_noise: share of the images that are trained at t = 1, where only the tokens determine the image. With it a
            small model learns to use its tokens much sooner.
        stratified_budgets: draw the numbers of kept tokens, and the images that keep none, in equal strata over the
            batch. All steps then compute almost the same number of positions, on each process.
        teacher: REPA's teacher: `effnet-lite2`, a timm model, or None for no REPA.
        teacher_weights: local weights file of the teacher.
        repa_weight: weight of the alignment loss.
        repa_until: share of the training's optimizer steps that have an alignment loss. In later steps the teacher does
            not run, and `train/repa` repeats its last value until the epoch ends.
        repa_projection: `mlp` projects each patch separately, as REPA; `conv` is iREPA's 3 x 3 convolution.
        repa_spatial_norm: iREPA's normalisation of the teacher's features over an image's patches: subtract this share
            of their mean (0.6 in its code for latents), and divide by their standard deviation. None keeps the features
            as they are.
        route_share: share of the patches that skip the decoder's blocks `route_blocks`, only in training (TREAD uses
            0.5); 0 for none.
        route_blocks: first and last of these blocks, counted from 0. TREAD uses 2 and 8 of 12.
        activation_checkpointing: recompute blocks in the backward pass, for less memory.
        compile_blocks: `torch.compile` every Transformer block for training steps; evaluation runs them as they are.
        seed: seed of noise, times and budgets in training, and of the fixed ones in validation.
    """

    val_means: ClassVar[tuple[str, ...]] = ("val/loss", "val/loss_other_tokens", "val/token_gap")

    def __init__(
        self,
        net: FlexTokConfig,
        vae: str | None = None,
        init_from: str | None = None,
        init_parts: list[str] | None = None,
        train: list[str] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.01,
        mup_base_width: int | None = None,
        timestep_shift: float = 1.0,
        pure_noise: float = 0.0,
        stratified_budgets: bool = False,
        teacher: str | None = None,
        teacher_weights: str | None = None,
        repa_weight: float = 1.0,
        repa_until: float = 1.0,
        repa_projection: Projection = "mlp",
        repa_spatial_norm: float | None = None,
        route_share: float = 0.0,
        route_blocks: tuple[int, int] | None = None,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        net = config_from_dict(FlexTokConfig, net) if isinstance(net, Mapping) else net  # from a checkpoint
        self.save_hyperparameters(ignore="net")
        self.hparams["net"] = dataclasses.asdict(net)  # plain types: a checkpoint must load with weights_only
        if not 0.0 < timestep_shift < math.inf:
            raise ValueError(f"timestep_shift={timestep_shift} must be a positive number; 1.0 leaves the law as it is")
        if not 0.0 <= pure_noise <= 1.0:
            raise ValueError(f"pure_noise={pure_noise} must be a share in [0, 1]")
        if net.objective == "mse" and (timestep_shift != 1.0 or pure_noise > 0):
            rank_zero_warn(
                f"timestep_shift={timestep_shift} and pure_noise={pure_noise} have no effect with net.objective='mse', "
                "which always trains at t = 1: leave them at 1.0 and 0.0"
            )
        check_share(repa_until)
        if repa_spatial_norm is not None and not 0.0 <= repa_spatial_norm <= 1.0:
            raise ValueError(f"repa_spatial_norm={repa_spatial_norm} must be a share of the mean in [0, 1], or null")
        if mup_base_width is not None:
            check_base_width(mup_base_width, math.lcm(4, net.encoder_head_dim, net.decoder_head_dim))
        self.hold(build_tokenizer(net, vae))
        self.teacher_name, self.teacher_weights, self.seed = teacher, teacher_weights, seed
        self._vae_hash: str | None = None
        self.routing = build_routing(route_share, route_blocks, net, teacher is not None)
        self.teacher: Frozen[Teacher] | None = None
        if teacher is not None:
            if net.repa_layer is None:
                raise ValueError(f"teacher={teacher!r} needs a decoder block to align: set model.net.repa_layer")
            with torch.device("meta"):
                self.teacher_width = Teacher(teacher, teacher_weights, pretrained=False).dim
            self.projection = build_projection(repa_projection, net.decoder_width, self.teacher_width)
        elif (repa_until, repa_projection, repa_spatial_norm) != (1.0, "mlp", None):
            rank_zero_warn("repa_until, repa_projection and repa_spatial_norm have no effect without model.teacher")
        for width_part in self.width_parts():
            rescale_initial_weights(width_part)
        self.check_start()
        self.tokenizer.checkpoint_activations(activation_checkpointing)
        if compile_blocks:
            for part in (self.tokenizer.encoder, self.tokenizer.decoder):
                compile_for_all_lengths(part.blocks)

    @property
    def flops_per_sample(self) -> float:
        """Floating-point operations of a training step per image, as MFU counts them; see `flextok_pl.cost.models`.

        Expected over the budgets of the training, at the image size of its data, or else at the model's own. A frozen
        encoder counts its forward pass. Other frozen networks, the projection to the teacher and recomputation are not
        counted.
        """
        return tokenizer_flops(
            self.tokenizer.config, self.grid, routing=self.routing, train=self.trained_parts
        ).training

    def width_parts(self) -> list[WidthPart]:
        """Encoder, decoder and projection, if any."""
        config, base_width = self.tokenizer.config, self.hparams["mup_base_width"]
        if base_width is None:
            return []
        base_config = dataclasses.replace(config, encoder_width=base_width, decoder_width=base_width)
        encoder, decoder = self.tokenizer.encoder, self.tokenizer.decoder
        with torch.device("meta"):
            parts = [
                WidthPart(encoder, RegisterEncoder(base_config), base_width / config.encoder_width, xavier_std),
                WidthPart(decoder, FlowDecoder(base_config), base_width / config.decoder_width, xavier_std),
            ]
            if self.teacher_name is not None:
                projection = build_projection(self.hparams["repa_projection"], base_width, self.teacher_width)
                parts.append(WidthPart(self.projection, projection, parts[1].ratio, default_std))
        return parts

    def setup(self, stage: str) -> None:
        """Check that precomputed features are the teacher's, and load the teacher if there are none."""
        super().setup(stage)
        features = getattr(self.trainer.datamodule, "teacher", None)  # type: ignore[attr-defined]
        if self.teacher_name is None or stage != "fit":
            return
        if features is None:
            self.teacher = Frozen(Teacher(self.teacher_name, self.teacher_weights))
            return
        same = features["name"] == self.teacher_name
        if same and self.teacher_weights is not None:  # else the name identifies the weights
            same = features["sha256"] == weights_hash(Teacher(self.teacher_name, self.teacher_weights))
        if not same:
            raise ValueError(
                f"the shards hold features of the teacher {features}, but model.teacher={self.teacher_name!r} with "
                f"model.teacher_weights={self.teacher_weights!r} is another; set them to the former, or write the "
                "features again (flextok data latents)"
            )

    def configure_model(self) -> None:
        """Shard encoder, decoder and projection if the strategy asks for it."""
        projection = [] if self.teacher_name is None else [self.projection]
        shard(self, [self.tokenizer.encoder, self.tokenizer.decoder, *projection])

    def on_train_start(self) -> None:
        """Find the step at which the alignment ends, now that the length of the training is known."""
        super().on_train_start()
        self._aligned_steps = aligned_steps(self.hparams["repa_until"], self.trainer.estimated_stepping_batches)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the velocity loss, and the alignment with the teacher, if any."""
        latents = self.latents(batch)
        generator = step_generator(self, self.seed, batch_idx)
        config, options = self.tokenizer.config, self.hparams
        process = self.global_rank, self.trainer.world_size
        draws = sample_draws(
            config,
            latents,
            generator,
            options["timestep_shift"],
            options["pure_noise"],
            options["stratified_budgets"],
            *process,
        )
        route = sample_route(self.routing, config, latents, generator, *process)
        result = flow_loss(self.tokenizer, latents, draws, route=route)
        return self.logged_loss(result.loss, draws) + self._alignment(batch, latents, result)

    def _alignment(self, batch: Batch, latents: Tensor, result: FlowLoss) -> Tensor | float:
        if self.teacher_name is None or result.patch_features is None:
            return 0.0
        if self.global_step >= self._aligned_steps:
            return without_alignment(self.projection, result.patch_features)
        patch, mean_share = self.tokenizer.config.patch_size, self.hparams["repa_spatial_norm"]
        grid = (latents.shape[2] // patch, latents.shape[3] // patch)
        features = resized_map(self._teacher_features(batch, grid), grid)
        if mean_share is not None:  # on the decoder's grid, so that the grid of the stored features does not matter
            features = spatially_normalized(features, mean_share)
        loss = alignment_loss(self.projection(result.patch_features, grid), features)
        log_means(self, {"train/repa": loss}, len(latents))
        return float(self.hparams["repa_weight"]) * loss

    def _teacher_features(self, batch: Batch, grid: tuple[int, int]) -> Tensor:
        """The teacher's features, (B, F, h', w'); precomputed ones must not be coarser than the decoder's grid."""
        if "teacher_features" not in batch:
            if self.teacher is None or "image" not in batch:
                raise ValueError(
                    f"model.teacher={self.teacher_name!r} needs images or its features, and these shards give "
                    f"{sorted(batch)}: set model.teacher to null, train on images, or write latents with features "
                    f"(flextok data latents ... --teacher {self.teacher_name})"
                )
            return self.teacher(batch["image"])  # type: ignore[no-any-return]
        features = batch["teacher_features"]
        if features.shape[-2] < grid[0] or features.shape[-1] < grid[1]:
            raise ValueError(
                f"the stored features of the teacher lie on a grid of {tuple(features.shape[-2:])}, coarser than the "
                f"decoder's of {grid}; write them again (flextok data latents) with --teacher_grid {max(grid)}"
            )
        return features

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Compute the loss with fixed draws for each image, with its own tokens and with random ones, in float32."""
        config = self.tokenizer.config
        with full_precision(self.device):
            latents = self.latents(batch)
        generators = evaluation_generators(self.seed, batch)
        draws = draws_of_each(config, latents, generators)
        shape = (config.num_registers,)
        tokens = torch.stack([torch.randint(config.vocab_size, shape, generator=each) for each in generators])
        with full_precision(self.device):
            own = flow_loss(self.tokenizer, latents, draws).loss
            other = flow_loss(self.tokenizer, latents, draws, tokens=tokens.to(latents.device)).loss
        gap = other.mean() - own.mean()
        values = {"val/loss": own.mean(), "val/loss_other_tokens": other.mean(), "val/token_gap": gap}
        self._val_means.add(values, len(latents))
        self.val_loss.update(own, draws)

    def frozen_weights(self) -> dict[str, str]:
        """The hash of the autoencoder, unless that is part of `net`."""
        if self.hparams["vae"] is None:
            return {}
        self._vae_hash = self._vae_hash or weights_hash(self.tokenizer.require_vae())
        return {"vae": self._vae_hash}


def build_tokenizer(net: FlexTokConfig, vae: str | None) -> FlexTok:
    """Build a new tokenizer around a frozen autoencoder; see `TokenizerModule` for the arguments."""
    if vae is not None:
        autoencoder = load_autoencoder(vae)
    elif net.vae is None:
        raise ValueError("net.vae=None leaves no autoencoder to make latents with; set model.vae or net.vae")
    else:
        autoencoder = VAE(net.vae)
    if autoencoder.config.latent_channels != net.latent_channels:
        raise ValueError(
            f"vae={vae!r} makes {autoencoder.config.latent_channels} latent channels but net.latent_channels="
            f"{net.latent_channels}; set model.net.latent_channels={autoencoder.config.latent_channels}"
        )
    return FlexTok(net, Frozen(autoencoder))
