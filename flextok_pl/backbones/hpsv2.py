"""Human Preference Score v2 (Wu et al., https://arxiv.org/abs/2306.09341): a CLIP tuned to people's choices.

The authors' package pins old packages, so we load its weights into the `open_clip` model that it was tuned from.
B pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flextok_pl.backbones.clip_score import distinct
from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained
from flextok_pl.precision import as_float64

NETWORK = "ViT-H-14"
REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


class HPSv2(MeasuringNetwork):
    """Scores images by a text, on the images' device.

    `weights` is a local copy of `HPS_v2.1_compressed.pt`, or of version 2.0, from https://huggingface.co/xswu/HPSv2;
    None downloads 2.1.
    """

    def __init__(self, weights: Path | str | None = None) -> None:
        source = Pretrained("verifier", "hpsv2", weights, "hpsv2_weights")
        remedy = f"give hpsv2_weights, the file {FILE} of https://huggingface.co/{REPOSITORY}"
        with source.loading(remedy, "pip install 'flextok_pl[verifiers]'"):
            import open_clip
            from huggingface_hub import hf_hub_download

            state: Any = source.state_dict(weights or hf_hub_download(REPOSITORY, FILE))
            network = open_clip.create_model(NETWORK)
            network.load_state_dict(state.get("state_dict", state))
            self._tokenize: Any = open_clip.get_tokenizer(NETWORK)
            size = network.visual.image_size
            self._prepare: Any = open_clip.image_transform(size, is_train=False, resize_mode="longest")
        super().__init__("hpsv2", network)

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine of each pair: (B, 3, H, W) uint8 and B texts -> (B,) float64, on the images' `summing_device`.

        Images that are not square are padded with black, as published.
        """
        different, places = distinct(texts)
        words = self._tokenize(different).to(images.device)
        pixels = torch.stack([self._prepare(to_pil_image(image)) for image in images.cpu()]).to(images.device)
        with self.to(images.device).measuring():
            seen: Tensor = self.network.encode_image(pixels, normalize=True)
            read: Tensor = self.network.encode_text(words, normalize=True)
        return as_float64((seen * read[places]).sum(1))
