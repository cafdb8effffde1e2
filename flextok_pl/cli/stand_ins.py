"""Files of random weights that stand for networks which `--smoke` does not find on a machine.

Each function writes to a folder, and returns the path, or None where nothing would be downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flextok_pl.backbones.extractors import INCEPTION
from flextok_pl.evaluation.options import PROBE

BLOCKS = 2
"""Of large networks."""
CAPTION = "a random picture, number {}"
"""Of samples; the vocabulary of a text encoder has its words."""


def write_timm(folder: Path, name: str) -> Path | None:
    """A network of timm."""
    if name == PROBE or name.startswith("effnet-"):
        return None
    import timm

    file = folder / f"{name}.safetensors"
    save_file(timm.create_model(name, pretrained=False).state_dict(), file)
    return file


def write_inception(folder: Path, name: str) -> Path | None:
    """Inception, as torch-fidelity has it."""
    if name != INCEPTION:
        return None
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):  # type: ignore[misc]
        """It reads a file when it is made, and here takes nothing of it."""

        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Keep what there is."""

    file = folder / "inception.pth"
    torch.save({}, file)
    torch.save(Random(name, ["2048"], feature_extractor_weights_path=str(file)).state_dict(), file)
    return file


def write_perceptual(folder: Path, name: str) -> Path | None:
    """The network of a perceptual distance."""
    return write_lpips(folder, True, "vgg") if name == "lpips" else write_timm(folder, name)


def write_lpips(folder: Path, asked: bool | str, net: str = "alex") -> Path | None:
    """The network under LPIPS."""
    if asked is not True:
        return None
    from torchvision.models import alexnet, vgg

    made = vgg.make_layers(vgg.cfgs["D"]) if net == "vgg" else alexnet().features
    file = folder / f"{net}.pth"
    torch.save({f"features.{name}": weight for name, weight in made.state_dict().items()}, file)
    return file


def write_clip(folder: Path, name: Path | str) -> Path | None:
    """A CLIP with `BLOCKS` blocks on each side, and a vocabulary of letters."""
    if str(name) not in CLIPS:
        return None
    transformers: Any = import_module("transformers")
    folder = folder / "clip"
    folder.mkdir()
    ends, letters = ["<|startoftext|>", "<|endoftext|>"], [chr(ord("a") + i) for i in range(26)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *ends]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    start, end = (words.index(word) for word in ends)
    text, vision, width = CLIPS[str(name)]
    text = text | {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return folder


def write_t5(folder: Path, width: int) -> Path:
    """An encoder of FLAN-T5's kind with `BLOCKS` blocks, and a vocabulary of the words of `CAPTION`."""
    transformers: Any = import_module("transformers")
    folder.mkdir()
    sizes = {"d_model": width, "d_ff": width * 5 // 2, "d_kv": 64, "num_heads": max(1, width // 64)}
    config = transformers.T5Config(**sizes, num_layers=BLOCKS, vocab_size=32128, feed_forward_proj="gated-gelu")
    transformers.T5EncoderModel(config).save_pretrained(folder)
    words = folder / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CAPTION.split()]))
    transformers.BertTokenizerFast(vocab_file=str(words)).save_pretrained(folder)
    return folder


CLIPS: dict[str, tuple[dict[str, int], dict[str, int], int]] = {
    "openai/clip-vit-large-patch14": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": BLOCKS},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": BLOCKS}
        | {"image_size": 224, "patch_size": 14},
        768,
    )
}
"""Name -> sizes of its text network and of its image network, and the width that they share."""

STAND_INS: tuple[tuple[str, str, Callable[[Path, Any], Path | None]], ...] = (
    ("teacher", "teacher_weights", write_timm),
    ("perceptual_network", "perceptual_weights_path", write_perceptual),
    ("extractor", "weights", write_inception),
    ("lpips", "lpips", write_lpips),
    ("classifier", "classifier_weights", write_timm),
    ("clip", "clip", write_clip),
)
"""The option that names a network, the option that gives its weights, and what writes them."""
