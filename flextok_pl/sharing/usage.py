"""Writes the code of a model card, which loads and uses the model."""

from __future__ import annotations

from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.interop.hub import HubId

UNKNOWN_TOKENIZER = "OWNER/TOKENIZER"


def usage(address: str, config: FlexTokConfig | PriorConfig | VAEConfig) -> str:
    """Python that runs as it is, except for the name of a prior's tokenizer if that is not recorded."""
    if isinstance(config, PriorConfig):
        lines = _prior(address, config)
    elif isinstance(config, FlexTokConfig):
        lines = _tokenizer(address, config)
    else:
        lines = _autoencoder(address, config)
    return "With the package `flextok_pl`:\n\n```python\nimport torch\n" + "\n".join(lines) + "\n```"


def _tokenizer(address: str, config: FlexTokConfig) -> list[str]:
    few, most = max(1, config.num_registers // 4), config.num_registers
    load = ["from flextok_pl import FlexTok", "", f'tok = FlexTok.from_pretrained("{address}")']
    if config.vae is None:
        channels, (rows, columns) = config.latent_channels, config.grids[0]
        size = f"{rows * config.patch_size}, {columns * config.patch_size}"
        return [
            *load,
            f"latents = torch.randn(1, {channels}, {size})  # yours: (B, {channels}, h, w), scaled",
            f"tokens = tok.tokenize_latents(latents)  # (B, {most}) int64",
            f"again = tok.sample_latents(tokens, num_tokens={few})  # from the first {few} tokens",
        ]
    channels, side = config.vae.image_channels, config.patch_pixels
    height, width = (side * patches for patches in config.grids[0])
    return [
        *load,
        f"images = torch.rand(1, {channels}, {height}, {width}) * 2 - 1  # yours: (B, {channels}, H, W) in [-1, 1]",
        f"tokens = tok.tokenize(images)  # (B, {most}) int64, ordered",
        f"again = tok.detokenize(tokens, num_tokens={few}).clamp(-1, 1)  # from the first {few} tokens",
    ]


def _prior(address: str, config: PriorConfig) -> list[str]:
    text = config.text_width is not None
    known = f"  # the one whose weights have the hash {config.tokenizer}" if config.tokenizer else ""
    tokenizer = config.tokenizer_id if HubId.parse(config.tokenizer_id) else UNKNOWN_TOKENIZER
    lines = ["from flextok_pl import FlexTok, Prior"]
    if text:
        lines.append("from flextok_pl.models.text import TextEncoder")
    lines += [
        "",
        f'prior = Prior.from_pretrained("{address}")',
        f'tok = FlexTok.from_pretrained("{tokenizer}"){known}',
    ]
    if text:
        pad = "" if config.text_mask else ", pad=True"
        lines.append(f'encoder = TextEncoder("{config.text_encoder}", {config.text_length}{pad})')
        lines.append('condition = encoder(["a red apple"])')
    elif config.num_classes:
        shown = f"  # {', '.join(config.class_names[:2])}" if config.class_names else ""
        lines.append(f"condition = torch.tensor([0, {min(1, config.num_classes - 1)}]){shown}")
    given = "condition, cfg_scale=1.5, " if text or config.num_classes else ""
    return [
        *lines,
        f"tokens = prior.generate({given}generator=torch.Generator().manual_seed(0))  # (B, {config.num_tokens}) int64",
        "images = tok.detokenize(tokens).clamp(-1, 1)  # (B, 3, H, W); num_tokens takes fewer",
    ]


def _autoencoder(address: str, config: VAEConfig) -> list[str]:
    channels, side = config.image_channels, 8 * config.downsampling
    return [
        "from flextok_pl import VAE",
        "",
        f'vae = VAE.from_pretrained("{address}")',
        f"images = torch.rand(1, {channels}, {side}, {side}) * 2 - 1  # yours: (B, {channels}, H, W) in [-1, 1]",
        f"latents = vae.encode(images)  # (B, {config.latent_channels}, h, w)",
        "again = vae.decode(latents).clamp(-1, 1)",
    ]
