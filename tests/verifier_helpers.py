"""Small networks of random weights, in the files that verifiers read."""

import json

import pytest
import torch

from flextok_pl.backbones.aesthetic import aesthetic_head

transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "apple", "tree", "on", "the", "##s"]


def pictures(count, size=32, seed=0):
    """(B, 3, size, size) uint8 of coarse colours, which networks of random weights tell apart."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def write_clip(folder):
    """A CLIP whose text is single letters, of at most 12 places, and whose images have 16 px."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 54, "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPConfig(
        text_config={**sizes, **text}, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def write_vocabulary(folder):
    """A vocabulary of BERT's kind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def random_tensors(shapes, seed=0):
    """Name -> tensor, by name and seed only; norms are near 1."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in sorted(shapes):
        noise = torch.randn(shapes[name], generator=generator)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        tensors[name] = 1 + 0.1 * noise if is_norm else noise * (0.2 if len(shapes[name]) > 1 else 0.1)
    return tensors


def image_reward_state(width=128, hidden=192, depth=2, patch=16, side=32):
    """A state dict with the published names, of two layers in each Transformer."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (side // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **_affine("norm", width),
    }
    for i in range(depth):
        shapes |= _affine(f"blocks.{i}.norm1", width) | _affine(f"blocks.{i}.norm2", width)
        shapes |= _linear(f"blocks.{i}.attn.qkv", width, 3 * width) | _linear(f"blocks.{i}.attn.proj", width, width)
        shapes |= _linear(f"blocks.{i}.mlp.fc1", width, hidden) | _linear(f"blocks.{i}.mlp.fc2", hidden, width)
    text = {
        "embeddings.word_embeddings.weight": (len(WORDS), width),
        "embeddings.position_embeddings.weight": (40, width),
        **_affine("embeddings.LayerNorm", width),
    }
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                text |= _linear(f"{layer}.{attention}.self.{part}", width, width)
            text |= _linear(f"{layer}.{attention}.output.dense", width, width)
            text |= _affine(f"{layer}.{attention}.output.LayerNorm", width)
        text |= _linear(f"{layer}.intermediate.dense", width, hidden) | _linear(f"{layer}.output.dense", hidden, width)
        text |= _affine(f"{layer}.output.LayerNorm", width)
    head = {name: tuple(tensor.shape) for name, tensor in aesthetic_head(width).state_dict().items()}
    parts = {"blip.visual_encoder": shapes, "blip.text_encoder": text, "mlp": head}
    parts["blip"] = _linear("vision_proj", width, 8) | _linear("text_proj", width, 8)
    state = random_tensors({f"{part}.{name}": shape for part, of in parts.items() for name, shape in of.items()})
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def _linear(name, width, out):
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _affine(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
