"""TREAD: in training, some patches skip middle blocks of the decoder (https://arxiv.org/abs/2501.04765).

A random share of an image's patches skips the blocks of a route and rejoins the others behind them, unchanged. The
blocks of the route see fewer patches and cost less; TREAD's authors report that the model also learns faster.
Registers take every block, as TREAD's conditions do. In evaluation all patches take every block. The published code
has one route in DiT-B: half of the patches skip blocks 2 to 8 of 12.

Shapes: B images, N patches, n patches that take every block, D width.
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
    """Settings of a training's route."""

    share: float  # of patches that skip the blocks
    first: int  # first block of the route, counted from 0
    last: int  # last block of the route

    def kept(self, num_patches: int) -> int:
        """N -> n."""
        return num_patches - int(num_patches * self.share)


class Route(NamedTuple):
    """Which patches take the blocks of a route."""

    routing: Routing
    rows: Tensor  # (B n,) int64, their rows among the patches of all images
    packing: Packing | None = None  # of the registers beside n patches; None where there are none

    def covers(self, block: int) -> bool:
        """Check whether a block is on the route."""
        return self.routing.first <= block <= self.routing.last

    def leave(self, x: Positions) -> Positions:
        """(B, N, D) patches -> the (B, n, D) that take the blocks, with the same registers."""
        assert x.patches is not None
        images, _, width = x.patches.shape
        return Positions(take(x.patches.flatten(0, 1), self.rows).view(images, -1, width), x.registers)

    def join(self, x: Positions, before: Positions) -> Positions:
        """(B, n, D) patches after the blocks -> (B, N, D), with the others as `before`."""
        assert x.patches is not None and before.patches is not None
        patches = before.patches.flatten(0, 1).index_copy(0, self.rows, x.patches.flatten(0, 1))
        return Positions(patches.view_as(before.patches), x.registers)


def build_routing(share: float, blocks: tuple[int, int] | None, config: FlexTokConfig, aligned: bool) -> Routing | None:
    """The routing of `route_share` and `route_blocks`, or None for a share of 0; `aligned` is true with REPA.

    Raises:
        ValueError: the blocks are not in the middle of the decoder, or REPA would see only some patches.
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
            f"route_blocks={blocks} has net.repa_layer={layer} on it, where the alignment sees only some patches; set "
            "another route or repa_layer, or route_share to 0"
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
    """Draw which patches take the blocks, equally many of each image, for the images of all ranks.

    Each image's draw is a function of a seed from the generator, like its noise; see `sample_draws`. Without a routing
    nothing is drawn.
    """
    if routing is None:
        return None
    num_patches = config.num_patches(latents.shape[2:])
    seeds = torch.randint(2**62, (len(latents) * world_size,), generator=generator)[rank::world_size]
    order = seeded_normal(send(seeds, latents.device), (num_patches,)).argsort(dim=1)  # (B, N)
    kept = order[:, : routing.kept(num_patches)].sort(dim=1).values  # (B, n)
    starts = torch.arange(len(latents), device=latents.device)[:, None] * num_patches
    return Route(routing, (starts + kept).flatten())
