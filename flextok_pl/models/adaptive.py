"""As few tokens per image as a wanted quality takes.

`FlexTok.tokenize(images, quality=...)` searches the smallest budget by decoding, or asks a predictor that has learned
from such searches.

Shapes: B batch, N images to learn from, H x W image, K registers, k budget, L FSQ levels, F predictor's features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flextok_pl.precision import full_precision

Distance = Callable[[Tensor, Tensor], Tensor]
"""(B, 3, H, W) images and their reconstructions, in [-1, 1] -> (B,), smaller for better ones."""


def squared_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error of each image on the scale [0, 1]: (B, 3, H, W) twice, in [-1, 1] -> (B,)."""
    return ((images - reconstructions.clamp(-1, 1)) / 2).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Quality:
    """What a reconstruction must reach, and how it is decoded.

    Args:
        target: largest distance allowed.
        distance: between images and reconstructions; `PerceptualDistance(...).each` is another one.
        num_steps: of the decoder.
        guidance: `none`, `cfg` or `apg`.
        guidance_scale: its strength; 1 is none.
        seed: of the noise, which is the same for every image and budget.
        predictor: says budgets without decoding; None searches them.
    """

    target: float
    distance: Distance = squared_error
    num_steps: int = 25
    guidance: str = "none"
    guidance_scale: float = 1.0
    seed: int = 0
    predictor: BudgetPredictor | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.target):
            raise ValueError(f"target={self.target} must be a number, the largest distance allowed")


def smallest_budgets(distance_at: Callable[[Tensor, Tensor], Tensor], target: float, count: int, most: int) -> Tensor:
    """Search by bisection, all images at once.

    Quality mostly, not always, rises with the budget. What is returned has been seen to reach the target, and a budget
    below it, to which the search came, has been seen to fail.

    Args:
        distance_at: (M,) int64 numbers of images and (M,) budgets -> (M,) distances.
        target: largest distance allowed.
        count: B.
        most: K.

    Returns:
        (B,) int64 budgets; K where no budget that was tried reaches the target.
    """
    low, high = torch.ones(count, dtype=torch.int64), torch.full((count,), most)
    while (open_ := (low < high).nonzero().flatten()).numel():
        middle = (low[open_] + high[open_]) // 2
        reached = distance_at(open_, middle).cpu() <= target
        high[open_] = torch.where(reached, middle, high[open_])
        low[open_] = torch.where(reached, low[open_], middle + 1)
    return high


def searched_budgets(
    images: Tensor, tokens: Tensor, latent_size: tuple[int, int], quality: Quality, detokenize: Callable[..., Tensor]
) -> Tensor:
    """The smallest budget at which each image reaches a quality.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        tokens: (B, K) of them.
        latent_size: (h, w) of them.
        quality: what is to be reached.
        detokenize: a tokenizer's.

    Returns:
        (B,) int64 on the CPU; see `smallest_budgets`.
    """

    def distance_at(which: Tensor, budgets: Tensor) -> Tensor:
        which = which.to(tokens.device)
        made = detokenize(
            tokens[which],
            num_tokens=budgets,
            num_steps=quality.num_steps,
            guidance=quality.guidance,
            guidance_scale=quality.guidance_scale,
            generator=[torch.Generator().manual_seed(quality.seed) for _ in range(len(which))],
            latent_size=latent_size,
        )
        with full_precision(images.device):
            return quality.distance(images[which], made)

    return smallest_budgets(distance_at, quality.target, len(tokens), tokens.shape[1])


class BudgetPredictor:
    """Says from an image's codes, without decoding, how many tokens it needs: ridge regression of log2 k.

    It learns for one tokenizer and one `Quality`. From the share `coverage` of images that shall reach the target
    follows a margin, measured on images that the regression has not seen.

    Args:
        weight: (F,), on codes.
        bias: of log2 k, margin included.
        num_registers: K.
    """

    def __init__(self, weight: Tensor, bias: float, num_registers: int) -> None:
        self.weight, self.bias, self.num_registers = weight, bias, num_registers

    @classmethod
    def fit(
        cls, codes: Sequence[Tensor] | Tensor, budgets: Tensor, ridge: float = 1.0, coverage: float = 0.9
    ) -> BudgetPredictor:
        """Learn from images whose smallest budgets are known.

        Args:
            codes: (N, K, L) quantised codes of all tokens, `tok.quantizer.tokens_to_codes(tok.tokenize(images))`.
            budgets: (N,) int64, what `tok.tokenize(images, quality=...)` used.
            ridge: strength of the penalty, relative to the features' mean variance.
            coverage: share of images that shall reach the target.

        Raises:
            ValueError: fewer than 8 images, or another number of budgets.
        """
        codes = codes if isinstance(codes, Tensor) else torch.cat(list(codes))
        if len(codes) < 8 or len(budgets) != len(codes):
            raise ValueError(f"{len(codes)} codes and {len(budgets)} budgets: give at least 8 of each")
        if not 0 < coverage < 1:
            raise ValueError(f"coverage={coverage} must be a share in (0, 1)")
        x, y = codes.flatten(1).cpu().double(), budgets.cpu().double().log2()
        held_out = torch.arange(len(x)) % 4 == 3
        weight, bias = _ridge(x[~held_out], y[~held_out], ridge)
        margin = (y[held_out] - x[held_out] @ weight - bias).quantile(coverage)
        weight, bias = _ridge(x, y, ridge)
        return cls(weight, bias + float(margin), codes.shape[1])

    def __call__(self, codes: Tensor) -> Tensor:
        """(B, K, L) quantised codes -> (B,) int64 budgets."""
        wanted = (codes.flatten(1).cpu().double() @ self.weight + self.bias).exp2()
        return wanted.ceil().clamp(1, self.num_registers).long()


def _ridge(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Weight (F,) and bias of the regression of (N,) y on (N, F) x, by the N x N dual system."""
    mean, centre = x.mean(0), float(y.mean())
    rows = x - mean
    penalty = ridge * float(rows.square().sum()) / len(x)
    dual = torch.linalg.solve(rows @ rows.T + penalty * torch.eye(len(x), dtype=x.dtype), y - centre)
    weight = rows.T @ dual
    return weight, centre - float(mean @ weight)
