"""Patches, positions and time as vectors.

Shapes: B batch, C channels, h x w latent, p patch side, H x W grid of patches, D width.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flextok_pl.precision import accumulation_dtype, at_least_float32


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """(B, C, h, w) -> (B, H, W, p*p*C); features are ordered (row in patch, column in patch, channel)."""
    return rearrange(latents, "b c (h p) (w q) -> b h w (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, p*p*C) -> (B, C, h, w), the inverse of `patchify`."""
    return rearrange(patches, "b h w (p q c) -> b c (h p) (w q)", p=patch_size, q=patch_size)


def sincos_position_table(width: int, grid_size: tuple[int, int], base: float = 10000.0) -> Tensor:
    """2-D sine-cosine positions (https://arxiv.org/abs/2104.02057, appendix), (1, D, H, W).

    Channels are [sin(row w), cos(row w), sin(column w), cos(column w)] with w_k = base**(-k / (D/4)).
    """
    wide = accumulation_dtype(torch.get_default_device())
    omega = base ** (-torch.arange(width // 4, dtype=wide) / (width // 4))
    rows, columns = (torch.arange(n, dtype=wide)[:, None] * omega for n in grid_size)  # (H, D/4), (W, D/4)
    row_part = torch.cat([rows.sin(), rows.cos()], dim=1).T[:, :, None].expand(-1, -1, grid_size[1])
    column_part = torch.cat([columns.sin(), columns.cos()], dim=1).T[:, None, :].expand(-1, grid_size[0], -1)
    return torch.cat([row_part, column_part])[None].float()


def grid_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """The top-left part of a position table (1, D, H, W): (1, rows, columns, D); ValueError if it is too small."""
    if rows > table.shape[2] or columns > table.shape[3]:
        raise ValueError(
            f"an input of {rows} x {columns} patches is larger than the position table of "
            f"{table.shape[2]} x {table.shape[3]} (grid_size); use smaller images or a model with a larger grid_size"
        )
    return table[:, :, :rows, :columns].permute(0, 2, 3, 1)


def resample_positions(table: Tensor, grid_size: Sequence[int]) -> Tensor:
    """Resample a position table (1, D, H, W) to another grid of the same picture: (1, D, *grid_size), bicubic.

    This is how ViTs are fine-tuned at another size (https://arxiv.org/abs/2010.11929, section 3.2): a finer grid lies
    between the positions that the model knows, not beyond them. A table of this size stays as it is.
    """
    if table.shape[2:] == torch.Size(grid_size):
        return table
    return F.interpolate(table, list(grid_size), mode="bicubic", antialias=True)


def fitted_positions(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights by name, with position tables resampled to the wanted grids, and a note of that, or an empty string."""
    tables = {
        name: resample_positions(table, wanted[name].shape[2:])
        for name, table in given.items()
        if name.endswith("patch_posemb") and name in wanted and wanted[name].shape[2:] != table.shape[2:]
    }
    grids = {f"{list(given[name].shape[2:])} to {list(table.shape[2:])}" for name, table in tables.items()}
    note = f", positions resampled from {' and '.join(sorted(grids))}" if grids else ""
    return {**given, **tables}, note


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the flow time followed by a two-layer MLP (GLIDE, https://arxiv.org/abs/2112.10741).

    The longest period is 256, and t is scaled so that `max_timestep` maps to 1000.
    """

    def __init__(self, width: int, num_frequencies: int, max_timestep: float) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.max_timestep = max_timestep
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def frequencies(self, t: Tensor) -> Tensor:
        """(B,) float32 -> (B, num_frequencies), cosines first."""
        half = self.num_frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        omega = (1000.0 / self.max_timestep) * torch.exp(-math.log(256) * steps / half)
        angles = at_least_float32(t)[:, None] * omega  # (B, half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        frequencies = self.frequencies(t)
        return self.mlp(frequencies.to(next(self.mlp.parameters()).dtype))  # type: ignore[no-any-return]
