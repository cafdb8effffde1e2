"""Tokenize and reconstruct pictures of any size: `reconstruct`, `tokenize_picture`.

A picture is resized to the nearest of the tokenizer's training shapes, and the decoded image is resized back to its
aspect. A large picture can be cut into overlapping tiles instead, each with its own tokens. The tiles are decoded
together and averaged where they overlap at every step of the flow, as in MultiDiffusion
(https://arxiv.org/abs/2302.08113), so there are no seams. A single image is one tile.

Shapes: C channels, H x W picture, n tiles of a x b pixels, K tokens of each; c latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_pl.models.arguments import IMAGE_LIMIT, as_images, check_image_values
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.precision import full_precision

AT_A_TIME = 64
"""Number of tiles that the autoencoder encodes or decodes in one call."""


@dataclass(frozen=True)
class Tiling:
    """Positions of tiles on a canvas. All lengths are in latent positions, or in pixels after `scaled`."""

    canvas: tuple[int, ...]  # height and width
    tile: tuple[int, ...]
    rows: tuple[int, ...]  # first row of each tile
    columns: tuple[int, ...]
    ramp: tuple[int, ...]  # length over which the weight of a tile rises from its edge

    def scaled(self, factor: int) -> Tiling:
        """The same tiling in a unit that is smaller by this factor."""
        times = partial(_times, factor)
        return Tiling(*map(times, (self.canvas, self.tile, self.rows, self.columns, self.ramp)))

    @property
    def places(self) -> list[tuple[slice, slice]]:
        """The part of the canvas under each tile."""
        height, width = self.tile
        return [(slice(y, y + height), slice(x, x + width)) for y in self.rows for x in self.columns]

    def cut(self, canvas: Tensor) -> Tensor:
        """(C, H, W) -> (n, C, a, b)."""
        return torch.stack([canvas[:, rows, columns] for rows, columns in self.places])

    def blend(self, tiles: Tensor) -> Tensor:
        """(n, C, a, b) -> (C, H, W), the mean of the tiles at each position, weighted by distance from their edge."""
        height, width = (_weights(side, ramp).to(tiles) for side, ramp in zip(self.tile, self.ramp, strict=True))
        weight = height[:, None] * width
        total, weights = tiles.new_zeros(tiles.shape[1], *self.canvas), tiles.new_zeros(self.canvas)
        for tile, (rows, columns) in zip(tiles, self.places, strict=True):
            total[:, rows, columns] += weight * tile
            weights[rows, columns] += weight
        return total / weights

    def agreeing(self, tiles: Tensor) -> Tensor:
        """Average (n, C, a, b) tiles where they overlap; a single tile stays as it is."""
        return self.cut(self.blend(tiles)) if len(tiles) > 1 else tiles


def _times(factor: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(factor * length for length in lengths)


def _weights(side: int, ramp: int) -> Tensor:
    """(side,) weights in (0, 1]: a raised cosine over `ramp` positions from either edge, 1 between."""
    place = torch.arange(side) + 0.5
    from_edge = torch.minimum(place, side - place) / max(ramp, 0.5)
    return (from_edge.clamp(max=1.0) * (math.pi / 2)).sin().square()


def _starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """First positions of the fewest evenly spread tiles that cover a length and overlap at least this much."""
    count = 1 + math.ceil((length - tile) / (tile - overlap))
    return tuple(round(i * (length - tile) / max(1, count - 1)) for i in range(count))


@dataclass(frozen=True)
class TokenizedPicture:
    """Tokens of a picture of any size, made by `tokenize_picture`."""

    tokens: Tensor  # (n, K) int64
    picture: Tensor  # (C, H, W), the picture that `decode` reconstructs, in its own aspect
    tiling: Tiling  # of the latents

    def decode(self, tok: FlexTok, num_tokens: int | None = None, seed: int = 0, **decoding: Any) -> Tensor:
        """Reconstruct the picture from the first `num_tokens` tokens of each tile: (C, H, W) around [-1, 1], unclamped.

        `decoding` takes the steps and guidance of `FlexTok.detokenize`.
        """
        vae, tiling = tok.require_vae(), self.tiling
        generator = torch.Generator().manual_seed(seed)
        canvas = torch.randn(1, vae.config.latent_channels, *tiling.canvas, generator=generator)[0]
        noise = tiling.cut(canvas)
        latents = tok.sample_latents(self.tokens, num_tokens, noise=noise, join=tiling.agreeing, **decoding)
        with torch.no_grad(), full_precision(tok.device):
            made = torch.cat([vae.decode(part) for part in torch.split(latents, AT_A_TIME)])  # (n, C, a, b)
            whole = tiling.scaled(vae.config.downsampling).blend(made) if len(made) > 1 else made[0]
        height, width = size = self.picture.shape[1:]
        return _resized(whole, size) if len(made) == 1 else whole[:, :height, :width]


def tokenize_picture(tok: FlexTok, picture: Tensor, tiled: bool = False, overlap: float = 0.25) -> TokenizedPicture:
    """Tokenize a picture (C, H, W) in [-1, 1] of any size.

    Args:
        tok: a tokenizer with an autoencoder.
        picture: the picture.
        tiled: cut a picture that is larger than the tokenizer's images into tiles, without resizing it.
        overlap: least overlap of neighbouring tiles, as a share of their side.

    Raises:
        ValueError: an option is out of range, or the picture is empty or not around [-1, 1].
    """
    vae = tok.require_vae().config
    picture = as_images(picture[None], vae.image_channels)[0].to(tok.device)
    check_image_values(picture)
    height, width = picture.shape[1:]
    if min(height, width) < 1:
        raise ValueError(f"picture has shape {tuple(picture.shape)}; it must have at least one pixel")
    if not 0 <= overlap <= 0.5:
        raise ValueError(f"overlap={overlap} must be a share of a tile's side in [0, 0.5]")
    shapes = [tuple(side * tok.config.patch_pixels for side in grid) for grid in tok.config.grids]
    tile = shapes[0]
    if not tiled or (height <= tile[0] and width <= tile[1]):
        tile = min(shapes, key=partial(_distance, (height, width)))
        image, picture = _resized(picture, tile).clamp(-IMAGE_LIMIT, IMAGE_LIMIT), _fitted(picture, tile)
    else:
        image = picture
    factor, own = vae.downsampling, tuple(side // vae.downsampling for side in tile)
    canvas = tuple(max(-(-length // factor), side) for length, side in zip(picture.shape[1:], own, strict=True))
    least = tuple(round(overlap * side) for side in own)
    starts = [_starts(*each) for each in zip(canvas, own, least, strict=True)]
    tiling = Tiling(canvas, own, starts[0], starts[1], least)
    image = _with_repeated_edge(image, _times(factor, canvas))
    tiles = tiling.scaled(factor).cut(image)
    tokens = torch.cat([tok.tokenize(part) for part in torch.split(tiles, AT_A_TIME)])
    return TokenizedPicture(tokens, picture, tiling)


def reconstruct(
    tok: FlexTok,
    picture: Tensor,
    num_tokens: int | None = None,
    tiled: bool = False,
    overlap: float = 0.25,
    seed: int = 0,
    **decoding: Any,
) -> Tensor:
    """Reconstruct a picture (C, H, W) in [-1, 1] of any size from its tokens: (C, H, W) of the same size, unclamped.

    Args:
        tok: a tokenizer with an autoencoder.
        picture: the picture.
        num_tokens: number of first tokens to use, of each tile; default all.
        tiled: see `tokenize_picture`.
        overlap: see `tokenize_picture`.
        seed: seed of the noise.
        **decoding: steps and guidance of `FlexTok.detokenize`.

    Raises:
        ValueError: an argument does not fit the model.
    """
    made = tokenize_picture(tok, picture, tiled, overlap).decode(tok, num_tokens, seed, **decoding)
    return made if made.shape == picture.shape else _resized(made, picture.shape[1:])


def _distance(size: tuple[int, int], shape: tuple[int, ...]) -> float:
    """Distance of a shape from a size, in aspect first, then in scale."""
    height, width = (math.log(side / length) for side, length in zip(shape, size, strict=True))
    return abs(height - width) + 0.1 * abs(height + width)


def _fitted(picture: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize a picture in its own aspect, as large as a size allows."""
    scale = min(side / length for side, length in zip(size, picture.shape[1:], strict=True))
    return _resized(picture, [max(1, round(length * scale)) for length in picture.shape[1:]])


def _resized(picture: Tensor, size: Sequence[int]) -> Tensor:
    if picture.shape[1:] == torch.Size(size):
        return picture
    return F.interpolate(picture[None], list(size), mode="bicubic", antialias=True)[0]


def _with_repeated_edge(picture: Tensor, size: tuple[int, ...]) -> Tensor:
    """Put (C, H, W) in the top-left corner of a larger size."""
    bottom, right = (side - length for side, length in zip(size, picture.shape[1:], strict=True))
    return F.pad(picture[None], (0, right, 0, bottom), mode="replicate")[0] if bottom or right else picture
