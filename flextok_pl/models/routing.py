"""TREAD: patches that go around middle blocks of the decoder in training (https://arxiv.org/abs/2501.04765).

A random share of an image's patches skips the blocks of a route, and joins the others behind them as it was. The blocks
of the route see fewer patches and cost less, and TREAD's authors report that the model also learns faster. Registers
take no route, as TREAD's conditions take none, and evaluation takes all patches through all blocks. The published code
has one route in DiT-B: half of the patches around the blocks 2 to 8 of 12.

Shapes: B images, N patches, n patches that take the blocks, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flextok_pl.config import FlexTokConfig
from flextok_pl.flow.noise import seeded_normal
from flextok_pl.layers.packing import Packing, Positions, take
from flextok_pl.transfer import send


class Routing(NamedTuple):
    """How a training routes patches."""

    share: float  # of the patches, that skip the blocks
    first: int  # of these blocks, counted from 0
    last: int  # of them

    def kept(self, num_patches: int) -> int:
        """N -> n."""
        return num_patches - int(num_patches * self.share)


class Route(NamedTuple):
    """Which patches take the blocks of a route."""

    routing: Routing
    rows: Tensor  # (B n,) int64, the patches that do, among those of all images
    packing: Packing | None = None  # of the registers beside n patches; None where there are none

    def covers(self, block: int) -> bool:
        """Whether a block is on the route."""
        return self.routing.first <= block <= self.routing.last

    def leave(self, x: Positions) -> Positions:
        """(B, N, D) patches -> the (B, n, D) that take the blocks, beside the same registers."""
        assert x.patches is not None
        images, _, width = x.patches.shape
        return Positions(take(x.patches.flatten(0, 1), self.rows).view(images, -1, width), x.registers)

    def join(self, x: Positions, before: Positions) -> Positions:
        """(B, n, D) patches behind the blocks -> (B, N, D), the others as they were `before`."""
        assert x.patches is not None and before.patches is not None
        patches = before.patches.flatten(0, 1).index_copy(0, self.rows, x.patches.flatten(0, 1))
        return Positions(patches.view_as(before.patches), x.registers)


def build_routing(share: float, blocks: tuple[int, int] | None, config: FlexTokConfig, aligned: bool) -> Routing | None:
    """The routing of `route_share` and `route_blocks`, or None for a share of 0; `aligned` tells if there is REPA.

    Raises:
        ValueError: the blocks are not in the middle of the decoder, or REPA would see only a part of the patches.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"route_share={share} must be a share of the patches in [0, 1)")
    if share == 0.0:
        return None
    depth, layer = config.decoder_depth, config.repa_layer
    if blocks is None or not 0 <= blocks[0] <= blocks[1] < depth - 1:
        raise ValueError(
            f"route_blocks={blocks} with route_share={share} must be the first and the last block that patches skip, "
            f"in 0..{depth - 2} for decoder_depth={depth}: the last block of the decoder takes all patches"
        )
    routing = Routing(share, *blocks)
    if aligned and layer is not None and routing.first <= layer <= routing.last:
        raise ValueError(
            f"route_blocks={blocks} has net.repa_layer={layer} on it, where the alignment would see only a part of the "
            "patches; set another route or repa_layer, or route_share to 0"
        )
    return routing


def sample_route(
    routing: Routing | None,
    config: FlexTokConfig,
    latents: Tensor,  # (B, C, h, w) of this rank
    generator: torch.Generator,  # on the CPU, in the same state on all ranks
    rank: int = 0,
    world_size: int = 1,  # all processes have B images
) -> Route | None:
    """Draw which patches take the blocks, the same number of each image, for the images of all ranks.

    Each image's are a function of a seed that the generator yields, as its noise is; see `sample_draws`. Without a
    routing nothing is drawn.
    """
    if routing is None:
        return None
    num_patches = config.num_patches(latents.shape[2:])
    seeds = torch.randint(2**62, (len(latents) * world_size,), generator=generator)[rank::world_size]
    order = seeded_normal(send(seeds, latents.device), (num_patches,)).argsort(dim=1)  # (B, N)
    kept = order[:, : routing.kept(num_patches)].sort(dim=1).values  # (B, n)
    starts = torch.arange(len(latents), device=latents.device)[:, None] * num_patches
    return Route(routing, (starts + kept).flatten())
