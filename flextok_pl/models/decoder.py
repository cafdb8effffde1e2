"""The flow decoder: noised latents and tokens in, velocity out.

- It decodes any number of first tokens. Learned vectors replace missing tokens, or the whole condition.
- All missing tokens of an image cost one position. Each image has its own budget and pays for no other's.
- Attention is full over patches and tokens. Time modulates patches and tokens separately.
- The last block computes patches only, because the head reads nothing else.

Shapes: B images, C channels, h x w latent, N patches, K registers, k kept tokens of an image and T in all, D width.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.config import FlexTokConfig
from flextok_pl.flow.decoding import GuidedField
from flextok_pl.layers.blocks import AdaLNBlock, run_block
from flextok_pl.layers.embeddings import TimeEmbedding, grid_positions, patchify, sincos_position_table, unpatchify
from flextok_pl.layers.norm import layer_norm
from flextok_pl.layers.packing import Packing, Positions, pack, places
from flextok_pl.models.routing import Route
from flextok_pl.transfer import send


class Velocity(NamedTuple):
    """Output of a decoder pass."""

    velocity: Tensor  # (B, C, h, w), noise minus clean latents
    patch_features: Tensor | None  # (B, N, D) patches after block `repa_layer`, if there is one


class TokenLayout(NamedTuple):
    """Which tokens each image keeps, and what replaces the others. All indices are on the decoder's device."""

    packing: Packing | None  # of kept tokens, then of replacements; None where tokens are added to patches
    places: Tensor  # (T,) int64, the place of each kept token among the K of its image
    patches: Tensor | None  # (T,) int64, the patch that each token is added to, among those of all images
    replacements: Tensor  # int64, 0 for the mask token, 1 for the null token: of images with missing tokens, or of all
    route: Route | None = None  # of patches around middle blocks, in training


def token_layout(
    config: FlexTokConfig,
    latents: Tensor,  # (B, C, h, w)
    num_tokens: Tensor,  # (B,) int64 on the CPU, in 0..K: number of first tokens to decode
    null: Tensor | None = None,  # (B,) bool, images of 0 tokens without a condition; None if all have one
    route: Route | None = None,
) -> TokenLayout:
    """Lay out the first `num_tokens` tokens of each image for decoding."""
    k, device, batch = config.num_registers, latents.device, len(latents)
    num_patches = config.num_patches(latents.shape[2:])
    owner, place = places(num_tokens)
    replacements = torch.zeros_like(num_tokens) if null is None else null.long()
    if config.layout == "grid":
        return TokenLayout(
            None, send(place, device), send(owner * k + place, device), send(replacements, device), route
        )
    lacking = (num_tokens < k).nonzero().flatten()
    counts = torch.cat([torch.ones_like(owner), k - num_tokens[lacking]])
    owners, within = torch.cat([owner, lacking]), torch.cat([place, num_tokens[lacking]])
    packing = pack(owners, within, batch, num_patches, k, "all", device, counts)
    if route is not None:
        kept = route.routing.kept(num_patches)
        route = route._replace(packing=pack(owners, within, batch, kept, k, "all", device, counts))
    return TokenLayout(packing, send(place, device), None, send(replacements[lacking], device), route)


