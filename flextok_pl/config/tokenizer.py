"""Hyper-parameters of the tokenizer and its autoencoder; see `flextok_pl.config`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flextok_pl.config.checks import as_tuples, at_least, nearest_multiples, one_of, preset_of

NestedDropoutLaw = Literal["uniform", "pow2", "uniform_pow2", "exponential", "none"]
TimestepLaw = Literal["logit_normal", "uniform", "mode"]
MODE_SCALE_MOST = 2 / (math.pi - 2)  # beyond, the `mode` law leaves [0, 1] (https://arxiv.org/abs/2403.03206)
Layout = Literal["registers", "grid"]
MissingTokens = Literal["mask", "zero"]
Objective = Literal["flow", "mse"]
Guidance = Literal["none", "cfg", "apg"]


@dataclass(frozen=True)
class VAEConfig:
    """The image autoencoder that turns pixels into latents.

    Args:
        kind: `kl` is diffusers' `AutoencoderKL`. `pixel`, for tiny images, folds square pixel blocks into channels; it
            has no weights and is lossless.
        latent_channels: C. A `pixel` autoencoder needs image_channels * f**2 for a fold of f x f pixels.
        block_out_channels: widths of the `kl` autoencoder's levels; n levels downsample by 2**(n-1).
        layers_per_block: residual blocks per level.
        norm_num_groups: groups of the group norms.
        down_block_types: diffusers block names; empty means `DownEncoderBlock2D` at every level.
        up_block_types: diffusers block names; empty means `UpDecoderBlock2D` at every level.
        act_fn: activation name.
        mid_block_add_attention: attention in the middle block.
        use_quant_conv: 1x1 convolution before the posterior.
        use_post_quant_conv: 1x1 convolution after the latents.
        scaling_factor: latents = (posterior - shift_factor) * scaling_factor. The published FlexTok VAE
            uses 0.88 (unconfirmed).
        shift_factor: 0 for every published FlexTok model.
        image_channels: channels of the pictures: 3 for colour, 1 for grey, more for other data.
    """

    kind: Literal["kl", "pixel"] = "kl"
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    act_fn: str = "silu"
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.88
    shift_factor: float = 0.0
    image_channels: int = 3

    def __post_init__(self) -> None:
        as_tuples(self, "block_out_channels", "down_block_types", "up_block_types")
        if not self.block_out_channels:
            raise ValueError("block_out_channels=() must have at least one width")
        if self.kind not in ("kl", "pixel"):
            raise ValueError(f"kind={self.kind!r} is not a known autoencoder; use 'kl' or 'pixel'")
        at_least(self, image_channels=1)
        channels = self.image_channels
        if (
            self.kind == "pixel"
            and channels * math.isqrt(self.latent_channels // channels) ** 2 != self.latent_channels
        ):
            raise ValueError(
                f"latent_channels={self.latent_channels} is not {channels} * f**2: a 'pixel' autoencoder folds f x f "
                f"pixels of image_channels={channels}, so use {', '.join(str(channels * f**2) for f in (1, 2, 3))}, ..."
            )
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor={self.scaling_factor} must be positive")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position, along each axis."""
        if self.kind == "pixel":
            return math.isqrt(self.latent_channels // self.image_channels)
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True)
class FlexTokConfig:
    """A FlexTok tokenizer.

    Args:
        vae: the image autoencoder, or None for a model of latents only.
        latent_channels: C, channels of the latents; equals `vae.latent_channels` if there is a VAE.
        encoder_width: D of the encoder.
        encoder_depth: number of blocks of the encoder.
        encoder_head_dim: width of the encoder's attention heads.
        decoder_width: D of the decoder.
        decoder_depth: number of blocks of the decoder.
        decoder_head_dim: width of the decoder's attention heads.
        mlp_ratio: SwiGLU hidden width is int(2 * int(mlp_ratio * D) / 3).
        num_registers: K, the most tokens of an image.
        fsq_levels: quantisation levels of each code dimension, in 2..1000; their product is the vocabulary.
        patch_size: latent positions per patch, along each axis.
        grid_size: (rows, columns) of patches in the position tables. Smaller inputs, of any shape, use the top-left
            part. To train on several shapes, give the most rows and the most columns of any.
        position_base: ratio of the largest to the smallest frequency of the position tables; 10000 as published. On a
            grid of few patches that leaves most channels constant: the demo has 10 on 4 x 4. It only fills a new
            model's tables, which checkpoints store.
        max_timestep: t that the time embedding maps to its full range: 1 or 1000 (unconfirmed for the
            published models, stored in their metadata).
        time_frequencies: width of the sinusoidal time embedding, an even number.
        repa_layer: index of the decoder block whose patches are compared with a teacher, or None.
        nested_dropout: law of the number of kept tokens in training (unconfirmed: the sources disagree).
        null_dropout: probability of dropping all tokens in training (unconfirmed).
        timestep_law: law of t in training (see `flextok_pl.flow.rectified`; unconfirmed).
        mode_scale: the `mode` law's scale s (unconfirmed).
        stratified: draw t in equal strata over the batch.
        layout: `registers` reads tokens from registers. `grid` is a baseline of 2-D tokens: they are read at the
            encoder's patches in raster order and added to the decoder's. `num_registers` is then the number of
            patches, and images must have exactly the size of `grid_size`.
        missing_tokens: input of the decoder for tokens beyond the budget. `mask` is a learned vector. `zero` is token
            0, as in published 2-D models; only for a `grid` trained with all tokens (`nested_dropout: none`).
        causal_registers: registers of the encoder see no later ones. False is a baseline: they all see each other, and
            the first k codes cost as much as all.
        objective: `flow` is rectified flow. `mse` is a baseline whose decoder regresses the latents: flow at t = 1 from
            zeros instead of noise. It decodes in one step; steps, guidance, noise and the options of t have no effect.
        started_from: note of a training: source and hash of the weights that it started from; empty for new ones.
        num_steps: decoding steps that the model was made for, such as a distilled one's; its default. This and the two
            options below are null for a model with the usual defaults.
        guidance: guidance that the model was made for: `none`, `cfg` or `apg`.
        guidance_scale: strength of that guidance.
        trained_grids: note of a training: (rows, columns) of patches of its images; the first is the default for
            decoding. Empty for images of `grid_size` only.
        same_tokens_as: note of a training that kept everything that makes tokens: its hash, which must not have
            changed, and the hashes of all weights of the tokenizers that it and earlier trainings started from.
    """

    vae: VAEConfig | None = VAEConfig()
    latent_channels: int = 16
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_head_dim: int = 64
    decoder_width: int = 768
    decoder_depth: int = 12
    decoder_head_dim: int = 64
    mlp_ratio: float = 4.0
    num_registers: int = 256
    fsq_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    patch_size: int = 2
    grid_size: tuple[int, int] = (16, 16)
    position_base: float = 10000.0
    max_timestep: float = 1.0
    time_frequencies: int = 256
    repa_layer: int | None = 1
    nested_dropout: NestedDropoutLaw = "uniform"
    null_dropout: float = 0.2
    timestep_law: TimestepLaw = "mode"
    mode_scale: float = 0.25
    stratified: bool = False
    layout: Layout = "registers"
    missing_tokens: MissingTokens = "mask"
    causal_registers: bool = True
    objective: Objective = "flow"
    started_from: str = ""
    num_steps: int | None = None
    guidance: Guidance | None = None
    guidance_scale: float | None = None
    trained_grids: tuple[tuple[int, int], ...] = ()
    same_tokens_as: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        as_tuples(self, "fsq_levels", "grid_size", "same_tokens_as")
        object.__setattr__(self, "trained_grids", tuple(tuple(grid) for grid in self.trained_grids))
        at_least(self, encoder_head_dim=1, encoder_depth=1, decoder_head_dim=1, decoder_depth=1)
        at_least(self, num_registers=1, patch_size=1, latent_channels=1)
        for side in ("encoder", "decoder"):
            width, head_dim = getattr(self, f"{side}_width"), getattr(self, f"{side}_head_dim")
            if width % head_dim:
                raise ValueError(f"{side}_width={width} must be a multiple of {side}_head_dim={head_dim}")
            if width % 4:
                raise ValueError(f"{side}_width={width} must be a multiple of 4 for sin-cos positions")
        if not self.fsq_levels or min(self.fsq_levels) < 2 or max(self.fsq_levels) > 1000:
            raise ValueError(f"fsq_levels={self.fsq_levels} must have at least one entry, each in 2..1000")
        if self.time_frequencies < 2 or self.time_frequencies % 2:
            raise ValueError(f"time_frequencies={self.time_frequencies} must be a positive multiple of 2")
        if self.vae is not None and self.vae.latent_channels != self.latent_channels:
            raise ValueError(
                f"latent_channels={self.latent_channels} differs from vae.latent_channels="
                f"{self.vae.latent_channels}; give both the same value"
            )
        if self.repa_layer is not None and not 0 <= self.repa_layer < self.decoder_depth:
            raise ValueError(
                f"repa_layer={self.repa_layer} is not a block of a decoder with decoder_depth="
                f"{self.decoder_depth}; use 0..{self.decoder_depth - 1} or null"
            )
        if self.position_base <= 1:
            raise ValueError(f"position_base={self.position_base} must be above 1; published models have 10000")
        if not 0.0 <= self.null_dropout <= 1.0:
            raise ValueError(f"null_dropout={self.null_dropout} must be a probability in [0, 1]")
        if any(n > most for grid in self.trained_grids for n, most in zip(grid, self.grid_size, strict=True)):
            raise ValueError(f"trained_grids={self.trained_grids} has more patches than grid_size={self.grid_size}")
        if not -1.0 <= self.mode_scale <= MODE_SCALE_MOST:
            raise ValueError(
                f"mode_scale={self.mode_scale} must be in [-1, {MODE_SCALE_MOST:.4f}], for times in [0, 1]"
            )
        one_of(self, layout=Layout, missing_tokens=MissingTokens, objective=Objective)
        one_of(self, nested_dropout=NestedDropoutLaw, timestep_law=TimestepLaw)
        if self.num_steps is not None:
            at_least(self, num_steps=1)
        if self.guidance is not None:
            one_of(self, guidance=Guidance)
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number, or null")
        patches = math.prod(self.grid_size)
        if self.layout == "grid" and self.num_registers != patches:
            raise ValueError(
                f"num_registers={self.num_registers} with layout='grid' must be the number of patches; grid_size="
                f"{self.grid_size} has {patches}: set num_registers={patches}"
            )
        if self.layout == "grid" and not self.causal_registers:
            raise ValueError(
                "causal_registers=False has no effect with layout='grid', which has no registers; leave it out"
            )

        if self.missing_tokens == "zero" and (self.layout != "grid" or self.nested_dropout != "none"):
            raise ValueError(
                f"missing_tokens='zero' with layout={self.layout!r} and nested_dropout={self.nested_dropout!r} must be "
                "'mask'; zeros are only for a grid that is trained with all tokens (nested_dropout='none')"
            )

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return math.prod(self.fsq_levels)

    def num_patches(self, latent_size: Sequence[int]) -> int:
        """N, of latents of (h, w) positions."""
        return math.prod(latent_size) // self.patch_size**2

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of patches of the training images, the default first."""
        return self.trained_grids or (self.grid_size,)

    @property
    def patch_pixels(self) -> int:
        """Image pixels per patch, along each axis; ValueError without an autoencoder."""
        if self.vae is None:
            raise ValueError("vae=None: without an autoencoder a patch has no size in pixels; set vae")
        return self.vae.downsampling * self.patch_size

    def grid_of(self, image_size: Sequence[int], name: str = "image_size") -> tuple[int, int]:
        """(rows, columns) of patches of images of (height, width) pixels.

        Raises:
            ValueError: the size is not a multiple of a patch, or larger than the position tables. The message calls it
                `name` and gives sizes that fit.
        """
        side, (height, width) = self.patch_pixels, image_size
        given = f"{name}={height if height == width else [height, width]}"
        if height % side or width % side or min(height, width) < 1:
            near = " by ".join(nearest_multiples(pixels, side) for pixels in dict.fromkeys(image_size))
            raise ValueError(f"{given} must be a multiple of the patch of {side} x {side} pixels; the nearest: {near}")
        rows, columns = grid = height // side, width // side
        tables = f"net.grid_size={list(self.grid_size)}"
        if self.layout == "grid" and grid != self.grid_size:
            other = "more" if math.prod(grid) > math.prod(self.grid_size) else "fewer"
            raise ValueError(
                f"{given} gives {other} patches, {rows} x {columns}, than {tables} has: layout='grid' has one "
                f"token for each patch, so they must be {' x '.join(map(str, self.grid_size))}; give "
                f"{[n * side for n in self.grid_size]} pixels"
            )
        if rows > self.grid_size[0] or columns > self.grid_size[1]:
            raise ValueError(
                f"{given} gives more patches, {rows} x {columns}, than {tables} has; give at most "
                f"{[n * side for n in self.grid_size]} pixels, or train with net.grid_size=[{rows}, {columns}] from "
                "these weights (init_from resamples their positions)"
            )
        return grid

    def latent_size_of(self, image_size: Sequence[int]) -> tuple[int, int]:
        """(h, w) of the latents of images of (height, width) pixels; ValueError as for `grid_of`."""
        rows, columns = self.grid_of(image_size)
        return rows * self.patch_size, columns * self.patch_size

    @staticmethod
    def preset(name: str) -> FlexTokConfig:
        """A named configuration: `d12_d12`, `d18_d18`, `d18_d28` (as published), `tiny` or `demo`."""
        return preset_of(TOKENIZER_PRESETS, name)


def _published(encoder_depth: int, decoder_depth: int) -> FlexTokConfig:
    return FlexTokConfig(
        encoder_width=64 * encoder_depth,
        encoder_depth=encoder_depth,
        decoder_width=64 * decoder_depth,
        decoder_depth=decoder_depth,
    )


_DEMO_VAE = VAEConfig(
    block_out_channels=(16, 24, 64, 96),
    layers_per_block=1,
    norm_num_groups=8,
    mid_block_add_attention=False,
    scaling_factor=1.0,
)

TOKENIZER_PRESETS = {
    "d12_d12": _published(12, 12),
    "d18_d18": _published(18, 18),
    "d18_d28": _published(18, 28),
    "demo": FlexTokConfig(
        vae=_DEMO_VAE,
        encoder_width=128,
        encoder_depth=3,
        encoder_head_dim=32,
        decoder_width=128,
        decoder_depth=3,
        decoder_head_dim=32,
        num_registers=64,
        fsq_levels=(7, 5, 5, 5, 5),
        grid_size=(4, 4),
        position_base=10.0,
        repa_layer=None,
        nested_dropout="uniform_pow2",
        null_dropout=0.1,
        timestep_law="logit_normal",
    ),
    "tiny": FlexTokConfig(
        vae=VAEConfig(kind="pixel", latent_channels=12, scaling_factor=1.0),
        latent_channels=12,
        encoder_width=64,
        encoder_depth=2,
        encoder_head_dim=32,
        decoder_width=64,
        decoder_depth=2,
        decoder_head_dim=32,
        num_registers=16,
        grid_size=(8, 8),
        repa_layer=None,
        nested_dropout="pow2",
        null_dropout=0.1,
        timestep_law="logit_normal",
    ),
}
