"""Pre-norm Transformer blocks, plain and conditioned on time.

- Norms have no parameters and linear maps no biases. Queries and keys are normalised. The MLP is gated.
- Time shifts, scales and gates patches and registers with separate values, which start at zero.
- A block computes only the kind of position that its caller needs, which saves most of the last block.
- Compiled blocks serve gradients only; without gradients a block runs uncompiled.

Shapes: B images, N patches of each, R registers in all, D width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flextok_pl.layers.attention import Attention
from flextok_pl.layers.norm import layer_norm
from flextok_pl.layers.packing import Kind, Packing, Positions


def run_block(block: nn.Module, checkpointing: bool, *arguments: object) -> Any:
    """Run `block(*arguments)`; with `checkpointing` the backward pass recomputes it instead of keeping activations.

    Without gradients a compiled block runs uncompiled. Evaluation has other lengths, precisions and masks, and each
    would be compiled again. After eight, torch stops compiling, also for training.
    """
    if not torch.is_grad_enabled():
        return block._call_impl(*arguments)  # type: ignore[no-untyped-call]
    if checkpointing:
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)


def compile_for_all_lengths(blocks: nn.ModuleList) -> None:
    """`torch.compile` each block in place, once for all lengths, because lengths change with the budgets."""
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
    """Hidden width at which the three matrices of `SwiGLU` hold about as much as the two of a plain MLP."""
    return int(2 * int(mlp_ratio * width) / 3)


class Block(nn.Module):
    """Pre-norm block: x + attention, then x + MLP.

    With `only`, keys and values come from all positions, but queries, projections and the MLP are computed for one
    kind.
    """

    def __init__(self, width: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.mlp = SwiGLU(width, mlp_ratio)

    def forward(self, x: Positions, packing: Packing | None = None, only: Kind | None = None) -> Positions:
        """(B, N, D) patches and (R, D) registers -> the same, or `only` one kind."""
        h = x.map(layer_norm)
        x = x.only(only).map(torch.add, self.attn(h.only(only), h, packing))
        return x.map(lambda values: values + self.mlp(layer_norm(values)))


class Modulation(NamedTuple):
    """The part of a time embedding for one block; each field broadcasts over one kind of position."""

    gate_attn: Tensor
    gate_mlp: Tensor
    shift_attn: Tensor
    scale_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor


class AdaLNBlock(nn.Module):
    """`Block` with adaLN-zero (https://arxiv.org/abs/2212.09748), separate for patches and registers.

    The order of the six parts differs from DiT: gates first, then shift and scale of each branch. Without `registers`
    every position is a patch.
    """

    def __init__(self, width: int, head_dim: int, mlp_ratio: float, registers: bool = True) -> None:
        super().__init__()
        self.kinds = 2 if registers else 1
        self.attn = Attention(width, head_dim)
        self.mlp = SwiGLU(width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.kinds * 6 * width))

    def forward(
        self, x: Positions, time: Tensor, packing: Packing | None = None, only: Kind | None = None
    ) -> Positions:
        """Run `Block` with a time embedding, (B, D) or (1, D) for all images."""
        m = self._modulations(time, packing)
        h = x.map(lambda values, m: modulate(layer_norm(values), m.shift_attn, m.scale_attn), m)
        attended = self.attn(h.only(only), h, packing)
        x = x.only(only).map(lambda values, more, m: torch.addcmul(values, more, m.gate_attn), attended, m)
        return x.map(self._add_mlp, m)

    def _modulations(self, time: Tensor, packing: Packing | None) -> tuple[Modulation, Modulation | None]:
        table = self.adaLN_modulation(time).unflatten(-1, (self.kinds, 6, -1))  # (B, kinds, 6, D) or (1, ...)
        patches = Modulation(*table[:, :1].unbind(2))  # 6 x (B, 1, D)
        if packing is None:
            return patches, None
        registers = table[:, 1] if len(table) == 1 else table[:, 1].index_select(0, packing.owner)
        return patches, Modulation(*registers.unbind(1))  # 6 x (R, D)

    def _add_mlp(self, values: Tensor, m: Modulation) -> Tensor:
        h = modulate(layer_norm(values), m.shift_mlp, m.scale_mlp)
        return torch.addcmul(values, self.mlp(h), m.gate_mlp)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """X * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)
