"""The flow decoder: noised latents and tokens in, velocity out.

What is special about it:
- Any number of first tokens decodes: learned vectors stand for those that are missing, or for the whole condition.
- All missing tokens of an image cost one position, whatever their number, and each image has a budget of its own.
- Attention is full over patches and tokens; time modulates the two kinds of position separately.
- The last block computes patches only, as the head reads nothing else.

Shapes: B batch, C channels, h x w latent, N patches, K registers, k kept tokens, m = max k of the batch, m' computed
registers, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.config import FlexTokConfig
from flextok_pl.layers.attention import aligned_registers
from flextok_pl.layers.blocks import AdaLNBlock, run_block
from flextok_pl.layers.embeddings import TimeEmbedding, grid_positions, patchify, sincos_position_table, unpatchify
from flextok_pl.layers.norm import layer_norm


class Velocity(NamedTuple):
    """A decoder pass."""

    velocity: Tensor  # (B, C, h, w), noise minus clean latents
    patch_features: Tensor | None  # (B, N, D) patches after block `repa_layer`, where there is one


class AdaLNHead(nn.Module):
    """Modulated LayerNorm and a linear map to the values of a patch."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.proj = nn.Linear(width, out_features)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, out_features)."""
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=-1)
        return self.proj(layer_norm(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class FlowDecoder(nn.Module):
    """Rectified-flow Transformer over noised patches and tokens (FlexTok, section 3.2).

    Tokens beyond an image's budget are replaced by one learned vector without position, and attention is
    full; so all K-k of them are identical at every layer. They are computed ONCE, at the first of their positions,
    whose attention logit as a key is raised by log(K-k): softmax over n equal keys is exp(s + log n). The function
    and its gradients are those of the full sequence, at N+k+1 positions instead of N+K. A dropped condition
    replaces all K tokens by another vector, and is the same trick with k = 0.

    In the baseline `layout="grid"` there are no positions for tokens: each is added to its patch, and so is what
    replaces it.
    """

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        width = config.decoder_width
        registers = config.layout == "registers"
        self.config = config
        self.activation_checkpointing = False
        self.code_embed = nn.Linear(len(config.fsq_levels), width)
        if registers:
            self.register_posemb = nn.Parameter(torch.empty(1, 1, width, config.num_registers))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.null_token = nn.Parameter(torch.empty(width))
        self.patch_embed = nn.Linear(config.latent_channels * config.patch_size**2, width)
        self.patch_posemb = nn.Parameter(
            sincos_position_table(width, config.grid_size, config.position_base), requires_grad=False
        )
        self.time_embed = TimeEmbedding(width, config.time_frequencies, config.max_timestep)
        self.blocks = nn.ModuleList(
            AdaLNBlock(width, config.decoder_head_dim, config.mlp_ratio, registers) for _ in range(config.decoder_depth)
        )
        self.head = AdaLNHead(width, config.latent_channels * config.patch_size**2)

    def forward(
        self,
        x_t: Tensor,  # (B, C, h, w) noised latents
        t: Tensor,  # (B,) float32, 1 being pure noise
        codes: Tensor,  # (B, m, number of FSQ levels) quantised; m = 0 is enough where `null` holds for every sample
        num_tokens: Tensor | None = None,  # (B,) int64 kept tokens, at most m; None keeps all m
        null: Tensor | None = None,  # (B,) bool, True for the unconditional branch; None for nowhere
    ) -> Velocity:
        """Velocity of `x_t` at time `t`."""
        patches = self.patch_embed(patchify(x_t, self.config.patch_size))  # (B, H, W, D)
        grid = patches.shape[1:3]
        patches = (patches + grid_positions(self.patch_posemb, *grid)).flatten(1, 2)  # (B, N, D)
        n = patches.shape[1]
        x, mask = self._sequence(patches, codes, num_tokens, null)
        time = self.time_embed(t)

        features = None
        for i, block in enumerate(self.blocks):
            rows = x[:, :n] if i == len(self.blocks) - 1 else None
            x = run_block(block, self.activation_checkpointing, x, time, n, mask, rows)
            if i == self.config.repa_layer:
                features = x[:, :n]
        patches = self.head(x, time).unflatten(1, grid)  # (B, H, W, p*p*C)
        return Velocity(unpatchify(patches, self.config.patch_size), features)

    def _sequence(
        self, patches: Tensor, codes: Tensor, num_tokens: Tensor | None, null: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the blocks compute for (B, N, D) patches, and its mask, (B, L) or None."""
        if self.config.layout == "grid":
            return patches + self._condition_of_patches(codes, num_tokens, null).to(patches.dtype), None
        n = patches.shape[1]
        registers, counts = self._registers(codes, num_tokens, null, n)
        x = torch.cat([patches, registers.to(patches.dtype)], dim=1)  # (B, N+m', D)
        return x, None if counts is None else F.pad(counts, (n, 0), value=1.0).log()

    def _registers(
        self, codes: Tensor, num_tokens: Tensor | None, null: Tensor | None, num_patches: int
    ) -> tuple[Tensor, Tensor | None]:
        """Register inputs (B, m', D) of mixed budgets, and how many registers each stands for, (B, m').

        That is 1 for a kept token, K-k for the first dropped one, 0 for those behind it. m' is min(m+1, K), on a GPU up
        to 7 more. Or (B, K, D) and None where all K tokens are kept.
        """
        m, total = codes.shape[1], self.config.num_registers
        whole = num_tokens is None and null is None and m == total
        length = m if whole else aligned_registers(num_patches, min(m + 1, total), total, codes.device)
        tokens = self.code_embed(F.pad(codes, (0, 0, 0, length - m)).to(self.code_embed.weight.dtype))
        tokens = tokens + self.register_posemb[0, 0, :, :length].T  # (B, m', D)
        if whole:
            return tokens, None
        kept, merged = self._replacement(codes, num_tokens, null)
        place = torch.arange(length, device=codes.device) - kept[:, None]  # (B, m')
        counts = torch.where(place == 0, total - kept[:, None], place < 0)
        return torch.where(place[..., None] < 0, tokens, merged[:, None].to(tokens.dtype)), counts.float()

    def _condition_of_patches(self, codes: Tensor, num_tokens: Tensor | None, null: Tensor | None) -> Tensor:
        """What the patches of a grid are given, (B, N, D): token i for patch i, or what replaces it; N is K."""
        kept, replacement = self._replacement(codes, num_tokens, null)
        tokens = self.code_embed(codes.to(self.code_embed.weight.dtype))  # (B, m, D)
        tokens = F.pad(tokens, (0, 0, 0, self.config.num_registers - codes.shape[1]))  # (B, N, D)
        visible = torch.arange(self.config.num_registers, device=codes.device) < kept[:, None]  # (B, N)
        return torch.where(visible[..., None], tokens, replacement[:, None])

    def _replacement(self, codes: Tensor, num_tokens: Tensor | None, null: Tensor | None) -> tuple[Tensor, Tensor]:
        """How many tokens of each image are kept, (B,), and the vector (B, D) in place of the others."""
        batch, m = codes.shape[:2]
        kept = torch.full((batch,), m, device=codes.device) if num_tokens is None else num_tokens
        replacement = self.mask_token.expand(batch, -1)
        if null is not None:
            kept = torch.where(null, 0, kept)
            replacement = torch.where(null[:, None], self.null_token, replacement)
        return kept, replacement
