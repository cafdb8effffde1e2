"""Decode the same images at many token budgets, several of them in one call of the tokenizer.

B images, K tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flextok_pl.contracts import Reconstructor
from flextok_pl.flow.decoding import Decoding
from flextok_pl.keys import sample_generators
from flextok_pl.metrics.images import to_uint8
from flextok_pl.transfer import send

PIXELS_AT_ONCE = 2**21
"""Pixels of the images that a device decodes at a time by default: 32 images of 256, or 512 images of 64."""


def images_at_once(batch_size: int, image_size: Sequence[int], device: torch.device) -> int:
    """How many images, of [H, W] pixels or of unknown size, to decode in a call for batches of this size.

    A CPU gains nothing from more than a batch. On other devices, small images of one budget are too little work.
    """
    if device.type == "cpu" or not image_size:
        return batch_size
    return max(batch_size, PIXELS_AT_ONCE // (image_size[0] * image_size[1]))


def decode(
    tokenizer: Reconstructor,
    tokens: Tensor,
    budgets: Sequence[int],
    decoding: Decoding,
    keys: Sequence[str],
    seed: int,
    at_once: int | None = None,
    pause: Callable[[], None] = lambda: None,
    image_size: Sequence[int] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Decode tokens (B, K) at each budget, from noise that is a function of (seed, key) only.

    Yields budgets with their images, (B, 3, H, W) uint8. A call of the tokenizer decodes `at_once` images, default B,
    of several budgets if necessary; `pause` is called after each. Images have [H, W] pixels if that is given and the
    tokenizer's configuration gives latents for it, as a `FlexTok`'s does; otherwise the tokenizer's own size.
    """
    latent_size_of: Any = getattr(getattr(tokenizer, "config", None), "latent_size_of", None)
    shape = {} if image_size is None or latent_size_of is None else {"latent_size": latent_size_of(image_size)}
    places = [(budget, i) for budget in budgets for i in range(len(keys))]
    left, waiting = list(budgets), tokens.new_empty(0)
    for start in range(0, len(places), at_once or len(keys)):
        kept, rows = (torch.tensor(each) for each in zip(*places[start : start + (at_once or len(keys))], strict=True))
        noise = sample_generators([keys[i] for i in rows], seed)
        given = tokens[send(rows, tokens.device), : int(kept.max())]
        made = tokenizer.detokenize(given, num_tokens=kept, generator=noise, **shape, **decoding.arguments)
        images = to_uint8(made)
        pause()
        waiting = torch.cat([waiting, images]) if len(waiting) else images
        while left and len(waiting) >= len(keys):
            yield left.pop(0), waiting[: len(keys)]
            waiting = waiting[len(keys) :]
