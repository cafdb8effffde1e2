"""Multi-head attention, and the masks that FlexTok and its baselines use.

Shapes: B batch, L sequence, Q queries, H heads, D width, d head width, N patches, K registers, k <= K of them.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flextok_pl.layers.norm import layer_norm


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Queries (B, H, Q, d) attend to keys and values (B, H, L, d) -> (B, H, Q, d).

    The mask is (Q, L) bool, True where a query sees a key; or (B, L), added to the logits of each key: one with log(n)
    counts as n equal keys, one with -inf is invisible.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask[:, None, None, :].to(q.dtype).expand(-1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def registers_last_mask(num_patches: int, num_registers: int, causal: bool, device: torch.device) -> Tensor:
    """(N+K, N+K) bool, rows for queries, patches first.

    Patches see patches; register i sees all patches and registers 0..i if `causal`, or else all registers.
    """
    length = num_patches + num_registers
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril()
        visible[:num_patches, :num_patches] = True
    else:
        visible[:num_patches, num_patches:] = False
    return visible


def aligned_registers(num_patches: int, needed: int, limit: int, device: torch.device) -> int:
    """How many registers to compute where `needed` are: with the patches a multiple of 8 positions on a GPU.

    Its attention reads masks in vectors of 8 numbers; at other lengths it takes up to 1.7 times as long: see
    docs/scaling.md.
    """
    return min(needed + -(num_patches + needed) % 8, limit) if device.type == "cuda" else needed


class Attention(nn.Module):
    """Attention without biases, with LayerNorm on q and k and the muP scale 8 / head_dim.

    Source: FlexTok (https://arxiv.org/abs/2502.13967); the scale is muP's (https://arxiv.org/abs/2203.03466)
    and equals the usual head_dim**-0.5 at head_dim 64.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.scale = 8 / head_dim
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def queries_and_keys(self, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries (B, H, Q, d) of `queries` (B, Q, D), and keys (B, H, L, d) of `x` (B, L, D)."""
        q = rearrange(self.wq(queries), "b q (h d) -> b h q d", d=self.head_dim)
        k = rearrange(self.wk(x), "b l (h d) -> b h l d", d=self.head_dim)
        return layer_norm(q), layer_norm(k)

    def forward(self, queries: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from `queries` (B, Q, D) to `x` (B, L, D), masked as in `attention`; returns (B, Q, D)."""
        q, k = self.queries_and_keys(queries, x)
        v = rearrange(self.wv(x), "b l (h d) -> b h l d", d=self.head_dim)
        out = attention(q.to(v.dtype), k.to(v.dtype), v, self.scale, mask)
        return self.proj(rearrange(out, "b h q d -> b q (h d)"))  # type: ignore[no-any-return]
