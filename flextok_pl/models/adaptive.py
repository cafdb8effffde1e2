"""Find the fewest tokens of each image that reach a given quality: `FlexTok.tokenize(images, quality=...)`.

The search is a bisection. All images of a batch are decoded together, each at its own budget, so a search takes about
log2 K batched decodings.

Shapes: B batch, H x W image, K registers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flextok_pl.flow.decoding import UNGUIDED, Decoding, chosen_decoding
from flextok_pl.precision import full_precision

Distance = Callable[[Tensor, Tensor], Tensor]
"""Maps (B, 3, H, W) images and their reconstructions, in [-1, 1], to (B,) distances; smaller is better."""


def squared_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error of each image on the scale [0, 1]: two (B, 3, H, W) in [-1, 1] -> (B,)."""
    return ((images - reconstructions.clamp(-1, 1)) / 2).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Quality:
    """The quality that a reconstruction must reach, and how to decode it.

    Args:
        target: largest distance allowed.
        distance: between images and reconstructions, such as `PerceptualDistance(...).each`.
        num_steps: steps of the decoder; default the model's own, or else 25.
        guidance: `none`, `cfg` or `apg`; default the model's own, or else none.
        guidance_scale: strength of the guidance; 1 turns it off.
        seed: seed of the noise, which is the same for every image and budget.
    """

    target: float
    distance: Distance = squared_error
    num_steps: int | None = None
    guidance: str | None = None
    guidance_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if math.isnan(self.target):
            raise ValueError(f"target={self.target} must be a number, the largest distance allowed")

    def decoding(self, own: object) -> Decoding:
        """The options with which a model of this configuration decodes the candidates."""
        given = {"num_steps": self.num_steps, "guidance": self.guidance, "guidance_scale": self.guidance_scale}
        return chosen_decoding(own, UNGUIDED, **given)


def smallest_budgets(
    images: Tensor,
    tokens: Sequence[Tensor],
    latent_size: tuple[int, int],
    quality: Quality,
    decoding: Decoding,
    detokenize: Callable[..., Tensor],
) -> Tensor:
    """Search all images at once by bisection, from the same noise at every budget: (B,) int64 on the CPU.

    Takes (B, 3, H, W) images in [-1, 1], the (K_i,) tokens of each and the (h, w) of their latents. Quality mostly
    rises with the budget, but not always. A result below K has reached the target, and the search has seen a smaller
    budget fail. The result is also K if no budget that was tried reaches the target.
    """
    low, high = torch.ones(len(tokens), dtype=torch.int64), torch.tensor([len(row) for row in tokens])
    while (open_ := (low < high).nonzero().flatten()).numel():
        middle = (low[open_] + high[open_]) // 2
        which = open_.to(images.device)
        made = detokenize(
            [tokens[i] for i in open_.tolist()],
            num_tokens=middle,
            **decoding.arguments,
            generator=[torch.Generator().manual_seed(quality.seed) for _ in range(len(which))],
            latent_size=latent_size,
        )
        with full_precision(images.device):
            reached = quality.distance(images[which], made).cpu() <= quality.target
        high[open_] = torch.where(reached, middle, high[open_])
        low[open_] = torch.where(reached, low[open_], middle + 1)
    return high
