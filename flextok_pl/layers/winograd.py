"""3x3 convolutions with a quarter of the multiplications, for inference on a CPU.

- Winograd's minimal filtering (https://arxiv.org/abs/1509.09308): the 4 x 4 outputs of a tile are sums of 36 products
  instead of 144 in a direct convolution. Inputs and kernels are transformed, multiplied as 36 matrices, and gathered.
- The filtering evaluates at 0, ±2/3, ±3/2 and infinity. In float32 the error is no larger than a direct convolution's;
  at the usual points, 0, ±1, ±2 and infinity, it is four times as large.
- After nearest-neighbour upsampling, 4 x 4 outputs come from 4 x 4 positions, and the upsampled image is never made.
- Transforms are sums of slices, because products with such small matrices do not use several cores well. They work in
  place, in memory that is allocated once: fresh memory costs more than computing on it.

Nothing is kept between calls, so weights may change at any time. There are no gradients.

Shapes: B images of H x W positions, C channels in and D out, T tiles. Channels are last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS_PER_CORE = 2**20
"""Transformed numbers at a time and per core: few enough for its cache, enough for large products."""

FEWEST_CHANNELS, FEWEST_POSITIONS = 128, 512
"""Channels, in and out, and positions of an image from which it beats a direct convolution (AMD EPYC with AVX-512)."""

_P, _Q = 2 / 3, 3 / 2  # the finite points except 0 and the negatives; P Q = 1


class Workspace:
    """Memory on one device and of one type, allocated by name and reused."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Get memory of this shape. Its contents stay until the same name is taken again."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self._like.new_empty(size)
        return self._memory[name][:size].view(shape)


@dataclass(frozen=True)
class Filtering:
    """How four outputs in a row come from six products; both axes of an image are treated alike.

    Args:
        size: positions of the input that a tile reads.
        stride: positions of the input from one tile to the next.
        kernel: rows of the three taps that make one factor of each product.
        spread: writes the other factors (6, ...) from the positions (size, ...).
        gather: adds the sums of products (6, ...), which it overwrites, to the outputs (4, ...).
    """

    size: int
    stride: int
    kernel: tuple[tuple[float, float, float], ...]
    spread: Callable[[Tensor, Tensor], None]
    gather: Callable[[Tensor, Tensor], None]

    def transformed(self, weight: Tensor, workspace: Workspace) -> Tensor:
        """(D, C, 3, 3) -> (36, C, D), one matrix for each product of a tile."""
        outputs, inputs = weight.shape[:2]
        both_sides = [[a * b for a in row for b in column] for row in self.kernel for column in self.kernel]
        taps = weight.reshape(outputs * inputs, 9).T
        kernels = workspace.take("kernels", 36, outputs * inputs)
        torch.mm(weight.new_tensor(both_sides), taps, out=kernels)  # (36, 9) (9, D C)
        return kernels.view(36, outputs, inputs).transpose(1, 2)


def _spread(d: Tensor, v: Tensor) -> None:
    """Apply to the positions the polynomials that vanish at all points except one."""
    torch.add(d[0:2], d[4:6], out=v[0::5])
    v[0::5].sub_(d[2:4], alpha=_P**2 + _Q**2)  # at 0 and infinity
    for place, point, other in ((1, _P, _Q), (3, _Q, _P)):
        torch.sub(d[3:5], d[1:3], alpha=other**2, out=v[place : place + 2])  # odd and even powers
        torch.add(v[place + 1], v[place], alpha=point, out=v[place])  # at the point
        torch.sub(v[place], v[place + 1], alpha=2, out=v[place + 1])  # at its opposite, with the other sign


def _gather(m: Tensor, y: Tensor) -> None:
    """Sum powers 0 to 3 of the points, each times its product."""
    at, opposite = m[1:5:2], m[2:6:2]
    at.sub_(opposite)  # even powers
    torch.add(at, opposite, alpha=2, out=opposite)  # odd powers
    y[0].add_(m[0]).add_(m[1], alpha=_Q).add_(m[3], alpha=_P)
    y[1].add_(m[2]).add_(m[4])
    y[2].add_(m[1], alpha=_P).add_(m[3], alpha=_Q)
    y[3].add_(m[2], alpha=_P**2).add_(m[4], alpha=_Q**2).add_(m[5])


def _kernel() -> tuple[tuple[float, float, float], ...]:
    """The taps as a polynomial at each point, divided by the value of `_spread` there, times the point's size."""
    rows = []
    for point, other in ((_P, _Q), (_Q, _P)):
        scale = point / (2 * point**2 * (point**2 - other**2))
        rows += [(scale, sign * scale * point, scale * point**2) for sign in (1, -1)]
    return (1.0, 0.0, 0.0), *rows, (0.0, 0.0, 1.0)


