"""The register encoder: latents in, ordered codes out.

What is special about it:
- Learned registers, not the patches, become tokens, so their number does not depend on the size of the image.
- They are ordered: each sees all patches and the registers before it, and patches see patches only.
- The first k codes therefore cost k registers, not K; the last block computes the registers alone.

Shapes: B batch, C channels, h x w latent, N patches, K registers, k <= K of them, D width.
"""

import torch
from torch import Tensor, nn

from flextok_pl.config import FlexTokConfig
from flextok_pl.layers.attention import aligned_registers, registers_last_mask
from flextok_pl.layers.blocks import Block, run_block
from flextok_pl.layers.embeddings import grid_positions, patchify, sincos_position_table
from flextok_pl.layers.norm import layer_norm


class RegisterEncoder(nn.Module):
    """ViT whose learned registers read the patches, causally among themselves (FlexTok, section 3.1).

    Register i sees all patches and registers 0..i. In the baselines `causal_registers=False` and `layout="grid"` codes
    depend on all positions, and k of them save work in the last block only.
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

    def forward(self, latents: Tensor, num_tokens: int | None = None) -> Tensor:
        """The first `num_tokens` codes (default K), unquantised: (B, C, h, w) -> (B, k, number of FSQ levels)."""
        patches = self.patch_embed(patchify(latents, self.config.patch_size))  # (B, H, W, D)
        patches = patches + grid_positions(self.patch_posemb, patches.shape[1], patches.shape[2])
        x, mask, coded = self._sequence(patches.flatten(1, 2), num_tokens or self.config.num_registers)
        for i, block in enumerate(self.blocks):
            rows = None
            if i == len(self.blocks) - 1:
                rows, mask = x[:, coded], None if mask is None else mask[coded]
            x = run_block(block, self.activation_checkpointing, x, mask, rows)
        return self.head(layer_norm(x))  # type: ignore[no-any-return]

    def _sequence(self, patches: Tensor, k: int) -> tuple[Tensor, Tensor | None, slice]:
        """What the blocks compute for (B, N, D) patches, who sees whom, and the rows of the first k codes."""
        if self.config.layout == "grid":
            return patches, None, slice(0, k)
        n = patches.shape[1]
        causal, most = self.config.causal_registers, self.config.num_registers
        length = aligned_registers(n, k, most, patches.device) if causal else most
        registers = self.registers[:length].to(patches.dtype).expand(len(patches), -1, -1)  # (B, K', D)
        mask = registers_last_mask(n, length, causal, patches.device)
        return torch.cat([patches, registers], dim=1), mask, slice(n, n + k)  # (B, N+K', D)
