"""ImageReward (Xu et al., https://arxiv.org/abs/2304.05977): a reward fitted to people's rankings of images.

A text reads the image by cross-attention (BLIP), and a multilayer perceptron maps its first state to the reward. The
authors' package pins old packages, so we load its weights into the BLIP of `transformers`. B pairs.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flextok_pl.backbones.aesthetic import aesthetic_head
from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained
from flextok_pl.precision import as_float64

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
VOCABULARY = "bert-base-uncased"
MAX_LENGTH = 35  # tokens to which a text is padded or cut
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of rewards before normalisation, as published
HEAD_WIDTH = 64  # of attention heads, in both Transformers

VISION_NAMES = {
    r"^cls_token": "embeddings.class_embedding",
    r"^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^blocks\.(\d+)\.": r"encoder.layers.\1.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv": ".self_attn.qkv",
    r"\.attn\.proj": ".self_attn.projection",
    r"^norm\.": "post_layernorm.",
}
"""Renames the published image encoder for `transformers`, in this order; other names are the same."""

UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Prefixes of tensors that do not affect the reward."""


class ImageReward(MeasuringNetwork):
    """Scores images by a text, on the images' device.

    `weights` is a local copy of `ImageReward.pt` from https://huggingface.co/THUDM/ImageReward; None downloads it.
    `tokenizer` is a local folder with the vocabulary of `bert-base-uncased`, or that name on the Hub.
    """

    def __init__(self, weights: Path | str | None = None, tokenizer: Path | str = VOCABULARY) -> None:
        install = "pip install 'flextok_pl[text]'"
        source = Pretrained("verifier", "image_reward", weights, "image_reward_weights")
        with source.loading(f"give {FILE} of https://huggingface.co/{REPOSITORY} as image_reward_weights", install):
            from huggingface_hub import hf_hub_download
            from transformers import CLIPImageProcessor

            network, side = _network(source.state_dict(weights or hf_hub_download(REPOSITORY, FILE)))
            self._prepare: Any = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
        remedy = f"download the vocabulary of {VOCABULARY} on a machine with a network and give its folder"
        with Pretrained("image_reward_tokenizer", str(tokenizer)).loading(remedy, install):
            from transformers import BertTokenizer

            self._tokenizer: Any = BertTokenizer.from_pretrained(tokenizer)
        super().__init__("image_reward", network)

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Reward of each pair: (B, 3, H, W) uint8 and B texts -> (B,) float64, on the images' `summing_device`."""
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_LENGTH, "return_tensors": "pt"}
        words = self._tokenizer(list(texts), **options).to(images.device)
        pixels = self._prepare(list(images.cpu()), return_tensors="pt").to(images.device)
        vision, text, head = (self.network[part] for part in ("vision", "text", "head"))
        with self.to(images.device).measuring():
            seen = vision(**pixels).last_hidden_state
            mask = torch.ones(seen.shape[:2], dtype=torch.int64, device=seen.device)
            states = text(
                input_ids=words["input_ids"],
                attention_mask=words["attention_mask"],
                encoder_hidden_states=seen,
                encoder_attention_mask=mask,
            ).last_hidden_state
            rewards: Tensor = head(states[:, 0])[:, 0]
        return (as_float64(rewards) - MEAN) / STD


def _network(state: Mapping[str, Tensor]) -> tuple[nn.ModuleDict, int]:
    """Build the network in the sizes of its tensors; returns also the side of its images in pixels."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for name, tensor in state.items():
        if not name.startswith(UNUSED):
            part = next((part for part in parts if name.startswith(part)), None)
            if part is None:
                raise ValueError(f"the file holds {name}, which is not a part of ImageReward")
            parts[part][name.removeprefix(part)] = tensor
    vision_state, text_state, head_state = parts.values()
    patches, width = vision_state["pos_embed"].shape[1] - 1, vision_state["cls_token"].shape[-1]
    patch_size = vision_state["patch_embed.proj.weight"].shape[-1]
    side = round(patches**0.5) * patch_size
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vision_state["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_count(vision_state, "blocks."),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=side,
            patch_size=patch_size,
            layer_norm_eps=1e-6,
        )
    )
    words, text_width = text_state["embeddings.word_embeddings.weight"].shape
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=words,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=text_state["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_count(text_state, "encoder.layer."),
            num_attention_heads=text_width // HEAD_WIDTH,
            max_position_embeddings=text_state["embeddings.position_embeddings.weight"].shape[0],
        ),
        add_pooling_layer=False,
    )
    head = aesthetic_head(text_width)
    vision.load_state_dict({_renamed(name): tensor for name, tensor in vision_state.items()})
    text.load_state_dict(text_state)
    head.load_state_dict(head_state)
    return nn.ModuleDict({"vision": vision, "text": text, "head": head}), side


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of layers whose tensors have this prefix."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def _renamed(name: str) -> str:
    for pattern, new in VISION_NAMES.items():
        name = re.sub(pattern, new, name)
    return name
