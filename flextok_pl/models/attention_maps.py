"""Measure how much attention the decoder's patches pay to each token, by block and flow time.

Shapes: B batch, N patches, K registers, L = N + K, H heads, d head width, D width, T flow times, M blocks.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flextok_pl.flow.rectified import interpolate
from flextok_pl.layers.packing import both
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.precision import full_precision


@torch.no_grad()
def register_attention(
    tok: FlexTok, images: Tensor, times: Sequence[float] = (0.9, 0.5, 0.1), generator: torch.Generator | None = None
) -> Tensor:
    """Share of the patches' attention that each token gets in each block, with all K tokens kept.

    Takes a tokenizer with an autoencoder, (B, 3, H, W) images in [-1, 1], and T flow times at which to noise their
    latents; 1 is pure noise. Returns (T, M, K) float32 on the CPU: means over images, heads and patches. Each row sums
    up to 1 minus the share of the patches.
    """
    if tok.config.layout == "grid":
        raise ValueError(
            "layout='grid' adds tokens to patches, so no attention goes to a token; use a tokenizer of registers"
        )
    regression = tok.config.objective == "mse"
    if regression and any(t != 1 for t in times):
        raise ValueError(f"times={list(times)}: a decoder with objective='mse' takes t = 1 only; give times=[1.0]")
    if not all(0 <= t <= 1 for t in times):
        raise ValueError(f"times={list(times)} must be in [0, 1]")
    latents = tok.encode_latents(images)
    with full_precision(tok.device):
        codes = tok.quantizer(tok.encode(latents))  # (B, K, number of FSQ levels)
    noise = torch.zeros_like(latents) if regression else torch.randn(latents.shape, generator=generator).to(latents)
    shares: list[Tensor] = []
    num_registers = codes.shape[1]

    def look(module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        queries, x, _ = arguments
        patches, registers = both(x.map(module.keys))  # (B, N, H, d), (B K, H, d)
        k = torch.cat([patches, registers.view(len(latents), -1, *registers.shape[1:])], dim=1)
        logits = torch.einsum("bnhd,blhd->bhnl", module.queries(queries.patches).float(), k.float())
        attention = (logits * module.scale).softmax(-1)  # (B, H, N, L)
        shares.append(attention[..., -num_registers:].mean((0, 1, 2)))

    hooks = [cast(Any, block).attn.register_forward_hook(look) for block in tok.decoder.blocks]
    try:
        for t in times:
            time = torch.full((len(latents),), t, device=latents.device)
            with full_precision(tok.device):
                tok.velocity(interpolate(latents, noise, time), time, codes)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(shares).reshape(len(times), -1, num_registers).cpu()
