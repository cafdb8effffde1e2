"""FlexTok: images to 1..K ordered tokens, and back (https://arxiv.org/abs/2502.13967).

- An autoencoder maps an image to latents. The registers of a ViT read them and are quantised to tokens.
- Tokens are ordered: a register sees no later one, and training drops all tokens after a random number of them.
- A rectified flow decodes latents from any number of first tokens, with guidance.

Shapes: B batch, C channels, h x w latent, K registers, k <= K kept tokens, L FSQ levels.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flextok_pl.config import FlexTokConfig
from flextok_pl.contracts import GuidanceScale
from flextok_pl.flow.decoding import chosen_decoding
from flextok_pl.interop import TOKENIZER_FORMATS
from flextok_pl.layers.frozen import Frozen
from flextok_pl.layers.packing import places, take
from flextok_pl.models.adaptive import Quality, smallest_budgets
from flextok_pl.models.arguments import (
    as_budgets,
    as_images,
    as_noise,
    as_token_batch,
    check_finite,
    check_image_values,
    check_latents,
)
from flextok_pl.models.decoder import FlowDecoder, guided_field, token_layout
from flextok_pl.models.encoder import RegisterEncoder, code_layout
from flextok_pl.models.fsq import FSQ
from flextok_pl.models.identity import tokens_identity
from flextok_pl.models.pretrained import PretrainedModel, load_model
from flextok_pl.models.vae import VAE
from flextok_pl.precision import full_precision, require_float32
from flextok_pl.transfer import send

DIVERGED = "the weights hold some, or have diverged: use other weights"


class FlexTok(PretrainedModel):
    """The tokenizer: an autoencoder for latents, a register encoder, FSQ, and a flow decoder.

    For use, call `encode_latents`, `tokenize`, `sample_latents` and `detokenize`: they compute in float32 without TF32,
    also under autocast, and refuse values that are not finite. For training, call `encode` and `velocity`: they have
    gradients and the caller's precision.

    An autoencoder given as `vae` replaces a new one of `config.vae`, also in the configuration. A frozen one is not
    part of the state dict, but is saved.
    """

    config: FlexTokConfig
    vae: VAE | Frozen[VAE] | None
    formats = TOKENIZER_FORMATS

    def __init__(self, config: FlexTokConfig, vae: VAE | Frozen[VAE] | None = None) -> None:
        super().__init__()
        if vae is None and config.vae is not None:
            vae = VAE(config.vae)
        self.config = config if vae is None else dataclasses.replace(config, vae=vae.config)
        self.vae = vae
        self.encoder = RegisterEncoder(config)
        self.quantizer = FSQ(config.fsq_levels)
        self.decoder = FlowDecoder(config)
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier for linear maps, unit normal tokens, and zero for adaLN-zero.

        In the official code tokens start at a standard deviation of 0.02. There the content of the registers drowns
        their identity at first, and they learn to differ later.
        """
        for module in [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        decoder = self.decoder
        for token in [*self.encoder.parameters(recurse=False), *decoder.parameters(recurse=False)]:
            if token.requires_grad:  # registers, their positions, mask and null token, but not fixed patch positions
                nn.init.normal_(token)
        zeros = [module for name, module in decoder.named_modules() if name.endswith("adaLN_modulation.1")]
        for module in [*zeros, decoder.head.proj]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        vae_config: dict[str, Any] | str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load a tokenizer saved by this package or by the official code, in evaluation mode and float32.

        Args:
            path_or_hub_id: a `.safetensors` file, a folder with `model.safetensors` or its index, or a Hub id
                `OWNER/NAME` or `OWNER/NAME@REVISION`; a local file or folder comes first.
            vae_config: diffusers' `AutoencoderKL` configuration (a mapping or a JSON file), for an official checkpoint
                whose autoencoder is not the published one.
            device: where to put the weights.

        Raises:
            ValueError: the file is missing or damaged, or its model is not supported.
        """
        return load_model(path_or_hub_id, TOKENIZER_FORMATS, cls, device, vae_config)

    def weights_to_save(self, weights: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """The state dict, and the autoencoder if that is frozen."""
        weights = super().weights_to_save(weights)
        return {**weights, **self.vae.module.state_dict(prefix="vae.")} if isinstance(self.vae, Frozen) else weights

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping activations, to save memory."""
        self.encoder.activation_checkpointing = self.decoder.activation_checkpointing = enabled

    @property
    def num_registers(self) -> int:
        """K, the most tokens of an image."""
        return self.config.num_registers

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.patch_posemb.device

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latents of training images, or of the first of several training sizes."""
        rows, columns = self.config.grids[0]
        return rows * self.config.patch_size, columns * self.config.patch_size

    def identity(self) -> dict[str, Any]:
        """What token shards and priors record of the tokenizer; see `tokens_identity`."""
        vae = None if self.vae is None else self.require_vae()
        return tokens_identity(self, self.encoder, vae, self.config)

    def require_vae(self) -> VAE:
        """The autoencoder; raises a `ValueError` if there is none."""
        if self.vae is None:
            raise ValueError(
                "this tokenizer has no VAE (config.vae is null) and takes latents only; use encode / velocity / "
                "sample_latents, or build it with a VAE"
            )
        return self.vae.module if isinstance(self.vae, Frozen) else self.vae

    @property
    def image_channels(self) -> int:
        """Channels of the pictures that it takes; raises a `ValueError` without an autoencoder."""
        return self.require_vae().config.image_channels

    def encode_latents(
        self, images: Tensor, sample_posterior: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Scaled VAE latents of images, (B, C, h, w).

        Args:
            images: (B, 3, H, W) in [-1, 1], of any floating type, also NumPy; overshoots up to 2 are allowed.
            sample_posterior: sample the posterior instead of taking its mean.
            generator: source of that sample.

        Raises:
            ValueError: the images are not floating point around [-1, 1], or do not fit the autoencoder.
        """
        vae = self.require_vae()
        images = as_images(images, vae.config.image_channels).to(self.device)
        check_image_values(images)
        with full_precision(self.device):
            latents = vae.encode(images, sample_posterior, generator)
        return check_finite(latents, "the autoencoder's latents", DIVERGED)

    def encode(self, latents: Tensor, num_tokens: int | Tensor | None = None) -> Tensor:
        """Codes before quantisation, with gradients: scaled latents (B, C, h, w) -> (B, k, L).

        `num_tokens` is k, one for all or (B,) int64, default K; rows beyond an image's k are zero. Causal registers
        beyond an image's k are not computed.

        Raises:
            ValueError: the latents do not fit the model, or k is not in 1..K.
        """
        budgets = as_budgets(num_tokens, [self.num_registers] * len(latents), self.num_registers)
        codes = self._encode(latents, budgets)
        if len(budgets) == 0:
            return codes.view(0, num_tokens if isinstance(num_tokens, int) else self.num_registers, codes.shape[-1])
        return pad_sequence(list(torch.split(codes, budgets.tolist())), batch_first=True)

    def _encode(self, latents: Tensor, budgets: Tensor) -> Tensor:
        """Codes of (B,) budgets, concatenated."""
        check_latents(latents, self.config)
        require_float32(self.encoder.patch_posemb.dtype, "tokenizer")
        return self.encoder(latents.float(), code_layout(self.config, latents, budgets))  # type: ignore[no-any-return]

    @torch.no_grad()
    def tokenize_latents(self, latents: Tensor, num_tokens: int | None = None) -> Tensor:
        """`tokenize` without the VAE and without checking values: scaled latents (B, C, h, w) -> (B, k) int64."""
        with full_precision(self.device):
            return self.quantizer.codes_to_tokens(self.quantizer(self.encode(latents, num_tokens)))

    @overload
    def tokenize(self, images: Tensor, num_tokens: int | None = None, quality: None = None) -> Tensor: ...

    @overload
    def tokenize(self, images: Tensor, num_tokens: Tensor, quality: None = None) -> list[Tensor]: ...

    @overload
    def tokenize(self, images: Tensor, num_tokens: int | None = None, *, quality: Quality) -> list[Tensor]: ...

    @torch.no_grad()
    def tokenize(
        self, images: Tensor, num_tokens: int | Tensor | None = None, quality: Quality | None = None
    ) -> Tensor | list[Tensor]:
        """Tokenize images from the mean of the VAE's posterior, so the result is deterministic.

        Args:
            images: see `encode_latents`.
            num_tokens: k, one for all or (B,) int64, default K; with `quality` the most for an image.
            quality: keep the fewest tokens of each image that reach this quality; takes about log2 k decodings.

        Returns:
            (B, k) int64; with `quality` or (B,) numbers a list of B tensors (k_i,), which `detokenize` also takes.

        Raises:
            ValueError: an argument does not fit the model.
        """
        images = as_images(images, self.image_channels).to(self.device)
        self.config.grid_of(images.shape[2:])
        latents = self.encode_latents(images)
        budgets = as_budgets(num_tokens, [self.num_registers] * len(latents), self.num_registers)
        with full_precision(self.device):
            codes = self.quantizer(self._encode(latents, budgets))
        tokens = self.quantizer.codes_to_tokens(check_finite(codes, "the encoder's codes", DIVERGED))
        rows = list(torch.split(tokens, budgets.tolist()))
        if quality is not None:
            size = (latents.shape[2], latents.shape[3])
            made_by = quality.decoding(self.config)
            budgets = smallest_budgets(images, rows, size, quality, made_by, self.detokenize)
            return [row[:budget] for row, budget in zip(rows, budgets.tolist(), strict=True)]
        return rows if isinstance(num_tokens, Tensor) else tokens.view(len(rows), num_tokens or self.num_registers)

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor | float,
        tokens_or_codes: Tensor,
        num_tokens: int | Tensor | None = None,
        null: Tensor | None = None,
    ) -> Tensor:
        """Compute the decoder's velocity, with gradients.

        With `objective="mse"` it is minus the decoded latents, and defined for x_t = 0 and t = 1 only.

        Args:
            x_t: (B, C, h, w) noised latents.
            t: flow time, one for all or (B,); 1 is pure noise.
            tokens_or_codes: (B, k') int64 tokens, or (B, k', L) quantised codes.
            num_tokens: number of tokens kept, one for all or (B,) int64; default all k'.
            null: (B,) bool, True for samples without condition.

        Returns:
            (B, C, h, w), an estimate of noise minus clean latents.

        Raises:
            ValueError: an argument does not fit the model.
        """
        check_latents(x_t, self.config)
        require_float32(self.decoder.patch_posemb.dtype, "tokenizer")
        codes = tokens_or_codes
        if not codes.is_floating_point():
            codes = self.quantizer.tokens_to_codes(codes)
        batch, length, _ = codes.shape
        budgets = as_budgets(num_tokens, [length] * batch, self.num_registers)
        if null is not None:
            null = null.cpu()
            budgets = budgets.masked_fill(null, 0)
        owner, place = places(budgets)
        codes = take(codes.flatten(0, 1), send(owner * length + place, codes.device))
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).reshape(-1)
        layout = token_layout(self.config, x_t, budgets, null)
        return self.decoder(x_t, t, codes, layout).velocity  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample_latents(
        self,
        tokens: Tensor | Sequence[Tensor],
        num_tokens: int | Tensor | None = None,
        num_steps: int | None = None,
        guidance: str | None = None,
        guidance_scale: GuidanceScale | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
        latent_size: tuple[int, int] | None = None,
        solver: str = "euler",
        guidance_interval: tuple[float, float] | None = None,
        join: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        """Decode as `detokenize`, without the VAE: returns the scaled latents, (B, C, h, w).

        `join` maps states (B, C, h, w) to those that the decoder sees, for example to average overlapping tiles.
        """
        decoding = chosen_decoding(
            self.config,
            num_steps=num_steps,
            guidance=guidance,
            guidance_scale=guidance_scale,
            solver=solver,
            guidance_interval=guidance_interval,
        )
        require_float32(self.decoder.patch_posemb.dtype, "tokenizer")
        codes, budgets = self._codes_and_budgets(tokens, num_tokens)
        x = as_noise(noise, generator, len(budgets), latent_size or self.latent_size, self.config).to(self.device)
        if self.config.objective == "mse":
            x = torch.zeros_like(x)
        if len(x) == 0:
            return x
        with full_precision(self.device):
            field = guided_field(self.decoder, codes, budgets, x)
            latents = join(decoding.under(self.config.objective).sample(lambda x, *when: field(join(x), *when), x))
        return check_finite(latents, "the decoded latents", DIVERGED)

    @torch.no_grad()
    def detokenize(
        self,
        tokens: Tensor | Sequence[Tensor],
        num_tokens: int | Tensor | None = None,
        num_steps: int | None = None,
        guidance: str | None = None,
        guidance_scale: GuidanceScale | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
        latent_size: tuple[int, int] | None = None,
        solver: str = "euler",
        guidance_interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Decode images from tokens.

        Steps and guidance default to those that the tokenizer's file states (`config.num_steps` and so on), or else to
        25 steps with `apg` at 7.5.

        A tokenizer with `objective="mse"` is deterministic and decodes in one step: steps, solver, guidance, generator
        and the values of `noise` have no effect.

        Args:
            tokens: (B, k') of any integer type, or a list of B tensors (k',) or (1, k') of different lengths.
            num_tokens: number of tokens to use, one for all or (B,) int64; default all. A sample with fewer tokens
                uses those it has. `config.missing_tokens` chooses what replaces the others.
            num_steps: steps of the solver.
            guidance: `none`, `cfg` (classifier-free) or `apg` (adaptive projected guidance).
            guidance_scale: a number, 1 for no guidance, or a function of t. It requires `cfg` or `apg`.
            generator: source of the noise: one for the batch, or one for each sample, whose image then does not
                depend on the rest of the batch.
            noise: (B, C, h, w), the state at t = 1, instead of a draw.
            latent_size: (h, w) of the noise to draw; default the training size, `self.latent_size`. Tokens do not
                hold the shape of their image. For H x W pixels give (H / f, W / f), where f is the autoencoder's
                `config.downsampling`.
            solver: `euler` or `heun`.
            guidance_interval: (low, high], the flow times at which to guide; default all, (0, 1).

        Returns:
            (B, 3, H, W) around [-1, 1], not clamped.

        Raises:
            ValueError: an argument does not fit the model.
        """
        vae = self.require_vae()
        options = (num_steps, guidance, guidance_scale, generator, noise, latent_size, solver, guidance_interval)
        latents = self.sample_latents(tokens, num_tokens, *options)
        with full_precision(self.device):
            images = vae.decode(latents)
        return check_finite(images, "the decoded images", DIVERGED)

    def _codes_and_budgets(
        self, tokens: Tensor | Sequence[Tensor], num_tokens: int | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Quantised codes of all images, concatenated, and the number of each, (B,) int64 on the CPU."""
        rows = as_token_batch(tokens)
        budgets = as_budgets(num_tokens, [len(row) for row in rows], self.num_registers)
        kept = [row[:budget] for row, budget in zip(rows, budgets.tolist(), strict=True)]
        flat = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)
        return self.quantizer.tokens_to_codes(flat.to(self.device)), budgets
