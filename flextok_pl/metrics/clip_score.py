"""CLIP score (Hessel et al., arXiv 2104.08718): how well an image fits its caption, 100 x the cosine of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flextok_pl.contracts import weights_hash
from flextok_pl.precision import full_precision


class CLIPScore:
    """A CLIP model of `transformers`, which moves to where the images are.

    Args:
        model: a local folder, or a name on the Hugging Face hub such as `openai/clip-vit-base-patch16`.

    Raises:
        ValueError: `transformers` is missing, or the model cannot be read.
    """

    def __init__(self, model: Path | str) -> None:
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise ValueError("the CLIP score needs the package transformers; install the extra `text`") from error
        try:
            network: Any = CLIPModel.from_pretrained(model)
            self.processor: Any = CLIPProcessor.from_pretrained(model)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"model={str(model)!r}: no CLIP model and processor can be read ({str(error)[:200]}); download a CLIP "
                "model where there is a network and give its folder"
            ) from error
        self.network = network.eval().requires_grad_(False)
        self.weights_hash = weights_hash(network)

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score of each pair: (B, 3, H, W) uint8 and B captions -> (B,) float64 on the CPU, not clamped at 0."""
        length = self.network.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(captions),
            images=list(images.cpu()),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=length,
        ).to(images.device)
        with torch.no_grad(), full_precision(images.device):
            outputs = self.network.to(images.device)(**inputs)
        cosine: Tensor = (outputs.image_embeds * outputs.text_embeds).sum(1)  # the model has normalised both
        return 100 * cosine.cpu().double()
