"""CLIP score (Hessel et al., arXiv 2104.08718): how well an image fits its caption, 100 x the cosine of embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained
from flextok_pl.precision import as_float64


class CLIPScore(MeasuringNetwork):
    """A CLIP model of `transformers`, which moves to where the images are.

    `model` is a local folder, or a name on the Hugging Face hub such as `openai/clip-vit-base-patch16`.
    """

    def __init__(self, model: Path | str) -> None:
        remedy = "download a CLIP model where there is a network and give its folder"
        with Pretrained("clip", str(model)).loading(remedy, "pip install 'flextok_pl[text]'"):
            from transformers import CLIPModel, CLIPProcessor

            network: Any = CLIPModel.from_pretrained(model)
            self.processor: Any = CLIPProcessor.from_pretrained(model)
        super().__init__(str(model), network)

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score of each pair, not clamped at 0.

        (B, 3, H, W) uint8 and B captions -> (B,) float64, on the images' `summing_device`.
        """
        length = self.network.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(captions),
            images=list(images.cpu()),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=length,
        ).to(images.device)
        with self.to(images.device).measuring():
            outputs = self.network(**inputs)
        cosine: Tensor = (outputs.image_embeds * outputs.text_embeds).sum(1)  # the model has normalised both
        return 100 * as_float64(cosine)
