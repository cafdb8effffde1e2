"""Measure how well an image fits a text, with CLIP-like models that `transformers` loads.

CLIP score (Hessel et al., https://arxiv.org/abs/2104.08718) and PickScore (Kirstain et al.,
https://arxiv.org/abs/2305.01569). B pairs, D features.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained, transformers_files
from flextok_pl.downloads import Download
from flextok_pl.precision import as_float64

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The model that PickScore was tuned from: PickScore's own repository has no vocabulary."""


class CLIPNetwork(MeasuringNetwork):
    """A CLIP model that moves to the images' device.

    `model` is a local folder or a name on the Hugging Face Hub, given by `option`. `processor` holds the image settings
    and the vocabulary, if they are elsewhere.
    """

    def __init__(self, option: str, model: Path | str, processor: Path | str | None = None) -> None:
        remedy = "download a CLIP model on a machine with a network and give its folder"
        with Pretrained(option, str(model)).loading(remedy, "pip install 'flextok_pl[text]'"):
            from transformers import CLIPModel, CLIPProcessor

            place = os.path.expanduser(model)
            loaded: Any = CLIPModel.from_pretrained(place, output_loading_info=True)
            network, found = loaded
            if found["missing_keys"]:
                raise ValueError(f"it lacks {sorted(found['missing_keys'])[0]}, which would stay random")
            self.processor: Any = CLIPProcessor.from_pretrained(processor or place)
        super().__init__(str(model), network.float())

    def cosines(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine of the embeddings of each pair: (B, 3, H, W) uint8, B texts -> (B,) float32 on the images' device.

        A text longer than the model's limit is cut.
        """
        different, places = distinct(texts)
        length = self.network.config.text_config.max_position_embeddings
        words = self.processor.tokenizer(
            different, return_tensors="pt", padding=True, truncation=True, max_length=length
        ).to(images.device)
        seen = self.embeddings(images)
        with self.measuring():
            read = self.network.text_projection(self.network.text_model(**words).pooler_output)
            cosines: Tensor = (seen * F.normalize(read)[places]).sum(1)
        return cosines

    def embeddings(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32 of length 1, on their device."""
        pixels = self.processor.image_processor(list(images.cpu()), return_tensors="pt").to(images.device)
        with self.to(images.device).measuring():
            return F.normalize(self.network.visual_projection(self.network.vision_model(**pixels).pooler_output))


def clip_downloads(model: Path | str) -> list[Download]:
    """The downloads of a `CLIPNetwork`."""
    return [] if Path(model).expanduser().is_dir() else [transformers_files(str(model))]


def distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Remove repetitions from texts; returns also the place of each text, as candidates of a prompt share one."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return list(places), [places[text] for text in texts]


class CLIPScore(CLIPNetwork):
    """100 x the cosine, not clamped at 0; `model` is for example `openai/clip-vit-base-patch16`."""

    def __init__(self, model: Path | str) -> None:
        super().__init__("clip", model)

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score of each pair: (B, 3, H, W) uint8 and B captions -> (B,) float64, on the images' `summing_device`."""
        return 100 * as_float64(self.cosines(images, captions))


class PickScore(CLIPNetwork):
    """The cosine x the learned temperature of a CLIP that was tuned to people's choices between two images.

    The published folder has no vocabulary; a local copy may hold that of `PICKSCORE_PROCESSOR`.
    """

    def __init__(self, model: Path | str = PICKSCORE) -> None:
        own = any(Path(model).expanduser().glob("*processor_config.json"))
        super().__init__("pickscore", model, None if own else PICKSCORE_PROCESSOR)

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Score of each pair: (B, 3, H, W) uint8 and B texts -> (B,) float64, on the images' `summing_device`."""
        cosines = as_float64(self.cosines(images, texts))
        return as_float64(self.network.logit_scale).exp() * cosines
