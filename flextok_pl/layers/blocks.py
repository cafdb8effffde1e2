"""Pre-norm Transformer blocks, plain and conditioned on time.

What is special about them:
- Norms have no parameters and linear maps no biases; queries and keys are normalised; the MLP is gated.
- Time shifts, scales and gates patches and registers by values of their own, which start at zero.
- A block computes only the rows that its caller needs, which saves most of the last one.
- A compiled block is used for gradients only; without them it runs uncompiled.

Shapes: B batch, L sequence, Q query rows, D width, N patches.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flextok_pl.layers.attention import Attention
from flextok_pl.layers.norm import layer_norm


def run_block(block: nn.Module, checkpointing: bool, *arguments: object) -> Tensor:
    """`block(*arguments)`; with `checkpointing` the backward pass computes it again instead of keeping activations.

    A compiled block runs uncompiled without gradients. Evaluation has other lengths, precisions and masks, single
    images, or one position at a time: each would be compiled anew, and after eight torch compiles no more, in training
    neither.
    """
    if not torch.is_grad_enabled():
        return block._call_impl(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    if checkpointing:
        return checkpoint(block, *arguments, use_reentrant=False)  # type: ignore[no-any-return]
    return block(*arguments)  # type: ignore[no-any-return]


def compile_for_all_lengths(blocks: nn.ModuleList) -> None:
    """`torch.compile` each block in place, once for all lengths, which change with the budgets."""
    for block in blocks:
        block.compile(dynamic=True)


class SwiGLU(nn.Module):
    """Gated MLP fc2(SiLU(fc1 x) * fc3 x) (https://arxiv.org/abs/2002.05202), without biases."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = swiglu_width(width, mlp_ratio)
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.fc3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))  # type: ignore[no-any-return]


def swiglu_width(width: int, mlp_ratio: float) -> int:
    """Hidden width of `SwiGLU`: its three matrices hold about as much as the two of a plain MLP of `mlp_ratio`."""
    return int(2 * int(mlp_ratio * width) / 3)


class Block(nn.Module):
    """Pre-norm block: x + attention, then x + MLP.

    With `rows`, those of `x` that a caller needs, keys and values are of the whole sequence, but queries, projections
    and the MLP are computed for these rows only. They are a tensor, not a slice of `x`: on a GPU Inductor fails on
    changing bounds, in its analysis of memory coalescing (torch 2.11).
    """

    def __init__(self, width: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.mlp = SwiGLU(width, mlp_ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(B, L, D), and (B, Q, D) rows of it or None for all, masked as in `attention` -> (B, Q, D)."""
        h = layer_norm(x)
        queries = h if rows is None else layer_norm(rows)
        x = (x if rows is None else rows) + self.attn(queries, h, mask)
        return x + self.mlp(layer_norm(x))  # type: ignore[no-any-return]


class Modulation(NamedTuple):
    """What a time embedding contributes to one block, for patches and registers apart; each (B, 2, D) or (B, 1, D)."""

    gate_attn: Tensor
    gate_mlp: Tensor
    shift_attn: Tensor
    scale_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor


class AdaLNBlock(nn.Module):
    """`Block` with adaLN-zero (https://arxiv.org/abs/2212.09748), separate for patches and registers.

    Differs from DiT in the order of the six parts: gates first, then shift and scale of either branch.

    Without `registers`, every position is a patch.
    """

    def __init__(self, width: int, head_dim: int, mlp_ratio: float, registers: bool = True) -> None:
        super().__init__()
        self.kinds = 2 if registers else 1
        self.attn = Attention(width, head_dim)
        self.mlp = SwiGLU(width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.kinds * 6 * width))

    def forward(
        self, x: Tensor, time: Tensor, num_patches: int, mask: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """(B, L, D), patches first, and a (B, D) time embedding -> (B, Q, D); `rows` and `mask` as in `Block`."""
        m = Modulation(*self.adaLN_modulation(time).unflatten(-1, (self.kinds, 6, -1)).unbind(2))  # 6 x (B, 2, D)
        h = modulate(layer_norm(x), m.shift_attn, m.scale_attn, num_patches)
        queries = h if rows is None else modulate(layer_norm(rows), m.shift_attn, m.scale_attn, num_patches)
        x = (x if rows is None else rows) + gate(self.attn(queries, h, mask), m.gate_attn, num_patches)
        h = modulate(layer_norm(x), m.shift_mlp, m.scale_mlp, num_patches)
        return x + gate(self.mlp(h), m.gate_mlp, num_patches)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, num_patches: int) -> Tensor:
    """X * (1 + scale) + shift of (B, L, D).

    `shift` and `scale` are (B, 2, D), index 0 for the first N positions and 1 for the others; (B, 1, D) without others.
    """
    patches = torch.addcmul(shift[:, :1], x[:, :num_patches], 1 + scale[:, :1])
    if x.shape[1] == num_patches:
        return patches
    return torch.cat([patches, torch.addcmul(shift[:, 1:], x[:, num_patches:], 1 + scale[:, 1:])], dim=1)


def gate(x: Tensor, factor: Tensor, num_patches: int) -> Tensor:
    """X * factor with one factor for patches and one for registers; shapes as in `modulate`."""
    patches = x[:, :num_patches] * factor[:, :1]
    if x.shape[1] == num_patches:
        return patches
    return torch.cat([patches, x[:, num_patches:] * factor[:, 1:]], dim=1)
