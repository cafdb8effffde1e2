"""The register encoder: latents in, one code for each kept register out.

- Learned registers, not patches, become tokens, so their number does not depend on the size of the image.
- Registers are ordered: each sees all patches and the registers before it. Patches see patches only.
- The first k codes cost k registers, not K, and each image has its own k. The last block computes registers only.

Shapes: B images, C channels, h x w latent, N patches, K registers, k <= K of them, R codes in all, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.config import FlexTokConfig
from flextok_pl.layers.blocks import Block, run_block
from flextok_pl.layers.embeddings import grid_positions, patchify, sincos_position_table
from flextok_pl.layers.norm import layer_norm
from flextok_pl.layers.packing import Packing, Positions, pack, places, take
from flextok_pl.transfer import send


class CodeLayout(NamedTuple):
    """Which codes of which image to compute. All indices are on the encoder's device."""

    registers: Tensor | None  # int64, which of the K each computed register is; None where patches become tokens
    packing: Packing | None
    codes: Tensor | None  # (R,) int64, the wanted codes among the computed ones; None for all


def code_layout(config: FlexTokConfig, latents: Tensor, num_tokens: Tensor) -> CodeLayout:
    """Lay out the first `num_tokens` codes, (B,) int64 on the CPU, of (B, C, h, w) latents."""
    k, device, batch = config.num_registers, latents.device, len(latents)
    num_patches = config.num_patches(latents.shape[2:])
    owner, place = places(num_tokens)
    if config.layout == "grid":
        return CodeLayout(None, None, send(owner * k + place, device))
    if config.causal_registers:
        return CodeLayout(send(place, device), pack(owner, place, batch, num_patches, k, "earlier", device), None)
    codes = send(owner * k + place, device)
    owner, place = places(torch.full_like(num_tokens, k))
    return CodeLayout(send(place, device), pack(owner, place, batch, num_patches, k, "registers", device), codes)


class RegisterEncoder(nn.Module):
    """ViT whose learned registers read the patches, causally among themselves (FlexTok, section 3.1).

    Register i sees all patches and registers 0..i. In the baselines `causal_registers=False` and `layout="grid"`, codes
    depend on all positions, and k of them cost as much as K.
    """

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        width = config.encoder_width
        self.config = config
        self.activation_checkpointing = False
        self.patch_embed = nn.Linear(config.latent_channels * config.patch_size**2, width)
        self.patch_posemb = nn.Parameter(
            sincos_position_table(width, config.grid_size, config.position_base), requires_grad=False
        )
        if config.layout == "registers":
            self.registers = nn.Parameter(torch.empty(config.num_registers, width))
        self.blocks = nn.ModuleList(
            Block(width, config.encoder_head_dim, config.mlp_ratio) for _ in range(config.encoder_depth)
        )
        self.head = nn.Linear(width, len(config.fsq_levels))

    def forward(self, latents: Tensor, layout: CodeLayout) -> Tensor:
        """Unquantised codes of (B, C, h, w), concatenated image by image: (R, FSQ levels)."""
        patches = self.patch_embed(patchify(latents, self.config.patch_size))  # (B, H, W, D)
        patches = patches + grid_positions(self.patch_posemb, patches.shape[1], patches.shape[2])
        x = Positions(patches.flatten(1, 2), None)
        if layout.registers is not None:
            assert layout.packing is not None
            registers = F.embedding(layout.registers, self.registers).to(patches.dtype)
            x = Positions(x.patches, layout.packing.fill(registers))
        for i, block in enumerate(self.blocks):
            only = "registers" if i == len(self.blocks) - 1 and layout.packing is not None else None
            x = run_block(block, self.activation_checkpointing, x, layout.packing, only)
        if layout.registers is None:
            assert x.patches is not None
            coded = x.patches.flatten(0, 1)
        else:
            assert x.registers is not None
            coded = x.registers[: len(layout.registers)]
        codes = coded if layout.codes is None else take(coded, layout.codes)
        return self.head(layer_norm(codes))  # type: ignore[no-any-return]
