"""Multi-head attention of FlexTok and its baselines, without masks where a kernel allows it.

- Queries and keys are normalised, so each sums to zero over its head. A constant c added to a key, and 1 to all
  queries, therefore adds 8 c to that key's logits. With c = log(n) / 8 a key counts as n equal ones (softmax over n
  equal keys is that of s + log n); with a large negative c it does not count. Flash kernels take no such mask.
- The encoder's patches, which see no register, and its registers are two calls.
- On a GPU in half precision, attention runs on the concatenated sequences of all images. Elsewhere registers are padded
  to (B, M), for attention only.

Shapes: B images, N patches, R registers in all, M the most of an image, H heads, D width, d head width, Q queries,
L keys.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from flextok_pl.layers.norm import layer_norm
from flextok_pl.layers.packing import Packing, Positions, Sequences, both, put, take

SHORT = 256  # keys up to which matrix products train faster on a CPU than its flash kernel (docs/log.md)
UNSEEN = -1000.0  # a key with this constant has logits 8000 below the others', so its weight is exactly 0


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

    def queries(self, x: Tensor) -> Tensor:
        """Normalised queries (..., H, d) of (..., D) positions."""
        return layer_norm(self.wq(x).unflatten(-1, (-1, self.head_dim)))

    def keys(self, x: Tensor) -> Tensor:
        """Normalised keys (..., H, d) of (..., D) positions."""
        return layer_norm(self.wk(x).unflatten(-1, (-1, self.head_dim)))

    def values(self, x: Tensor) -> Tensor:
        """Values (..., H, d) of (..., D) positions."""
        return self.wv(x).unflatten(-1, (-1, self.head_dim))  # type: ignore[no-any-return]

    def forward(self, queries: Positions, x: Positions, packing: Packing | None) -> Positions:
        """Attend from `queries`, which may be of one kind only, to the positions (B, N, D), (R, D) of `x` they see.

        Without `packing` there are patches only.
        """
        q, k, v = queries.map(self.queries), x.map(self.keys), x.map(self.values)
        out = attention(q, k, v, self.scale, packing)
        return out.map(lambda heads: self.proj(heads.flatten(-2)))


def attention(q: Positions, k: Positions, v: Positions, scale: float, packing: Packing | None) -> Positions:
    """`Attention` on queries, keys and values (B, N, H, d) and (R, H, d)."""
    if packing is None or packing.sight != "all":
        patches = q.patches
        if patches is not None:
            assert k.patches is not None and v.patches is not None
            patches = dense_attention(patches, k.patches, v.patches, scale)
        registers = q.registers
        if packing is not None and registers is not None:
            registers = _of_registers(registers, k, v, scale, packing)
        return Positions(patches, registers)
    if packing.log_counts is not None or packing.padded is not None:
        q = q.map(lambda queries: queries + 1)
    if packing.log_counts is not None:
        patches, registers = both(k)
        k = Positions(patches, registers + (packing.log_counts / 8).to(registers.dtype)[:, None, None])
    if packing.sequences is not None:
        return _of_all_end_to_end(q, k, v, scale, packing.sequences)
    queries = q.patches if q.registers is None else _padded(q, packing)
    assert queries is not None
    out = dense_attention(queries, _padded(k, packing, UNSEEN), _padded(v, packing), scale)
    n = both(k)[0].shape[1]
    return Positions(out[:, :n], None if q.registers is None else _unpadded(out[:, n:], packing))


def _of_registers(queries: Tensor, k: Positions, v: Positions, scale: float, packing: Packing) -> Tensor:
    """Attend from registers (R, H, d) to the patches and registers of their image that they see: (R, H, d)."""
    earlier, s = packing.sight == "earlier", packing.sequences
    if s is not None:
        return _end_to_end(queries, s.join(k), s.join(v), s.register_ends, s, scale, earlier)
    rows, keys, mask = _in_rows(queries, packing), _padded(k, packing), None
    if earlier:
        mask = torch.ones(rows.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device)
        mask = mask.tril(keys.shape[1] - rows.shape[1])
    return _unpadded(dense_attention(rows, keys, _padded(v, packing), scale, mask), packing)


def _of_all_end_to_end(q: Positions, k: Positions, v: Positions, scale: float, s: Sequences) -> Positions:
    keys, values = s.join(k), s.join(v)
    if q.registers is None:
        assert q.patches is not None
        out = _end_to_end(q.patches.flatten(0, 1), keys, values, s.patch_ends, s, scale)
        return Positions(out.view_as(q.patches), None)
    return s.split(_end_to_end(s.join(q), keys, values, s.ends, s, scale), like=q)


def _end_to_end(
    q: Tensor, k: Tensor, v: Tensor, query_ends: Tensor, s: Sequences, scale: float, causal: bool = False
) -> Tensor:
    """Queries of sequences that end at `query_ends` attend to all keys of their sequence; `causal` aligns the ends."""
    window = (-1, 0 if causal else -1)
    out = varlen_attn(q, k, v, query_ends, s.ends, s.longest, s.longest, scale=scale, window_size=window)
    assert isinstance(out, Tensor)
    return out


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """(B, Q, H, d) queries attend to (B, L, H, d) keys, where a (Q, L) mask is True: (B, Q, H, d)."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    products = q.device.type == "cpu" and torch.is_grad_enabled() and k.shape[2] <= SHORT
    with sdpa_kernel(SDPBackend.MATH) if products else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _in_rows(registers: Tensor, packing: Packing, fill: float = 0.0) -> Tensor:
    """Registers (R, ...) padded to (B, M, ...)."""
    if packing.padded is not None:
        registers = put(registers, packing.padded, packing.num_images * packing.longest, fill)
    return registers.reshape(packing.num_images, packing.longest, *registers.shape[1:])


def _padded(values: Positions, packing: Packing, fill: float = 0.0) -> Tensor:
    """The positions of each image, (B, N+M, ...)."""
    patches, registers = both(values)
    return torch.cat([patches, _in_rows(registers, packing, fill)], dim=1)


def _unpadded(rows: Tensor, packing: Packing) -> Tensor:
    """The inverse of `_in_rows`."""
    registers = rows.flatten(0, 1)
    return registers if packing.padded is None else take(registers, packing.padded)
