"""The image autoencoder: pixels <-> latents.

`VAE` wraps diffusers' `AutoencoderKL` (the published FlexTok VAE is one, https://arxiv.org/abs/2502.13967, appendix A)
and scales its latents. For tiny images it is also an exact autoencoder without weights.

Shapes: B batch, H x W image, C x h x w latent, f = H / h downsampling.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers  # loads an architecture at its first use: half a second that only some commands pay
import torch
from einops import rearrange
from torch import Tensor

from flextok_pl.config import VAEConfig
from flextok_pl.config.checks import nearest_multiples
from flextok_pl.downloads import Download, HubRepository
from flextok_pl.files import whole_files, write_file
from flextok_pl.interop.autoencoder import read_vae_config, vae_config_from_diffusers, vae_config_to_diffusers
from flextok_pl.interop.hub import PREFETCH, HubId
from flextok_pl.models.arguments import as_images
from flextok_pl.models.publishing import Publishable
from flextok_pl.models.vae_inference import decode, encode
from flextok_pl.precision import outside_autocast, require_float32
from flextok_pl.transfer import send

_LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution


def autoencoder_downloads(path_or_hub_id: str | Path) -> list[Download]:
    """The downloads of `VAE.from_pretrained`."""
    if Path(path_or_hub_id).expanduser().is_dir():
        return []
    weights = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors")
    index = "diffusion_pytorch_model.safetensors.index.json"
    repository, _, revision = str(path_or_hub_id).partition("@")
    return [HubRepository(repository, (weights, ("config.json",), (index,)), revision or None)]


class VAE(Publishable):
    """An image autoencoder with scaled latents: latents = (posterior - shift_factor) * scaling_factor.

    `moments`, `encode` and `decode` compute in float32, also under autocast (but see `precision.frozen_networks_in`).
    `forward` is for training the autoencoder, in the caller's precision. `network`, a diffusers `AutoencoderKL` of the
    configured architecture, replaces a new one with random weights; the kind `pixel` has none.
    """

    config: VAEConfig

    def __init__(self, config: VAEConfig, network: diffusers.AutoencoderKL | None = None) -> None:
        super().__init__()
        self.config = config
        if config.kind == "kl":
            self.vae = network or diffusers.AutoencoderKL(**vae_config_to_diffusers(config))

    @property
    def network(self) -> diffusers.AutoencoderKL:
        """Diffusers' autoencoder of the kind `kl`; state dicts and files call it `vae`, like the official ones."""
        return self.vae

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> VAE:
        """Load a folder written by `save_pretrained` or by diffusers, or a diffusers model from the Hub.

        Raises:
            ValueError: there is no such model, its config is not supported, or its tensors do not fit its config.
        """
        name, revision = str(path_or_hub_id), None
        folder = Path(path_or_hub_id).expanduser()
        source = HubId.parse(name)
        if folder.is_dir():
            config = read_vae_config(folder)  # refuses what is not supported before reading the weights
            if config.kind == "pixel":
                return cls(config)
        elif isinstance(path_or_hub_id, Path) or source is None:
            raise ValueError(
                f"there is no autoencoder folder {name!r}; give a folder, or a Hub id such as 'owner/name' or "
                "'owner/name@revision'"
            )
        else:
            name, revision = source.repository, source.revision
        try:
            network, info = diffusers.AutoencoderKL.from_pretrained(
                str(folder) if folder.is_dir() else name,
                revision=revision,
                use_safetensors=True,  # never unpickle
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError) as error:
            remedy = "" if source is None or folder.is_dir() else f"; without a network, {PREFETCH}"
            raise ValueError(f"cannot load the autoencoder {name!r}: {error}{remedy}") from error
        for kind in ("missing", "unexpected", "mismatched"):
            if keys := sorted(info[f"{kind}_keys"]):
                raise ValueError(f"the autoencoder {name!r} does not fit its config: {kind} tensors {keys[:3]}")
        return cls(vae_config_from_diffusers(network.config), network)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads, and diffusers too for the kind `kl`."""
        folder = Path(folder).expanduser()
        if self.config.kind == "pixel":
            write_file(folder / "config.json", json.dumps(vae_config_to_diffusers(self.config), indent=2) + "\n")
            return
        self.vae.register_to_config(
            scaling_factor=self.config.scaling_factor, shift_factor=self.config.shift_factor or None
        )
        names = [*self.file_names(), "config.json"]
        with whole_files([folder / name for name in names]) as files, TemporaryDirectory(dir=folder) as written:
            self.vae.save_pretrained(written, safe_serialization=True)
            for file, name in zip(files, names, strict=True):
                Path(written, name).replace(file)

    def file_names(self) -> list[str]:
        """The name that diffusers gives its file."""
        return ["diffusion_pytorch_model.safetensors"]

    def save_to_publish(self, folder: Path, format: str, max_shard_size: int | str | None) -> Path:
        """Save the model in a folder, in diffusers' layout."""
        if (format, max_shard_size) != ("ours", None):
            raise ValueError(
                f"format={format!r} and max_shard_size={max_shard_size!r}: an autoencoder has one format and one file"
            )
        if self.config.kind == "pixel":
            raise ValueError("a `pixel` autoencoder has no weights to publish; its config.json is complete")
        self.save_pretrained(folder)
        return folder / self.file_names()[0]

    def rescaled(self, scaling_factor: float, shift_factor: float = 0.0) -> VAE:
        """The same autoencoder with another scaling of the latents; shares its weights."""
        config = dataclasses.replace(self.config, scaling_factor=scaling_factor, shift_factor=shift_factor)
        return VAE(config, self.vae if config.kind == "kl" else None)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the moments (B, 2C, h, w), and a sample of them decoded to (B, 3, H, W)."""
        moments = self._moments(as_images(images, self.config.image_channels))
        return moments, self._decode(self.scale(moments, sample_posterior=True, generator=generator))

    def moments(self, images: Tensor) -> Tensor:
        """The posterior of the latents, unscaled: (B, 3, H, W) in [-1, 1] -> (B, 2C, h, w).

        The first C channels are the mean, the others the log-variance, clamped to [-30, 20] as in diffusers.
        """
        images = as_images(images, self.config.image_channels)
        self._require_float32()
        with outside_autocast(images.device):
            return self._moments(images).float()

    def _moments(self, images: Tensor) -> Tensor:
        factor, (height, width) = self.config.downsampling, images.shape[-2:]
        if height % factor or width % factor or height * width == 0:
            raise ValueError(
                f"images of {height} x {width} pixels do not fit; both sides must be multiples of {factor}: nearest "
                f"are {nearest_multiples(height, factor)} by {nearest_multiples(width, factor)}"
            )
        if self.config.kind == "pixel":
            mean = rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=factor, q=factor)  # (B, 3 f^2, h, w)
            return torch.cat([mean, torch.full_like(mean, _LOG_VARIANCE_RANGE[0])], dim=1)
        mean, log_variance = encode(self.vae, images).chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*_LOG_VARIANCE_RANGE)], dim=1)  # (B, 2C, h, w)

    def scale(
        self, moments: Tensor, sample_posterior: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Scaled latents (B, C, h, w) of a posterior (B, 2C, h, w): its mean or a sample."""
        if moments.ndim != 4 or moments.shape[1] != 2 * self.config.latent_channels:
            raise ValueError(
                f"moments have shape {tuple(moments.shape)}; this autoencoder's are "
                f"(B, {2 * self.config.latent_channels}, h, w): a mean and a log-variance"
            )
        latents, log_variance = moments.chunk(2, dim=1)  # 2 x (B, C, h, w)
        if sample_posterior:
            device = latents.device if generator is None else generator.device
            noise = torch.randn(latents.shape, generator=generator, device=device, dtype=latents.dtype)
            latents = latents + (0.5 * log_variance).exp() * send(noise, latents.device)
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def encode(
        self, images: Tensor, sample_posterior: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) scaled latents; see `moments` and `scale`."""
        return self.scale(self.moments(images), sample_posterior, generator)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) scaled latents -> (B, 3, H, W), not clamped."""
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; this autoencoder's are "
                f"(B, {self.config.latent_channels}, h, w)"
            )
        self._require_float32()
        with outside_autocast(latents.device):
            return self._decode(latents.float()).float()

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.config.scaling_factor + self.config.shift_factor
        if self.config.kind == "pixel":
            factor = self.config.downsampling
            return rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=factor, q=factor)
        return decode(self.vae, latents)

    def _require_float32(self) -> None:
        if self.config.kind == "kl":
            require_float32(self.vae.dtype, "autoencoder")
