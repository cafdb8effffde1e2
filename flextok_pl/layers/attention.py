"""Multi-head attention, and the attention patterns that FlexTok and its baselines use.

The patterns are functions of (q, k, v), so that a block is the same in the encoder and in the decoder and
no pattern needs a materialised L x L mask.

Shapes: B batch, L sequence, Q queries, H heads, D width, d head width, N patches, K registers, k <= K of them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flextok_pl.layers.norm import layer_norm

AttentionPattern = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q, k, v, scale) -> output; q is (B, H, Q, d), k and v are (B, H, L, d), the output is (B, H, Q, d)."""


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None = None) -> Tensor:
    """Every query attends to every key.

    Args:
        q: (B, H, Q, d).
        k: (B, H, L, d).
        v: (B, H, L, d).
        scale: factor on q . k.
        key_bias: (B, L) added to the logits of each key. A key with bias log(n) counts as n equal keys,
            one with -inf is invisible.
    """
    bias = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype).expand(-1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def registers_last_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, num_patches: int, causal: bool = True
) -> Tensor:
    """Patches attend to patches; register i attends to all patches and to registers 0..i, or to all registers.

    Args:
        q: (B, H, N+K, d), or (B, H, k, d) when only the outputs of the first k registers are wanted.
        k: (B, H, N+K, d), patches first.
        v: (B, H, N+K, d).
        scale: factor on q . k.
        num_patches: N.
        causal: whether registers see no later ones.
    """
    n, whole = num_patches, q.shape[2] == k.shape[2]
    queries = q[:, :, n:] if whole else q
    visible = None
    if causal:
        # Only the registers' rows need a mask, and it has K x (N+K) entries: row i sees N+i+1 keys.
        visible = torch.ones(queries.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(n)
    registers = F.scaled_dot_product_attention(queries, k, v, attn_mask=visible, scale=scale)
    if not whole:
        return registers
    patches = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], scale=scale)
    return torch.cat([patches, registers], dim=2)


class Attention(nn.Module):
    """Attention without biases, with LayerNorm on q and k and the muP scale 8 / head_dim.

    Source: FlexTok (https://arxiv.org/abs/2502.13967); the scale is muP's (https://arxiv.org/abs/2203.03466)
    and equals the usual head_dim**-0.5 at head_dim 64.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, x: Tensor, pattern: AttentionPattern) -> Tensor:
        """Attend from `queries` (B, Q, D) to `x` (B, L, D); returns (B, Q, D)."""
        q = rearrange(self.wq(queries), "b q (h d) -> b h q d", d=self.head_dim)
        k = rearrange(self.wk(x), "b l (h d) -> b h l d", d=self.head_dim)
        v = rearrange(self.wv(x), "b l (h d) -> b h l d", d=self.head_dim)
        out = pattern(layer_norm(q).to(v.dtype), layer_norm(k).to(v.dtype), v, 8 / self.head_dim)
        return self.proj(rearrange(out, "b h q d -> b q (h d)"))  # type: ignore[no-any-return]
