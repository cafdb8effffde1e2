"""The image autoencoder: pixels <-> latents.

A thin wrapper around diffusers' `AutoencoderKL` (the published FlexTok VAE is one,
https://arxiv.org/abs/2502.13967, appendix A) that owns the scaling of the latents, and an exact
autoencoder without weights for tiny images.

Shapes in this file: B batch, H x W image, C x h x w latent, f = H / h downsampling.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers  # which loads an architecture when it is first used: half a second that not every command pays
import torch
from einops import rearrange
from torch import Tensor, nn

from flextok_pl.config import VAEConfig, config_from_dict, config_to_dict
from flextok_pl.files import write_file
from flextok_pl.models.arguments import as_images
from flextok_pl.precision import outside_autocast, require_float32

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_PIXEL_CLASS = "PixelAutoencoder"
_LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution

# What diffusers assumes for keys that a config.json leaves out.
_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": (_DOWN,),
    "up_block_types": (_UP,),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Hints for tiling and mixed precision: they change no weight and no result.
_DIFFUSERS_IGNORED = frozenset({"sample_size", "force_upcast"})


def vae_config_from_diffusers(values: Mapping[str, Any]) -> VAEConfig:
    """Read the contents of any diffusers `AutoencoderKL` config.json.

    Args:
        values: the parsed file. Keys that start with an underscore, `sample_size` and `force_upcast` do
            not change the function and are ignored. A null `scaling_factor` or `shift_factor` claims
            nothing, and becomes 1 or 0.

    Raises:
        ValueError: a key is unknown, or asks for something the wrapper cannot do.
    """
    name = values.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise ValueError(f"_class_name={name!r} is not supported; give the config of an 'AutoencoderKL'")
    given = {key: value for key, value in values.items() if key[:1] != "_" and key not in _DIFFUSERS_IGNORED}
    unknown = sorted(set(given) - set(_DIFFUSERS_DEFAULTS))
    if unknown:
        raise ValueError(f"the autoencoder config has an unknown key {unknown[0]!r}={given[unknown[0]]!r}")
    full = _DIFFUSERS_DEFAULTS | given
    for key in ("in_channels", "out_channels"):
        if full.pop(key) != 3:
            raise ValueError(f"{key}={given[key]} is not supported; images have 3 channels")
    for key in ("latents_mean", "latents_std"):
        if full.pop(key) is not None:
            raise ValueError(f"{key} is not supported: latents are normalised by scaling_factor and shift_factor")
    for key, default in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        if all(block == default for block in full[key]):
            full[key] = ()
    full["scaling_factor"] = 1.0 if full["scaling_factor"] is None else full["scaling_factor"]
    full["shift_factor"] = 0.0 if full["shift_factor"] is None else full["shift_factor"]
    return config_from_dict(VAEConfig, full)


def read_vae_config(folder: Path) -> VAEConfig:
    """The configuration of an autoencoder that this package or diffusers wrote to a folder.

    Raises:
        ValueError: the folder has none, or it is not supported.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no autoencoder: it has no config.json")
    values = json.loads(file.read_text())
    if values.get("_class_name") == _PIXEL_CLASS:
        return config_from_dict(VAEConfig, {k: v for k, v in values.items() if k[0] != "_"})
    return vae_config_from_diffusers(values)