class AdaLNHead(nn.Module):
    """Modulated LayerNorm, then a linear map to the values of a patch."""

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

    One learned vector without position replaces all tokens beyond an image's budget. Attention is full, so these K-k
    tokens stay identical at every layer. They are computed once, at the first of their positions, whose attention
    logit as a key is raised by log(K-k): softmax over n equal keys is exp(s + log n). The function and its gradients
    equal those of the full sequence, at N+k+1 positions instead of N+K. A dropped condition replaces all K tokens by
    another vector: the same with k = 0.

    With `layout="grid"` tokens have no positions: each token, or its replacement, is added to its patch.
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
        if config.missing_tokens == "mask":
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
        t: Tensor,  # (B,) float32, or (1,) for all images; 1 is pure noise
        codes: Tensor,  # (T or more, FSQ levels) quantised, those of an image after those of the one before
        layout: TokenLayout,
    ) -> Velocity:
        """Velocity of `x_t` at time `t`."""
        patches = self.patch_embed(patchify(x_t, self.config.patch_size))  # (B, H, W, D)
        grid = patches.shape[1:3]
        patches = (patches + grid_positions(self.patch_posemb, *grid)).flatten(1, 2)  # (B, N, D)
        x = self._with_tokens(patches, codes, layout)
        time = self.time_embed(t)

        features, route, before = None, layout.route, x
        for i, block in enumerate(self.blocks):
            only = "patches" if i == len(self.blocks) - 1 else None
            packing = layout.packing if route is None or not route.covers(i) else route.packing
            if route is not None and i == route.routing.first:
                before, x = x, route.leave(x)
            x = run_block(block, self.activation_checkpointing, x, time, packing, only)
            if route is not None and i == route.routing.last:
                x = route.join(x, before)
            if i == self.config.repa_layer:
                features = x.patches
        assert x.patches is not None
        values = self.head(x.patches, time).unflatten(1, grid)  # (B, H, W, p*p*C)
        return Velocity(unpatchify(values, self.config.patch_size), features)

    def _with_tokens(self, patches: Tensor, codes: Tensor, layout: TokenLayout) -> Positions:
        """The positions that the blocks compute for (B, N, D) patches."""
        # All codes are embedded, even if no image keeps one, so that all parameters have gradients.
        tokens = self.code_embed(codes.to(self.code_embed.weight.dtype))[: len(layout.places)]  # (T, D)
        replacements = F.embedding(layout.replacements, torch.stack([self._missing_token(), self.null_token]))
        if layout.packing is None:
            assert layout.patches is not None
            flat = replacements.to(patches.dtype).repeat_interleave(patches.shape[1], 0)  # (B N, D)
            flat = flat.index_copy(0, layout.patches, tokens.to(patches.dtype))
            return Positions(patches + flat.view_as(patches), None)
        tokens = tokens + F.embedding(layout.places, self.register_posemb[0, 0].T)
        registers = torch.cat([tokens, replacements.to(tokens.dtype)]).to(patches.dtype)
        return Positions(patches, layout.packing.fill(registers))

    def _missing_token(self) -> Tensor:
        """The vector of a token beyond the budget, (D,)."""
        if self.config.missing_tokens == "mask":
            return self.mask_token
        lowest = self.null_token.new_full((len(self.config.fsq_levels),), -1.0)  # the code of token 0
        return self.code_embed(lowest).to(self.null_token.dtype)  # type: ignore[no-any-return]


def guided_field(
    decoder: FlowDecoder,
    codes: Tensor,  # (T or more, FSQ levels) quantised, those of an image after those of the one before
    num_tokens: Tensor,  # (B,) int64 on the CPU, the number of tokens of each image
    latents: Tensor,  # (B, C, h, w), of the shape and on the device of those to decode
) -> GuidedField:
    """The velocity given the tokens and, on request, without them, of the same states in one pass."""

    @cache
    def layout(guided: bool) -> TokenLayout:
        if not guided:
            return token_layout(decoder.config, latents, num_tokens)
        halves = torch.cat([num_tokens, torch.zeros_like(num_tokens)])
        return token_layout(decoder.config, torch.cat([latents, latents]), halves, halves == 0)

    def field(x: Tensor, t: float, guided: bool) -> tuple[Tensor, Tensor | None]:
        time = x.new_full((1,), t)
        if not guided:
            return decoder(x, time, codes, layout(False)).velocity, None
        conditional, unconditional = decoder(torch.cat([x, x]), time, codes, layout(True)).velocity.chunk(2)
        return conditional, unconditional

    return field