def _spread_upsampled(d: Tensor, v: Tensor) -> None:
    v[1::3].copy_(d[1:3])
    torch.sub(d[0], d[1], out=v[0])
    torch.sub(d[2], d[1], out=v[2])
    torch.sub(d[1], d[2], out=v[3])
    torch.sub(d[3], d[2], out=v[5])


def _gather_upsampled(m: Tensor, y: Tensor) -> None:
    y[0::2].add_(m[0:2]).add_(m[1:3])
    y[1::2].add_(m[3:5]).add_(m[4:6])


SAME = Filtering(6, 4, _kernel(), _spread, _gather)
"""A convolution with stride 1: F(4, 3)."""

_UPSAMPLED_KERNEL = ((1, 0, 0), (1, 1, 1), (0, 1, 1), (1, 1, 0), (1, 1, 1), (0, 0, 1))
UPSAMPLED = Filtering(4, 2, _UPSAMPLED_KERNEL, _spread_upsampled, _gather_upsampled)
"""A convolution of the image at twice its height and width: F(2, 2) for even and for odd outputs."""


def serves(weight: Tensor, height: int, width: int) -> bool:
    """Check that `add_convolution` takes H x W outputs and weights (D, C, 3, 3), and is faster than a direct one.

    The number of images does not matter, so that an image's result does not depend on the others.
    """
    fits = weight.shape[2:] == (3, 3) and height % 4 == width % 4 == 0
    return fits and min(weight.shape[:2]) >= FEWEST_CHANNELS and height * width >= FEWEST_POSITIONS


def add_convolution(
    padded: Tensor, weight: Tensor, outputs: Tensor, workspace: Workspace, filtering: Filtering = SAME
) -> None:
    """Add a 3x3 convolution to `outputs` in place.

    Args:
        padded: (B, h + 2, w + 2, C), the image of h x w positions in a frame of zeros or of its surroundings.
        weight: (D, C, 3, 3), in torch's order.
        outputs: (B, H, W, D) contiguous, H and W multiples of 4: h x w, or twice that with `UPSAMPLED`.
        workspace: memory for intermediate values, under the names `tiles`, `products` and `kernels`.
        filtering: `SAME` or `UPSAMPLED`.
    """
    (batch, height, width, channels), depth = outputs.shape, padded.shape[3]
    rows, columns = height // 4, width // 4  # of tiles
    kernels = filtering.transformed(weight, workspace)
    targets = outputs.view(batch, rows, 4, columns, 4, channels)
    tiles = NUMBERS_PER_CORE * torch.get_num_threads() // (36 * max(channels, depth))
    images = max(1, min(batch, tiles // (rows * columns)))  # at a time, with all their tiles
    some_rows = -(-rows // -(-rows // max(1, min(rows, tiles // columns))))  # at a time: equal parts
    per_image, per_row, per_column, _ = padded.stride()
    for i in range(0, batch, images):
        for r in range(0, rows, some_rows):
            target = targets[i : i + images, r : r + some_rows]  # (b, r, 4, columns, 4, D)
            b, k = target.shape[:2]
            shape = (filtering.size, b, k, padded.shape[2], depth)
            step = filtering.stride * per_row
            start = padded.storage_offset() + i * per_image + r * step
            positions = padded.as_strided(shape, (per_row, per_image, step, per_column, 1), start)
            lines = workspace.take("products", 6, b * k, padded.shape[2], depth)
            filtering.spread(positions, lines.view(6, *shape[1:]))
            a = lines.stride()
            shape = (filtering.size, 6, b * k, columns, depth)
            positions = lines.as_strided(shape, (a[2], a[0], a[1], a[2] * filtering.stride, 1))
            spread = workspace.take("tiles", 6, 6, b * k, columns, depth)
            filtering.spread(positions, spread.transpose(0, 1))
            products = workspace.take("products", 36, b * k * columns, channels)
            torch.bmm(spread.view(36, -1, depth), kernels, out=products)  # 36 x (T, C) (C, D)
            lines = workspace.take("tiles", 4, 6, b * k, columns, channels).zero_()
            filtering.gather(products.view(6, 6, b * k, columns, channels), lines)
            lines = lines.view(4, 6, b, k, columns, channels)
            filtering.gather(lines.transpose(0, 1), target.permute(4, 2, 0, 1, 3, 5))