def _autoencoder_kl(config: VAEConfig) -> diffusers.AutoencoderKL:
    levels = len(config.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        if len(getattr(config, name)) not in (0, levels):
            raise ValueError(
                f"{name}={getattr(config, name)} needs {levels} entries, one for each of block_out_channels="
                f"{config.block_out_channels}, or none"
            )
    odd = [width for width in config.block_out_channels if width % config.norm_num_groups]
    if odd:
        raise ValueError(f"block_out_channels={odd[0]} must be a multiple of norm_num_groups={config.norm_num_groups}")
    values = config_to_dict(config)
    del values["kind"]
    values["down_block_types"] = config.down_block_types or (_DOWN,) * levels
    values["up_block_types"] = config.up_block_types or (_UP,) * levels
    values["shift_factor"] = config.shift_factor or None
    return diffusers.AutoencoderKL(in_channels=3, out_channels=3, **values)


class VAE(nn.Module):
    """An image autoencoder with scaled latents: latents = (posterior - shift_factor) * scaling_factor.

    `moments`, `encode` and `decode` compute in float32, also under autocast. `forward` is the pass of its own training,
    and computes as the caller says.

    Args:
        config: architecture and scaling; the weights are random.

    Attributes:
        config: as given.
        vae: diffusers' `AutoencoderKL`; absent for the `pixel` kind, which has no weights.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        if config.kind == "kl":
            self.vae = _autoencoder_kl(config)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> VAE:
        """Load a folder written by `save_pretrained` or by diffusers, or a diffusers model of the Hub.

        Raises:
            ValueError: there is no such folder or model, its config is not supported, or its tensors do
                not fit its config.
        """
        name = str(path_or_hub_id)
        folder = Path(path_or_hub_id).expanduser()
        if folder.is_dir():
            config = read_vae_config(folder)  # says what is not supported before the weights are read
            if config.kind == "pixel":
                return cls(config)
        elif isinstance(path_or_hub_id, Path) or name[:1] in "./~" or name.count("/") != 1:
            raise ValueError(
                f"there is no autoencoder folder {name!r}; give a folder, or a Hub id such as 'owner/name'"
            )
        try:
            network, info = diffusers.AutoencoderKL.from_pretrained(
                str(folder) if folder.is_dir() else name,
                use_safetensors=True,  # never unpickle
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot load the autoencoder {name!r}: {error}") from error
        for kind in ("missing", "unexpected", "mismatched"):
            if keys := sorted(info[f"{kind}_keys"]):
                raise ValueError(f"the autoencoder {name!r} does not fit its config: {kind} tensors {keys[:3]}")
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.config = vae_config_from_diffusers(network.config)
        model.vae = network
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads, and for the `kl` kind diffusers too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.kind == "pixel":
            values = {"_class_name": _PIXEL_CLASS, **config_to_dict(self.config)}
            write_file(folder / "config.json", json.dumps(values, indent=2) + "\n")
            return
        self.vae.register_to_config(
            scaling_factor=self.config.scaling_factor, shift_factor=self.config.shift_factor or None
        )
        self.vae.save_pretrained(str(folder), safe_serialization=True)

    def rescale(self, scaling_factor: float, shift_factor: float = 0.0) -> None:
        """Change the scaling of the latents; the weights stay."""
        self.config = dataclasses.replace(self.config, scaling_factor=scaling_factor, shift_factor=shift_factor)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The pass of a training, in the precision of the caller.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            generator: of the draw from the posterior.

        Returns:
            The moments (B, 2C, h, w), and the images decoded from a sample of that posterior, (B, 3, H, W).
        """
        moments = self._moments(as_images(images))
        return moments, self._decode(self.scale(moments, sample_posterior=True, generator=generator))

    def moments(self, images: Tensor) -> Tensor:
        """The posterior of the latents, unscaled.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, 2C, h, w): the mean, then the log-variance, clamped to [-30, 20] as in diffusers.

        Raises:
            ValueError: `images` has another shape or type, or a side that f does not divide; or the weights are not
                float32.
        """
        images = as_images(images)
        self._require_float32()
        with outside_autocast(images.device):
            return self._moments(images)

    def _moments(self, images: Tensor) -> Tensor:
        factor = self.config.downsampling
        if images.shape[-2] % factor or images.shape[-1] % factor or not images.shape[-2:].numel():
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels do not fit; both sides must be multiples of "
                f"{factor}"
            )
        if self.config.kind == "pixel":
            mean = rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=factor, q=factor)  # (B, 3 f^2, h, w)
            return torch.cat([mean, torch.full_like(mean, _LOG_VARIANCE_RANGE[0])], dim=1)
        mean, log_variance = self.vae._encode(images).chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*_LOG_VARIANCE_RANGE)], dim=1)  # (B, 2C, h, w)

    def scale(
        self, moments: Tensor, sample_posterior: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Scaled latents of a posterior.

        Args:
            moments: (B, 2C, h, w) from `moments`.
            sample_posterior: draw from the posterior instead of taking its mean.
            generator: of that draw.

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: `moments` has another number of channels.
        """
        if moments.ndim != 4 or moments.shape[1] != 2 * self.config.latent_channels:
            raise ValueError(
                f"moments have shape {tuple(moments.shape)}; this autoencoder's are "
                f"(B, {2 * self.config.latent_channels}, h, w): a mean and a log-variance"
            )
        latents, log_variance = moments.chunk(2, dim=1)  # 2 x (B, C, h, w)
        if sample_posterior:
            device = latents.device if generator is None else generator.device
            noise = torch.randn(latents.shape, generator=generator, device=device, dtype=latents.dtype)
            latents = latents + (0.5 * log_variance).exp() * noise.to(latents.device)
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def encode(
        self, images: Tensor, sample_posterior: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) scaled latents; see `moments` and `scale`."""
        return self.scale(self.moments(images), sample_posterior, generator)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) scaled latents -> (B, 3, H, W), not clamped.

        Raises:
            ValueError: `latents` has another number of channels, or the weights are not float32.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; this autoencoder's are "
                f"(B, {self.config.latent_channels}, h, w)"
            )
        self._require_float32()
        with outside_autocast(latents.device):
            return self._decode(latents.float())

    def _decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.config.scaling_factor + self.config.shift_factor
        if self.config.kind == "pixel":
            factor = self.config.downsampling
            return rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=factor, q=factor)
        images: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return images

    def _require_float32(self) -> None:
        if self.config.kind == "kl":
            require_float32(self.vae.dtype, "autoencoder")
